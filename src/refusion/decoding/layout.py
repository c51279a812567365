"""Which tokens the next forward runs, and who sees whom: decode state to grids of cells.

Every kind of row lives on a grid of fixed shape with a mask of the cells that are needed; `refusion.decoding.packing` puts the needed
cells of all grids side by side.

- drafts [W, K]: drafted tokens of the chosen slots. While verifying they are one chain, each slot seeing the chosen ones before it;
  while infilling every slot stands alone, and is drafted no further than its last group was.
- plan [W, K]: masks of the slots still open (or of the next block) that see all drafts: the next plan, should everything be accepted.
- solo [W, K]: copies of the chosen slots but the first that do not see their siblings, for the infill groups of a verify forward.
- groups [W, C + 1, K]: for each accepted length, masks from there to the end of the slot (or `infill_length` of them), seeing exactly
  that prefix: the next drafts.
- alternatives [W, A, R, K]: for each of the first accepted lengths and each runner-up of the draft that would fail there, that token and
  masks behind it: the next drafts, should the runner-up be the correction.
"""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.state import CHOSEN, INFILL, OPEN, PLAN, REMASK, VERIFY, DecodeState
from refusion.model.segments import NO_PARENT, TRUNK

# B = requests, W = slots of a block, K = tokens per slot, C = candidate lengths, A = those with alternatives, R = alternatives
# P = longest prompt


@dataclass(frozen=True, slots=True)
class Grid:
    """One kind of row. All [B, N] with N the cells of the grid; `given_ids` 0 and `is_read` False unless the kind needs them."""

    token_ids: Tensor
    positions: Tensor
    segment: Tensor
    rank: Tensor
    parent: Tensor
    visible: Tensor
    is_trunk: Tensor
    is_read: Tensor
    given_ids: Tensor
    is_needed: Tensor


@dataclass(frozen=True, slots=True)
class Grids:
    """All cells of one forward, and the slots they belong to."""

    cells: dict[str, Grid]
    shapes: dict[str, tuple[int, ...]]
    window: Tensor  # [B, W] slots being verified or infilled
    plan_slots: Tensor  # [B, W] slots the plan rows belong to
    is_planned: Tensor  # [B, W]


def build_grids(
    state: DecodeState, slots: SlotSettings, width: int, num_candidates: int, mask_id: int, prompts: Tensor | None = None
) -> Grids:
    """The next forward of every request. width is W; prompts [B, P] (right-padded) joins the first forward of a batch."""
    window = state.window(width)
    status = state.status.gather(1, window)
    is_chosen = status == CHOSEN
    drafts = state.token_ids.gather(1, window[:, :, None].expand(-1, -1, slots.slot_size))
    verified = torch.where(is_chosen, state.lengths.gather(1, window), 0)
    plan_slots, is_planned = planned_slots(state, window, slots)
    cells = _Cells(state, slots, num_candidates, mask_id, window, is_chosen, drafts, verified)
    num_tried = min(ALTERNATIVE_LENGTHS, num_candidates) if slots.alternatives else 0
    grids = {"drafts": cells.drafts(), "plan": cells.plan(plan_slots, is_planned)}
    shapes: dict[str, tuple[int, ...]] = {"drafts": (width, slots.slot_size), "plan": (width, slots.slot_size)}
    if num_candidates > 0 and width > 1:
        grids["solo"], shapes["solo"] = cells.solo(), (width, slots.slot_size)
    grids["groups"], shapes["groups"] = cells.groups(), (width, num_candidates + 1, slots.slot_size)
    segments = 2 * width + 1 + width * (num_candidates + 1)  # so many numbers are taken by now
    if num_tried:
        runner_ups = state.runner_ups.gather(1, window[:, :, None, None].expand(-1, -1, *state.runner_ups.shape[2:]))
        shapes["alternatives"] = (width, num_tried, slots.alternatives, slots.slot_size)
        grids["alternatives"] = cells.alternatives(runner_ups, num_tried, segments)
        segments += width * num_tried * slots.alternatives
    if prompts is not None:
        grids["prompt"], shapes["prompt"] = _prompt(state, prompts, segments, names_first=slots.names_first), (prompts.shape[1],)
    return Grids(grids, shapes, window, plan_slots, is_planned)


