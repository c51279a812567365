"""Slots: cutting an answer into them, and the training rows that follow from an order and a set of masked slots.

Everything here is a pure function of its arguments and an explicit generator, in numpy, one document at a time. A row says per token
what to predict and what it may see; packing rows, building masks and losses is left to `refusion.training`.

Visibility, for every layout alike: inside its document token i sees token j if j < visible[i], or if both belong to the same mask group
(group > 0) and j <= i, or to the same bidirectional group (group < 0). A clean token of a causal layout has visible = i + 1, group 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

IGNORED = -100
NO_TERM, AR_TERM, MDM_TERM = 0, 1, 2
DEFAULT_SLOT_SIZES = (4, 8, 16, 32)
MIN_MASK_PROBABILITY = 1e-3
Noise = Literal["uniform", "cosine", "clipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotRow:
    """One document as the network sees it. All arrays are [T]; `labels` are aligned with the logits (no shift is left to do)."""

    input_ids: IntArray
    position_ids: IntArray
    labels: IntArray
    """Token to predict, IGNORED (-100) where there is none."""
    terms: IntArray
    """NO_TERM, AR_TERM or MDM_TERM: the part of the loss a target belongs to."""
    visible: IntArray
    """Index in the row of the first token that a token does not see, its mask group aside."""
    group: IntArray
    """0 for prompt and clean tokens, 1, 2, ... for mask groups (causal inside), -1, -2, ... for bidirectional ones."""
    teacher_rows: IntArray
    """Index in the *original text* (prompt + answer) whose plain causal logits predict the same target; -1 where none does."""
    mask_probability: float | FloatArray
    """p of the masking draw, or [T] where tokens differ in it; masked targets weigh num_units / (p * answer_length)."""
    answer_length: int
    """|answer| of the weights: answer tokens that masks may stand for, those behind its end included."""
    slot_size: int
    num_units: int = 1
    """The row's share in the normaliser of the MDM term: 1 for a mean over documents, answer_length for a mean over answer tokens."""

    @property
    def is_masked(self) -> BoolArray:
        return self.terms == MDM_TERM

    @property
    def weights(self) -> FloatArray:
        """[T] weight of each target before the global normalisers: 1 for AR, units / (p * |answer|) for MDM, 0 without a target."""
        masked_weight = self.num_units / (self.mask_probability * self.answer_length)
        return np.where(self.terms == MDM_TERM, masked_weight, (self.terms == AR_TERM).astype(np.float64))


