from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import Plain, is_idle, new_request, run

from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.params import SlotSettings
from refusion.engine.build import moved_network
from refusion.engine.candidates import Candidates
from refusion.engine.changes import QueuedTable, SeatNumbers
from refusion.engine.commits import Demand, commits
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.network import FlatNetwork
from refusion.engine.ops import LARGEST_TILE, PlainOps
from refusion.engine.requests import Answer, lane_key
from refusion.engine.runner import MOST_LAYOUTS, NO_PROMPT, PromptRows
from refusion.engine.scheduler import MOST_PASSED
from refusion.engine.shapes import (
    LONG_CONTEXT,
    PROMPT_ROWS,
    ROWS,
    SEATS,
    WIDE_QUERY_ROWS,
    Shape,
    power_of_two,
    row_bucket,
    tile_rows,
    wide_groups,
)
from refusion.engine.warm_up import Expected, wanted_shapes
from refusion.errors import RequestError
from refusion.model.quantize import QuantizedWeight, quantize
from refusion.model.rows import PROMPT, plain_tiles
from refusion.model.transformer import Transformer

NewEngine = Callable[..., Engine]
COSTS = CostTable((1, 1000), (1.0, 2.0))


# ---- changes to seats ----


def table() -> tuple[QueuedTable, AutoregressiveRounds]:
    rounds = AutoregressiveRounds(4, eos_ids=torch.tensor([2]), device=torch.device("cpu"), use_kernels=False)
    rounds.table.values.copy_(torch.arange(24).view(4, 6))
    rounds.table = QueuedTable(rounds.table)
    return rounds.table, rounds


def test_changes_wait_and_are_applied_as_if_one_by_one() -> None:
    queued, rounds = table()
    rounds.admit(0, prompt_length=100, seed=101, max_tokens=102, last_token=103)
    queued.move(0, 1)  # with what has just been written
    queued.move(3, 0)
    queued.move(1, 2)
    queued.write(3, {"prompt_length": 7})
    queued.write(2, {"prompt_length": 8, "seed": 9})
    assert queued.values.tolist() == torch.arange(24).view(4, 6).tolist()
    queued.apply()
    admitted = [100, 101, 102, 0, 103, 0]
    assert queued.values.tolist() == [[18, 19, 20, 21, 22, 23], admitted, [8, 9, *admitted[2:]], [7, 19, 20, 21, 22, 23]]
    queued.apply()  # nothing is left
    assert queued.values[3, 0] == 7


