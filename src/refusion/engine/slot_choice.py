"""Which slots suit this machine: of the settings a checkpoint knows, the one that its expectations and the cost of forwards call fastest.

What a setting brings (tokens of a forward) and takes (rows of a forward) depends on the model alone and stands in the checkpoint, as
`benchmarks/cpu_slots.py` counted it; what rows cost depends on the machine and is measured (`refusion.engine.costs`). Equal tables give
equal choices. What a user gives is never chosen here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refusion.engine.costs import CostTable
from refusion.errors import CheckpointError

HOST_SECONDS = 2e-3
"""Of a slot forward on a CPU, outside the network."""
HOST_SECONDS_AUTOREGRESSIVE = 0.7e-3
GAIN = 1.05
"""Another choice than the first must be so much faster: predictions are no measurements."""
SIZES = ("slot_size", "block_size", "serial_blocks", "max_candidates")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a setting did with one kind of text."""

    tokens_per_forward: float
    rows: Mapping[str, float]
    """Share of the forwards by their decode rows."""

    def tokens_per_second(self, costs: CostTable) -> float:
        """By this cost table."""
        numbers, shares = np.array([int(number) for number in self.rows]), np.array(list(self.rows.values()))
        seconds = float((np.asarray(costs.cost(numbers)) * shares).sum() / shares.sum())
        return self.tokens_per_forward / (seconds + HOST_SECONDS)


@dataclass(frozen=True, slots=True)
class Choice:
    """Slot settings, and what they are expected to do by kind of text."""

    slots: Mapping[str, Any]
    expected: Sequence[Expected]

    def speedups(self, costs: CostTable) -> list[float]:
        """Speed over that of autoregressive decoding, by kind of text."""
        seconds = float(costs.cost(1)) + HOST_SECONDS_AUTOREGRESSIVE
        return [seconds * each.tokens_per_second(costs) for each in self.expected]


def read_choices(found: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """The `choices` of a checkpoint's slots. Raises `CheckpointError` if they are none."""
    try:
        choices = [
            Choice(
                {name: value for name, value in entry.items() if name != "expected"},
                [Expected(float(each["tokens_per_forward"]), {str(int(key)): float(each["rows"][key]) for key in each["rows"]})
                 for each in entry["expected"]],
            )
            for entry in found
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"choices of the checkpoint's slots are malformed ({error!r}); see benchmarks/cpu_slots.py") from error
    sound = all(choice.expected and all(each.rows and each.tokens_per_forward > 0 for each in choice.expected) for choice in choices)
    if not sound or any(choice.slots.keys() - set(SIZES) for choice in choices):
        raise CheckpointError(f"choices of the checkpoint's slots need expectations and may name {', '.join(SIZES)} alone")
    return choices


def choose(choices: Sequence[Choice], costs: CostTable) -> Mapping[str, Any]:
    """Slot settings of the fastest, by the geometric mean over the kinds of text; of the first if no other is clearly faster.

    One that is slower than autoregressive decoding on some kind of text comes after all that are not, and among those its worst counts.
    """
    speedups = [choice.speedups(costs) for choice in choices]
    losing = all(min(each) < 1.0 for each in speedups)
    scores = [min(each) if losing else float(np.exp(np.mean(np.log(each)))) * (min(each) >= 1.0) for each in speedups]
    best = int(np.argmax(scores))
    return choices[best if scores[best] > GAIN * scores[0] else 0].slots
