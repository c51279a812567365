"""Plan-and-infill decoding over flat rows, all state on the device: the tokens of `refusion.decoding.refusion.ReFusionDecoder`.

The plain version runs the very tensor functions of that decoder; with `use_kernels`, `refusion.decoding.kernels` does the same in one
launch each for `lay_out` and `settle`.
"""

# torch leaves the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.layout import build_grids, planned_slots
from refusion.decoding.packing import Placement, pack_flat, put_rows, put_tiles
from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.refusion_report import AGENDA, ReportColumns, rows_needed, seat_report
from refusion.decoding.rounds import SeatReport
from refusion.decoding.row_buffers import RowBuffers, cache_targets
from refusion.decoding.seats import SeatedRounds, SeatTable
from refusion.decoding.settling.settle import settle_forward
from refusion.decoding.settling.step_report import StepReport
from refusion.decoding.state import CHOSEN, CLOSED, DONE, OPEN, PLAN, DecodeState
from refusion.model.rows import Rows, Spans, Tiles

# B = seats, S = slots of an answer (a multiple of W), W = slots of a block, K = tokens per slot, T = decode rows of a forward

SCALARS = {"prompt_lengths": "prompt_length", "seeds": "seed", "phase": "phase", "num_drafts": "num_drafts", "num_forwards": "num_forwards"}
"""Fields of `DecodeState` -> columns of the table."""


