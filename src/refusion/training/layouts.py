"""Layouts: how each objective turns one example into a row of inputs, targets, weights, terms and visibility.

Every objective is a class with the same two methods, `row` and `lengths`; packing, masks, loss and Trainer know none of them by name.
The paper's layout and the serial one are built in `refusion.slots`, which decoding's tests share; the two bidirectional ones here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refusion.slots import (
    IGNORED,
    MDM_TERM,
    MIN_MASK_PROBABILITY,
    NO_TERM,
    IntArray,
    SlotRow,
    autoregressive_row,
    cut_slots,
    keyed_uniforms,
    permute_slots,
    row_generator,
    serial_row,
)
from refusion.training.recipe import ObjectiveSettings

# D = documents, T = tokens of a row, A = answer tokens, N = blocks of an answer

LAYOUT_STREAM, TEXT_ORDER_STREAM, SLOT_SIZE_STREAM = 1, 2, 3  # streams of keyed_uniforms; 0 draws copies in `batches`


class Layout(Protocol):
    """What an objective makes of examples. Every draw is keyed by (seed, epoch, example id) and by nothing else."""

    def row(self, epoch: int, example_id: int, prompt: IntArray, answer: IntArray) -> SlotRow:
        """The corrupted row of one example in one epoch."""
        ...

    def lengths(self, epoch: int, ids: IntArray, prompt: IntArray, answer: IntArray) -> IntArray:
        """[D] an upper bound of each row's length, from the lengths [D] of prompts and answers; exact but where draws decide."""
        ...


def make_layout(objective: ObjectiveSettings, *, mask_token_id: int, seed: int, pack_length: int) -> Layout:
    """The layout of a recipe's objective."""
    if objective.name == "refusion":
        return ReFusionLayout(objective, mask_token_id, seed, pack_length)
    if objective.name == "masked_diffusion":
        return MaskedDiffusionLayout(mask_token_id, seed, objective.pad_answers)
    if objective.name == "block_diffusion":
        return BlockDiffusionLayout(objective.block_size, mask_token_id, seed, objective.pad_answers)
    return AutoregressiveLayout()


def shortest_lengths(objective: ObjectiveSettings, prompt: IntArray, answer: IntArray) -> IntArray:
    """[D] the fewest tokens that a row of each example can have; one that is longer than a packed row cannot be trained on."""
    if objective.name == "refusion":
        return prompt + answer  # what does not fit behind the end is left out
    answer = _padded_lengths(answer, objective.pad_answers)
    if objective.name == "block_diffusion":
        return prompt + 2 * answer - _last_block(answer, objective.block_size)
    return prompt + answer


