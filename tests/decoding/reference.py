"""The plain two-pass algorithm word by word for one request, slow, in Python lists.

It shares no code with the decoder but the readout of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scripted import Row, Script

from refusion.decoding.forward import Readout, Rows, readout_logits
from refusion.decoding.params import ALTERNATIVE_LENGTHS
from refusion.decoding.sampling import Draw


@dataclass
class Reference:
    """Decodes one prompt; `token_ids` and `num_forwards` are the result."""

    script: Script
    prompt: list[int]
    slot_size: int
    slots_per_block: int
    slot_threshold: float
    token_threshold: float
    accept_argmax: bool
    max_tokens: int
    mask_id: int
    eos_ids: Sequence[int]
    banned: Sequence[int] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    corrects: bool = False  # the row that rejects a draft also names the token that replaces it
    infill_length: int | None = None  # tokens drafted behind a cut
    alternatives: int = 0  # runner-ups of a draft that may stand in its place at once

    def run(self) -> Reference:
        self.committed: list[Row] = []
        for position, token in enumerate(self.prompt):
            self.committed.append(Row.of(token, position, self.committed))
        self.answer: dict[int, int] = {}  # place in the answer -> token
        self.num_forwards, self.num_drafts = 0, 0
        self.firsts: dict[int, int] = {}  # slot -> its first token, where the slot before it has named it, or the prompt
        if self.corrects:
            self.firsts[0] = self._read(self.committed[-1], attempt=1)[0]
        self.runner_ups: dict[int, list[list[int]]] = {}  # slot -> per place those of its draft
        num_slots = self.num_slots = -(-self.max_tokens // self.slot_size)
        self.closed: set[int] = set()
        for block in range(0, num_slots, self.slots_per_block):
            self.open = [slot for slot in range(block, min(block + self.slots_per_block, num_slots)) if slot not in self.closed]
            while self.open:
                self._round()
            if self.closed:
                break
        self.token_ids = self._text()
        return self

    def _text(self) -> list[int]:
        token_ids: list[int] = []
        for place in range(self.max_tokens):
            token_ids.append(self.answer[place])
            if token_ids[-1] in self.eos_ids:
                break
        return token_ids

    def _round(self) -> None:
        drafts = self._plan()
        chosen = [slot for slot in self.open if drafts[slot][0][1] > self.slot_threshold]
        if not chosen:
            chosen = [max(self.open, key=lambda slot: (drafts[slot][0][1], -slot))]
        for slot in chosen:
            self.firsts.pop(slot, None)
        self._verify({slot: [token for token, _ in drafts[slot]] for slot in chosen})

    def _plan(self) -> dict[int, list[tuple[int, float]]]:
        """Per open slot the drafts with their confidence."""
        self.num_forwards += 1
        self.num_drafts += 1
        seen = list(self.committed)
        drafts: dict[int, list[tuple[int, float]]] = {}
        for slot in self.open:
            drafts[slot], self.runner_ups[slot] = [], []
            for place in range(slot * self.slot_size, (slot + 1) * self.slot_size):
                row = Row.of(self.mask_id, len(self.prompt) + place, seen)
                seen.append(row)
                token, confidence, _, _ = self._read(row)
                drafts[slot].append((token, confidence))
                self.runner_ups[slot].append(self._runner_ups(row))
            if slot in self.firsts:
                drafts[slot][0] = (self.firsts[slot], drafts[slot][0][1])
                self.runner_ups[slot][0] = []
        return drafts

    def _verify(self, drafts: dict[int, list[int]]) -> None:
        self.num_forwards += 1
        seen = list(self.committed)
        rows = {slot: self._forward(slot, tokens, seen) for slot, tokens in drafts.items()}  # `seen` grows from slot to slot
        passes = {slot: self._passes(rows[slot], drafts[slot], 0) for slot in drafts}
        prefix: list[tuple[int, int]] = []  # (slot, place in it)
        for slot in drafts:
            for place in range(self.slot_size):
                if not passes[slot][place]:
                    break
                prefix.append((slot, place))
            else:
                continue
            break
        ends = [index for index, (slot, place) in enumerate(prefix) if drafts[slot][place] in self.eos_ids]
        if ends:  # a
            for slot, place in prefix[: ends[0] + 1]:
                self._commit(rows[slot][place])
            touched = {slot for slot, _ in prefix[: ends[0] + 1]}
            self._close_behind(prefix[ends[0]][0])
            self.open = [slot for slot in self.open if slot not in touched]
            self._name_firsts({slot: rows[slot] for slot in touched if slot != prefix[ends[0]][0]})
        elif len(prefix) >= self.slot_size:  # b
            for slot in list(drafts)[: len(prefix) // self.slot_size]:
                for row in rows[slot]:
                    self._commit(row)
                self.open.remove(slot)
            self._name_firsts({slot: rows[slot] for slot in list(drafts)[: len(prefix) // self.slot_size]})
        else:  # c
            verified = {slot: self._prefix_length(passes[slot]) for slot in drafts}
            judged = {slot: self._judged(rows[slot], verified[slot]) for slot in drafts}
            for slot in drafts:
                self._try_alternatives(slot, drafts, verified, judged, 0)
            self._infill(drafts, verified, judged)

    def _infill(self, drafts: dict[int, list[int]], verified: dict[int, int], judged: dict[int, int]) -> None:
        chosen = list(drafts)
        rows: dict[int, list[Row]] = {}
        while True:
            chosen = self._through_end(chosen, drafts, verified)
            # The tokens that stand were verified with their siblings in view, so a complete slot is forwarded alone before it counts.
            if rows and all(self._is_complete(slot, drafts, verified) for slot in chosen):
                break
            self.num_forwards += 2
            self.num_drafts += 1
            for slot in chosen:
                if not self._is_complete(slot, drafts, verified):
                    drafts[slot] = self._redraft(slot, drafts[slot][: verified[slot]])
                    if self.corrects:
                        drafts[slot][verified[slot]] = judged[slot]
            rows = {slot: self._forward(slot, drafts[slot], list(self.committed)) for slot in chosen}
            for slot in chosen:
                if not self._is_complete(slot, drafts, verified):
                    before = verified[slot]
                    verified[slot] = self._prefix_length(self._passes(rows[slot], drafts[slot], before))
                    judged[slot] = self._judged(rows[slot], verified[slot])
                    self._try_alternatives(slot, drafts, verified, judged, before)
        for slot in chosen:
            for place in range(self._length(slot, drafts, verified)):
                self._commit(rows[slot][place])
            self.open.remove(slot)
        whole = [slot for slot in chosen if not any(token in self.eos_ids for token in drafts[slot])]
        self._name_firsts({slot: rows[slot] for slot in whole})

    def _name_firsts(self, whole: dict[int, list[Row]]) -> None:
        """The last row of a slot that is final names the first token of the slot behind it, if that is open."""
        last_open = self.num_slots if not self.closed else 0
        for slot, rows in whole.items():
            is_later = slot + 1 < last_open and (slot + 1) % self.slots_per_block == 0
            if self.corrects and (slot + 1 in self.open or is_later):
                self.firsts[slot + 1] = self._read(rows[-1], attempt=self.num_drafts + 1)[0]

    def _try_alternatives(
        self, slot: int, drafts: dict[int, list[int]], verified: dict[int, int], judged: dict[int, int], before: int
    ) -> None:
        """A correction that is a runner-up of the draft it replaces stands, and its own row names the token behind it."""
        place = verified[slot]
        if self._is_complete(slot, drafts, verified) or place >= self.slot_size - 1 or place - before > ALTERNATIVE_LENGTHS:
            return
        if judged[slot] in self.runner_ups[slot][place] and judged[slot] not in self.eos_ids:
            drafts[slot][place] = judged[slot]
            verified[slot] += 1
            judged[slot] = self._judged(self._forward(slot, drafts[slot][: place + 1], list(self.committed)), place + 1)

    def _through_end(self, chosen: list[int], drafts: dict[int, list[int]], verified: dict[int, int]) -> list[int]:
        """The chosen slots up to the first in which an EOS stands; slots behind it are closed."""
        for index, slot in enumerate(chosen):
            if any(token in self.eos_ids for token in drafts[slot][: verified[slot]]):
                self._close_behind(slot)
                return chosen[: index + 1]
        return chosen

    def _is_complete(self, slot: int, drafts: dict[int, list[int]], verified: dict[int, int]) -> bool:
        stands = drafts[slot][: verified[slot]]
        return len(stands) == self.slot_size or any(token in self.eos_ids for token in stands)

    def _length(self, slot: int, drafts: dict[int, list[int]], verified: dict[int, int]) -> int:
        ends = [place for place, token in enumerate(drafts[slot][: verified[slot]]) if token in self.eos_ids]
        return ends[0] + 1 if ends else verified[slot]

    def _redraft(self, slot: int, stands: list[int]) -> list[int]:
        seen = list(self.committed)
        self._forward(slot, stands, seen)
        drafts = list(stands)
        for place in range(len(stands), self.slot_size):
            row = Row.of(self.mask_id, len(self.prompt) + slot * self.slot_size + place, seen)
            seen.append(row)
            if place < len(stands) + (self.infill_length or self.slot_size):
                drafts.append(self._read(row)[0])
                self.runner_ups[slot][place] = self._runner_ups(row)
            else:
                drafts.append(self.mask_id)
                self.runner_ups[slot][place] = []
        return drafts

    def _forward(self, slot: int, tokens: list[int], seen: list[Row]) -> list[Row]:
        """Rows of a slot's tokens behind `seen`, which they join."""
        rows: list[Row] = []
        for place, token in enumerate(tokens):
            rows.append(Row.of(token, len(self.prompt) + slot * self.slot_size + place, seen))
            seen.append(rows[-1])
        return rows

    def _passes(self, rows: list[Row], drafts: list[int], num_verified: int) -> list[bool]:
        passes = [True] * (num_verified + 1)
        for place in range(num_verified + 1, self.slot_size):
            _, _, probability, is_argmax = self._read(rows[place - 1], drafts[place])
            passes.append(probability > self.token_threshold or (self.accept_argmax and is_argmax))
        return passes[: self.slot_size]

    def _judged(self, rows: list[Row], num_verified: int) -> int:
        """What the row before the first draft that failed predicts, drawn in the forward that judged it."""
        if num_verified == self.slot_size:
            return -1
        return self._read(rows[num_verified - 1], attempt=self.num_drafts + 1)[0]

    @staticmethod
    def _prefix_length(passes: list[bool]) -> int:
        return passes.index(False) if False in passes else len(passes)

    def _commit(self, row: Row) -> None:
        self.committed.append(row)
        self.answer[row.position - len(self.prompt)] = row.token

    def _close_behind(self, last: int) -> None:
        self.closed |= {slot for slot in self.open if slot > last} | {-1}  # -1: the answer has an end, further blocks do not exist
        self.open = [slot for slot in self.open if slot <= last]

    def _read(self, row: Row, given: int = 0, attempt: int | None = None) -> tuple[int, float, float, bool]:
        """(token, its probability, probability of `given`, whether `given` is the most probable)."""
        readout = self._readout(row, given, attempt)
        return int(readout.token_ids), float(readout.confidence), float(readout.given_probability), bool(readout.given_is_argmax)

    def _runner_ups(self, row: Row) -> list[int]:
        return self._readout(row, 0, None).runner_ups[0].tolist()

    def _readout(self, row: Row, given: int, attempt: int | None) -> Readout:
        draw = Draw(self.temperature, self.top_p, torch.tensor([self.seed]), torch.tensor([attempt or self.num_drafts]))
        keys = Rows(draw.seeds, draw.attempts, torch.tensor([row.position]), torch.tensor([given]))
        banned = torch.tensor(list(self.banned), dtype=torch.long)
        return readout_logits(self.script(row).clone()[None], banned, draw, keys, self.alternatives)
