"""What one forward of plan-and-infill decoding decides: readout to next state and report, for padded and flat rows alike.

Tensor functions of fixed shape without a look at the data, so that they can be captured in a CUDA graph;
`refusion.decoding.kernels.settle` does the same in one launch.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refusion.decoding.decisions import InfillVerdict, Verdict, choose_slots, infill_prefix, passing, verify_prefix
from refusion.decoding.forward import Readout
from refusion.decoding.packing import Placement
from refusion.decoding.params import SlotSettings
from refusion.decoding.state import CHOSEN, CLOSED, COMMITTED, DONE, INFILL, OPEN, PLAN, REMASK, VERIFY, DecodeState

# B = requests, S = slots, W = slots of a block, K = tokens per slot, T = tokens of a forward


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one forward did, for events and statistics; window-shaped tensors [B, W] and [B, W, K]."""

    phase: Tensor  # [B] what the forward was
    window: Tensor  # [B, W]
    drafts: Tensor  # [B, W, K] what was verified
    is_chosen: Tensor  # [B, W] slots that were verified or infilled
    num_accepted: Tensor  # [B, W] tokens of them that stand now
    is_committed: Tensor  # [B, W, K]
    plan_slots: Tensor  # [B, W]
    is_planned: Tensor  # [B, W] slots planned by this forward (speculative plans that hold included)
    plan_scores: Tensor  # [B, W]
    num_rows: Tensor  # [B] tokens the forward ran


@dataclass(frozen=True, slots=True)
class Settled:
    """The next state and what happened."""

    state: DecodeState
    report: StepReport


def settle_forward(
    state: DecodeState, slots: SlotSettings, num_candidates: int, eos_ids: Tensor, placement: Placement, readout: Readout
) -> Settled:
    """Judge one forward of every request. eos_ids [E] end an answer."""
    return _Settling(state, slots, num_candidates, eos_ids, placement, readout).run()