@dataclass(frozen=True, slots=True)
class ReFusionLayout:
    """Slots by diffusion, inside a slot left to right: the paper's layout, or the serial one for a share of the examples.

    With `pad_answers` slots go on behind the end of the answer, as far as a packed row has room.
    """

    settings: ObjectiveSettings
    mask_token_id: int
    seed: int
    pack_length: int

    def row(self, epoch: int, example_id: int, prompt: IntArray, answer: IntArray) -> SlotRow:
        ids = np.array([example_id])
        generator = row_generator(self.seed, epoch, example_id)
        slot_size = int(self._slot_sizes(epoch, ids)[0])
        num_behind = int(self._num_behind(np.array([len(prompt)]), np.array([len(answer)]))[0])
        if self._is_serial(epoch, ids)[0]:
            return serial_row(
                prompt,
                answer,
                mask_token_id=self.mask_token_id,
                generator=generator,
                slot_size=slot_size,
                max_groups=self.settings.serial_groups or None,
                max_length=self.pack_length,
                has_border_targets=self.settings.serial_borders,
                num_behind=num_behind,
            )
        keeps_order = keyed_uniforms(self.seed, epoch, ids, TEXT_ORDER_STREAM)[0] < self.settings.text_order_share
        return permute_slots(
            prompt,
            answer,
            mask_token_id=self.mask_token_id,
            generator=generator,
            slot_size=slot_size,
            keep_text_order=bool(keeps_order),
            noise=self.settings.noise,
            num_behind=num_behind,
        )

    def lengths(self, epoch: int, ids: IntArray, prompt: IntArray, answer: IntArray) -> IntArray:
        sizes, num_behind = self._slot_sizes(epoch, ids), self._num_behind(prompt, answer)
        masked = answer + np.minimum(num_behind, sizes - 1)  # of a serial row
        if self.settings.serial_groups:
            masked = np.minimum(masked, self.settings.serial_groups * sizes)
        longer = np.where(self._is_serial(epoch, ids), masked, num_behind)
        return np.minimum(prompt + answer + longer, self.pack_length)

    def _num_behind(self, prompt: IntArray, answer: IntArray) -> IntArray:
        """[D] tokens behind the answer's end."""
        return np.minimum(_padded_lengths(answer, self.settings.pad_answers) - answer, np.maximum(self.pack_length - prompt - answer, 0))

    def _is_serial(self, epoch: int, ids: IntArray) -> np.ndarray:
        return keyed_uniforms(self.seed, epoch, ids, LAYOUT_STREAM) < self.settings.serial_share

    def _slot_sizes(self, epoch: int, ids: IntArray) -> IntArray:
        sizes = np.asarray(self.settings.slot_sizes, dtype=np.int64)
        return sizes[(keyed_uniforms(self.seed, epoch, ids, SLOT_SIZE_STREAM) * len(sizes)).astype(np.int64)]


@dataclass(frozen=True, slots=True)
class AutoregressiveLayout:
    """Plain fine-tuning: every answer token from the token before it."""

    def row(self, epoch: int, example_id: int, prompt: IntArray, answer: IntArray) -> SlotRow:
        return autoregressive_row(prompt, answer)

    def lengths(self, epoch: int, ids: IntArray, prompt: IntArray, answer: IntArray) -> IntArray:
        return prompt + answer


@dataclass(frozen=True, slots=True)
class MaskedDiffusionLayout:
    """LLaDA: answer tokens masked one by one, everything sees everything."""

    mask_token_id: int
    seed: int
    pad_answers: int = 0

    def row(self, epoch: int, example_id: int, prompt: IntArray, answer: IntArray) -> SlotRow:
        answer = _padded(answer, self.pad_answers)
        generator = row_generator(self.seed, epoch, example_id)
        return masked_diffusion_row(prompt, answer, mask_token_id=self.mask_token_id, generator=generator)

    def lengths(self, epoch: int, ids: IntArray, prompt: IntArray, answer: IntArray) -> IntArray:
        return prompt + _padded_lengths(answer, self.pad_answers)


@dataclass(frozen=True, slots=True)
class BlockDiffusionLayout:
    """BD3-LM: masked diffusion inside a block, blocks left to right."""

    block_size: int
    mask_token_id: int
    seed: int
    pad_answers: int = 0

    def row(self, epoch: int, example_id: int, prompt: IntArray, answer: IntArray) -> SlotRow:
        answer = _padded(answer, self.pad_answers)
        generator = row_generator(self.seed, epoch, example_id)
        return block_diffusion_row(prompt, answer, mask_token_id=self.mask_token_id, generator=generator, block_size=self.block_size)

    def lengths(self, epoch: int, ids: IntArray, prompt: IntArray, answer: IntArray) -> IntArray:
        answer = _padded_lengths(answer, self.pad_answers)
        return prompt + 2 * answer - _last_block(answer, self.block_size)


