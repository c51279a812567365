"""How probable a masked or block diffusion model holds a continuation: Monte-Carlo lower bounds over the rows of their training layouts.

Masked diffusion (LLaDA, arXiv 2502.09992, equation 6): with m of L answer tokens masked, m uniform on 1..L and the set random,

    log p(x) >= E_m E_masked [ L/m * sum over masked tokens of log p(token | all others) ],

every token seeing every other. Block diffusion (BD3-LM, arXiv 2503.09573, equation 8) is the same inside each block, given the blocks
before it: one sample draws a set for every block and scores them in one row, clean blocks | noisy blocks. A token alone is exact.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams
from refusion.evaluation.likelihood import Likelihood, Pair
from refusion.evaluation.scoring import ScoreRow, Sight, TokenScores, score_rows
from refusion.model.transformer import Transformer
from refusion.slots import IntArray, cut_slots, row_generator

Sample = tuple[ScoreRow, list[float]]
"""A row, and what each of its targets weighs."""


def diffusion_bounds(
    model: Transformer,
    pairs: Sequence[Pair],
    mask_token_id: int,
    params: DiffusionParams,
    *,
    num_samples: int,
    seed: int,
    batch_size: int = 8,
) -> list[Likelihood]:
    """The bound of every pair, its samples batched together; noise is keyed by seed and tokens. params: resolved."""
    samples = [diffusion_samples(pair, mask_token_id, params, num_samples, seed) for pair in pairs]
    scores = iter(score_rows(model, [row for drawn in samples for row, _ in drawn], batch_size))
    return [
        _bound([(weights, next(scores)) for _, weights in drawn], is_exact=_largest_block(pair, params) == 1)
        for pair, drawn in zip(pairs, samples, strict=True)
    ]


def diffusion_samples(pair: Pair, mask_token_id: int, params: DiffusionParams, num_samples: int, seed: int) -> list[Sample]:
    """Rows with some tokens masked; their number is spread evenly over what a block may have, from a random start for each block."""
    context, answer = pair
    is_block = isinstance(params, BlockDiffusionParams)
    borders = cut_slots(len(answer), params.size if is_block else len(answer))
    lay_out = partial(_block_row, borders=borders) if is_block else _whole_row
    key = zlib.crc32(np.asarray([len(context), *context, *answer], dtype=np.int64).tobytes())
    generator = row_generator(seed, 0, key)
    starts = generator.random(len(borders) - 1)
    samples: list[Sample] = []
    for index in range(1 if _largest_block(pair, params) == 1 else num_samples):
        masked, weights = _masked_sets(borders, (starts + index / num_samples) % 1.0, generator)
        samples.append((lay_out(context, answer, masked, mask_token_id), weights))
    return samples


def _masked_sets(borders: IntArray, times: np.ndarray, generator: np.random.Generator) -> tuple[IntArray, list[float]]:
    """Masked answer tokens of all blocks, ascending, and the weight of each: size of its block over number of masks there."""
    masked, weights = [], []
    for first, end, time in zip(borders[:-1], borders[1:], times, strict=True):
        size = int(end - first)
        count = 1 + int(time * size)
        masked.append(first + np.sort(generator.permutation(size)[:count]))
        weights += [size / count] * count
    return np.concatenate(masked), weights


def _whole_row(context: Sequence[int], answer: Sequence[int], masked: IntArray, mask_token_id: int) -> ScoreRow:
    """Context and noisy answer in text order, everything seeing everything: `refusion.training.layouts.masked_diffusion_row`."""
    noisy = _noisy(answer, masked, mask_token_id)
    length = len(context) + len(answer)
    nothing = [0] * length
    indices = (len(context) + masked).tolist()
    return ScoreRow([*context, *noisy], range(length), indices, [answer[i] for i in masked], Sight(nothing, nothing, nothing))


def _block_row(context: Sequence[int], answer: Sequence[int], masked: IntArray, mask_token_id: int, borders: IntArray) -> ScoreRow:
    """Context, clean blocks but the last, noisy blocks: `refusion.training.layouts.block_diffusion_row`."""
    num_prompt, num_clean, size = len(context), int(borders[-2]), int(borders[1])
    before = -(-num_prompt // size)  # blocks of the prompt
    block_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
    ranks = [*(place // size for place in range(num_prompt)), *(before + block_of[:num_clean]).tolist(), *[0] * len(answer)]
    positions = [*range(num_prompt + num_clean), *range(num_prompt, num_prompt + len(answer))]
    clean = [0] * (num_prompt + num_clean)
    return ScoreRow(
        [*context, *answer[:num_clean], *_noisy(answer, masked, mask_token_id)],
        positions,
        (num_prompt + num_clean + masked).tolist(),
        [answer[i] for i in masked],
        Sight([*clean, *(1 + block_of).tolist()], ranks, [*clean, *(before + block_of).tolist()]),
    )


def _noisy(answer: Sequence[int], masked: IntArray, mask_token_id: int) -> list[int]:
    hidden = set(masked.tolist())
    return [mask_token_id if place in hidden else token for place, token in enumerate(answer)]


def _largest_block(pair: Pair, params: DiffusionParams) -> int:
    return min(len(pair[1]), params.size) if isinstance(params, BlockDiffusionParams) else len(pair[1])


def _bound(samples: list[tuple[list[float], TokenScores]], *, is_exact: bool) -> Likelihood:
    values = np.array([math.fsum(w * p for w, p in zip(weights, score.log_probs, strict=True)) for weights, score in samples])
    # The number of masks is spread evenly, which only makes the true error smaller than this one.
    spread = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Likelihood(float(values.mean()), 0.0 if is_exact else spread, all(all(score.is_argmax) for _, score in samples))
