"""The numbers of `refusion.decoding.state` and `refusion.model.rows` as kernels may read them."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton.language as tl

from refusion.decoding import state
from refusion.model import rows, segments

PLAN = tl.constexpr(state.PLAN)
VERIFY = tl.constexpr(state.VERIFY)
REMASK = tl.constexpr(state.REMASK)
INFILL = tl.constexpr(state.INFILL)
DONE = tl.constexpr(state.DONE)
OPEN = tl.constexpr(state.OPEN)
CHOSEN = tl.constexpr(state.CHOSEN)
COMMITTED = tl.constexpr(state.COMMITTED)
CLOSED = tl.constexpr(state.CLOSED)
PADDING = tl.constexpr(rows.PADDING)
NO_PARENT = tl.constexpr(segments.NO_PARENT)
TRUNK = tl.constexpr(segments.TRUNK)
AGENDA_VERIFIED = tl.constexpr(3)
"""The agenda of `refusion.decoding.refusion_report`: phase, window, plan, then verified tokens and what is planned."""