class _Settling:
    """Turns the readout of one forward into the next state. Every request is judged by every rule; its phase picks which one counts."""

    def __init__(
        self, state: DecodeState, slots: SlotSettings, num_candidates: int, eos_ids: Tensor, placement: Placement, readout: Readout
    ) -> None:
        self.state, self.slots, self.num_candidates = state, slots, num_candidates
        self.placement, self.readout = placement, readout
        self.phase = self.state.phase[:, None]  # [B, 1]
        self.is_chosen = self.state.status.gather(1, placement.window) == CHOSEN
        self.drafts = _slots_of(self.state.token_ids, placement.window)
        self.num_verified = torch.where(self.is_chosen, self.state.lengths.gather(1, placement.window), 0)
        self.is_eos = (self.drafts[..., None] == eos_ids).any(dim=3)

    def run(self) -> Settled:
        passes = self._passes()
        chain = verify_prefix(passes, self.is_chosen, self.is_eos)
        infill = infill_prefix(passes, self.is_chosen, self.is_eos)
        goes_infill = torch.where(self.phase == VERIFY, chain.needs_infill[:, None], self.phase == INFILL)[:, 0]  # [B]
        is_infilled = (self.phase[:, 0] == INFILL) & (infill.is_complete == (self.is_chosen & ~infill.is_dropped)).all(dim=1)
        is_committed = self._committed(chain, infill, is_infilled)
        keeps_infilling = goes_infill & ~is_infilled
        is_whole = is_committed.any(dim=2).any(dim=1) & ~self._ends(is_committed).any(dim=1)
        plan_holds = self.phase[:, 0] == PLAN
        if self.slots.fuse_plan:
            fused = ((self.phase[:, 0] == VERIFY) & chain.is_full) | (is_infilled & is_whole)
            plan_holds = plan_holds | fused
        token_ids, lengths, is_covered = self._next_drafts(infill, keeps_infilling)
        status = self._next_status(is_committed, infill, keeps_infilling)
        state = replace(self.state, token_ids=token_ids, lengths=self._next_lengths(lengths, is_committed, keeps_infilling), status=status)
        state, plan_holds = self._apply_plan(state, plan_holds)
        state = self._next_phase(state, plan_holds, keeps_infilling, is_covered)
        return Settled(state, self._report(infill, is_committed, plan_holds, keeps_infilling | is_infilled))

    def _passes(self) -> Tensor:
        """[B, W, K]: token j is judged by row j - 1 of its slot."""
        probability = self.placement.fold("drafts", self.readout.given_probability).roll(1, dims=2)
        is_argmax = self.placement.fold("drafts", self.readout.given_is_argmax).roll(1, dims=2)
        accept_argmax = self.slots.acceptance == "argmax"
        return passing(probability, is_argmax, self.num_verified, threshold=self.slots.token_threshold, accept_argmax=accept_argmax)

    def _committed(self, chain: Verdict, infill: InfillVerdict, is_infilled: Tensor) -> Tensor:
        """[B, W, K] tokens this forward makes final."""
        by_chain = chain.is_committed & (self.phase == VERIFY)[:, :, None]
        return by_chain | (infill.is_accepted & is_infilled[:, None, None])

    def _ends(self, is_committed: Tensor) -> Tensor:
        """[B, W] bool: slots in which an EOS is committed now."""
        return (is_committed & self.is_eos).any(dim=2)

    def _next_drafts(self, infill: InfillVerdict, keeps_infilling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts of unfinished slots for the next infill turn: from the fused group of the accepted length, or from a remask forward.

        Returns token_ids [B, S, K], verified lengths [B, W] and whether every unfinished slot's length was prepared for [B].
        """
        step = (infill.lengths - self.num_verified).clamp(0, self.num_candidates)  # [B, W] candidate index
        groups = self.placement.fold("groups", self.readout.token_ids)  # [B, W, A, K]
        index = step[:, :, None, None].expand(-1, -1, 1, groups.shape[3])
        proposed = groups.gather(2, index)[:, :, 0]  # [B, W, K]
        is_unfinished = self.is_chosen & ~infill.is_complete & ~infill.is_dropped
        is_prepared = infill.lengths - self.num_verified <= self.num_candidates
        is_covered = (is_prepared | ~is_unfinished).all(dim=1)
        is_remask = self.phase == REMASK
        lengths = torch.where(is_remask, self.num_verified, infill.lengths)
        proposed = torch.where(is_remask[:, :, None], groups[:, :, 0], proposed)
        place = torch.arange(proposed.shape[2], device=proposed.device)
        takes = (keeps_infilling & is_covered)[:, None] & is_unfinished
        takes = takes | (is_remask & self.is_chosen)
        is_new = takes[:, :, None] & (place >= lengths[:, :, None])
        drafts = torch.where(is_new, proposed, self.drafts)
        if self.slots.correction == "autoregressive":
            # The row that rejected token a of a slot predicts a better one; it replaces the mask's, also through a remask forward.
            judged = self.placement.fold("drafts", self.readout.token_ids).roll(1, dims=2)  # [B, W, K]
            is_first = (keeps_infilling[:, None] & is_unfinished)[:, :, None] & (place == lengths[:, :, None])
            is_kept = (is_remask & self.is_chosen)[:, :, None] & (place == lengths[:, :, None])
            drafts = torch.where(is_first, judged, torch.where(is_kept, self.drafts, drafts))
        return _with_slots(self.state.token_ids, self.placement.window, drafts), lengths, is_covered

    def _next_lengths(self, verified: Tensor, is_committed: Tensor, keeps_infilling: Tensor) -> Tensor:
        """[B, S]: committed lengths, verified lengths of slots in infill, 0 for the rest of the window."""
        now = is_committed.sum(dim=2)
        in_infill = (keeps_infilling | (self.phase[:, 0] == REMASK))[:, None] & self.is_chosen
        before = self.state.lengths.gather(1, self.placement.window)
        is_final = self.state.status.gather(1, self.placement.window) == COMMITTED
        window = torch.where(is_final, before, torch.where(in_infill, verified, now))
        return self.state.lengths.scatter(1, self.placement.window, window)

    def _next_status(self, is_committed: Tensor, infill: InfillVerdict, keeps_infilling: Tensor) -> Tensor:
        """[B, S]: committed slots, slots closed behind an EOS, chosen slots that are masks again."""
        window = self.placement.window
        status = self.state.status.gather(1, window)
        stays = (keeps_infilling | (self.phase[:, 0] == REMASK))[:, None]
        status = torch.where(self.is_chosen & ~stays, OPEN, status)
        status = torch.where(is_committed.any(dim=2), COMMITTED, status)
        status = self.state.status.scatter(1, window, status)
        ends = self._ends(is_committed) | (infill.has_eos & keeps_infilling[:, None])
        last = torch.where(ends, window, status.shape[1]).min(dim=1, keepdim=True).values  # the slot the answer ends in
        is_behind = torch.arange(status.shape[1], device=status.device) > last
        return torch.where(is_behind & ((status == OPEN) | (status == CHOSEN)), CLOSED, status)

    def _apply_plan(self, state: DecodeState, plan_holds: Tensor) -> tuple[DecodeState, Tensor]:
        """Draft and choose slots from the plan rows where the plan holds and had anything to plan."""
        slots, is_planned = self.placement.plan_slots, self.placement.is_planned
        plan_holds = plan_holds & is_planned.any(dim=1)
        is_planned = is_planned & plan_holds[:, None]
        drafts = self.placement.fold("plan", self.readout.token_ids)
        scores = self.placement.fold("plan", self.readout.confidence)[:, :, 0]
        is_chosen = choose_slots(scores, is_planned, self.slots.slot_threshold)
        keep = _slots_of(state.token_ids, slots)
        token_ids = _with_slots(state.token_ids, slots, torch.where(is_planned[:, :, None], drafts, keep))
        status = state.status.scatter(1, slots, torch.where(is_chosen, CHOSEN, state.status.gather(1, slots)))
        lengths = state.lengths.scatter(1, slots, torch.where(is_chosen, 0, state.lengths.gather(1, slots)))
        return replace(state, token_ids=token_ids, status=status, lengths=lengths), plan_holds

    def _next_phase(self, state: DecodeState, plan_holds: Tensor, keeps_infilling: Tensor, is_covered: Tensor) -> DecodeState:
        was = self.state.phase
        has_work = ((state.status == OPEN) | (state.status == CHOSEN)).any(dim=1)
        infilling = torch.where(is_covered, INFILL, REMASK)
        phase = torch.where(keeps_infilling, infilling, PLAN)
        phase = torch.where(was == REMASK, INFILL, phase)
        phase = torch.where(plan_holds, VERIFY, phase)
        phase = torch.where(has_work, phase, DONE)
        has_drafted = plan_holds | (was == REMASK) | (keeps_infilling & is_covered)
        return replace(
            state,
            phase=torch.where(was == DONE, DONE, phase),
            num_drafts=state.num_drafts + (has_drafted & (was != DONE)),
            num_forwards=state.num_forwards + (was != DONE),
        )

    def _report(self, infill: InfillVerdict, is_committed: Tensor, plan_holds: Tensor, is_infill: Tensor) -> StepReport:
        is_judged = self.is_chosen & ((self.phase == VERIFY) | (self.phase == INFILL))
        accepted = torch.where(is_infill[:, None], infill.lengths, is_committed.sum(dim=2))
        return StepReport(
            phase=self.state.phase,
            window=self.placement.window,
            drafts=self.drafts,
            is_chosen=is_judged,
            num_accepted=torch.where(is_judged, accepted, 0),
            is_committed=is_committed,
            plan_slots=self.placement.plan_slots,
            is_planned=self.placement.is_planned & plan_holds[:, None],
            plan_scores=self.placement.fold("plan", self.readout.confidence)[:, :, 0],
            num_rows=self.placement.num_rows,
        )


def _slots_of(token_ids: Tensor, slots: Tensor) -> Tensor:
    """token_ids [B, S, K] of slots [B, W]."""
    return token_ids.gather(1, slots[:, :, None].expand(-1, -1, token_ids.shape[2]))


def _with_slots(token_ids: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """token_ids [B, S, K] with slots [B, W] replaced by values [B, W, K]."""
    return token_ids.scatter(1, slots[:, :, None].expand_as(values), values)
