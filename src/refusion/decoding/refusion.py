"""Plan-and-infill decoding of a batch of requests, each in its own phase (ReFusion, arXiv 2512.13586, section 4).

One `step` is one forward for every request that is not done. Two-pass decoding is the same code with `fuse_plan=False` and
`max_candidates=0`; the fused default gives the same tokens in fewer forwards.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from torch import Tensor

from refusion.decoding.forward import ForwardBatch, ForwardFn, Readout
from refusion.decoding.layout import build_grids
from refusion.decoding.packing import Placement, pack_padded
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.sampling import Draw, cut_answer
from refusion.decoding.settling.settle import settle_forward
from refusion.decoding.settling.step_report import StepReport
from refusion.decoding.state import COMMITTED, DONE, DecodeState
from refusion.model.cache import KVCache

# B = requests, S = slots, W = slots of a block, K = tokens per slot, T = tokens of a forward


class ReFusionDecoder:
    """Decodes a batch that starts together. Requests that finish early take no more rows; `compact` frees their memory."""

    def __init__(self, forward: ForwardFn, slots: SlotSettings, sampling: SamplingParams, *, mask_id: int, eos_ids: Tensor) -> None:
        assert not slots.sliding, "slots that slide are decoded by `decode_sliding`"
        self.forward, self.slots, self.sampling = forward, slots, sampling
        self.mask_id, self.eos_ids = mask_id, eos_ids
        self.width = min(slots.slots_per_block(sampling.max_tokens), slots.num_slots(sampling.max_tokens))

    def start(self, prompts: Tensor, prompt_lengths: Tensor, seeds: Tensor) -> None:
        """Begin with right-padded prompts [B, P]; the first `step` prefills and plans in one forward."""
        num_slots = self.slots.num_slots(self.sampling.max_tokens)
        self.state = DecodeState.start(prompt_lengths, seeds, num_slots, self.width, self.slots.slot_size, self.slots.alternatives)
        answer = num_slots * self.slots.slot_size
        scratch = 4 * self.width * self.slots.slot_size  # the cache grows should a fused forward need more
        self.cache: KVCache = self.forward.new_cache(len(prompts), prompts.shape[1] + answer + scratch)
        self.prompts: Tensor | None = prompts

    @property
    def is_done(self) -> Tensor:
        """[B] bool: nothing left to write."""
        return self.state.phase == DONE

    @property
    def num_forwards(self) -> Tensor:
        """[B] forwards each request took part in."""
        return self.state.num_forwards

    def answer(self, row: int) -> list[int]:
        """Final tokens of one request from the start of the answer on: up to the first gap, the first EOS or max_tokens."""
        status: list[int] = self.state.status[row].tolist()
        lengths: list[int] = self.state.lengths[row].tolist()
        token_ids: list[list[int]] = self.state.token_ids[row].tolist()
        answer: list[int] = []
        for slot, (state, length) in enumerate(zip(status, lengths, strict=True)):
            if state != COMMITTED:
                break
            answer += token_ids[slot][:length]
            if length < self.slots.slot_size:
                break  # a slot is cut short by an EOS only
        return cut_answer(answer, self.eos_ids.tolist(), self.sampling.max_tokens)

    def compact(self, requests: Tensor) -> None:
        """Go on with these requests [R] (indices) only."""
        self.state = self.state.select(requests)
        self.cache.select(requests)

    @torch.no_grad()
    def step(self) -> StepReport:
        """One forward for every unfinished request."""
        num_candidates = self.slots.candidates()
        grids = build_grids(self.state, self.slots, self.width, num_candidates, self.mask_id, self.prompts)
        draw = Draw(self.sampling.temperature, self.sampling.top_p, self.state.seeds, self.state.num_drafts + 1)
        batch, placement = pack_padded(grids, draw, self.slots.alternatives)
        readout = self._read(batch, placement)
        first_ids = self._first_ids(placement, readout)
        self._commit_prompts(placement)
        settled = settle_forward(self.state, self.slots, num_candidates, self.mask_id, self.eos_ids, placement, readout, first_ids)
        self._commit(placement, settled.report.is_committed)
        self.state = settled.state
        return settled.report

    def _read(self, batch: ForwardBatch, placement: Placement) -> Readout:
        """What the network says; `refusion.decoding.variants` has one that scores slots in other ways."""
        return self.forward(batch, self.cache)

    def _first_ids(self, placement: Placement, readout: Readout) -> Tensor | None:
        """[B] what the last rows of the prompts say, in the forward that runs them."""
        if self.prompts is None or not self.slots.names_first:
            return None
        return placement.fold("prompt", readout.token_ids).gather(1, self.state.prompt_lengths[:, None] - 1)[:, 0]

    def _commit_prompts(self, placement: Placement) -> None:
        """The first forward's prompt rows join the cache; its masks do not."""
        if self.prompts is not None:
            is_token = torch.arange(self.prompts.shape[1], device=self.prompts.device) < self.state.prompt_lengths[:, None]
            self.cache.keep(placement.rows["prompt"], is_token)
            self.prompts = None

    def _commit(self, placement: Placement, is_committed: Tensor) -> None:
        """Rows of accepted drafts join the cache in text order, with the K/V of this very forward."""
        is_kept = is_committed.flatten(1)
        kept_first = (~is_kept).to(torch.int8).sort(dim=1, stable=True).indices
        self.cache.keep(placement.rows["drafts"].gather(1, kept_first), is_kept.gather(1, kept_first))
