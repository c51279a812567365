"""Slots that begin where the text ends, over flat rows, all state on the device.

A seat has tokens it *knows* (final, not yet in the cache: one, two behind an alternative that was right, none before the first forward) and
drafts behind them; together they are the *chain*. A forward runs the chain, whose every row judges the draft behind it and names the token
that stands if that fails; masks behind every prepared length of accepted drafts; a plan behind the whole chain; and for the first lengths
the runner-ups of the draft that would fail there, with masks behind them. What passes is final, with the token that the last passing row
names. The next drafts come from the masks behind that length, or the plan, or the runner-up that was right; in the place of their first
mask stands the named token. With `use_kernels`, `refusion.decoding.kernels.sliding` does the same in one launch each way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.packing import put_rows, put_tiles
from refusion.decoding.params import SlotSettings
from refusion.decoding.rounds import SeatReport
from refusion.decoding.row_buffers import RowBuffers, cache_targets
from refusion.decoding.seats import SeatedRounds, SeatTable
from refusion.decoding.sliding_report import (
    NUM_DRAFTED,
    NUM_KNOWN,
    PLANS,
    SHORT,
    WHOLE,
    WHOLE_BEHIND_FAILURE,
    most_rows,
    num_lengths,
    num_tried,
    report_width,
    rows_needed,
    seat_report,
)
from refusion.model.rows import PADDING, Rows, Spans, Tiles
from refusion.model.segments import NO_PARENT, TRUNK

# B = seats, K = tokens per slot, N = K + 1 most tokens of a chain, R = alternatives, T = decode rows of a forward
# C = prepared lengths, A = those with alternatives, M = masks of a group, X = cells of a seat: all rows it could have

CHAIN = 0
"""Segment of the chain; the groups of masks have 1, 2, ... in the order of their rows."""


@dataclass(frozen=True, slots=True)
class _Before:
    """The seats as a forward found them. All [B] unless said otherwise."""

    known: Tensor
    drafted: Tensor
    plans: Tensor  # how, see `sliding_report`
    planned: Tensor  # masks of the plan
    written: Tensor
    max_tokens: Tensor
    is_active: Tensor
    chain: Tensor  # [B, N]
    runner_ups: Tensor  # [B, N, R]
    first: Tensor  # decode row of the forward
    first_ids: Tensor
    num_rows: int

    @classmethod
    def of(cls, rounds: "SlidingRounds", first: Tensor, num_rows: int) -> "_Before":
        """Copies, since the table is about to change. first: [B] decode row of each seat."""
        num_seats = len(first)
        known, drafted, plans, written, max_tokens, is_done = (
            rounds.table.column(name, num_seats).clone()
            for name in ("num_known", "num_drafted", "plans", "num_written", "max_tokens", "is_done")
        )
        planned = torch.where(plans != SHORT, rounds.slot_size, rounds.slots.most_masks)
        chain, runner_ups = (rounds.table.group(name, num_seats).clone() for name in ("chain", "runner_ups"))
        runner_ups, first_ids = runner_ups.view(num_seats, rounds.num_kept, -1), rounds.first_ids[:num_seats].long()
        return cls(known, drafted, plans, planned, written, max_tokens, is_done == 0, chain, runner_ups, first, first_ids, num_rows)

    def read(self, values: Tensor, row: Tensor) -> Tensor:
        """What rows of the readout say; rows that did not fit say anything."""
        return values[row.clamp(0, self.num_rows - 1)]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a forward decided. All [B]."""

    stands: Tensor  # tokens of the chain
    named: Tensor  # token that stands behind them
    second: Tensor  # and behind that, where `is_hit`
    is_all: Tensor  # every draft passed
    is_hit: Tensor  # the named token is a runner-up that was tried
    has_group: Tensor  # masks were made behind the accepted length
    plan: Tensor  # first row of the plan
    group: Tensor  # of the masks behind the accepted length
    runner_up: Tensor  # of the runner-up


@dataclass(frozen=True, slots=True)
class _Chain:
    """What the next forward runs."""

    chain: Tensor  # [B, N]
    runner_ups: Tensor  # [B, N, R]
    known: Tensor  # [B]
    drafted: Tensor  # [B]
    is_draft: Tensor  # [B, N]
    score: Tensor  # [B] confidence of the first draft, 0 where there is none