def masked_diffusion_row(prompt: IntArray, answer: IntArray, *, mask_token_id: int, generator: np.random.Generator) -> SlotRow:
    """LLaDA's fine-tuning row (arXiv 2502.09992, section 2.3): prompt | answer in text order, each answer token masked with probability t.

    Draws t ~ U(0, 1) with p = (1 - 1e-3) t + 1e-3, then the masks. A masked token predicts itself and weighs 1 / (p |answer|), as in the
    authors' GUIDELINES.md; the prompt is never masked; every token sees the whole document.
    """
    num_prompt, length = len(prompt), len(answer)
    total = num_prompt + length
    probability = _mask_probabilities(generator.random(1))[0]
    is_masked = np.concatenate([np.zeros(num_prompt, np.bool_), generator.random(length) < probability])
    text = np.concatenate([prompt, answer])
    return SlotRow(
        input_ids=np.where(is_masked, mask_token_id, text),
        position_ids=np.arange(total),
        labels=np.where(is_masked, text, IGNORED),
        terms=np.where(is_masked, MDM_TERM, NO_TERM),
        visible=np.full(total, total),
        group=np.zeros(total, np.int64),
        teacher_rows=np.full(total, -1),
        mask_probability=float(probability),
        answer_length=length,
        slot_size=length,
    )


def block_diffusion_row(
    prompt: IntArray, answer: IntArray, *, mask_token_id: int, generator: np.random.Generator, block_size: int
) -> SlotRow:
    """BD3-LM's row (arXiv 2503.09573, section 3): prompt | clean blocks x_0 | noisy blocks x_t.

    Prompt and answer are cut into blocks of their own, the last of each may be short. A clean token sees its block and all before it. A
    noisy block sees itself and the clean blocks before it. Each block draws t ~ U(0, 1) with p = (1 - 1e-3) t + 1e-3, then its masks; a
    masked token predicts itself and weighs 1 / p, and the mean runs over answer tokens. No noisy block sees the last clean one, so that
    is left out.
    """
    num_prompt, length = len(prompt), len(answer)
    borders = cut_slots(length, block_size)
    block_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))  # [A]
    probability = _mask_probabilities(generator.random(len(borders) - 1))[block_of]  # [A]
    is_masked = generator.random(length) < probability
    num_clean = num_prompt + int(borders[-2])
    prompt_index = np.arange(num_prompt)
    nothing = np.zeros(num_clean, np.int64)
    return SlotRow(
        input_ids=np.concatenate([prompt, answer[: borders[-2]], np.where(is_masked, mask_token_id, answer)]),
        position_ids=np.concatenate([np.arange(num_clean), num_prompt + np.arange(length)]),
        labels=np.concatenate([nothing + IGNORED, np.where(is_masked, answer, IGNORED)]),
        terms=np.concatenate([nothing, np.where(is_masked, MDM_TERM, NO_TERM)]),
        visible=np.concatenate(
            [
                np.minimum((prompt_index // block_size + 1) * block_size, num_prompt),
                num_prompt + borders[block_of[: borders[-2]] + 1],
                num_prompt + borders[block_of],
            ]
        ),
        group=np.concatenate([nothing, -1 - block_of]),
        teacher_rows=np.full(num_clean + length, -1),
        mask_probability=np.concatenate([np.ones(num_clean), probability]),
        answer_length=length,
        slot_size=block_size,
        num_units=length,
    )


def _mask_probabilities(t: np.ndarray) -> np.ndarray:
    """p for t in [0, 1): never so small that the weight 1 / p explodes."""
    return (1.0 - MIN_MASK_PROBABILITY) * t + MIN_MASK_PROBABILITY


def _last_block(answer: IntArray, block_size: int) -> IntArray:
    """[D] tokens in the last block of an answer."""
    return (answer - 1) % block_size + 1


def _padded(answer: IntArray, multiple: int) -> IntArray:
    """The answer with its last token, an EOS, repeated up to a multiple of so many tokens; 0: as it is."""
    return np.pad(answer, (0, -len(answer) % multiple), mode="edge") if multiple else answer


def _padded_lengths(answer: IntArray, multiple: int) -> IntArray:
    return answer + -answer % multiple if multiple else answer
