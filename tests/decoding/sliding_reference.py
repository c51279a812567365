"""Sliding slots word by word for one request, slow, in Python lists: only the rows that matter are ever run.

It shares no code with the rounds but the readout of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scripted import Row, Script

from refusion.decoding.forward import Readout, Rows, readout_logits
from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.sampling import Draw


@dataclass
class SlidingReference:
    """Decodes one prompt; `token_ids` and `num_forwards` are the result."""

    script: Script
    prompt: list[int]
    slots: SlotSettings
    max_tokens: int
    mask_id: int
    eos_ids: Sequence[int]
    banned: Sequence[int] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_forwards: int = 0

    def run(self) -> SlidingReference:
        rows: list[Row] = []
        for position, token in enumerate(self.prompt):
            rows.append(Row.of(token, position, rows))
        # The forward of the prompt names the first token and plans a slot.
        plan = self._masks(rows, 0, self.slots.slot_size)
        first = self._named(rows[-1])
        known, drafts, plans_whole = [first], plan[1:], True
        self.num_forwards = 1
        while not self._write(known if len(self.token_ids) == 0 else []):
            self.num_forwards += 1
            attempt_before = len(self.token_ids)
            chain = [(token, ()) for token in known] + drafts
            seen = list(rows)
            run: list[Row] = []
            start = len(self.token_ids) - len(known)
            for place, (token, _) in enumerate(chain):
                run.append(Row.of(token, self._position(start + place), seen))
                seen.append(run[-1])
            stands = num_known = len(known)
            while stands < len(chain) and self._passes(run[stands - 1], chain[stands][0]):
                stands += 1
            named = self._named(run[stands - 1])
            before = [*rows, *run[:stands]]
            accepted = [token for token, _ in chain[len(known) : stands]]
            length = stands - len(known) + 1
            ups = chain[stands][1] if stands < len(chain) else ()
            prepared = self.slots.candidates()
            place = start + stands
            new_known = [named]
            if stands == len(chain):
                new_drafts = self._masks(before, place, self.slots.slot_size if plans_whole else self.slots.most_masks)[1:]
            elif length <= min(ALTERNATIVE_LENGTHS, prepared) and named in ups and named not in self.eos_ids:
                row = Row.of(named, self._position(place), before)
                new_known.append(self._named(row))
                new_drafts = self._masks([*before, row], place + 1, self.slots.most_masks)[1:]
            elif length <= prepared:
                new_drafts = self._masks(before, place, self.slots.most_masks)[1:]
            else:
                new_drafts = []
            is_long = len(accepted) >= (self.slots.infill_length or self.slots.slot_size)
            plans_whole = (len(chain) > num_known or plans_whole) if stands == len(chain) else is_long
            assert len(self.token_ids) == attempt_before, "everything of a forward is drawn with one attempt"
            rows, known, drafts = before, new_known, new_drafts
            if self._write([*accepted, *known]):
                break
        return self

    def _write(self, tokens: list[int]) -> bool:
        """Whether the answer is over."""
        for token in tokens:
            self.token_ids.append(token)
            if token in self.eos_ids or len(self.token_ids) == self.max_tokens:
                return True
        return False

    def _position(self, place: int) -> int:
        return len(self.prompt) + min(place, self.max_tokens - 1)

    def _masks(self, seen: list[Row], place: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
        """Drafts of `count` masks from `place` on, each with its runner-ups."""
        seen, found = list(seen), []
        for index in range(count):
            seen.append(Row.of(self.mask_id, self._position(place + index), seen))
            readout = self._readout(seen[-1], 0, shift=-1 if self.slots.acceptance == "exact" else 0)
            found.append((int(readout.token_ids), tuple(readout.runner_ups[0].tolist())))
        return found

    def _named(self, row: Row) -> int:
        return int(self._readout(row, 0).token_ids)

    def _passes(self, row: Row, token: int) -> bool:
        readout = self._readout(row, token)
        if self.slots.acceptance == "exact":
            return int(readout.token_ids) == token
        is_argmax = self.slots.acceptance == "argmax" and bool(readout.given_is_argmax)
        return float(readout.given_probability) > self.slots.token_threshold or is_argmax

    def _readout(self, row: Row, given: int, shift: int = 0) -> Readout:
        attempt = 1 if self.slots.acceptance == "exact" else len(self.token_ids) + 1
        draw = Draw(self.temperature, self.top_p, torch.tensor([self.seed]), torch.tensor([attempt]))
        keys = Rows(draw.seeds, draw.attempts, torch.tensor([row.position + shift]), torch.tensor([given]))
        banned = torch.tensor(list(self.banned), dtype=torch.long)
        return readout_logits(self.script(row).clone()[None], banned, draw, keys, self.slots.alternatives)