def planned_slots(state: DecodeState, window: Tensor, slots: SlotSettings) -> tuple[Tensor, Tensor]:
    """Slots [B, W] the plan rows of this forward belong to, and which of them exist: this block's open slots, else the next block's.

    Beside an infill there is a plan only if the drafts reach the end of every slot: else it cannot hold, whatever they are worth.
    """
    status = state.status.gather(1, window)
    is_open = status == OPEN
    following = window + window.shape[1]
    exists = following < state.status.shape[1]
    next_status = state.status.gather(1, following.clamp(max=state.status.shape[1] - 1))
    block_goes_on = is_open.any(dim=1, keepdim=True)
    plan_slots = torch.where(block_goes_on, window, following)
    is_planned = torch.where(block_goes_on, is_open, exists & (next_status == OPEN))
    phase = state.phase[:, None]
    reaches_end = state.lengths.gather(1, window) + slots.most_drafted(phase == INFILL) >= slots.slot_size
    can_end = (reaches_end | (status != CHOSEN)).all(dim=1, keepdim=True)
    is_fused = ((phase == VERIFY) | (phase == INFILL)) & can_end & slots.fuse_plan
    return plan_slots.clamp(max=state.status.shape[1] - 1), is_planned & ((phase == PLAN) | is_fused)


