"""From the readout of one forward to the next state of every request."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.packing import Placement
from refusion.decoding.params import SlotSettings
from refusion.decoding.settling.next_drafts import NextDrafts, draft_anew, follow_infill, replace_rejected
from refusion.decoding.settling.picking import with_slots
from refusion.decoding.settling.plan import put_plan
from refusion.decoding.settling.runner_ups import take_runner_ups
from refusion.decoding.settling.step_report import StepReport, report_step
from refusion.decoding.settling.turn import Turn, read_turn
from refusion.decoding.settling.verdicts import TurnVerdict, reach_verdict
from refusion.decoding.state import CHOSEN, CLOSED, COMMITTED, DONE, INFILL, OPEN, PLAN, REMASK, VERIFY, DecodeState

# B = requests, S = slots, W = slots of a block, K = tokens per slot


@dataclass(frozen=True, slots=True)
class Settled:
    """The next state and what happened."""

    state: DecodeState
    report: StepReport


def settle_forward(
    state: DecodeState,
    slots: SlotSettings,
    num_candidates: int,
    mask_id: int,
    eos_ids: Tensor,
    placement: Placement,
    readout: Readout,
    first_ids: Tensor | None = None,
) -> Settled:
    """Judge one forward of every request. eos_ids [E] end an answer.

    first_ids [B]: what the last row of a prompt that this forward ran to its end says, -1 where it ran none; for
    `SlotSettings.names_first` alone.
    """
    turn = read_turn(state, slots, num_candidates, mask_id, eos_ids, placement, readout)
    corrects = slots.correction == "autoregressive"
    verdict = reach_verdict(turn)
    infill = follow_infill(turn, verdict)
    drafts = draft_anew(turn, infill)
    if corrects:
        drafts = replace_rejected(turn, infill, drafts)
    if slots.alternatives:
        drafts = take_runner_ups(turn, infill, drafts)
    state = _with_block(turn, verdict, drafts)
    if corrects:
        state = _name_firsts(turn, verdict, state)
    if first_ids is not None:
        state = _begin_with(first_ids, turn, state)
    state = put_plan(turn, state, verdict.plan_holds)
    return Settled(_next_phase(turn, verdict, state, infill.is_covered), report_step(turn, verdict))


def _with_block(turn: Turn, verdict: TurnVerdict, drafts: NextDrafts) -> DecodeState:
    """The state with what became of the slots in the window."""
    state, window = turn.state, turn.placement.window
    stays = (verdict.goes_on | (turn.phase == REMASK))[:, None]  # [B, 1] chosen slots stay in infill
    return replace(
        state,
        token_ids=with_slots(state.token_ids, window, drafts.token_ids),
        runner_ups=with_slots(state.runner_ups, window, drafts.runner_ups),
        lengths=_next_lengths(turn, verdict, drafts.lengths, stays),
        status=_next_status(turn, verdict, stays),
    )


def _next_lengths(turn: Turn, verdict: TurnVerdict, stands: Tensor, stays: Tensor) -> Tensor:
    """[B, S]: committed lengths, lengths of slots in infill that stand, 0 for chosen ones that are masks again."""
    window, lengths = turn.placement.window, turn.state.lengths
    now = torch.where(stays, stands, verdict.is_committed.sum(dim=2))
    return lengths.scatter(1, window, torch.where(turn.is_chosen, now, lengths.gather(1, window)))


def _next_status(turn: Turn, verdict: TurnVerdict, stays: Tensor) -> Tensor:
    """[B, S]: committed slots, slots closed behind an EOS, chosen slots that are masks again."""
    window = turn.placement.window
    status = turn.state.status.gather(1, window)
    status = torch.where(turn.is_chosen & ~stays, OPEN, status)
    status = torch.where(verdict.is_committed.any(dim=2), COMMITTED, status)
    status = turn.state.status.scatter(1, window, status)
    ends = verdict.ends | (verdict.infill.has_eos & verdict.goes_on[:, None])
    last = torch.where(ends, window, status.shape[1]).min(dim=1, keepdim=True).values  # the slot the answer ends in
    is_behind = torch.arange(status.shape[1], device=status.device) > last
    return torch.where(is_behind & ((status == OPEN) | (status == CHOSEN)), CLOSED, status)


def _name_firsts(turn: Turn, verdict: TurnVerdict, state: DecodeState) -> DecodeState:
    """The last row of a slot that is final now names the first token of the slot behind it, if that is still open.

    An open slot of which that is known has length 1; its plan then leaves the first token alone.
    """
    num_slots = state.status.shape[1]
    following = turn.placement.window + 1
    is_open = state.status.gather(1, following.clamp(max=num_slots - 1)) == OPEN
    is_named = verdict.is_committed[:, :, -1] & ~turn.is_eos[:, :, -1] & (following < num_slots) & is_open
    target = torch.where(is_named, following, num_slots)  # one column more takes what is not named
    names = turn.placement.fold("drafts", turn.readout.token_ids)[:, :, -1]
    firsts = F.pad(state.token_ids[:, :, 0], (0, 1)).scatter(1, target, names)[:, :num_slots]
    lengths = F.pad(state.lengths, (0, 1)).scatter(1, target, 1)[:, :num_slots]
    token_ids = torch.cat((firsts[:, :, None], state.token_ids[:, :, 1:]), dim=2)
    return replace(state, token_ids=token_ids, lengths=lengths)


def _begin_with(first_ids: Tensor, turn: Turn, state: DecodeState) -> DecodeState:
    """The prompt's last row names the first token of the answer, as `_name_firsts` does of later slots."""
    is_named = (first_ids >= 0) & (turn.phase == PLAN)
    token_ids, lengths = state.token_ids.clone(), state.lengths.clone()
    token_ids[:, 0, 0] = torch.where(is_named, first_ids.to(token_ids.dtype), token_ids[:, 0, 0])
    lengths[:, 0] = torch.where(is_named, 1, lengths[:, 0])
    return replace(state, token_ids=token_ids, lengths=lengths)


def _next_phase(turn: Turn, verdict: TurnVerdict, state: DecodeState, is_covered: Tensor) -> DecodeState:
    """The state with its next phase and counts. is_covered [B]: every slot that goes on has its drafts."""
    runs, is_remask = turn.phase != DONE, turn.phase == REMASK
    has_work = ((state.status == OPEN) | (state.status == CHOSEN)).any(dim=1)
    phase = torch.where(verdict.goes_on, torch.where(is_covered, INFILL, REMASK), PLAN)
    phase = torch.where(is_remask, INFILL, phase)
    phase = torch.where(verdict.plan_holds, VERIFY, phase)
    has_drafted = verdict.plan_holds | is_remask | (verdict.goes_on & is_covered)
    return replace(
        state,
        phase=torch.where(has_work & runs, phase, DONE),
        num_drafts=state.num_drafts + (has_drafted & runs),
        num_forwards=state.num_forwards + runs,
    )
