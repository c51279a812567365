"""The diffusion baselines in plain loops, one request at a time: what `refusion.decoding.diffusion_rounds` computes for many at once.

Masked diffusion (LLaDA, arXiv 2502.09992, algorithm 5 with blocks; Fast-dLLM, arXiv 2505.22618, for threshold and cache): the answer is a
region of masks of fixed length, every token sees every other, and the most confident predictions of a block stay. Block diffusion
(BD3-LM, arXiv 2503.09573): finished blocks are cached, a block sees itself and what is before it. Predictions are unshifted: the mask at
a position predicts the token there.
"""

# torch leaves the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.forward import ForwardBatch, ForwardFn
from refusion.decoding.params import SamplingParams
from refusion.decoding.sampling import Draw, cut_answer
from refusion.model.cache import KVCache
from refusion.model.segments import NO_PARENT, Segments

Predictions = dict[int, tuple[int, float]]
"""Position in the text -> predicted token and its probability."""


@dataclass(slots=True)
class Trace:
    """One answer, and how it came about."""

    token_ids: list[int] = field(default_factory=list)
    """Through the first EOS."""
    num_forwards: int = 0
    """All but those that only prefill the prompt."""
    commits: list[dict[int, int]] = field(default_factory=list)
    """Of each of these forwards: place in the answer -> token."""


def decode(
    forward: ForwardFn,
    prompt_ids: Sequence[int],
    params: DiffusionParams,
    sampling: SamplingParams,
    *,
    mask_id: int,
    eos_ids: Collection[int],
) -> Trace:
    """Answer one prompt; params are resolved."""
    if isinstance(params, MaskedDiffusionParams):
        return _Masked(forward, prompt_ids, params, sampling, mask_id, eos_ids).run()
    return _Blocks(forward, prompt_ids, params, sampling, mask_id, eos_ids).run()


class _Text:
    """Prompt and answer with its masks, and what both decoders do to them."""

    def __init__(
        self,
        forward: ForwardFn,
        prompt_ids: Sequence[int],
        num_answer: int,
        sampling: SamplingParams,
        mask_id: int,
        eos_ids: Collection[int],
    ) -> None:
        self.forward, self.sampling, self.mask_id, self.eos_ids = forward, sampling, mask_id, eos_ids
        self.num_prompt, self.end = len(prompt_ids), len(prompt_ids) + num_answer
        self.text = [*prompt_ids, *[mask_id] * num_answer]
        self.trace = Trace()
        self.num_drafts = 0

    def predict(self, cache: KVCache, positions: Sequence[int], ranks: Sequence[int], read: range) -> Predictions:
        """Forward these positions and read some. A token sees the cache and the new ones of no higher rank."""
        self.num_drafts += len(read) > 0
        rank = torch.tensor([list(ranks)])
        nothing = torch.zeros_like(rank)
        batch = ForwardBatch(
            token_ids=torch.tensor([[self.text[position] for position in positions]]),
            positions=torch.tensor([list(positions)]),
            segments=Segments(nothing, rank, nothing + NO_PARENT, nothing, nothing.bool()),
            is_read=torch.tensor([[position in read for position in positions]]),
            given_ids=nothing,
            draw=Draw(self.sampling.temperature, self.sampling.top_p, torch.tensor([self.sampling.seed]), torch.tensor([self.num_drafts])),
        )
        readout = self.forward(batch, cache)
        tokens, confidence = readout.token_ids[0].tolist(), readout.confidence[0].tolist()
        return {position: (tokens[row], confidence[row]) for row, position in enumerate(positions) if position in read}

    def commit(self, predictions: Predictions, block: range, params: DiffusionParams, steps_left: int) -> None:
        """The most confident predictions for masks of the block become final, the first of equals first."""
        masked = [position for position in block if self.text[position] == self.mask_id]
        best_first = sorted(masked, key=lambda position: -predictions[position][1])
        if params.threshold is None:
            chosen = best_first[: math.ceil(len(masked) / max(steps_left, 1))]
        else:
            threshold = torch.tensor(params.threshold).item()  # compared in float32, like the confidence
            chosen = [position for position in best_first if predictions[position][1] > threshold] or best_first[:1]
        for position in chosen:
            self.text[position] = predictions[position][0]
        self.trace.commits.append({position - self.num_prompt: self.text[position] for position in sorted(chosen)})

    def is_whole(self, block: range) -> bool:
        """Nothing in it is masked."""
        return all(self.text[position] != self.mask_id for position in block)

    def has_ended(self) -> bool:
        """An EOS stands, and everything before it."""
        answer = self.text[self.num_prompt :]
        certain = answer[: answer.index(self.mask_id)] if self.mask_id in answer else answer
        return any(token in self.eos_ids for token in certain)

    def finish(self) -> Trace:
        answer = self.text[self.num_prompt :]
        certain = answer[: answer.index(self.mask_id)] if self.mask_id in answer else answer
        self.trace.token_ids = cut_answer(certain, list(self.eos_ids), self.sampling.max_tokens)
        return self.trace