class _Cells:
    """Builds the grids of one forward; holds what they share."""

    def __init__(
        self,
        state: DecodeState,
        slots: SlotSettings,
        num_candidates: int,
        mask_id: int,
        window: Tensor,
        is_chosen: Tensor,
        drafts: Tensor,
        verified: Tensor,
    ) -> None:
        self.mask_id, self.is_chosen, self.token_ids, self.verified = mask_id, is_chosen, drafts, verified
        self.width, self.slot_size, self.num_candidates = window.shape[1], slots.slot_size, num_candidates
        self.most_masks = slots.most_masks
        self.device = drafts.device
        self.phase = state.phase[:, None, None]  # [B, 1, 1]
        self.is_judging = (self.phase == VERIFY) | (self.phase == INFILL)
        self.most_drafted = slots.most_drafted(self.phase == INFILL)  # [B, 1, 1]
        self.prompt_lengths = state.prompt_lengths[:, None, None]
        self.place = torch.arange(slots.slot_size, device=drafts.device)  # [K]
        self.slot = torch.arange(self.width, device=drafts.device)[:, None]  # [W, 1]
        self.positions = self._positions(window)
        self.is_first = is_chosen & (is_chosen.cumsum(dim=1) == 1)  # [B, W] the first chosen slot: its chain sees no sibling
        self.is_unfinished = is_chosen & (verified < slots.slot_size)

    def _positions(self, slots: Tensor) -> Tensor:
        """[B, W, K] positions of slots [B, W]."""
        return self.prompt_lengths + slots[:, :, None] * self.slot_size + self.place

    def drafts(self) -> Grid:
        """Row j judges token j + 1; the last row names the first token of the next slot."""
        is_chain = self.phase == VERIFY
        in_slot = self.is_chosen[:, :, None].expand_as(self.token_ids)
        stands = self.verified[:, :, None]
        is_drafted = self.is_judging & (self.place < stands + self.most_drafted)  # behind those there are only masks
        is_needed = in_slot & (is_drafted | ((self.phase == REMASK) & (self.place < stands)))
        chain_rank = in_slot.flatten(1).cumsum(dim=1).view_as(self.token_ids) - 1
        following = torch.cat((self.token_ids[:, :, 1:], self.token_ids[:, :, :1]), dim=2)
        is_judge = (self.place < self.slot_size - 1) & self.is_judging
        # In a remask forward the last token that stands may be an alternative that was not tried ahead: its row names the next one.
        is_last = (self.phase == REMASK) & (self.place == self.verified[:, :, None] - 1)
        return self._grid(
            self.token_ids,
            self.positions,
            segment=torch.where(is_chain, 0, self.slot.expand(-1, self.slot_size)),
            rank=torch.where(is_chain, chain_rank, self.place),
            is_trunk=self.is_judging.expand_as(self.token_ids),
            is_read=(self.is_judging | is_last).expand_as(self.token_ids),
            given_ids=torch.where(is_judge, following, 0),
            is_needed=is_needed,
        )

    def plan(self, plan_slots: Tensor, is_planned: Tensor) -> Grid:
        shape = self.token_ids.shape
        is_needed = is_planned[:, :, None].expand(shape)
        return self._grid(
            torch.full(shape, self.mask_id, device=self.device),
            self._positions(plan_slots),
            segment=torch.full(shape, self.width, device=self.device),
            rank=(self.slot * self.slot_size + self.place).expand(shape),
            parent=torch.full(shape, TRUNK, device=self.device),
            is_read=torch.ones(shape, dtype=torch.bool, device=self.device),
            is_needed=is_needed,
        )

    def solo(self) -> Grid:
        is_needed = (self.is_unfinished & ~self.is_first)[:, :, None] & (self.phase == VERIFY)
        return self._grid(
            self.token_ids,
            self.positions,
            segment=self.width + 1 + self.slot,
            rank=self.place,
            is_needed=is_needed & (self.place < self.num_candidates),  # no group sees more of the slot
        )

    def groups(self) -> Grid:
        """Candidate 0 keeps the verified length (the masks of a two-pass infill turn); candidate a expects `a` tokens more."""
        shape = (*self.token_ids.shape[:2], self.num_candidates + 1, self.slot_size)  # [B, W, C + 1, K]
        candidate = torch.arange(self.num_candidates + 1, device=self.device)
        length = self.verified[:, :, None] + candidate  # [B, W, C + 1]
        phase = self.phase[..., None]
        can_be_accepted = self.is_judging[..., None] & (candidate[:, None] <= self.most_drafted[..., None])
        is_wanted = torch.where(candidate[:, None] == 0, phase == REMASK, can_be_accepted)
        is_needed = self.is_unfinished[:, :, None, None] & is_wanted & self._in_group(length[..., None], self.most_masks)
        base = 2 * self.width + 1
        segment = base + (self.slot * (self.num_candidates + 1) + candidate)[:, :, None]  # [W, C + 1, 1]
        return self._grid(
            torch.full(shape, self.mask_id, device=self.device),
            self.positions[:, :, None].expand(shape),
            segment=segment,
            rank=self.place,
            parent=self._prefix()[:, :, None, None],
            visible=length[..., None],
            is_read=torch.ones(shape, dtype=torch.bool, device=self.device),
            is_needed=is_needed,
        )

    def alternatives(self, runner_ups: Tensor, num_tried: int, first_segment: int) -> Grid:
        """runner_ups [B, W, K, R]. A runner-up that would be the last token of its slot is not tried: nothing comes behind it."""
        num_alternatives = runner_ups.shape[3]
        shape = (*self.token_ids.shape[:2], num_tried, num_alternatives, self.slot_size)  # [B, W, A, R, K]
        length = self.verified[:, :, None] + torch.arange(1, num_tried + 1, device=self.device)  # [B, W, A]
        at = length.clamp(max=self.slot_size - 1)[..., None].expand(-1, -1, -1, num_alternatives)
        tried = runner_ups.gather(2, at)[..., None].clamp(min=0)  # [B, W, A, R, 1]; -1 where nothing was drafted
        length = length[..., None, None]
        is_wanted = (self.is_unfinished[:, :, None, None, None] & self.is_judging[..., None, None]) & (length < self.slot_size - 1)
        number = torch.arange(self.width * num_tried * num_alternatives, device=self.device).view(shape[1:4])
        return self._grid(
            torch.where(self.place == length, tried, self.mask_id).expand(shape),
            self.positions[:, :, None, None].expand(shape),
            segment=(first_segment + number)[..., None],
            rank=self.place,
            parent=self._prefix()[:, :, None, None, None],
            visible=length,
            is_read=torch.ones(shape, dtype=torch.bool, device=self.device),
            is_needed=is_wanted & self._in_group(length, 1 + self.most_masks),
        )

    def _in_group(self, length: Tensor, most: int) -> Tensor:
        """The places [..., K] of a group of at most so many rows behind an accepted length [..., 1]."""
        return (self.place >= length) & (self.place < length + most)

    def _prefix(self) -> Tensor:
        """[B, W] the segment that holds the drafts of a slot as its groups see them."""
        # In a verify forward the first slot's prefix is the chain itself, the others' a copy; otherwise every slot stands alone.
        in_verify = torch.where(self.is_first, 0, self.width + 1 + self.slot[:, 0])
        return torch.where(self.phase[:, :, 0] == VERIFY, in_verify, self.slot[:, 0])

    def _grid(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        segment: Tensor,
        rank: Tensor,
        is_needed: Tensor,
        parent: Tensor | None = None,
        visible: Tensor | None = None,
        is_trunk: Tensor | None = None,
        is_read: Tensor | None = None,
        given_ids: Tensor | None = None,
    ) -> Grid:
        nothing = torch.zeros((), dtype=torch.long, device=self.device)
        parts = (
            token_ids,
            positions,
            segment,
            rank,
            nothing + NO_PARENT if parent is None else parent,
            nothing if visible is None else visible,
            nothing.bool() if is_trunk is None else is_trunk,
            nothing.bool() if is_read is None else is_read,
            nothing if given_ids is None else given_ids,
            is_needed,
        )
        return Grid(*(part.expand(token_ids.shape).flatten(1) for part in parts))


def _prompt(state: DecodeState, prompts: Tensor, segment: int, *, names_first: bool) -> Grid:
    """The prompt as one more segment, which the first plan sees whole. names_first: its last row is read."""
    place = torch.arange(prompts.shape[1], device=prompts.device).expand(prompts.shape)
    is_token = place < state.prompt_lengths[:, None]
    is_read = (place == state.prompt_lengths[:, None] - 1) & names_first
    nothing = torch.zeros_like(place)
    return Grid(prompts, place, nothing + segment, place, nothing + NO_PARENT, nothing, is_token, is_read, nothing, is_token)
