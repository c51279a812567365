"""Sliding slots in the simplest way: one request, two forwards a round, a host loop. The plain twin of `refusion.decoding.sliding_rounds`.

A round runs the chain (known tokens and drafts), keeps what passes, and only then runs the masks behind it, where the rounds over flat rows
do both at once. The tokens are the same, and so is the number of rounds, which there is the number of forwards.
"""

# torch leaves the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from refusion.decoding.forward import ForwardBatch, ForwardFn, Readout
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.sampling import Draw
from refusion.decoding.sliding_report import num_tried
from refusion.model.segments import Segments

Keep = Callable[[Readout], int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted token, how probable it was, and its runner-ups."""

    token: int
    confidence: float
    runner_ups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlidingRound:
    """What a round judged, and what that made final."""

    drafts: list[Draft]
    is_infill: bool  # they are of masks behind a draft that failed, not of a plan
    num_passed: int
    final: list[int]


@dataclass(frozen=True, slots=True)
class SlidingTrace:
    """An answer, round by round."""

    rounds: list[SlidingRound]

    @property
    def token_ids(self) -> list[int]:
        return [token for each in self.rounds for token in each.final]

    @property
    def num_rounds(self) -> int:
        return len(self.rounds)


def decode_sliding(
    forward: ForwardFn, prompt_ids: Sequence[int], slots: SlotSettings, sampling: SamplingParams, *, mask_id: int, eos_ids: Sequence[int]
) -> SlidingTrace:
    """Decode one prompt."""
    return _Sliding(forward, list(prompt_ids), slots, sampling, mask_id, set(eos_ids)).run()


class _Sliding:
    def __init__(
        self, forward: ForwardFn, prompt_ids: list[int], slots: SlotSettings, sampling: SamplingParams, mask_id: int, eos_ids: set[int]
    ) -> None:
        self.forward, self.prompt_ids, self.slots, self.sampling = forward, prompt_ids, slots, sampling
        self.mask_id, self.eos_ids = mask_id, eos_ids
        self.written: list[int] = []
        self.cache = forward.new_cache(1, len(prompt_ids) + sampling.max_tokens + 2 * slots.slot_size + 2)

    def run(self) -> SlidingTrace:
        slots, lengths = self.slots, self.slots.candidates()
        readout = self._forward(self.prompt_ids, -len(self.prompt_ids), keep=lambda readout: len(self.prompt_ids))
        first = int(readout.token_ids[0, -1])
        drafts = self._masks([], 0, slots.slot_size)
        final, is_over = self._write([first])
        known, plans_whole, is_infill, rounds = [first], True, False, [SlidingRound([], False, 0, final)]
        while not is_over:
            start = len(self.written) - len(known)
            chain, has_drafts = [*known, *(draft.token for draft in drafts)], bool(drafts)
            stands = 0

            def passing(readout: Readout, chain: list[int] = chain, num_known: int = len(known)) -> int:
                nonlocal stands
                stands = self._num_passing(readout, chain, num_known)
                return stands

            judged, was_infill = drafts, is_infill
            readout = self._forward(chain, start, keep=passing)
            named = int(readout.token_ids[0, stands - 1])
            accepted, length = chain[len(known) : stands], stands - len(known) + 1
            runner_ups = () if stands == len(chain) else drafts[stands - len(known)].runner_ups
            known = [named]
            if stands == len(chain):
                drafts = self._masks([], start + stands, slots.slot_size if plans_whole else slots.most_masks)
            elif length <= num_tried(slots) and named in runner_ups and named not in self.eos_ids:
                second = self._forward([named], start + stands)
                known.append(int(second.token_ids[0, 0]))
                drafts = self._masks([named], start + stands + 1, slots.most_masks)
            else:
                drafts = self._masks([], start + stands, slots.most_masks) if length <= lengths else []
            is_long = len(accepted) >= slots.most_masks
            plans_whole = (has_drafts or plans_whole) if stands == len(chain) else is_long
            is_infill = stands < len(chain) or not plans_whole
            final, is_over = self._write([*accepted, *known])
            rounds.append(SlidingRound(judged, was_infill, len(accepted), final))
        return SlidingTrace(rounds)

    def _masks(self, before: list[int], place: int, count: int) -> list[Draft]:
        """Drafts of `count` masks from `place` of the answer on, behind tokens that are not cached; the first place is named otherwise."""
        # Exact drafts are drawn with the noise of the row in front, which is to write the same: equal noise, more often equal tokens.
        shift = -1 if self.slots.acceptance == "exact" else 0
        readout = self._forward([*before, *[self.mask_id] * count], place - len(before), shift=shift)
        rows = range(len(before) + 1, len(before) + count)
        return [
            Draft(int(readout.token_ids[0, row]), float(readout.confidence[0, row]), tuple(readout.runner_ups[0, row].tolist()))
            for row in rows
        ]

    def _num_passing(self, readout: Readout, chain: list[int], num_known: int) -> int:
        """Tokens of the chain that stand: what is known, and drafts up to the first that fails."""
        if self.slots.acceptance == "exact":
            passes = readout.token_ids[0, :-1] == torch.tensor(chain[1:])
        else:
            passes = readout.given_probability[0] > self.slots.token_threshold
            if self.slots.acceptance == "argmax":
                passes = passes | readout.given_is_argmax[0]
        for place in range(num_known, len(chain)):
            if not bool(passes[place - 1]):
                return place
        return len(chain)

    def _write(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Add to the answer. Returns what of it was added, and whether the answer is over."""
        for count, token in enumerate(tokens, 1):
            self.written.append(token)
            if token in self.eos_ids or len(self.written) == self.sampling.max_tokens:
                return tokens[:count], True
        return tokens, False

    def _forward(self, tokens: list[int], start: int, keep: Keep | None = None, shift: int = 0) -> Readout:
        """Tokens from place `start` of the answer on, each after those before it; so many as `keep` says of the readout are kept."""
        token_ids = torch.tensor([tokens])
        place = torch.arange(start, start + len(tokens))
        last = self.sampling.max_tokens - 1  # masks behind the end stand at the end
        positions = (len(self.prompt_ids) + place.clamp(max=last))[None]
        everything = torch.ones_like(token_ids, dtype=torch.bool)
        given_ids = torch.cat((token_ids[:, 1:], torch.zeros_like(token_ids[:, :1])), dim=1)
        # Everything of a round is drawn with one attempt: what was written when it began, or always the first.
        attempt = 1 if self.slots.acceptance == "exact" else len(self.written) + 1
        keys = torch.tensor([self.sampling.seed]), torch.tensor([attempt])
        draw = Draw(self.sampling.temperature, self.sampling.top_p, *keys, shift)
        count = self.slots.alternatives
        batch = ForwardBatch(token_ids, positions, Segments.causal(everything), everything, given_ids, draw, count)
        readout = self.forward(batch, self.cache)
        kept = 0 if keep is None else keep(readout)
        rows = torch.arange(len(tokens))[None]
        self.cache.keep(rows, rows < kept)
        return readout