class _Masked(_Text):
    """Masked diffusion: all positions at once, one block of them after the other."""

    def __init__(
        self,
        forward: ForwardFn,
        prompt_ids: Sequence[int],
        params: MaskedDiffusionParams,
        sampling: SamplingParams,
        mask_id: int,
        eos_ids: Collection[int],
    ) -> None:
        super().__init__(forward, prompt_ids, sampling.max_tokens, sampling, mask_id, eos_ids)
        self.params = params

    def run(self) -> Trace:
        for first in range(self.num_prompt, self.end, self.params.block_size):
            block = range(first, min(first + self.params.block_size, self.end))
            step = 0
            while not self.is_whole(block):
                predictions = self._step(block, is_first=step == 0)
                self.commit(predictions, block, self.params, self.params.steps_per_block - step)
                self.trace.num_forwards += 1
                step += 1
                if self.params.early_stop and self.has_ended():
                    return self.finish()
        return self.finish()

    def _step(self, block: range, *, is_first: bool) -> Predictions:
        """With a cache, the first forward of a block runs and caches everything; later ones run what is not cached."""
        if is_first or self.params.cache == "none":
            self.cache = self.forward.new_cache(1, 2 * self.end)
            positions = range(self.end)
        else:
            positions = range(block.start, self.end) if self.params.cache == "prefix" else block
        predictions = self.predict(self.cache, positions, [0] * len(positions), block)
        if is_first and self.params.cache != "none":
            kept = [p for p in positions if p < block.start or (p >= block.stop and self.params.cache == "dual")]
            self.cache.keep(torch.tensor([kept]), torch.ones(1, len(kept), dtype=torch.bool))
        return predictions


class _Blocks(_Text):
    """Block diffusion: a block over the cache of those before it."""

    def __init__(
        self,
        forward: ForwardFn,
        prompt_ids: Sequence[int],
        params: BlockDiffusionParams,
        sampling: SamplingParams,
        mask_id: int,
        eos_ids: Collection[int],
    ) -> None:
        num_blocks = math.ceil(sampling.max_tokens / params.size)
        super().__init__(forward, prompt_ids, num_blocks * params.size, sampling, mask_id, eos_ids)
        self.params = params
        self.cache = forward.new_cache(1, 2 * self.end)
        self.num_cached = 0

    def run(self) -> Trace:
        for first in range(self.num_prompt, self.end, self.params.size):
            block = range(first, first + self.params.size)
            step = 0
            while not self.is_whole(block):
                predictions = self._step(block)
                self.commit(predictions, block, self.params, self.params.steps_per_block - step)
                self.trace.num_forwards += 1
                step += 1
                if self.has_ended():
                    return self.finish()
        return self.finish()

    def _step(self, block: range) -> Predictions:
        """What stands before the block is cached by the way, or in a forward of its own; one that only prefills does not count."""
        if not self.params.fuse_commit and self.num_cached < block.start:
            if self.num_cached > 0:
                self.trace.num_forwards += 1
                self.trace.commits.append({})
            self._forward(range(self.num_cached, block.start), block)
        return self._forward(range(self.num_cached, block.stop), block)

    def _forward(self, positions: range, block: range) -> Predictions:
        read = block if positions.stop > block.start else range(0)
        predictions = self.predict(self.cache, positions, [self._block_of(position) for position in positions], read)
        num_kept = min(positions.stop, block.start) - positions.start
        if num_kept > 0:
            self.cache.keep(torch.arange(num_kept)[None], torch.ones(1, num_kept, dtype=torch.bool))
            self.num_cached += num_kept
        return predictions

    def _block_of(self, position: int) -> int:
        """Prompt and answer are cut into blocks of their own, as in training (`refusion.training.layouts.block_diffusion_row`)."""
        size = self.params.size
        if position < self.num_prompt:
            return position // size
        return -(-self.num_prompt // size) + (position - self.num_prompt) // size
