"""Weight-only quantisation: 8-bit weights with one float32 scale per output row; activations keep their dtype.

The scale of a row maps its largest magnitude to the largest code, so zero stays zero and nothing saturates. Which layers are
quantised, and from which file, is the caller's business.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# N = out features, K = in features

Kind = Literal["int8", "float8"]
KINDS: dict[Kind, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "float8": (torch.float8_e4m3fn, 448.0)}
"""Storage and largest code of each kind; int8 leaves -128 unused so that the codes are symmetric."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as `data * scale[:, None]`."""

    data: Tensor  # [N, K] int8 or float8_e4m3fn
    scale: Tensor  # [N] float32

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`, rounded once."""
        return (self.data.float() * self.scale[:, None]).to(dtype)


def quantize(weight: Tensor, kind: Kind) -> QuantizedWeight:
    """Nearest codes of a weight [N, K], symmetric per output row. A row of zeros gets scale 1."""
    dtype, largest = KINDS[kind]
    exact = weight.float()
    peak = exact.abs().amax(dim=1)  # [N]
    scale = torch.where(peak > 0, peak / largest, 1.0)
    codes = (exact / scale[:, None]).clamp(-largest, largest)
    return QuantizedWeight((codes.round() if dtype == torch.int8 else codes).to(dtype), scale)