class RefusionRounds(SeatedRounds):
    """See `refusion.decoding.rounds.Rounds`."""

    def __init__(
        self,
        slots: SlotSettings,
        width: int,
        num_slots: int,
        num_seats: int,
        *,
        mask_id: int,
        eos_ids: Tensor,
        device: torch.device,
        use_kernels: bool,
        max_rows: int | None = None,
    ) -> None:
        """width: W. num_slots: S, room for the longest answer. max_rows: most decode rows of a forward; else what the settings can need."""
        assert not slots.sliding, "slots that slide have rounds of their own"
        assert num_slots % width == 0, f"{num_slots} slots are no whole number of blocks of {width}"
        self.slots, self.width, self.slot_size, self.num_slots = slots, width, slots.slot_size, num_slots
        self.mask_id, self.eos_ids, self.use_kernels = mask_id, eos_ids, use_kernels
        self.table = SeatTable(num_seats, self._columns(), device)
        self.table.column("phase", num_seats).fill_(DONE)
        self.table.group("status", num_seats).fill_(CLOSED)
        self.table.group("agenda", num_seats).copy_(self._agenda(self.state(num_seats)))
        self.columns = ReportColumns(width, slots.slot_size)
        self.report_width = self.columns.total
        self.num_kept = self.fresh_rows = width * slots.slot_size
        buffers = RowBuffers(num_seats, self.num_kept, self.report_width, max_rows or self._most_rows(num_seats), device)
        self.given_ids, self.seeds, self.attempts = buffers.given_ids, buffers.seeds, buffers.attempts
        self.source, self.target, self.report = buffers.source, buffers.target, buffers.report
        self.first_ids = torch.full((num_seats,), -1, dtype=torch.int32, device=device)
        """[B] for `settle`: what the last row of a prompt that this forward ran to its end says, -1 where it ran none."""

    def _columns(self) -> dict[str, int]:
        """What is known of a seat when it is admitted comes first."""
        alternatives = self.slots.alternatives
        return {
            "prompt_length": 1,
            "seed": 1,
            "phase": 1,
            "num_drafts": 1,
            "num_forwards": 1,
            "agenda": AGENDA + 2 * self.width,
            "status": self.num_slots,
            "lengths": self.num_slots,
            "token_ids": self.num_slots * self.slot_size,
        } | ({"runner_ups": self.num_slots * self.slot_size * alternatives} if alternatives else {})

    def _most_rows(self, num_seats: int) -> int:
        """A forward with everything in it, and half as much again for padding."""
        groups = (self.slots.candidates() + ALTERNATIVE_LENGTHS * self.slots.alternatives) * self.slot_size
        return 512 + num_seats * self.width * (3 * self.slot_size + groups) * 3 // 2

    def admit(self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1) -> None:
        """Every token of the prompt is a prompt row, so `last_token` says nothing new."""
        num_slots = self.slots.num_slots(max_tokens)
        assert 1 <= num_slots <= self.num_slots, f"{max_tokens} tokens do not fit {self.num_slots} slots of {self.slot_size}"
        self.table.write(
            seat,
            {
                "prompt_length": prompt_length,
                "seed": seed,
                "phase": PLAN,
                "num_drafts": 0,
                "num_forwards": 0,
                "agenda": [PLAN, 0, 0, *[-1] * self.width, *[int(slot < num_slots) for slot in range(self.width)]],
                "status": [OPEN if slot < num_slots else CLOSED for slot in range(self.num_slots)],
                "lengths": 0,
            },
        )

    def retire(self, seat: int) -> None:
        self.table.column("phase", seat + 1)[seat].fill_(DONE)
        self.table.group("agenda", seat + 1)[seat, 0].fill_(DONE)

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        first = self.columns.agenda
        agendas = report[:, first : first + AGENDA + 2 * self.width]
        return rows_needed(agendas, self.slots, self._candidates(candidates))

    def first_draw(self, num_seats: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B] seed, position and attempt that the first token of every seat is drawn with."""
        state = self.state(num_seats)
        return state.seeds, state.prompt_lengths - 1, state.num_drafts + 1

    def read(self, report_row: np.ndarray) -> SeatReport:
        return seat_report(report_row, self.columns)

    @torch.no_grad()
    def lay_out(
        self,
        rows: Rows,
        spans: Spans,
        *,
        start: int,
        num_seats: int,
        candidates: int,
        tiles: Tiles | None = None,
        tile_start: int = 0,
    ) -> None:
        self._start, num_rows = start, rows.num_rows
        assert num_rows <= len(self.given_ids), f"{num_rows} rows, but room for {len(self.given_ids)}; give max_rows"
        if self.use_kernels:
            from refusion.decoding.kernels.layout import lay_out  # triton is there only where there are kernels

            where = {"start": start, "num_seats": num_seats, "num_candidates": self._candidates(candidates), "tile_start": tile_start}
            lay_out(self, rows, spans, **where, tiles=tiles)
            return
        state = self.state(num_seats)
        grids = build_grids(state, self.slots, self.width, self._candidates(candidates), self.mask_id)
        self._placement, target = pack_flat(grids, rows, spans, self.given_ids[:num_rows], start)
        for into, value in ((self.seeds, state.seeds), (self.attempts, state.num_drafts + 1)):
            put_rows(into[:num_rows], target.flatten(), value[:, None].expand_as(target), 0)
        if tiles is not None:
            put_tiles(spans, tiles, tile_start)

    @torch.no_grad()
    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        if self.use_kernels:
            from refusion.decoding.kernels.settle import settle

            where = {"start": self._start, "num_seats": num_seats, "num_candidates": self._candidates(candidates)}
            settle(self, readout, spans, **where)
            return
        state = self.state(num_seats)
        first_ids = self.first_ids[:num_seats] if self.slots.names_first else None
        given = (self._candidates(candidates), self.mask_id, self.eos_ids, self._placement, readout, first_ids)
        settled = settle_forward(state, self.slots, *given)
        self._keep(settled.report.is_committed.flatten(1), spans, num_seats)
        step = replace(settled.report, phase=state.phase.clone())  # the state is about to change in place
        is_running = step.phase != DONE
        for field in fields(DecodeState):
            before, after = getattr(state, field.name), getattr(settled.state, field.name)
            before.copy_(torch.where(is_running.view(-1, *[1] * (before.dim() - 1)), after, before))
        agenda = self.table.group("agenda", num_seats)
        agenda.copy_(torch.where(is_running[:, None], self._agenda(state), agenda))
        self._report(step, state, agenda, self._placement, len(readout.token_ids))

    def state(self, num_seats: int) -> DecodeState:
        """The first seats as the decoder's own state; views, not copies."""
        parts = {field: self.table.column(name, num_seats) for field, name in SCALARS.items()}
        for name in ("status", "lengths"):
            parts[name] = self.table.group(name, num_seats)
        parts["token_ids"] = self.table.group("token_ids", num_seats).unflatten(1, (self.num_slots, self.slot_size))
        shape = (self.num_slots, self.slot_size, self.slots.alternatives)
        if self.slots.alternatives:
            parts["runner_ups"] = self.table.group("runner_ups", num_seats).unflatten(1, shape)
        else:
            parts["runner_ups"] = parts["token_ids"].new_zeros(num_seats, *shape)
        return DecodeState(**parts)

    def _candidates(self, candidates: int) -> int:
        return min(candidates, self.slot_size - 1)

    def _keep(self, is_committed: Tensor, spans: Spans, num_seats: int) -> None:
        """Committed drafts [B, M] join the cache in text order."""
        row = self._placement.rows["drafts"]
        rank = is_committed.cumsum(dim=1) - 1
        count = num_seats * self.num_kept
        self.source[:count].copy_(torch.where(is_committed, row + self._start, -1).flatten())
        self.target[:count].copy_(cache_targets(spans, (spans.cached[:, None] + rank).clamp(min=0), is_committed).flatten())
        spans.cached.add_(is_committed.sum(dim=1).int())

    def _agenda(self, state: DecodeState) -> Tensor:
        """[B, 3 + 2W] what the next forward is, as `refusion.decoding.refusion_report.AGENDA` has it."""
        window = state.window(self.width)
        is_chosen = state.status.gather(1, window) == CHOSEN
        plan_slots, is_planned = planned_slots(state, window, self.slots)
        verified = torch.where(is_chosen, state.lengths.gather(1, window), -1)
        return torch.cat((state.phase[:, None], window[:, :1], plan_slots[:, :1], verified, is_planned.long()), dim=1)

    def _report(self, step: StepReport, state: DecodeState, agenda: Tensor, placement: Placement, num_rows: int) -> None:
        """One line of numbers a seat, as `ReportColumns` has them."""
        overflow = placement.num_rows.cumsum(dim=0).clamp(min=num_rows) - num_rows
        planned = state.token_ids.gather(1, step.plan_slots[:, :, None].expand_as(step.drafts))
        groups = (
            (state.phase == DONE)[:, None],
            state.num_forwards[:, None],
            torch.minimum(overflow, placement.num_rows)[:, None],
            step.num_rows[:, None],
            agenda,
            step.phase[:, None],
            step.window[:, :1],
            step.plan_slots[:, :1],
            torch.where(step.is_chosen, step.num_accepted, -1),
            step.is_committed.sum(dim=2),
            step.is_planned,
            torch.where(step.is_planned, step.plan_scores, 0.0).view(torch.int32),
            step.drafts.flatten(1),
            planned.flatten(1),
        )
        self.report[: len(agenda)].copy_(torch.cat([group.int() for group in groups], dim=1))
