"""Batches: which examples an epoch shows in what layout, packed into rows of fixed length, and the arrays the objective reads.

A batch is a pure function of (seed, step) given the examples: resuming starts at a step, processes and workers take their part of it,
and all of them see the same corruption. What the rows mean is `refusion.slots`; losses and masks are `objectives` and `attention`.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from refusion.slots import AR_TERM, IGNORED, IntArray, SlotRow, keyed_uniforms
from refusion.training.data import Examples
from refusion.training.layouts import Layout, make_layout
from refusion.training.recipe import ObjectiveSettings

# R = packed rows, L = tokens in a row, N = targets

Batch = dict[str, Any]

OPEN_ROWS = 64
"""Rows that packing keeps open at once; more pack tighter but mix documents from further apart."""
VALIDATION_EPOCH = 2**32 - 1
_COPIES_STREAM = 0  # of keyed_uniforms; `layouts` has the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Corruption:
    """Draws the layout of every example of an epoch and builds its row."""

    examples: Examples
    objective: ObjectiveSettings
    mask_token_id: int
    seed: int
    pack_length: int

    @property
    def layout(self) -> Layout:
        return make_layout(self.objective, mask_token_id=self.mask_token_id, seed=self.seed, pack_length=self.pack_length)

    def lengths(self, epoch: int, ids: IntArray) -> IntArray:
        """[D] an upper bound of each row's length, without building it (`Layout.lengths`). `ids` count copies: id % N is the example."""
        index = ids % len(self.examples)
        return self.layout.lengths(epoch, ids, self.examples.prompt_lengths[index], self.examples.answer_lengths[index])

    def row(self, epoch: int, example_id: int) -> SlotRow:
        """The corrupted row of one example in one epoch."""
        return self.layout.row(epoch, example_id, *self.examples.pair(example_id % len(self.examples)))


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """The packed rows of one epoch: row r holds the examples ids[borders[r] : borders[r + 1]]."""

    epoch: int
    ids: IntArray
    borders: IntArray

    @property
    def num_rows(self) -> int:
        return len(self.borders) - 1

    def row(self, index: int) -> IntArray:
        return self.ids[self.borders[index] : self.borders[index + 1]]


def plan_epoch(corruption: Corruption, epoch: int) -> EpochPlan:
    """Repeat, shuffle and pack the examples of one epoch; the packed rows are shuffled as well."""
    generator = np.random.default_rng((corruption.seed, epoch))
    ids = generator.permutation(_copies(corruption, epoch))
    rows = pack_rows(corruption.lengths(epoch, ids), corruption.pack_length)
    order = generator.permutation(len(rows))
    borders = np.concatenate([[0], np.cumsum([len(rows[r]) for r in order])])
    return EpochPlan(epoch=epoch, ids=ids[np.concatenate([rows[r] for r in order])], borders=borders)


