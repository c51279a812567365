"""Settings of decoding: how tokens are drawn and how slots are planned and accepted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal

from refusion.errors import ConfigError

MAX_SLOT_SIZE = 256
"""Longer slots gain nothing and cost memory by their square."""
FREE_ROWS = 192
"""Mask rows a slot's infill groups may take: up to about 200 rows, a GPU forward at batch 1 costs the same (weights dominate)."""
MAX_ALTERNATIVES = 3
"""More runner-ups are hardly ever right."""
ALTERNATIVE_LENGTHS = 4
"""Alternatives are tried for drafts that fail among the first so many; later ones fail too rarely to be worth their rows."""
SLIDING_LENGTHS = 2
"""Accepted lengths a sliding forward prepares for, unless max_candidates says otherwise."""
EXACT_LENGTHS = 4
"""The same at most where acceptance is exact: how many pay depends on the machine and the load, and changes no token."""

Acceptance = Literal["paper", "argmax", "exact"]
Correction = Literal["paper", "autoregressive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How much is generated, and how tokens are drawn."""

    max_tokens: int = 256
    """Most new tokens, EOS included; at least 1."""
    temperature: float = 0.0
    """0 is greedy; above it drafts are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability, in (0, 1]."""
    seed: int = 0
    """Noise is keyed by (seed, position, attempt): the same seed gives the same text in any batch."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer like EOS does."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        is_usable = self.temperature == 0.0 or (self.temperature >= 1e-3 and math.isfinite(self.temperature))
        _require(is_usable, "temperature", self.temperature, "0 (greedy) or at least 0.001")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(not isinstance(self.stop, str) and all(self.stop), "stop", self.stop, "made of non-empty strings")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotParams:
    """How the answer is cut into slots and blocks, and which slots and drafts are trusted.

    A field left out is taken from the checkpoint's `refusion` block for the device, else from `SlotSettings`.
    """

    slot_size: int | None = None
    """Tokens in a slot (k of the paper)."""
    block_size: int | None = None
    """Tokens in a serial block, a multiple of slot_size."""
    serial_blocks: int | None = None
    """Number of serial blocks the whole answer is cut into (N of the paper); instead of block_size."""
    slot_threshold: float | None = None
    """A slot is chosen if its first drafted token is more probable than this, in [0, 1]."""
    token_threshold: float | None = None
    """A drafted token passes if it is more probable than this given what stands before it, in [0, 1]."""
    acceptance: Acceptance | None = None
    """`paper`: p > token_threshold; `argmax`: that, or the token is the most probable one; `exact`: it is the very token that would be
    written there, so that, but for the rounding of 16 bits, the text is the one that autoregressive decoding writes with the same weights
    and seed. For sliding slots. Where a checkpoint recommends `exact` and what is given has another rule, or no slots that slide, the
    nearest one stands in: `argmax` with a token_threshold of 1."""
    correction: Correction | None = None
    """What stands in for the first draft that fails: `paper`: the next mask prediction; `autoregressive`: the token that judged it. Then
    the last row of the prompt and of a finished slot names the first token of the slot behind it; one begun before that keeps its own."""
    alternatives: int | None = None
    """How many runner-ups of each draft are tried beside it: if the correction is one of them, it stands at once, the token behind it is
    known as well, and the next drafts are made behind it. 0 to 3; needs correction `autoregressive`."""
    infill_length: int | None = None
    """Masks behind a draft that failed, at most; left out: all up to the end of the slot. Each takes a row for every length prepared, and
    late ones seldom pass. With correction `autoregressive` the first stands in the place of the token that is named there, and drafts
    nothing."""
    max_candidates: int | None = None
    """Fused infill: for how many accepted lengths the next drafts are prepared in the same forward; 0: two-pass infill."""
    fuse_plan: bool | None = None
    """Put the next plan into the forward that verifies this one; False with max_candidates=0 is the plain two-pass algorithm."""
    sliding: bool | None = None
    """Slots begin where the text ends: what a forward accepts is final at once, and drafts run on past it. Behind drafts that all passed a
    whole slot is planned, behind a failed one as many tokens as `infill_length` says. Needs correction `autoregressive` and one slot to a
    block. Unless acceptance is `exact`, `max_candidates` can change which drafts there are, and so the text."""

    def __post_init__(self) -> None:
        is_cut_once = self.block_size is None or self.serial_blocks is None
        _require(is_cut_once, "serial_blocks", self.serial_blocks, "left out where block_size is given")
        # Whatever is given must be valid by itself; whether it fits a slot size or slots left out shows once these are known.
        known: dict[str, Any] = {} if self.slot_size is not None else {"slot_size": max(self.block_size or 1, 1)}
        self.resolve(known | ({"sliding": True} if self.acceptance == "exact" and self.sliding is None else {}))

    def resolve(self, recommended: Mapping[str, Any]) -> "SlotSettings":
        """Fill what was left out. Raises `ConfigError` naming a field that is out of range."""
        given = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        base = dict(recommended)
        if {"slot_size", "block_size", "serial_blocks"} & given.keys():
            # A block length belongs to its slot size: never combine a given one with the checkpoint's.
            base = {name: value for name, value in base.items() if name not in ("slot_size", "block_size", "serial_blocks")}
            base["slot_size"] = recommended.get("slot_size", SlotSettings().slot_size)
        if given.get("correction") == "paper":
            for name in ("alternatives", "infill_length"):
                base.pop(name, None)  # the checkpoint's go with its own correction
        has_blocks = "serial_blocks" in given or given.get("block_size") not in (None, (base | given).get("slot_size"))
        if given.get("correction") == "paper" or has_blocks:
            base.pop("sliding", None)  # what was asked for stays where it is
        if given.get("sliding") and not base.get("sliding"):
            base.pop("max_candidates", None)  # a number of lengths for slots that stay where they are
        slides = (base | given).get("sliding", False)
        if base.get("acceptance") == "exact":
            if "token_threshold" in given or not slides:
                base["acceptance"] = "argmax"
            if (base | given)["acceptance"] == "argmax":
                base.setdefault("token_threshold", 1.0)
        _require(not (slides and "slot_threshold" in given), "slot_threshold", self.slot_threshold, "left out where slots slide (sliding)")
        _require(not (slides and self.fuse_plan is False), "fuse_plan", self.fuse_plan, "left out where slots slide (sliding)")
        is_used = "token_threshold" not in given or given.get("acceptance") != "exact"
        _require(is_used, "token_threshold", self.token_threshold, "left out where acceptance is 'exact'")
        unknown = base.keys() - {field.name for field in fields(SlotSettings)}
        _require(not unknown, "refusion block", sorted(unknown), f"made of {', '.join(field.name for field in fields(SlotSettings))}")
        return SlotSettings(**(base | given))


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSettings:
    """`SlotParams` with every field decided; the defaults are written here. What each field means stands there."""

    slot_size: int = 8
    block_size: int | None = None  # None: one slot, unless serial_blocks is given
    serial_blocks: int | None = None
    slot_threshold: float = 0.9
    token_threshold: float = 0.4
    acceptance: Acceptance = "argmax"
    correction: Correction = "autoregressive"
    alternatives: int = 0
    infill_length: int | None = None  # None: to the end of the slot
    max_candidates: int | None = None  # None: what FREE_ROWS allows
    fuse_plan: bool = True
    sliding: bool = False

    def __post_init__(self) -> None:
        _require(1 <= self.slot_size <= MAX_SLOT_SIZE, "slot_size", self.slot_size, f"in [1, {MAX_SLOT_SIZE}]")
        _require(0.0 <= self.slot_threshold <= 1.0, "slot_threshold", self.slot_threshold, "in [0, 1]")
        _require(0.0 <= self.token_threshold <= 1.0, "token_threshold", self.token_threshold, "in [0, 1]")
        _require(self.acceptance in ("paper", "argmax", "exact"), "acceptance", self.acceptance, "'paper', 'argmax' or 'exact'")
        can_be_exact = self.acceptance != "exact" or self.sliding
        _require(can_be_exact, "acceptance", self.acceptance, "'paper' or 'argmax' unless slots slide (sliding)")
        _require(self.correction in ("paper", "autoregressive"), "correction", self.correction, "'paper' or 'autoregressive'")
        _require(0 <= self.alternatives <= MAX_ALTERNATIVES, "alternatives", self.alternatives, f"in [0, {MAX_ALTERNATIVES}]")
        can_try = self.alternatives == 0 or self.correction == "autoregressive"
        _require(can_try, "alternatives", self.alternatives, "0 unless correction is 'autoregressive'")
        _require(self.infill_length is None or self.infill_length >= 1, "infill_length", self.infill_length, "at least 1")
        _require(self.max_candidates is None or self.max_candidates >= 0, "max_candidates", self.max_candidates, "0 or above")
        _require(self.serial_blocks is None or self.serial_blocks >= 1, "serial_blocks", self.serial_blocks, "at least 1")
        if self.sliding:
            is_one = self.serial_blocks is None and self.block_size in (None, self.slot_size)
            _require(is_one, "block_size", self.block_size, f"slot_size={self.slot_size}, and serial_blocks left out, where slots slide")
            _require(self.correction == "autoregressive", "correction", self.correction, "'autoregressive' where slots slide")
        if self.block_size is not None:
            fits = self.block_size >= self.slot_size and self.block_size % self.slot_size == 0
            _require(fits, "block_size", self.block_size, f"a multiple of slot_size={self.slot_size}")

    def slots_per_block(self, max_tokens: int) -> int:
        """W: with serial_blocks, max_tokens is first rounded up to a multiple of slot_size * serial_blocks."""
        if self.serial_blocks is not None:
            return math.ceil(max_tokens / (self.slot_size * self.serial_blocks))
        return (self.block_size or self.slot_size) // self.slot_size

    def num_slots(self, max_tokens: int) -> int:
        """S: slots beyond the last wanted token do not exist."""
        return math.ceil(max_tokens / self.slot_size)

    @property
    def most_masks(self) -> int:
        """Rows of an infill group at most."""
        return min(self.infill_length or self.slot_size, self.slot_size)

    def most_drafted(self, is_infill: Any) -> Any:
        """Tokens drafted behind those that stand, at most: a plan drafts whole slots, an infill as many as a group has masks.

        is_infill: whether the forward is one, a bool or an array or tensor of them; the result is of the same kind, in integers.
        """
        return self.slot_size - (self.slot_size - self.most_masks) * is_infill

    @property
    def names_first(self) -> bool:
        """Whether the last row of the prompt names the first token of the answer, as the last row of a slot names that of the next."""
        return self.correction == "autoregressive"

    def candidates(self) -> int:
        """Accepted lengths a fused infill forward prepares for: 1 .. this many beyond what is verified.

        Length a takes slot_size - a mask rows, at most infill_length. Unless max_candidates says otherwise, as many lengths as FREE_ROWS
        rows hold: all 15 for slots of 16, 6 for slots of 32.
        """
        sliding = EXACT_LENGTHS if self.acceptance == "exact" else SLIDING_LENGTHS
        if self.max_candidates is not None or self.sliding:
            return min(sliding if self.max_candidates is None else self.max_candidates, self.slot_size - 1)
        rows = accumulate(min(self.slot_size - length, self.most_masks) for length in range(1, self.slot_size))
        return sum(total <= FREE_ROWS for total in rows)


def _require(is_fine: bool, field: str, value: object, wanted: str) -> None:
    if not is_fine:
        raise ConfigError(f"{field} is {value!r}; it must be {wanted}")
