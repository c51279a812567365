"""The readout of flat rows, each with its own settings of sampling: the plain twin of the kernels that read and draw."""

from torch import Tensor

from refusion.decoding.forward import Readout, Rows, readout_logits
from refusion.decoding.sampling import Draw

# T = decode rows of a forward, V = vocabulary


def sampled_readout(
    logits: Tensor,
    banned_ids: Tensor,
    given_ids: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    attempts: Tensor,
    num_runner_ups: int = 0,
) -> Readout:
    """Readout [T] of float32 logits [T, V], which are overwritten; everything but `banned_ids` [N] has one value a row.

    top_p None: no row filters.
    """
    draw = Draw(temperature, 1.0 if top_p is None else top_p, seeds, attempts)
    rows = Rows(seeds, attempts.long(), positions.long(), given_ids.long())
    return readout_logits(logits, banned_ids, draw, rows, num_runner_ups)
