"""Variants of plan-and-infill decoding that the ablations measure; nothing serves with them.

They stand on the plain decoder and are not fast. `RecomputingDecoder` answers what concatenated K/V cost in quality, `ScoringDecoder` how
else a plan could choose its slots.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import replace

import torch
from torch import Tensor

from refusion.decoding.decisions import SlotScore, slot_scores
from refusion.decoding.forward import EagerForward, ForwardBatch, ForwardFn, Network, Readout
from refusion.decoding.packing import Placement
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.sampling import Draw
from refusion.decoding.state import INFILL
from refusion.model.cache import KVCache
from refusion.model.segments import Segments

# B = requests, W = slots of a block, K = tokens per slot, T = tokens of a forward


class RecomputingDecoder(ReFusionDecoder):
    """Infilled slots join the cache with K/V that saw their siblings, from one more forward, instead of those of the infill.

    That forward yields neither tokens nor verdicts and is not counted, so that only the texts differ; `num_recomputed` says how often a
    request took it. Without fused plans (`fuse_plan=False`) the next plan sees the new K/V too, which is what the comparison is about.
    """

    num_recomputed: int = 0

    def _commit(self, placement: Placement, is_committed: Tensor) -> None:
        is_infilled = (self.state.phase == INFILL) & is_committed.flatten(1).any(dim=1)  # [B]
        super()._commit(placement, is_committed & ~is_infilled[:, None, None])
        if not bool(is_infilled.any()):  # a host synchronisation: the plain decoder is not fast anyway
            return
        self.num_recomputed += int(is_infilled.sum())
        is_wanted = (is_committed & is_infilled[:, None, None]).flatten(1)  # [B, W * K]
        order = (~is_wanted).to(torch.int8).sort(dim=1, stable=True).indices  # text order, what is wanted first
        is_token = is_wanted.gather(1, order)
        index = placement.window[:, :, None].expand_as(is_committed)
        token_ids = self.state.token_ids.gather(1, index).flatten(1).gather(1, order)
        place = torch.arange(is_committed.shape[2], device=index.device)
        positions = (self.state.prompt_lengths[:, None, None] + index * is_committed.shape[2] + place).flatten(1).gather(1, order)
        nothing = torch.zeros_like(token_ids)
        draw = Draw(0.0, 1.0, self.state.seeds, self.state.num_drafts)
        self.forward(ForwardBatch(token_ids, positions, Segments.causal(is_token), nothing.bool(), nothing, draw), self.cache)
        self.cache.keep(torch.arange(token_ids.shape[1], device=index.device).expand_as(token_ids), is_token)


class ScoringDecoder(ReFusionDecoder):
    """Slots are scored by `slot_scores` over what the forward calls confidence: a probability, with `EntropyForward` a certainty."""

    def __init__(
        self, forward: ForwardFn, slots: SlotSettings, sampling: SamplingParams, *, mask_id: int, eos_ids: Tensor, score: SlotScore
    ) -> None:
        super().__init__(forward, slots, sampling, mask_id=mask_id, eos_ids=eos_ids)
        self.score: SlotScore = score

    def _read(self, batch: ForwardBatch, placement: Placement) -> Readout:
        """The score stands where the decoder looks for it: at the first row of each planned slot."""
        readout = self.forward(batch, self.cache)
        scores = slot_scores(placement.fold("plan", readout.confidence), self.score)  # [B, W]
        first = placement.rows["plan"].view(-1, *placement.shapes["plan"])[:, :, 0]
        # Cells without rows point at rows of others; they keep what is there.
        scores = torch.where(placement.is_planned, scores, readout.confidence.gather(1, first))
        planned = readout.confidence.clone()
        request, slot = placement.is_planned.nonzero(as_tuple=True)
        planned[request, first[request, slot]] = scores[request, slot]
        return replace(readout, confidence=planned)


class EntropyForward:
    """Says exp(-entropy) of a row's distribution where the confidence of its draft stands, in (0, 1] like a probability."""

    def __init__(self, network: Network, banned_ids: Tensor) -> None:
        self._tap = _EntropyTap(network, banned_ids)
        self._forward = EagerForward(self._tap, banned_ids)

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        return self._forward.new_cache(num_requests, capacity)

    def __call__(self, batch: ForwardBatch, cache: KVCache) -> Readout:
        self._tap.entropies.clear()
        readout = self._forward(batch, cache)
        certainty = torch.zeros_like(readout.confidence)
        if self._tap.entropies:
            certainty[batch.is_read] = torch.cat(self._tap.entropies).neg().exp()  # rows were read in this very order
        return replace(readout, confidence=certainty)


class _EntropyTap:
    """A network that takes down the entropy of every row of logits it hands out."""

    def __init__(self, network: Network, banned_ids: Tensor) -> None:
        self.network, self.banned_ids = network, banned_ids
        self.entropies: list[Tensor] = []

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        return self.network.new_cache(num_requests, capacity)

    def forward(self, token_ids: Tensor, positions: Tensor, segments: Segments, cache: KVCache) -> Tensor:
        return self.network.forward(token_ids, positions, segments, cache)

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits = self.network.lm_head(hidden)
        log_probs = logits.float().index_fill(1, self.banned_ids, -torch.inf).log_softmax(dim=1)
        self.entropies.append(-(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=1))  # 0 * log 0 is 0
        return logits