class SlidingRounds(SeatedRounds):
    """See `refusion.decoding.rounds.Rounds`."""

    def __init__(
        self,
        slots: SlotSettings,
        num_seats: int,
        *,
        mask_id: int,
        eos_ids: Tensor,
        device: torch.device,
        use_kernels: bool,
        max_rows: int | None = None,
    ) -> None:
        """max_rows: most decode rows of a forward; else what all seats can need."""
        assert slots.sliding, "other slots have rounds of their own"
        self.slots, self.slot_size, self.mask_id, self.eos_ids, self.use_kernels = slots, slots.slot_size, mask_id, eos_ids, use_kernels
        self.num_lengths, self.num_tried = slots.candidates(), num_tried(slots)
        self.num_kept = slots.slot_size + 1  # N
        self.fresh_rows = slots.slot_size
        self.report_width = report_width(slots.slot_size)
        self.table = SeatTable(num_seats, self._columns(), device)
        self.table.column("is_done", num_seats).fill_(1)
        buffers = RowBuffers(num_seats, self.num_kept, self.report_width, max_rows or 64 + num_seats * most_rows(slots) * 3 // 2, device)
        self.given_ids, self.seeds, self.attempts = buffers.given_ids, buffers.seeds, buffers.attempts
        self.source, self.target, self.report = buffers.source, buffers.target, buffers.report
        self._place = torch.arange(self.num_kept, device=device)  # [N] of the chain
        self.first_ids = torch.full((num_seats,), -1, dtype=torch.int32, device=device)
        """[B] for `settle`: what the last row of a prompt that this forward ran to its end says, -1 where it ran none."""

    def _columns(self) -> dict[str, int]:
        """What is known of a seat when it is admitted comes first."""
        names = ("prompt_length", "seed", "max_tokens", "is_done", "num_known", "num_drafted", "plans", "num_written", "num_forwards")
        return dict.fromkeys(names, 1) | {"chain": self.num_kept, "runner_ups": self.num_kept * max(self.slots.alternatives, 1)}

    def admit(self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1) -> None:
        """Every token of the prompt is a prompt row, so `last_token` says nothing new."""
        values = (prompt_length, seed, max_tokens, 0, 0, 0, 1, 0, 0)
        self.table.write(seat, dict(zip(self.table.columns, values, strict=False)))

    def retire(self, seat: int) -> None:
        self.table.column("is_done", seat + 1)[seat].fill_(1)

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        return rows_needed(report[:, NUM_KNOWN], report[:, NUM_DRAFTED], report[:, PLANS], self.slots, candidates)

    def first_draw(self, num_seats: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B] seed, position and attempt that the first token of every seat is drawn with."""
        column = self.table.column
        return column("seed", num_seats), column("prompt_length", num_seats) - 1, self._attempts(num_seats)

    def _attempts(self, num_seats: int) -> Tensor:
        """[B] that a forward draws with. Exact slots write what one token at a time would, which is drawn with the first."""
        written = self.table.column("num_written", num_seats)
        return written + 1 if self.slots.acceptance != "exact" else torch.ones_like(written)

    def drawn_at(self, rows: Rows) -> Tensor:
        """[T] positions that the noise of rows is keyed by.

        Where acceptance is exact, a mask has the noise of the row in front of it, which is to write the same: equal noise, more often equal
        tokens.
        """
        return rows.positions - (rows.token_ids == self.mask_id).int() if self.slots.acceptance == "exact" else rows.positions

    def read(self, report_row: np.ndarray) -> SeatReport:
        return seat_report(report_row, self.slot_size)

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
            from refusion.decoding.kernels.sliding import lay_out  # triton is there only where there are kernels

            lay_out(self, rows, spans, start=start, num_seats=num_seats, candidates=candidates, tiles=tiles, tile_start=tile_start)
            return
        cells = self._cells(num_seats, candidates)
        needed = cells.pop("is_needed").bool()  # [B, X]
        count = needed.sum(dim=1)
        end = count.cumsum(dim=0)
        row = (end - count)[:, None] + needed.cumsum(dim=1) - 1
        target = torch.where(needed, row, num_rows).clamp(max=num_rows).flatten()
        into = {
            name: getattr(rows, name) for name in ("token_ids", "positions", "seat", "segment", "rank", "parent", "visible", "is_trunk")
        }
        into |= {name: getattr(self, name)[:num_rows] for name in ("given_ids", "seeds", "attempts")}
        for name, array in into.items():
            put_rows(array, target, cells[name], PADDING if name == "seat" else 0)
        spans.row_start.copy_((end - count).clamp(max=num_rows) + start)
        spans.row_end.copy_(end.clamp(max=num_rows) + start)
        self._num_rows = count
        if tiles is not None:
            put_tiles(spans, tiles, tile_start)

    def _cells(self, num_seats: int, candidates: int) -> dict[str, Tensor]:
        """Everything a seat's rows could be, [B, X] each: chain, groups behind lengths, plan, alternatives."""
        prepared = num_lengths(self.slots, candidates)
        column, device = self.table.column, self.table.device
        known, drafted, plans = (column(name, num_seats)[:, None] for name in ("num_known", "num_drafted", "plans"))
        active = column("is_done", num_seats)[:, None] == 0
        chain = self.table.group("chain", num_seats)  # [B, N]
        runner_ups = self.table.group("runner_ups", num_seats).view(num_seats, self.num_kept, -1)  # [B, N, R]
        written = column("num_written", num_seats)[:, None]
        begins = written - known  # place of the chain's first token in the answer
        size, masks, lengths, tried, ups = self.slot_size, self.slots.most_masks, self.num_lengths, self.num_tried, self.slots.alternatives
        parts: list[tuple[Tensor, ...]] = []  # token, place behind the chain's first, segment, rank, parent, visible, trunk, given, needed

        def part(shape: torch.Size, *values: Tensor | int) -> None:
            # A number becomes a tensor where it is needed: a copy from the host could not be captured.
            whole = (value if isinstance(value, Tensor) else torch.full((), value, device=device) for value in values)
            parts.append(tuple(value.expand(shape).flatten(1) for value in whole))

        place = torch.arange(self.num_kept, device=device)  # of the chain
        following = torch.cat((chain[:, 1:], chain[:, :1]), dim=1)
        is_judging = place + 1 < known + drafted
        on_chain = place < known + drafted
        part(chain.shape, chain, place, CHAIN, place, NO_PARENT, 0, 1, torch.where(is_judging, following, 0), on_chain)
        mask = torch.arange(masks, device=device)
        length = torch.arange(1, lengths + 1, device=device)[:, None]  # [C, 1]
        seen = known[:, :, None] + length - 1  # [B, C, 1] the chain's tokens before the masks
        shape = torch.Size((num_seats, lengths, masks))
        is_prepared = (length <= prepared) & (length <= drafted[:, :, None])
        part(shape, self.mask_id, seen + mask, length, mask, CHAIN, seen, 0, 0, is_prepared)
        slot = torch.arange(size, device=device)
        planned = torch.where(plans != SHORT, size, masks)
        part(torch.Size((num_seats, size)), self.mask_id, known + drafted + slot, lengths + 1, slot, TRUNK, 0, 0, 0, slot < planned)
        if tried:
            length = torch.arange(1, tried + 1, device=device)[:, None, None]  # [A, 1, 1]
            which = torch.arange(ups, device=device)[:, None]
            row = torch.arange(masks + 1, device=device)
            seen = known[:, :, None, None] + length - 1  # [B, A, 1, 1]
            at = seen.clamp(max=self.num_kept - 1)[:, :, :, 0].expand(-1, -1, ups)
            tokens = runner_ups.gather(1, at)[..., None].clamp(min=0)  # [B, A, R, 1]; -1 where nothing was drafted
            segment = lengths + 2 + (length - 1) * ups + which
            shape = torch.Size((num_seats, tried, ups, masks + 1))
            is_tried = (length <= prepared) & (length <= drafted[:, :, None, None])
            part(shape, torch.where(row == 0, tokens, self.mask_id), seen + row, segment, row, CHAIN, seen, 0, 0, is_tried)
        names = ("token_ids", "place", "segment", "rank", "parent", "visible", "is_trunk", "given_ids", "is_needed")
        cells = {name: torch.cat([each[index].long() for each in parts], dim=1) for index, name in enumerate(names)}
        last = column("max_tokens", num_seats)[:, None] - 1  # masks behind the end stand at the end: no position lies past the context
        cells["positions"] = column("prompt_length", num_seats)[:, None] + torch.minimum(begins + cells.pop("place"), last)
        cells["is_needed"] *= active
        seat = torch.arange(num_seats, device=device)[:, None]
        for name, value in (
            ("seat", seat),
            ("seeds", column("seed", num_seats)[:, None]),
            ("attempts", self._attempts(num_seats)[:, None]),
        ):
            cells[name] = value.expand_as(cells["positions"])
        return cells

    @torch.no_grad()
    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        if self.use_kernels:
            from refusion.decoding.kernels.sliding import settle

            settle(self, readout, spans, start=self._start, num_seats=num_seats, candidates=candidates)
            return
        before = _Before.of(self, spans.row_start.long() - self._start, len(readout.token_ids))
        verdict = self._judge(before, readout, num_lengths(self.slots, candidates))
        following = self._next_chain(before, verdict, readout)
        final, num_final, is_over = self._final_tokens(before, verdict)
        active, column, group = before.is_active, self.table.column, self.table.group
        self._keep(torch.where(active, torch.minimum(verdict.stands, before.known + num_final), 0), before.first, spans, num_seats)
        changes = {
            "is_done": is_over,
            "num_known": following.known,
            "num_drafted": following.drafted,
            "plans": self._next_plans(before, verdict),
            "num_written": before.written + num_final,
            "num_forwards": column("num_forwards", num_seats) + 1,
            "chain": following.chain,
            "runner_ups": following.runner_ups.flatten(1),
        }
        for name, value in changes.items():
            into = group(name, num_seats)
            into.copy_(torch.where(active[:, None], value.view(num_seats, -1).long(), into))
        overflow = (before.first + self._num_rows - len(readout.token_ids)).clamp(min=0).minimum(self._num_rows)
        tokens = torch.where(active[:, None] & (self._place < num_final[:, None]), final, -1)
        drafts = torch.where(active[:, None] & following.is_draft, following.chain, -1)
        names = ("num_known", "num_drafted", "plans")
        state, has_end = [column(name, num_seats) for name in names], self._is_end(following.chain, following.is_draft)
        done, forwards = column("is_done", num_seats), column("num_forwards", num_seats)
        score = torch.where(active, following.score, 0.0).view(torch.int32)
        passed = torch.where(active & (before.drafted > 0), verdict.stands - before.known, -1)
        told = (score, passed, before.plans == WHOLE, before.written)
        scalars = (done, forwards, overflow, self._num_rows, spans.cached, *state, has_end, *told)
        first = torch.stack([each.int() for each in scalars], dim=1)
        self.report[:num_seats].copy_(torch.cat((first, tokens.int(), drafts.int()), dim=1))

    def _judge(self, before: "_Before", readout: Readout, prepared: int) -> "_Verdict":
        """What stands of the chain, and the rows behind it that were made for that; prepared: lengths."""
        known, drafted, place, slots = before.known, before.drafted, self._place, self.slots
        judge = before.first[:, None] + place - 1
        if slots.acceptance == "exact":
            passes = before.read(readout.token_ids, judge) == before.chain
        else:
            passes = before.read(readout.given_probability, judge) > slots.token_threshold
            if slots.acceptance == "argmax":
                passes |= before.read(readout.given_is_argmax, judge)
        is_draft = (place >= known[:, None]) & (place < (known + drafted)[:, None])
        stands = ((passes & is_draft) | (place < known[:, None])).long().cumprod(dim=1).sum(dim=1)
        named = torch.where(stands > 0, before.read(readout.token_ids, before.first + stands - 1), before.first_ids)
        is_all = stands == known + drafted
        length = stands - known + 1  # of the accepted drafts and the named token
        groups = before.first + known + drafted
        plan = groups + drafted.clamp(max=prepared) * slots.most_masks
        hit, is_hit = torch.zeros_like(known), torch.zeros_like(is_all)
        if self.num_tried:
            at = stands.clamp(max=self.num_kept - 1)[:, None, None]
            matches = before.runner_ups.gather(1, at.expand(-1, 1, slots.alternatives))[:, 0] == named[:, None]  # [B, R]
            is_hit = ~is_all & (length <= min(self.num_tried, prepared)) & matches.any(dim=1) & (named[:, None] != self.eos_ids).all(dim=1)
            hit = matches.long().argmax(dim=1)
        runner_up = plan + before.planned + ((length - 1) * slots.alternatives + hit) * (1 + slots.most_masks)
        group = groups + (length - 1) * slots.most_masks
        second = before.read(readout.token_ids, runner_up)
        return _Verdict(stands, named, second, is_all, is_hit, ~is_all & (length <= prepared), plan, group, runner_up)

    def _next_plans(self, before: "_Before", verdict: "_Verdict") -> Tensor:
        """[B] how the next forward plans. One without drafts says nothing of how predictable the text is."""
        is_long = verdict.stands - before.known >= self.slots.most_masks
        goes_on = verdict.is_all & ((before.drafted > 0) | (before.plans != SHORT))
        return torch.where(goes_on, WHOLE, torch.where(~verdict.is_all & is_long, WHOLE_BEHIND_FAILURE, SHORT))

    def _next_chain(self, before: "_Before", verdict: "_Verdict", readout: Readout) -> "_Chain":
        """What is known then, and drafts from the masks behind it but the first, in whose place the last known token stands."""
        masks, is_hit = self.slots.most_masks, verdict.is_hit
        source = torch.where(verdict.is_all, verdict.plan, torch.where(is_hit, verdict.runner_up + 1, verdict.group))
        drafted = torch.where(verdict.is_all, before.planned, torch.where(is_hit | verdict.has_group, masks, 1)) - 1
        known = 1 + is_hit.long()
        nth = self._place - known[:, None]  # draft
        is_draft = (nth >= 0) & (nth < drafted[:, None])
        row = source[:, None] + nth + 1
        chain = torch.where(is_draft, before.read(readout.token_ids, row), 0)
        chain[:, 0] = verdict.named
        chain[:, 1] = torch.where(is_hit, verdict.second, chain[:, 1])
        runner_ups = torch.full_like(before.runner_ups, -1)
        if self.slots.alternatives:
            runner_ups = torch.where(is_draft[..., None], before.read(readout.runner_ups, row), -1)
        score = torch.where(drafted > 0, before.read(readout.confidence, source + 1), 0.0)
        return _Chain(chain, runner_ups, known, drafted, is_draft, score)

    def _final_tokens(self, before: "_Before", verdict: "_Verdict") -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N], how many of them are final, and whether the answer is over: through the first EOS, no more than was asked for."""
        accepted, place = verdict.stands - before.known, self._place
        drafts = before.chain.gather(1, (before.known[:, None] + place).clamp(max=self.num_kept - 1))
        behind = torch.where(place == accepted[:, None], verdict.named[:, None], verdict.second[:, None])
        final = torch.where(place < accepted[:, None], drafts, behind)
        num_final = torch.minimum(accepted + 1 + verdict.is_hit, before.max_tokens - before.written)
        ends = (final[..., None] == self.eos_ids).any(dim=2) & (place < num_final[:, None])
        is_ended = ends.any(dim=1)
        num_final = torch.where(is_ended, ends.long().argmax(dim=1) + 1, num_final)
        return final, num_final, ~before.is_active | is_ended | (before.written + num_final >= before.max_tokens)

    def _is_end(self, tokens: Tensor, which: Tensor) -> Tensor:
        """[B] whether an EOS is among `which` of the tokens [B, N]."""
        return ((tokens[..., None] == self.eos_ids).any(dim=2) & which).any(dim=1)

    def _keep(self, kept: Tensor, first: Tensor, spans: Spans, num_seats: int) -> None:
        """The first `kept` [B] rows of the chain join the cache."""
        place = self._place
        is_kept = place < kept[:, None]
        count = num_seats * self.num_kept
        self.source[:count].copy_(torch.where(is_kept, first[:, None] + place + self._start, -1).flatten())
        self.target[:count].copy_(cache_targets(spans, spans.cached[:, None] + place, is_kept).flatten())
        spans.cached.add_(kept.int())
