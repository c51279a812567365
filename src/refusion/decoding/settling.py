"""What one forward of plan-and-infill decoding decides: readout to next state and report, for padded and flat rows alike.

Tensor functions of fixed shape without a look at the data, so that they can be captured in a CUDA graph;
`refusion.decoding.kernels.settle` does the same in one launch.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refusion.decoding.decisions import InfillVerdict, Verdict, choose_slots, infill_prefix, passing, verify_prefix
from refusion.decoding.forward import Readout
from refusion.decoding.packing import Placement
from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.state import CHOSEN, CLOSED, COMMITTED, DONE, INFILL, OPEN, PLAN, REMASK, VERIFY, DecodeState

# B = requests, S = slots, W = slots of a block, K = tokens per slot, T = tokens of a forward
# C = candidate lengths, A = those with alternatives, R = alternatives


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


@dataclass(slots=True)
class _Drafts:
    """What the slots of the window are tried with next."""

    token_ids: Tensor  # [B, W, K]
    runner_ups: Tensor  # [B, W, K, R]
    lengths: Tensor  # [B, W] tokens that stand
    is_covered: Tensor  # [B] every unfinished slot's length was prepared for


def settle_forward(
    state: DecodeState, slots: SlotSettings, num_candidates: int, mask_id: int, eos_ids: Tensor, placement: Placement, readout: Readout
) -> Settled:
    """Judge one forward of every request. eos_ids [E] end an answer."""
    return _Settling(state, slots, num_candidates, mask_id, eos_ids, placement, readout).run()


class _Settling:
    """Turns the readout of one forward into the next state. Every request is judged by every rule; its phase picks which one counts."""

    def __init__(
        self,
        state: DecodeState,
        slots: SlotSettings,
        num_candidates: int,
        mask_id: int,
        eos_ids: Tensor,
        placement: Placement,
        readout: Readout,
    ) -> None:
        self.state, self.slots, self.num_candidates, self.mask_id = state, slots, num_candidates, mask_id
        self.placement, self.readout = placement, readout
        self.phase = self.state.phase[:, None]  # [B, 1]
        self.is_chosen = self.state.status.gather(1, placement.window) == CHOSEN
        self.drafts = _slots_of(self.state.token_ids, placement.window)
        self.num_verified = torch.where(self.is_chosen, self.state.lengths.gather(1, placement.window), 0)
        self.eos_ids, self.is_eos = eos_ids, (self.drafts[..., None] == eos_ids).any(dim=3)
        self.num_alternatives = slots.alternatives
        self.runner_ups = _slots_of(self.state.runner_ups, placement.window)  # [B, W, K, R]
        self.place = torch.arange(slots.slot_size, device=self.drafts.device)

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
        drafts, window = self._next_drafts(infill, keeps_infilling), self.placement.window
        state = replace(
            self.state,
            token_ids=_with_slots(self.state.token_ids, window, drafts.token_ids),
            runner_ups=_with_slots(self.state.runner_ups, window, drafts.runner_ups),
            lengths=self._next_lengths(drafts.lengths, is_committed, keeps_infilling),
            status=self._next_status(is_committed, infill, keeps_infilling),
        )
        if self.slots.correction == "autoregressive":
            state = self._name_firsts(state, is_committed)
        state, plan_holds = self._apply_plan(state, plan_holds)
        state = self._next_phase(state, plan_holds, keeps_infilling, drafts.is_covered)
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

    def _next_drafts(self, infill: InfillVerdict, keeps_infilling: Tensor) -> "_Drafts":
        """Drafts of unfinished slots for the next infill turn: from the fused group of the accepted length, or from a remask forward."""
        is_remask = self.phase == REMASK
        lengths = torch.where(is_remask, self.num_verified, infill.lengths)
        step = lengths - self.num_verified  # [B, W]
        is_unfinished = self.is_chosen & ~infill.is_complete & ~infill.is_dropped
        is_covered = ((step <= self.num_candidates) | ~is_unfinished).all(dim=1)
        goes_on = keeps_infilling[:, None] & is_unfinished
        takes = (goes_on & is_covered[:, None]) | (is_remask & self.is_chosen)
        group = step.clamp(0, self.num_candidates)  # a remask forward has group 0 alone
        drafts = _Drafts(self.drafts, self.runner_ups, lengths, is_covered)
        runner_ups = [self._of_group(each, group) for each in self.readout.runner_ups.unbind(-1)]
        self._redraft(drafts, takes, lengths, self._of_group(self.readout.token_ids, group), runner_ups)
        if self.slots.correction == "autoregressive":
            self._correct(drafts, goes_on)
        if self.num_alternatives:
            self._try_alternatives(drafts, goes_on, step)
        return drafts

    def _redraft(self, drafts: "_Drafts", which: Tensor, first: Tensor, proposed: Tensor, runner_ups: list[Tensor]) -> None:
        """New drafts from place `first` [B, W] on for the slots `which` [B, W]: as many as a group has masks, and masks behind them."""
        is_new = which[:, :, None] & (self.place >= first[:, :, None])
        is_drafted = self.place < first[:, :, None] + self.slots.most_masks
        # A mask in the place of a draft never passes: it is banned, so its probability is 0.
        drafts.token_ids = torch.where(is_new, torch.where(is_drafted, proposed, self.mask_id), drafts.token_ids)
        if runner_ups:
            found = torch.where(is_drafted[..., None], torch.stack(runner_ups, dim=-1), -1)
            drafts.runner_ups = torch.where(is_new[..., None], found, drafts.runner_ups)

    def _of_group(self, values: Tensor, group: Tensor) -> Tensor:
        """[B, W, K] what the masks of one group [B, W] of every slot say."""
        groups = self.placement.fold("groups", values)  # [B, W, C + 1, K]
        return groups.gather(2, group[:, :, None, None].expand(-1, -1, 1, groups.shape[3]))[:, :, 0]

    def _correct(self, drafts: "_Drafts", goes_on: Tensor) -> None:
        """The row that rejected token a of a slot predicts a better one; it replaces the mask's, also through a remask forward."""
        judged = self.placement.fold("drafts", self.readout.token_ids).roll(1, dims=2)  # [B, W, K]
        is_first = self.place == drafts.lengths[:, :, None]
        is_remask = ((self.phase == REMASK) & self.is_chosen)[:, :, None]
        kept = self.drafts
        if self.num_alternatives:
            # What stands through a runner-up that was not tried ahead has its next token from this remask forward.
            last = (drafts.lengths - 1).clamp(min=0)
            is_ahead = (_at(self.runner_ups, last) == _at(self.drafts, last)[..., None]).any(dim=2) & (drafts.lengths > 0)
            kept = torch.where(is_ahead[:, :, None], judged, kept)
            drafts.runner_ups = torch.where((is_first & (is_remask | goes_on[:, :, None]))[..., None], -1, drafts.runner_ups)
        drafts.token_ids = torch.where(is_first & is_remask, kept, drafts.token_ids)
        drafts.token_ids = torch.where(is_first & goes_on[:, :, None], judged, drafts.token_ids)

    def _try_alternatives(self, drafts: "_Drafts", goes_on: Tensor, step: Tensor) -> None:
        """Where the correction is a runner-up of the draft it replaces, it stands, and what was made behind it are the next drafts."""
        at = drafts.lengths.clamp(max=self.slots.slot_size - 1)
        correction, runner_ups = _at(drafts.token_ids, at), _at(self.runner_ups, at)  # [B, W], [B, W, R]
        matches = runner_ups == correction[..., None]
        is_tried = goes_on & (step <= ALTERNATIVE_LENGTHS) & (drafts.lengths < self.slots.slot_size - 1)
        is_hit = is_tried & matches.any(dim=2) & (correction[..., None] != self.eos_ids).all(dim=2)
        is_kept = is_hit[:, :, None] & (self.place == drafts.lengths[:, :, None])
        drafts.runner_ups = torch.where(is_kept[..., None], self.runner_ups, drafts.runner_ups)  # says later that it stands through one
        if "alternatives" in self.placement.rows:
            takes = is_hit & drafts.is_covered[:, None]
            is_next = self.place == drafts.lengths[:, :, None] + 1
            behind = self._behind_alternative(self.readout.token_ids, matches, step)
            runner_ups = [self._behind_alternative(each, matches, step) for each in self.readout.runner_ups.unbind(-1)]
            # The runner-up's own row names the token behind it, the masks from there on name themselves.
            behind = torch.where(is_next, behind.roll(1, dims=2), behind)
            runner_ups = [torch.where(is_next, -1, each) for each in runner_ups]
            self._redraft(drafts, takes, drafts.lengths + 1, behind, runner_ups)
        drafts.lengths = drafts.lengths + is_hit

    def _behind_alternative(self, values: Tensor, matches: Tensor, step: Tensor) -> Tensor:
        """[B, W, K] what the rows of the alternative that `matches` [B, W, R] at `step` [B, W] say."""
        tried = self.placement.fold("alternatives", values)  # [B, W, A, R, K]
        index = (step - 1).clamp(0, tried.shape[2] - 1)[:, :, None, None, None]
        tried = tried.gather(2, index.expand(-1, -1, 1, *tried.shape[3:]))[:, :, 0]  # [B, W, R, K]
        which = matches.long().argmax(dim=2)[:, :, None, None]
        return tried.gather(2, which.expand(-1, -1, 1, tried.shape[3]))[:, :, 0]

    def _next_lengths(self, verified: Tensor, is_committed: Tensor, keeps_infilling: Tensor) -> Tensor:
        """[B, S]: committed lengths, verified lengths of slots in infill, 0 for chosen ones that are masks again."""
        now = is_committed.sum(dim=2)
        in_infill = (keeps_infilling | (self.phase[:, 0] == REMASK))[:, None] & self.is_chosen
        before = self.state.lengths.gather(1, self.placement.window)
        window = torch.where(self.is_chosen, torch.where(in_infill, verified, now), before)
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

    def _name_firsts(self, state: DecodeState, is_committed: Tensor) -> DecodeState:
        """The last row of a slot that is final now names the first token of the slot behind it, if that is still open.

        An open slot of which that is known has length 1; its plan then leaves the first token alone.
        """
        num_slots = state.status.shape[1]
        following = self.placement.window + 1
        is_open = state.status.gather(1, following.clamp(max=num_slots - 1)) == OPEN
        is_named = is_committed[:, :, -1] & ~self.is_eos[:, :, -1] & (following < num_slots) & is_open
        target = torch.where(is_named, following, num_slots)  # one column more takes what is not named
        names = self.placement.fold("drafts", self.readout.token_ids)[:, :, -1]
        firsts = F.pad(state.token_ids[:, :, 0], (0, 1)).scatter(1, target, names)[:, :num_slots]
        lengths = F.pad(state.lengths, (0, 1)).scatter(1, target, 1)[:, :num_slots]
        token_ids = torch.cat((firsts[:, :, None], state.token_ids[:, :, 1:]), dim=2)
        return replace(state, token_ids=token_ids, lengths=lengths)

    def _apply_plan(self, state: DecodeState, plan_holds: Tensor) -> tuple[DecodeState, Tensor]:
        """Draft and choose slots from the plan rows where the plan holds and had anything to plan."""
        slots, is_planned = self.placement.plan_slots, self.placement.is_planned
        plan_holds = plan_holds & is_planned.any(dim=1)
        is_planned = is_planned & plan_holds[:, None]
        drafts = self.placement.fold("plan", self.readout.token_ids)
        scores = self.placement.fold("plan", self.readout.confidence)[:, :, 0]
        is_chosen = choose_slots(scores, is_planned, self.slots.slot_threshold)
        is_named = (state.status.gather(1, slots) == OPEN) & (state.lengths.gather(1, slots) == 1)  # [B, W]
        is_new = is_planned[:, :, None] & ~(is_named[:, :, None] & (self.place == 0))
        token_ids = _with_slots(state.token_ids, slots, torch.where(is_new, drafts, _slots_of(state.token_ids, slots)))
        if self.num_alternatives:
            runner_ups = torch.where(is_new[..., None], self.placement.fold_each("plan", self.readout.runner_ups), -1)
            runner_ups = torch.where(is_planned[:, :, None, None], runner_ups, _slots_of(state.runner_ups, slots))
            state = replace(state, runner_ups=_with_slots(state.runner_ups, slots, runner_ups))
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


def _slots_of(values: Tensor, slots: Tensor) -> Tensor:
    """values [B, S, K, ...] of slots [B, W]."""
    index = slots.view(*slots.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _with_slots(values: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """values [B, S, K, ...] with slots [B, W] replaced by new [B, W, K, ...]."""
    return values.scatter(1, slots.view(*slots.shape, *[1] * (new.dim() - 2)).expand_as(new), new)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """values [B, W, K, ...] at a place [B, W] of each slot: [B, W, ...]."""
    index = place.view(*place.shape, *[1] * (values.dim() - 2))
    return values.gather(2, index.expand(-1, -1, 1, *values.shape[3:]))[:, :, 0]