def row_generator(seed: int, epoch: int, example_id: int) -> np.random.Generator:
    """The generator that corrupts one example in one epoch, whatever batch or process it lands in."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, example_id))))


def keyed_uniforms(seed: int, epoch: int, example_ids: IntArray, stream: int) -> FloatArray:
    """Uniform numbers in [0, 1), one per example, each a function of (seed, epoch, example id, stream) alone (SplitMix64).

    For choices that planning needs for many examples at once, such as the layout of a row.
    """
    key = np.zeros(len(example_ids), dtype=np.uint64)
    for word in (np.uint64(seed), np.uint64(epoch), np.uint64(stream), example_ids.astype(np.uint64)):
        key = _mix(key ^ _mix(word + np.zeros_like(key)))
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def cut_slots(answer_length: int, slot_size: int, first_length: int | None = None) -> IntArray:
    """Borders [S + 1] of consecutive slots: 0, first_length, first_length + slot_size, ..., answer_length. The last may be short.

    cut_slots(10, 4) is [0, 4, 8, 10]; cut_slots(10, 4, 1) is [0, 1, 5, 9, 10].
    """
    assert min(answer_length, slot_size) > 0, (answer_length, slot_size)
    first = slot_size if first_length is None else first_length
    assert 0 < first <= slot_size, (first, slot_size)
    inner = np.arange(min(first, answer_length), answer_length, slot_size, dtype=np.int64)
    return np.concatenate([_array([0]), inner, _array([answer_length])])


def permute_slots(
    prompt_ids: Sequence[int] | IntArray,
    answer_ids: Sequence[int] | IntArray,
    *,
    mask_token_id: int,
    generator: np.random.Generator,
    slot_size: int | None = None,
    slot_sizes: Sequence[int] = DEFAULT_SLOT_SIZES,
    keep_text_order: bool = False,
    noise: Noise = "uniform",
    num_behind: int = 0,
) -> SlotRow:
    """Corrupt one example as the paper does: prompt | clean slots in random order | masked slots in text order.

    Draws, in this order: the slot size (unless given), the masking probability p as `noise` says (`mask_probability`), which slots are
    masked with probability p each, the order of the clean ones (kept as in the text with `keep_text_order`). The answer must not be empty;
    the slots go on for `num_behind` tokens behind its end (`permuted_row`).
    """
    size = int(generator.choice(_array(slot_sizes))) if slot_size is None else slot_size
    borders = cut_slots(len(answer_ids) + num_behind, size)
    probability = mask_probability(float(generator.random()), noise)
    is_masked_slot = generator.random(len(borders) - 1) < probability
    clean_order = np.flatnonzero(~is_masked_slot).astype(np.int64)
    if not keep_text_order:
        clean_order = generator.permutation(clean_order)
    return permuted_row(prompt_ids, answer_ids, borders, clean_order, mask_token_id=mask_token_id, mask_probability=probability)


def mask_probability(u: float, noise: Noise = "uniform") -> float:
    """p for u drawn from U(0, 1): (1 - 1e-3) t + 1e-3, so that no weight 1 / p explodes.

    uniform: t = u. cosine: t = cos(pi / 2 u), 2 / pi in the mean (MaskGIT, arXiv 2202.04200). clipped: t = 0.3 + 0.5 u, neither few masks
    nor almost all (after the clipped schedules of BD3-LM, arXiv 2503.09573).
    """
    t = math.cos(0.5 * math.pi * u) if noise == "cosine" else 0.3 + 0.5 * u if noise == "clipped" else u
    return (1.0 - MIN_MASK_PROBABILITY) * t + MIN_MASK_PROBABILITY


def permuted_row(
    prompt_ids: Sequence[int] | IntArray,
    answer_ids: Sequence[int] | IntArray,
    borders: IntArray,
    clean_order: IntArray,
    *,
    mask_token_id: int,
    mask_probability: float,
) -> SlotRow:
    """The paper's row for a given cut and order: slots in `clean_order` are clean and stand in that order, all others are masked.

    A clean token predicts the next token of its own slot (a slot's last token nothing), a masked token itself. Physical order is plain
    causal, so the masked tokens see everything before them.

    Where `borders` go on behind the answer, its last token, an EOS, fills them. A clean slot stands through its first EOS only, as decoding
    commits it, so nothing is predicted from an EOS: decoding never goes on behind one. Slots behind the end are drawn like any others, so
    that masks also see an EOS that stands later than the text needs, which decoding may commit.
    """
    num_prompt, num_told = len(prompt_ids), len(answer_ids)
    prompt, answer = _array(prompt_ids), _going_on(_array(answer_ids), int(borders[-1]))
    length = len(answer)
    slot_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))  # [A]
    rank = np.full(len(borders) - 1, -1, dtype=np.int64)
    rank[clean_order] = np.arange(len(clean_order))
    token_rank = rank[slot_of]
    is_clean = token_rank >= 0
    is_told = np.arange(length) < num_told
    is_told[borders[:-1]] = True  # a slot behind the end has its first EOS in front
    clean = np.flatnonzero(is_clean & is_told)
    clean = clean[np.argsort(token_rank[clean], kind="stable")]  # answer positions in physical order
    masked = np.flatnonzero(~is_clean)

    ends_slot = np.zeros(length, dtype=np.bool_)
    ends_slot[borders[1:] - 1] = True
    ends_slot[num_told - 1 :] = True
    clean_labels = np.where(ends_slot[clean], IGNORED, answer[np.minimum(clean + 1, length - 1)])
    num_clean, num_masked = len(clean), len(masked)
    has_target = clean_labels != IGNORED
    return SlotRow(
        input_ids=np.concatenate([prompt, answer[clean], np.full(num_masked, mask_token_id, dtype=np.int64)]),
        position_ids=np.concatenate([np.arange(num_prompt), num_prompt + clean, num_prompt + masked]),
        labels=np.concatenate([np.full(num_prompt, IGNORED, dtype=np.int64), clean_labels, answer[masked]]),
        terms=np.concatenate([np.zeros(num_prompt, np.int64), np.where(has_target, AR_TERM, NO_TERM), np.full(num_masked, MDM_TERM)]),
        visible=np.minimum(np.arange(num_prompt + num_clean + num_masked) + 1, num_prompt + num_clean),
        group=np.concatenate([np.zeros(num_prompt + num_clean, np.int64), np.ones(num_masked, np.int64)]),
        teacher_rows=np.concatenate([np.full(num_prompt, -1), np.where(has_target, num_prompt + clean, -1), np.full(num_masked, -1)]),
        mask_probability=mask_probability,
        answer_length=length,
        slot_size=int(np.diff(borders).max()),
    )


def serial_row(
    prompt_ids: Sequence[int] | IntArray,
    answer_ids: Sequence[int] | IntArray,
    *,
    mask_token_id: int,
    generator: np.random.Generator,
    slot_size: int,
    max_groups: int | None = None,
    max_length: int | None = None,
    has_border_targets: bool = True,
    num_behind: int = 0,
) -> SlotRow:
    """The whole answer clean in text order, then one mask group per slot that sees prompt and answer *before* the slot only.

    Every answer token is an AR target and every slot is a masked target too, with p = 1. The first cut falls after 1..slot_size tokens, so
    cuts fall everywhere. `max_groups` and `max_length` keep a random subset of the slots where a row would get too long. Without
    `has_border_targets` the first token of a slot is no AR target, as in the paper's layout.

    The answer's last slot goes on for up to `num_behind` tokens of its last token, an EOS. There are no further slots: a group sees the
    text before it, and decoding plans nothing where that holds an EOS. The clean text and its targets end with the answer.
    """
    prompt, answer = _array(prompt_ids), _array(answer_ids)
    num_prompt, length = len(prompt), len(answer)
    total = num_prompt + length
    borders = cut_slots(length + num_behind, slot_size, int(generator.integers(1, slot_size + 1)))
    borders = borders[: np.searchsorted(borders, length) + 1]
    slots = _chosen_slots(np.diff(borders), max_groups, None if max_length is None else max_length - total, generator)
    lengths = np.diff(borders)[slots]
    starts = np.repeat(borders[slots], lengths)  # [M] start of the slot of each mask token
    inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    masked = starts + inside  # [M] answer positions
    plain = autoregressive_row(prompt_ids, answer_ids)
    if not has_border_targets:
        plain = _without_targets(plain, num_prompt + borders[:-1] - 1)
    num_masked = len(masked)
    return SlotRow(
        input_ids=np.concatenate([prompt, answer, np.full(num_masked, mask_token_id, dtype=np.int64)]),
        position_ids=np.concatenate([plain.position_ids, num_prompt + masked]),
        labels=np.concatenate([plain.labels, _going_on(answer, int(borders[-1]))[masked]]),
        terms=np.concatenate([plain.terms, np.full(num_masked, MDM_TERM)]),
        visible=np.concatenate([plain.visible, num_prompt + starts]),
        group=np.concatenate([plain.group, np.repeat(np.arange(1, len(lengths) + 1), lengths)]),
        teacher_rows=np.concatenate([plain.teacher_rows, np.where(inside == 0, num_prompt + masked - 1, -1)]),
        mask_probability=1.0,
        answer_length=int(borders[-1]),
        slot_size=slot_size,
    )


def autoregressive_row(prompt_ids: Sequence[int] | IntArray, answer_ids: Sequence[int] | IntArray) -> SlotRow:
    """Plain fine-tuning: prompt | answer, every answer token predicted from the token before it, nothing masked.

    The first answer token has a target only if there is a prompt token before it.
    """
    prompt, answer = _array(prompt_ids), _array(answer_ids)
    total = len(prompt) + len(answer)
    text = np.concatenate([prompt, answer])
    first = max(len(prompt) - 1, 0)
    labels = np.full(total, IGNORED, dtype=np.int64)
    labels[first:-1] = text[first + 1 :]
    has_target = labels != IGNORED
    return SlotRow(
        input_ids=text,
        position_ids=np.arange(total),
        labels=labels,
        terms=np.where(has_target, AR_TERM, NO_TERM),
        visible=np.arange(total) + 1,
        group=np.zeros(total, np.int64),
        teacher_rows=np.where(has_target, np.arange(total), -1),
        mask_probability=1.0,
        answer_length=len(answer),
        slot_size=len(answer),
    )


def _going_on(answer: IntArray, length: int) -> IntArray:
    """The answer, then its last token up to `length` tokens."""
    return np.pad(answer, (0, length - len(answer)), mode="edge")


def _without_targets(row: SlotRow, index: IntArray) -> SlotRow:
    """The row where the tokens of `index` predict nothing; -1 stands for the token before the first."""
    is_kept = ~np.isin(np.arange(len(row.labels)), index)
    return replace(
        row,
        labels=np.where(is_kept, row.labels, IGNORED),
        terms=np.where(is_kept, row.terms, NO_TERM),
        teacher_rows=np.where(is_kept, row.teacher_rows, -1),
    )


def _chosen_slots(lengths: IntArray, max_groups: int | None, max_tokens: int | None, generator: np.random.Generator) -> IntArray:
    """Indices, ascending, of a random subset of slots within both limits; all of them, without a draw, where the limits allow it."""
    count = len(lengths)
    if (max_groups is None or count <= max_groups) and (max_tokens is None or int(lengths.sum()) <= max_tokens):
        return np.arange(count)
    order = generator.permutation(count)[:max_groups]
    if max_tokens is not None:
        order = order[np.cumsum(lengths[order]) <= max_tokens]
    return np.sort(order)


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One SplitMix64 step (https://prng.di.unimi.it/splitmix64.c); unsigned arithmetic wraps on purpose."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _array(ids: Sequence[int] | IntArray) -> IntArray:
    return np.asarray(ids, dtype=np.int64)