def pack_rows(lengths: IntArray, pack_length: int) -> list[list[int]]:
    """Best fit over a bounded number of open rows, in the order given; returns the indices in each row.

    pack_rows([5, 4, 3, 2], 8) is [[0, 2], [1, 3]].
    """
    done: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), ascending
    rows: dict[int, list[int]] = {}
    for index, length in enumerate(lengths.tolist()):
        assert length <= pack_length, (length, pack_length)
        place = bisect.bisect_left(free, (length, -1))
        if place < len(free):
            space, row = free.pop(place)
        else:
            if len(free) == OPEN_ROWS:
                done.append(rows.pop(free.pop(0)[1]))
            space, row = pack_length, index
            rows[row] = []
        rows[row].append(index)
        bisect.insort(free, (space - length, row))
    return done + list(rows.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Which packed rows every optimizer step of a run takes, over as many epochs as it needs."""

    corruption: Corruption
    rows_per_step: int
    num_steps: int
    plans: list[EpochPlan]
    first_rows: list[int] = field(default_factory=list)
    """Number of rows before each plan, for all plans and the end."""

    @property
    def packed_share(self) -> float:
        """Share of the first epoch's packed rows that holds documents; the rest is padding."""
        plan = self.plans[0]
        return float(self.corruption.lengths(plan.epoch, plan.ids).sum() / (plan.num_rows * self.corruption.pack_length))

    def rows(self, step: int, part: int = 0, num_parts: int = 1) -> list[tuple[int, IntArray]]:
        """(epoch, example ids) of each row of a step that belongs to `part` (every num_parts-th)."""
        first = step * self.rows_per_step
        return [self._row(index) for index in range(first + part, first + self.rows_per_step, num_parts)]

    def _row(self, index: int) -> tuple[int, IntArray]:
        plan_index = bisect.bisect_right(self.first_rows, index) - 1
        if plan_index >= len(self.plans):
            return 0, np.zeros(0, dtype=np.int64)  # the last step of a run by epochs is filled with empty rows
        plan = self.plans[plan_index]
        return plan.epoch, plan.row(index - self.first_rows[plan_index])


def make_schedule(corruption: Corruption, *, rows_per_step: int, max_steps: int, epochs: float) -> Schedule:
    """Plan a run of `max_steps` steps, or of `epochs` passes where max_steps is 0 (a part of an epoch takes that share of its rows)."""
    plans: list[EpochPlan] = []
    first_rows = [0]
    target = max_steps * rows_per_step if max_steps else None
    while first_rows[-1] < target if target is not None else len(plans) < math.ceil(epochs):
        plans.append(plan_epoch(corruption, len(plans)))
        first_rows.append(first_rows[-1] + plans[-1].num_rows)
    if target is None:
        target = first_rows[-1] - int((math.ceil(epochs) - epochs) * plans[-1].num_rows)
    return Schedule(
        corruption=corruption,
        rows_per_step=rows_per_step,
        num_steps=max(1, math.ceil(target / rows_per_step)),
        plans=plans,
        first_rows=first_rows,
    )


def validation_schedule(corruption: Corruption, *, rows_per_step: int) -> Schedule:
    """Every example once, corrupted in the same way each time: the draws of an epoch that no training reaches."""
    examples = corruption.examples
    once = dataclasses.replace(examples, weights=np.ones(len(examples)))
    plain = dataclasses.replace(corruption, examples=once, objective=dataclasses.replace(corruption.objective, distill=0.0, teacher=""))
    plan = plan_epoch(plain, VALIDATION_EPOCH)
    return Schedule(
        corruption=plain,
        rows_per_step=rows_per_step,
        num_steps=math.ceil(plan.num_rows / rows_per_step),
        plans=[plan],
        first_rows=[0, plan.num_rows],
    )


class PackedBatches(IterableDataset):  # pyright: ignore[reportMissingTypeArgument]  (torch leaves the item type open)
    """Yields this process's micro-batches, ready packed, from optimizer step `start_step` on."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        start_step: int = 0,
        accumulation: int = 1,
        process: int = 0,
        num_processes: int = 1,
        chunk_size: int = 4096,
    ) -> None:
        self.schedule = schedule
        self.start_step = start_step
        self.accumulation = accumulation
        self.process = process
        self.num_processes = num_processes
        self.chunk_size = chunk_size

    def __iter__(self) -> Iterator[Batch]:
        """Worker w of W yields every W-th micro-batch, which is the order in which a DataLoader collects them."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = self.start_step * self.accumulation, self.schedule.num_steps * self.accumulation
        for index in range(first + worker, last, num_workers):
            yield self.micro_batch(*divmod(index, self.accumulation))

    def micro_batch(self, step: int, part: int) -> Batch:
        parts = self.accumulation * self.num_processes
        rows = self.schedule.rows(step, self.process * self.accumulation + part, parts)
        corruption = self.schedule.corruption
        documents = [[corruption.row(epoch, int(i)) for i in ids] for epoch, ids in rows]
        originals = None
        if corruption.objective.distill > 0:
            originals = [[self._original(int(i)) for i in ids] for _, ids in rows]
        return pack_batch(
            documents, corruption.pack_length, pad_id=corruption.mask_token_id, originals=originals, chunk_size=self.chunk_size
        )

    def _original(self, example_id: int) -> IntArray | None:
        """Prompt and answer as the teacher reads them, None where the pair is not distilled."""
        examples = self.schedule.corruption.examples
        index = example_id % len(examples)
        return np.concatenate(examples.pair(index)) if examples.is_distilled[index] else None


def pack_batch(
    rows: Sequence[Sequence[SlotRow]],
    pack_length: int,
    *,
    pad_id: int,
    originals: Sequence[Sequence[IntArray | None]] | None = None,
    chunk_size: int = 4096,
) -> Batch:
    """Lay documents side by side into [R, L] arrays. Padding sees only itself and has no target.

    Per token: input_ids, position_ids, labels, weights, terms, start, visible, group (`start` and `visible` count from the row's begin).
    Per target, padded with weight 0 to a multiple of chunk_size (by tokens that have none, while there are any): target_index (into the
    flattened rows), target_labels, target_weights, target_terms; with `originals` (the texts prompt + answer, None where nothing is
    distilled) also target_teacher (into the flattened teacher rows; distilled targets come first, num_teacher_chunks chunks of them) and
    teacher_input_ids, teacher_position_ids, teacher_start [Rt, L].
    num_documents, num_units, num_ar, num_tokens and num_teacher_chunks are plain ints.
    """
    shape = (len(rows), pack_length)
    own = np.arange(pack_length, dtype=np.int64)
    arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, IGNORED, dtype=np.int64),
        "weights": np.zeros(shape, dtype=np.float32),
        "terms": np.zeros(shape, dtype=np.int64),
        "start": np.tile(own, (len(rows), 1)),
        "visible": np.tile(own + 1, (len(rows), 1)),
        "group": np.zeros(shape, dtype=np.int64),
    }
    teacher = _TeacherRows(pack_length, pad_id)
    target_teacher = np.full(shape, -1, dtype=np.int64)
    num_tokens, num_units = 0, 0
    for r, documents in enumerate(rows):
        begin, num_groups = 0, 0
        for d, document in enumerate(documents):
            span = slice(begin, begin + len(document.input_ids))
            arrays["input_ids"][r, span] = document.input_ids
            arrays["position_ids"][r, span] = document.position_ids
            arrays["labels"][r, span] = document.labels
            arrays["weights"][r, span] = document.weights
            arrays["terms"][r, span] = document.terms
            arrays["start"][r, span] = begin
            arrays["visible"][r, span] = document.visible + begin
            arrays["group"][r, span] = document.group + num_groups * np.sign(document.group)
            original = originals[r][d] if originals is not None else None
            if original is not None:
                offset = teacher.add(original)
                target_teacher[r, span] = np.where(document.teacher_rows >= 0, document.teacher_rows + offset, -1)
            num_groups += _num_groups(document.group)
            num_units += document.num_units
            begin = span.stop
        num_tokens += begin
    batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch |= _targets(arrays, target_teacher if originals is not None else None, chunk_size)
    if originals is not None:
        batch |= teacher.tensors(len(rows))
    return batch | {
        "num_documents": sum(map(len, rows)),
        "num_units": num_units,
        "num_ar": int((arrays["terms"] == AR_TERM).sum()),
        "num_tokens": num_tokens,
    }