@pytest.mark.parametrize("values", [{"seed": 1}, {"prompt_length": 1, "max_tokens": 2}, "one too many"])
def test_only_leading_groups_of_a_seat_can_be_changed(values: dict[str, int | list[int]] | str) -> None:
    queued, _ = table()
    with pytest.raises(AssertionError, match="groups"):
        queued.write(0, values if isinstance(values, dict) else dict.fromkeys([*queued.columns, values], 0))
    queued.apply()
    assert queued.values[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_seats_can_be_exchanged_saved_and_restored() -> None:
    queued, _ = table()
    saved = queued.snapshot(1)
    queued.move(2, 1)
    assert queued.snapshot(1)["line"].tolist() == list(range(12, 18))
    queued.restore(3, saved)
    queued.write(3, {"prompt_length": -1})
    queued.apply()
    assert queued.values[3].tolist() == [-1, *range(7, 12)]
    queued.write(0, {"prompt_length": 5})
    queued.forget()
    queued.apply()
    assert queued.values[0].tolist() == list(range(6))


@pytest.mark.parametrize("changed", [[1], [0, 39], list(range(3, 38))], ids=["one", "two", "many"])
def test_only_seats_that_change_are_written(changed: list[int]) -> None:
    """The device knows more of the others than the host: a forward is under way."""
    cached, pages = torch.arange(100, 140, dtype=torch.int32), torch.arange(80, dtype=torch.int32).view(40, 2)
    expected, expected_pages = cached.clone(), pages.clone()
    numbers = SeatNumbers(cached, pages)
    for seat in changed:
        numbers.cached[seat], numbers.page_table[seat] = seat, (-seat, -1)
        expected[seat], expected_pages[seat] = seat, torch.tensor([-seat, -1])
    numbers.changed.update(changed)
    for _ in range(2):  # the second time there is nothing left
        numbers.apply()
        assert cached.tolist() == expected.tolist()
        assert pages.tolist() == expected_pages.tolist()
        cached[changed[0]] = expected[changed[0]] = 7


def test_making_changes_ready_changes_nothing() -> None:
    queued, _ = table()
    numbers = SeatNumbers(torch.zeros(3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32))
    before = queued.values.tolist()
    queued.warm()
    numbers.warm()
    assert queued.values.tolist() == before
    assert not numbers._cached.any()
    assert not numbers._page_table.any()


def test_rows_that_did_not_fit_are_an_error() -> None:
    _, rounds = table()
    report = torch.tensor([[0, 1, 0, 1, 1, 7], [0, 1, 3, 1, 0, 0]], dtype=torch.int32).numpy()
    assert commits(rounds, report, report[:, 2] == 0).token.tolist() == [7]
    with pytest.raises(AssertionError, match="3 rows of a seat did not fit"):
        commits(rounds, report, report[:, 2] >= 0)


# ---- shapes ----


def test_shapes_hold_what_they_are_asked_for() -> None:
    for rows in range(1, 4097):
        assert row_bucket(rows) >= rows
        assert row_bucket(rows) in ROWS
        assert rows <= row_bucket(rows, 1) <= power_of_two(rows)
        assert row_bucket(rows, has_prompt=True) == power_of_two(rows)
    assert row_bucket(5000) == 8192


@pytest.mark.parametrize("kind", ["refusion", "sliding", "autoregressive"])
@pytest.mark.parametrize("num_requests", [1, 5, 100])
def test_the_shapes_made_ready_cover_every_number_of_requests(kind: str, num_requests: int) -> None:
    candidates = Candidates(lambda: COSTS, 4096)
    slots = SlotSettings(slot_size=16, sliding=kind == "sliding", infill_length=4 if kind == "sliding" else None)
    decoder = "refusion" if kind == "sliding" else kind
    key = lane_key(new_request([7], [], decoder=decoder, slots=slots), decoder)
    load = Expected(num_requests=num_requests, prompt_tokens=300, answer_tokens=64, most_seats=128, prompt_rows=2048, decode_rows=4096)
    found = list(wanted_shapes(key, candidates, load))
    assert len(found) == len(set(found)) <= 250
    for count in range(1, num_requests + 1):
        bucket = next(size for size in SEATS if size >= count)
        here = [shape for shape in found if shape.num_seats == bucket]
        wanted_prompts = {size for size in PROMPT_ROWS if size <= 2048 and (size == 0 or size < 2 * 300 * bucket)}
        assert {shape.num_prompt_rows for shape in here} >= wanted_prompts - {2048} or bucket == 1
        if key.slots is None:
            assert {shape.num_rows for shape in here} == {bucket}
            continue
        (chosen,) = {shape.candidates for shape in here}
        groups = 16 * chosen - chosen * (chosen + 1) // 2
        # Sliding: from a token and the masks behind it to two tokens, a slot of drafts, masks behind two lengths and a plan.
        least, most = (5, 2 + 15 + 2 * 4 + 16) if kind == "sliding" else (16, 32 + groups)
        for rows in (least * count, min(count * most, 4096)):
            assert row_bucket(rows, bucket) in {shape.num_rows for shape in here if shape.num_prompt_rows == 0}


@pytest.mark.parametrize("kind", ["refusion", "autoregressive"])
def test_making_a_shape_ready_changes_nothing(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    engine, answers = new_engine(), []
    requests = [new_request([7, 8, index], answers, index=index, decoder=kind) for index in range(6)]
    for request in requests[:3]:
        engine.add(request)
    run(engine)
    engine.step()
    seats = engine.scheduler._lane(lane_key(requests[0], kind))
    before = [engine.runner.pool.keys.clone(), seats.lane.table.values.clone(), seats.lane.spans.cached.clone()]
    seats.lane.upload()
    before[1] = seats.lane.table.values.clone()
    engine.runner.warm(seats.lane, [engine.runner.shape(seats.lane, 4, 20, num_prompt, 1, 0) for num_prompt in (0, 5)])
    after = [engine.runner.pool.keys, seats.lane.table.values, seats.lane.spans.cached]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for request in requests[3:]:
        engine.add(request)
    run(engine)
    assert all(answer.token_ids == plain(requests[answer.request])[0] for answer in answers)
    assert engine.warm_up(requests[0], num_requests=4, prompt_tokens=8) == 0  # a CPU has nothing to make ready
    assert is_idle(engine)


def test_nobody_warms_up_an_engine_with_requests(new_engine: NewEngine) -> None:
    engine = new_engine()
    engine.add(new_request([7], []))
    with pytest.raises(RequestError, match="requests to finish"):
        engine.warm_up(new_request([7], []), num_requests=1, prompt_tokens=1)


@pytest.mark.parametrize("decoder", ["autoregressive", "refusion"])
def test_forwards_are_launched_ahead_only_while_nothing_changes(new_engine: NewEngine, plain: Plain, decoder: str) -> None:
    engine = new_engine(runs_ahead=True)
    answers: list[Answer] = []
    requests = [
        new_request([7, 8, index], answers, index=index, decoder=decoder, eos_ids=(999,), max_tokens=60 + index) for index in range(3)
    ]
    for request in requests:
        engine.add(request)
    again, ahead = engine.runner.launch_again, 0

    def counted(*args: object, **options: object) -> object:
        nonlocal ahead
        ahead += 1
        return again(*args, **options)  # type: ignore[arg-type]

    engine.runner.launch_again = counted  # type: ignore[method-assign, assignment]
    for _ in range(8):
        engine.step()
    assert ahead >= 6
    late = new_request([9], answers, index=3, decoder=decoder, max_tokens=4)
    engine.add(late)
    before = ahead
    engine.step()
    assert ahead == before  # somebody waits for a seat
    run(engine)
    assert len(answers) == 4
    assert all((answer.token_ids, answer.num_forwards) == plain([*requests, late][answer.request]) for answer in answers)
    assert is_idle(engine)


def counted_launches(engine: Engine) -> Counter[str]:
    """How often forwards are launched from now on by each of the two ways."""
    count = Counter[str]()

    def watch(name: str) -> None:
        launch = getattr(engine.runner, name)

        def counted(*args: object, **options: object) -> object:
            count[name] += 1
            return launch(*args, **options)

        setattr(engine.runner, name, counted)

    watch("launch")
    watch("launch_again")
    return count


@pytest.mark.parametrize("decoder", ["autoregressive", "refusion"])
def test_those_who_wait_for_a_seat_hold_nobody_up_while_all_are_taken(new_engine: NewEngine, plain: Plain, decoder: str) -> None:
    engine, answers = new_engine(runs_ahead=True, max_num_seqs=2), list[Answer]()
    requests = [new_request([7, 8, index], answers, index=index, decoder=decoder, eos_ids=(999,), max_tokens=40) for index in range(4)]
    for request in requests:
        engine.add(request)
    engine.step()
    count = counted_launches(engine)
    for _ in range(4):
        engine.step()
    assert count == {"launch_again": 4}
    run(engine)
    assert all((answer.token_ids, answer.num_forwards) == plain(requests[answer.request]) for answer in answers)


def test_a_few_empty_seats_hold_nobody_up_for_a_while(new_engine: NewEngine) -> None:
    engine, answers = new_engine(runs_ahead=True, max_num_seqs=4, idle_share=0.5, page_size=64), list[Answer]()
    for index in range(3):
        engine.add(new_request([7, 8, index], answers, index=index, decoder="autoregressive", eos_ids=(999,), max_tokens=40))
    engine.step()
    count = counted_launches(engine)
    engine.add(new_request([9, 10], answers, index=3, decoder="autoregressive", eos_ids=(999,), max_tokens=4))
    for _ in range(MOST_PASSED):
        engine.step()
    prompts = []
    for _ in range(2):  # one is too small a share, but only for so long
        assert engine._under_way is not None
        prompts.append(engine._under_way[0].prompt)
        engine.step()
    assert prompts[0] is None
    assert prompts[1] is not None
    assert count == {"launch_again": MOST_PASSED + 2}
    run(engine)
    assert len(answers) == 4


@pytest.mark.parametrize("decoder", ["autoregressive", "refusion"])
@pytest.mark.parametrize("costs", [COSTS, CostTable((1, 1000), (0.001, 1.0))], ids=["ahead", "behind"])
def test_those_who_wait_take_the_seats_of_others_while_forwards_are_under_way(
    new_engine: NewEngine, plain: Plain, decoder: str, costs: CostTable
) -> None:
    engine, answers = new_engine(runs_ahead=True, max_num_seqs=3, costs=costs, page_size=64), list[Answer]()
    lengths = (10, 23, 37, 14, 40, 31, 18, 26, 39, 12, 33, 21)
    requests = [
        new_request([7, 8, index], answers, index=index, decoder=decoder, eos_ids=(999,), max_tokens=length)
        for index, length in enumerate(lengths)
    ]
    for request in requests:
        engine.add(request)
    count = counted_launches(engine)
    run(engine)
    assert count["launch"] <= 5  # the first of all, and at the end, when nobody waits
    assert count["launch_again"] > 30
    for answer in answers:
        token_ids, num_forwards = plain(requests[answer.request])
        assert answer.token_ids == token_ids
        assert answer.num_forwards >= num_forwards
    assert len(answers) == 12
    assert is_idle(engine)


def test_where_rows_cost_more_than_the_wait_the_report_alone_says_what_follows(new_engine: NewEngine, plain: Plain) -> None:
    engine, answers = new_engine(runs_ahead=True, costs=CostTable((1, 1000), (0.001, 1.0)), page_size=64), list[Answer]()
    requests = [new_request([7, 8, index], answers, index=index, eos_ids=(999,), max_tokens=40 + index) for index in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    assert engine._under_way is not None
    assert not engine._under_way[0].leads
    count = counted_launches(engine)
    run(engine)
    assert count["launch"] <= 3  # as somebody ends
    assert count["launch_again"] > 10
    assert all((answer.token_ids, answer.num_forwards >= plain(requests[answer.request])[1]) == (plain(requests[answer.request])[0], True)
               for answer in answers)  # fmt: skip


def test_nothing_is_launched_behind_a_planned_end(new_engine: NewEngine, plain: Plain) -> None:
    """A token that the first plan named is the EOS of a second run: what verifies it most likely ends the answer."""
    eos_id, found = 999, []
    for _ in range(2):
        engine, answers = new_engine(runs_ahead=True), list[Answer]()
        request = new_request([7, 8, 9], answers, eos_ids=(eos_id,), max_tokens=24)
        engine.add(request)
        engine.step()  # the plan is under way
        engine.step()  # its report is read, and the forward that verifies was launched before
        seats = engine.scheduler._lane(lane_key(request, "refusion"))
        assert isinstance(seats.demand, Demand)
        assert engine._under_way is not None
        eos_id = int(seats.reports[0, seats.demand.columns.plans + 3])
        found.append(engine.scheduler.rows_ahead(engine._under_way[0]))
        run(engine)
        assert (answers[0].token_ids, answers[0].num_forwards) == plain(request)
        assert is_idle(engine)
    assert found[0] is not None
    assert found[1] is None


def test_prompt_rows_arrive_with_their_spans_and_tiles(new_engine: NewEngine) -> None:
    """Five tokens on seat 1 and forty on seat 2; the shape holds 64 rows and 4 seats."""
    runner = new_engine().runner
    lane = runner.new_lane(lane_key(new_request([7], []), "refusion"))
    shape = Shape(4, 64, 32, 1, 16)
    tokens = np.arange(100, 145, dtype=np.int32)
    positions = np.concatenate((np.arange(3, 8), np.arange(40))).astype(np.int32)
    longer = np.arange(64, dtype=np.int32)
    for prompt in (  # the second one over the traces of the first
        PromptRows(longer, longer, longer, [(0, 0, 20), (1, 20, 30), (3, 30, 64)]),
        PromptRows(tokens, positions, tokens + 1000, [(1, 0, 5), (2, 5, 45)]),
    ):
        runner._write_prompt(shape, prompt)
        runner._fetch_prompt(lane, shape)
    rows = runner.rows.narrow(0, 64)
    assert rows.token_ids.tolist() == [*tokens, *[0] * 19]
    assert rows.positions.tolist()[:45] == positions.tolist()
    assert rows.seat.tolist() == [1] * 5 + [2] * 40 + [-1] * 19
    assert rows.rank.tolist()[:45] == [*range(5), *range(40)]
    assert set(rows.segment.tolist()) == {PROMPT}
    assert set(rows.parent.tolist()) == {-1}
    assert set(rows.visible.tolist()) | set(rows.is_trunk.tolist()) == {0}
    assert runner.prompt_sources[:64].tolist() == [*range(45), *[-1] * 19]
    assert runner.prompt_targets[:64].tolist() == [*(tokens + 1000).tolist(), *[-1] * 19]
    assert lane.spans.prompt_start.tolist() == [0, 0, 5, 0]
    assert lane.spans.prompt_end.tolist() == [0, 5, 45, 0]
    plain = plain_tiles(lane.spans_of(4), 16, shape.num_prompt_tiles)
    tiles = lane.tiles_of(shape)
    for name in ("seat", "first", "end"):
        assert getattr(tiles, name)[: shape.num_prompt_tiles].tolist() == getattr(plain, name).tolist()
    assert set(tiles.seat[shape.num_prompt_tiles :].tolist()) == {-1}


def test_what_is_prepared_for_prompts_stays_small_however_many_lengths_they_have(new_engine: NewEngine) -> None:
    runner = new_engine().runner
    for num_rows in range(1, 2 * MOST_LAYOUTS):
        runner._write_prompt(Shape(1, num_rows, 1, 0, 16), NO_PROMPT)
        assert len(runner._prompt_parts) <= MOST_LAYOUTS


# ---- weights in 8 bits ----


class EightBits(PlainOps):
    def prepare(self, weight: torch.Tensor) -> QuantizedWeight:  # type: ignore[override]
        return quantize(weight, "int8")


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_moved_network_computes_with_the_weights_as_prepared(tiny_checkpoints: dict, name: str) -> None:
    moved, exact = (Transformer.from_pretrained(tiny_checkpoints[name]) for _ in range(2))
    for module in exact.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not exact.embed_tokens.weight:
            module.weight.data = quantize(module.weight, "int8").dequantize(torch.float32)
    network = moved_network(moved, EightBits(moved.config, moved.dtype), torch.device("cpu"))
    wanted = FlatNetwork(exact, PlainOps(exact.config, exact.dtype))
    if exact.lm_head.weight is exact.embed_tokens.weight:
        wanted.head = quantize(exact.lm_head.weight, "int8").dequantize(torch.float32)
    hidden = torch.randn(5, moved.config.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.logits(hidden), wanted.logits(hidden), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.cos, wanted.cos)
    is_empty = {name: parameter.is_meta for name, parameter in moved.named_parameters()}
    assert all(empty == (".weight" in name and "proj" in name) for name, empty in is_empty.items() if "lm_head" not in name)
    assert network.device.type == "cpu"
    assert isinstance(network.layers[0].qkv, QuantizedWeight)


def test_tiles_are_small_where_rows_are_few_and_large_where_the_context_is_long() -> None:
    short = [tile_rows(rows) for rows in (1, 16, 17, 64, 128, 4096)]
    long = [tile_rows(rows, LONG_CONTEXT + 1) for rows in (1, 16, 17, 64, 128, 4096)]
    assert short == sorted(short)
    assert long == sorted(long)
    assert all(wide >= narrow for narrow, wide in zip(short, long, strict=True))
    assert max(long) == LARGEST_TILE  # what the workspace of the attention kernel has room for
    assert tile_rows(64, LONG_CONTEXT) == tile_rows(64)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 8, 16])
def test_tiles_of_wide_heads_have_as_many_query_rows_however_many_heads_share_keys(num_groups: int) -> None:
    for num_rows in (17, 48, 64, 512):
        tile = tile_rows(num_rows, wide_groups=num_groups)
        assert tile * power_of_two(num_groups) <= WIDE_QUERY_ROWS
        assert tile == 16 or tile * power_of_two(num_groups) == WIDE_QUERY_ROWS
    assert tile_rows(16, wide_groups=num_groups) == tile_rows(16)


def test_narrow_heads_have_no_wide_groups(model: Transformer) -> None:
    config = replace(model.config, num_attention_heads=10, num_key_value_heads=2)
    assert [wide_groups(replace(config, head_dim=head_dim)) for head_dim in (16, 64, 128)] == [0, 0, 5]