def _num_groups(group: IntArray) -> int:
    """Groups of a document; `attention` relies on each being one run of neighbours."""
    runs = group[np.flatnonzero(np.diff(group, prepend=0))]
    runs = runs[runs != 0]
    assert len(np.unique(runs)) == len(runs), ("a group is torn apart", group)
    return int(np.abs(group).max())


def _targets(arrays: dict[str, np.ndarray], teacher: np.ndarray | None, chunk_size: int) -> Batch:
    """The targets of a batch as flat lists padded to whole chunks, so that every chunk has the same shape."""
    index = np.flatnonzero(arrays["terms"])
    num_teacher_chunks = 0
    if teacher is not None:
        has_teacher = teacher.reshape(-1)[index] >= 0
        index = index[np.argsort(~has_teacher, kind="stable")]
        num_teacher_chunks = math.ceil(int(has_teacher.sum()) / chunk_size)
    padding = -len(index) % chunk_size
    # Different tokens, for the backward pass of indexing adds up repeated ones one after the other. Few rows can lack so many.
    others = np.flatnonzero(arrays["terms"] == 0)[:padding]
    fill_index = np.concatenate([others, np.zeros(padding - len(others), dtype=np.int64)])

    def padded(values: np.ndarray, fill: int) -> Tensor:
        return torch.from_numpy(np.concatenate([values, np.full(padding, fill, dtype=values.dtype)]))

    targets: Batch = {
        "target_index": torch.from_numpy(np.concatenate([index, fill_index])),
        "target_labels": padded(arrays["labels"].reshape(-1)[index], 0),
        "target_weights": padded(arrays["weights"].reshape(-1)[index], 0),
        "target_terms": padded(arrays["terms"].reshape(-1)[index], 0),
    }
    if teacher is not None:
        targets["target_teacher"] = padded(teacher.reshape(-1)[index], -1)
        targets["num_teacher_chunks"] = num_teacher_chunks
    return targets


class _TeacherRows:
    """The uncorrupted documents of a batch, packed first fit into rows of their own."""

    def __init__(self, pack_length: int, pad_id: int) -> None:
        self.pack_length = pack_length
        self.pad_id = pad_id
        self.rows: list[list[IntArray]] = []
        self.used: list[int] = []

    def add(self, text: IntArray) -> int:
        """Place a document; returns its offset in the flattened rows."""
        fitting = (r for r, used in enumerate(self.used) if used + len(text) <= self.pack_length)
        row = next(fitting, len(self.rows))
        if row == len(self.rows):
            self.rows.append([])
            self.used.append(0)
        used = self.used[row]
        self.rows[row].append(text)
        self.used[row] += len(text)
        return row * self.pack_length + used

    def tensors(self, num_student_rows: int) -> Batch:
        """Rows are filled up to a multiple of a quarter of the student's, so that at most four shapes (five, rarely) are ever compiled."""
        step = max(1, num_student_rows // 4)
        shape = (max(step, math.ceil(len(self.rows) / step) * step), self.pack_length)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        start = np.tile(np.arange(self.pack_length, dtype=np.int64), (shape[0], 1))
        for r, texts in enumerate(self.rows):
            begin = 0
            for text in texts:
                span = slice(begin, begin + len(text))
                ids[r, span], positions[r, span], start[r, span] = text, np.arange(len(text)), begin
                begin = span.stop
        names = ("teacher_input_ids", "teacher_position_ids", "teacher_start")
        return dict(zip(names, map(torch.from_numpy, (ids, positions, start)), strict=True))


def _copies(corruption: Corruption, epoch: int) -> IntArray:
    """Ids of an epoch: copy c of example n has id n + c * N; the fraction of a weight is one more copy by chance."""
    weights = corruption.examples.weights
    count = len(weights)
    extra = keyed_uniforms(corruption.seed, epoch, np.arange(count), _COPIES_STREAM) < weights % 1
    copies = weights.astype(np.int64) + extra
    base = np.repeat(np.arange(count), copies)
    ordinal = np.arange(len(base)) - np.repeat(np.cumsum(copies) - copies, copies)
    return base + ordinal * count
