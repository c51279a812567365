"""The attention kernels against their plain twins: in Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from flat_forwards import BLOCKS, CHAIN, GROUPS, LONE, PLAN, TWO_WAY, Forward, Seat, dense, forward_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.model import attention_ops
from refusion.model.kernels import rotary, store
from refusion.model.kernels.attention import Workspace, attend, rotate_and_attend
from refusion.model.kernels.attention_config import MAX_SPLITS, Config, choose_config, choose_splits, padded_rows
from refusion.model.rows import Tiles, plain_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAGGED = [
    Seat(0, 0, CHAIN),
    Seat(1, 0, CHAIN + PLAN),
    Seat(15, 0, LONE),
    Seat(16, 0, CHAIN + GROUPS),
    Seat(17),
    Seat(100, 0, CHAIN + PLAN + GROUPS),
]
PROMPTS = [Seat(0, 1), Seat(0, 21), Seat(17, 9), Seat()]
BOTH = [Seat(0, 18, PLAN), Seat(20, 3, CHAIN + PLAN), Seat(5, 2), Seat(33, 0, CHAIN)]
ALONE = [Seat(length, 0, LONE) for length in (1, 31, 0, 32, 33)]
EQUAL_RANKS = [Seat(17, 0, TWO_WAY), Seat(0, 0, TWO_WAY), Seat(33, 0, BLOCKS), Seat(), Seat(0, 0, BLOCKS)]
BATCHES = {"decode": RAGGED, "prompt": PROMPTS, "both": BOTH, "autoregressive": ALONE, "equal ranks": EQUAL_RANKS}


def run(
    forward: Forward,
    *,
    splits: int,
    block: int,
    columns: int = 16,
    new_columns: int = 16,
    is_long: bool = False,
    num_tiles: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The kernel's answer; the workspace is NaN at first."""
    forward = forward.to(DEVICE)
    num_kv_heads, head_dim = forward.new_keys.shape[1:]
    num_tiles = num_tiles or len(forward.spans.cached) * 2 + forward.rows.num_rows // block
    tiles = plain_tiles(forward.spans, block, num_tiles)
    tile_rows = padded_rows(block, forward.query.shape[1] // num_kv_heads)
    workspace = Workspace(num_tiles * num_kv_heads * splits, tile_rows, head_dim, torch.device(DEVICE))
    for parts in (workspace.mixed, workspace.best, workspace.total):
        parts.fill_(torch.nan)
    config = Config(splits, columns, new_columns, num_warps=4, num_stages=2, is_long=is_long)
    query = forward.query.clone()
    found = attend(query, *forward.arguments[1:], tiles, workspace, config, **options)
    left_over = query.flatten(1) if options.get("in_place") else torch.zeros_like(found)
    is_padding = forward.rows.seat < 0
    assert torch.equal(found[is_padding], left_over[is_padding])
    return found.cpu()


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_that_of_the_plain_twin(name: str, splits: int, is_long: bool) -> None:
    forward = forward_of(BATCHES[name])
    expected = attention_ops.attend(*forward.arguments)
    torch.testing.assert_close(run(forward, splits=splits, block=8, is_long=is_long), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("num_groups", [1, 3, 4])
@pytest.mark.parametrize(("page_size", "columns"), [(16, 16), (16, 32), (64, 16), (32, 32)])
def test_pages_and_groups_of_any_size(page_size: int, columns: int, num_groups: int, is_long: bool) -> None:
    forward = forward_of([Seat(100, 2, CHAIN + PLAN), Seat(31, 0, CHAIN)], page_size=page_size, num_groups=num_groups, num_kv_heads=1)
    expected = attention_ops.attend(*forward.arguments)
    torch.testing.assert_close(run(forward, splits=2, block=4, columns=columns, is_long=is_long), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_heads_of_any_power_of_two(head_dim: int) -> None:
    forward = forward_of([Seat(20, 0, CHAIN)], head_dim=head_dim, num_kv_heads=1)
    torch.testing.assert_close(run(forward, splits=2, block=4), attention_ops.attend(*forward.arguments), rtol=0, atol=2e-6)


def test_bfloat16_is_rounded_only_in_weights_and_result() -> None:
    forward = forward_of(BOTH, dtype=torch.bfloat16)
    torch.testing.assert_close(run(forward, splits=3, block=8).double(), dense(forward), rtol=2e-2, atol=2e-2)


def test_a_row_does_not_depend_on_the_other_seats() -> None:
    alone = forward_of([Seat(37, 0, CHAIN + PLAN)], padding=(0, 0))
    crowd = forward_of([Seat(37, 0, CHAIN + PLAN), Seat(90, 5, CHAIN), Seat(3, 0, PLAN)], padding=(5, 0), seed=1)
    first = crowd.spans.row_start[0]
    for name in ("query", "new_keys", "new_values"):
        getattr(crowd, name)[first : first + 7] = getattr(alone, name)
    for name in ("keys", "values"):
        live = [f.spans.cache_rows(torch.zeros(37, dtype=torch.long), torch.arange(37)) for f in (crowd, alone)]
        getattr(crowd, name)[live[0]] = getattr(alone, name)[live[1]]
    together = run(crowd, splits=3, block=4)
    assert torch.equal(together[first : first + 7], run(alone, splits=3, block=4))


def test_padding_is_cleared_when_there_are_fewer_tiles_than_blocks_of_rows() -> None:
    forward = forward_of([Seat(5, 0, LONE)], padding=(20, 13))
    torch.testing.assert_close(run(forward, splits=2, block=4, num_tiles=1), attention_ops.attend(*forward.arguments), rtol=0, atol=2e-6)


def test_scratch_rows_may_be_slices_of_a_larger_buffer() -> None:
    forward = forward_of(BOTH)
    buffer = torch.full((2, forward.rows.num_rows + 3, 4, 16), torch.nan)
    sliced = buffer[:, 2:-1, 1:3].copy_(torch.stack((forward.new_keys, forward.new_values)))
    expected = attention_ops.attend(*forward.arguments)
    torch.testing.assert_close(
        run(replace(forward, new_keys=sliced[0], new_values=sliced[1]), splits=2, block=8), expected, rtol=0, atol=2e-6
    )


def test_too_small_a_workspace_is_refused() -> None:
    forward = forward_of([Seat(5, 0, LONE)]).to(DEVICE)
    tiles = plain_tiles(forward.spans, 4, 2)
    workspace = Workspace(7, padded_rows(4, 3), 16, torch.device(DEVICE))
    with pytest.raises(AssertionError, match="8 parts"):
        attend(*forward.arguments, tiles, workspace, Config(2, 16, 16, 4, 2))


def test_there_are_as_many_splits_as_programs_are_wanted() -> None:
    assert choose_splits(num_tiles=2, num_kv_heads=2, num_programs=7) == 1
    assert choose_splits(num_tiles=1, num_kv_heads=2, num_programs=7) == 3
    assert choose_splits(num_tiles=1, num_kv_heads=1, num_programs=1000) == MAX_SPLITS


def test_long_contexts_are_shared_by_more_programs_but_never_more_than_the_workspace_holds() -> None:
    num_more = 0
    for num_tiles in range(1, 80):
        for num_kv_heads in (1, 3, 8):
            for head_dim in (64, 128):
                short, long = (
                    choose_config(num_tiles, num_kv_heads, 64, head_dim, torch.bfloat16, 264, is_long).splits for is_long in (False, True)
                )
                assert short <= long
                assert long == 1 or num_tiles * num_kv_heads * long <= 264
                num_more += long > short
    assert num_more


@pytest.mark.parametrize(("limit", "waiting", "most_rows"), [(99 * 1024, 1, 128), (227 * 1024, 0, 256)])
def test_queries_and_the_columns_in_flight_fit_into_shared_memory(limit: int, waiting: int, most_rows: int) -> None:
    """Of the smallest cards, where the stage that is multiplied lies in registers, and of Hopper, where all of them lie there."""
    for tile_rows in (16, 32, 64, 128, 256):
        for head_dim in (64, 128):
            for num_tiles in (1, 4, 12, 40):
                for is_long in (False, True):
                    config = choose_config(num_tiles, 8, tile_rows, head_dim, torch.bfloat16, 264, is_long)
                    numbers = tile_rows + 2 * config.columns * (config.num_stages - waiting)
                    assert tile_rows > most_rows or 2 * head_dim * numbers <= limit, f"{config} with {tile_rows} x {head_dim}"


def test_the_parts_of_a_long_context_may_fill_the_workspace() -> None:
    forward = forward_of([Seat(700, 0, CHAIN + PLAN)], head_dim=128, num_kv_heads=1).to(DEVICE)
    tiles = plain_tiles(forward.spans, 4, 2, is_long=True)
    tile_rows = padded_rows(4, forward.query.shape[1])
    workspace = Workspace(8, tile_rows, 128, torch.device(DEVICE))
    assert choose_config(2, 1, tile_rows, 128, torch.float32, workspace.num_parts, tiles.is_long).splits == 4
    found = attend(forward.query.clone(), *forward.arguments[1:], tiles, workspace)
    torch.testing.assert_close(found, attention_ops.attend(*forward.arguments), rtol=0, atol=2e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", BATCHES)
def test_the_result_may_take_the_place_of_the_queries(name: str, splits: int) -> None:
    forward = forward_of(BATCHES[name])
    expected = attention_ops.attend(*forward.arguments)
    is_real = forward.rows.seat >= 0
    found = run(forward, splits=splits, block=4, in_place=True)
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_new_rows_may_be_taken_in_blocks_of_their_own(name: str) -> None:
    forward = forward_of(BATCHES[name])
    expected = attention_ops.attend(*forward.arguments)
    torch.testing.assert_close(run(forward, splits=5, block=8, columns=32, new_columns=16), expected, rtol=0, atol=2e-6)


def test_no_used_tile_leaves_only_zeros() -> None:
    forward = forward_of([Seat(5), Seat()], padding=(3, 3)).to(DEVICE)
    tiles = plain_tiles(forward.spans, 4, 2)
    assert isinstance(tiles, Tiles)
    workspace = Workspace(8, 16, 16, torch.device(DEVICE))
    assert not attend(*forward.arguments, tiles, workspace, Config(2, 16, 16, 4, 2)).any()


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 16), (8, 2, 32)])
def test_rotation_is_that_of_the_plain_twin(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, has_norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(DEVICE, dtype)
    angles = 6 * torch.rand(32, head_dim // 2, generator=generator).to(DEVICE)
    positions = torch.tensor([0, 31, 7, 7, 1], dtype=torch.int32, device=DEVICE)
    norms = 0.5 + torch.rand(2, head_dim, generator=generator).to(DEVICE, dtype)
    results = []
    for operation in (attention_ops.rotate_and_store, rotary.rotate_and_store):
        buffer = torch.full((2, 6, num_kv_heads + 1, head_dim), 7, dtype=dtype, device=DEVICE)
        slices = buffer[:, 1:, :num_kv_heads]
        settings = (*norms, 1e-6) if has_norm else (None, None, 1e-6)
        query = operation(qkv, positions, angles.cos(), angles.sin(), *settings, num_heads, num_kv_heads, head_dim, slices[0], slices[1])
        assert (buffer[:, 0] == 7).all()
        assert (buffer[:, :, num_kv_heads:] == 7).all()
        results.append((query, slices))
    tolerance = 1e-6 if dtype == torch.float32 else 4 * 2**-6  # the interpreter cuts to bfloat16, up to three times: steps of 1/64 below 4
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", BATCHES)
def test_rotation_joined_with_attention_is_both_one_after_the_other(name: str, splits: int, has_norm: bool) -> None:
    forward = forward_of(BATCHES[name]).to(DEVICE)
    num_rows, num_heads, head_dim = forward.query.shape
    num_kv_heads = forward.new_keys.shape[1]
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(DEVICE)
    angles = 6 * torch.rand(64, head_dim // 2, generator=generator).to(DEVICE)
    positions = torch.randint(64, (num_rows,), generator=generator).int().to(DEVICE)
    norms = tuple((0.5 + torch.rand(2, head_dim, generator=generator)).to(DEVICE)) if has_norm else (None, None)
    turned = (positions, angles.cos(), angles.sin(), *norms, 1e-6, num_heads, num_kv_heads, head_dim)
    is_real = forward.rows.seat >= 0
    new = torch.full((2, 2, num_rows, num_kv_heads, head_dim), torch.nan, device=DEVICE)
    query = attention_ops.rotate_and_store(qkv, *turned, *new[0])
    new[0, :, ~is_real] = torch.nan  # what nobody may see
    context = (forward.keys, forward.values, forward.rows, forward.spans)
    expected = attention_ops.attend(query, *new[0], *context)
    tiles = plain_tiles(forward.spans, 8, len(forward.spans.cached) * 2 + num_rows // 8)
    workspace = Workspace(
        len(tiles.seat) * num_kv_heads * splits, padded_rows(8, num_heads // num_kv_heads), head_dim, torch.device(DEVICE)
    )
    before = qkv.clone()
    found = rotate_and_attend(qkv, *turned, *new[1], *context, tiles, workspace, Config(splits, 16, 16, 4, 2))
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=2e-6)
    torch.testing.assert_close(new[1, :, is_real], new[0, :, is_real], rtol=0, atol=2e-6)
    assert new[1, :, ~is_real].isnan().all()
    assert torch.equal(qkv[:, num_heads * head_dim :], before[:, num_heads * head_dim :])
    assert torch.equal(found[~is_real], before[~is_real, : num_heads * head_dim])


@pytest.mark.parametrize("layers", [1, 4])
def test_rows_are_stored_as_by_the_plain_twin(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "layers_of_program", lambda num_rows, num_layers: layers)
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(2, 6, 9, 3, 16, generator=generator).to(DEVICE)  # six layers: more than a program takes, and not a multiple
    source = torch.tensor([4, -1, 0, 8, -1], dtype=torch.int32, device=DEVICE)
    target = torch.tensor([2, 0, 11, 5, 3], dtype=torch.int32, device=DEVICE)
    found, expected = torch.zeros(2, 2, 6, 12, 3, 16, device=DEVICE)
    store.store_rows(new[0], new[1], found[0], found[1], source, target)
    attention_ops.store_rows(new[0], new[1], expected[0], expected[1], source, target)
    assert torch.equal(found, expected)


def test_many_rows_share_programs_and_few_do_not() -> None:
    assert [store.layers_of_program(num_rows, 36) for num_rows in (1, 28, 29, 192, 10_000)] == [1, 1, 2, 8, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("num_kv_heads", "num_groups", "head_dim"), [(8, 4, 128), (3, 3, 64)])
@pytest.mark.parametrize("block", [4, 16, 32])
def test_real_heads_in_the_configuration_chosen_for_them(num_kv_heads: int, num_groups: int, head_dim: int, block: int) -> None:
    long = [(0, rank, -1, 0, 1) for rank in range(96)] + [(1, rank, -2, 0, 0) for rank in range(96)]
    seats = [Seat(8191, 0, long), Seat(512, 300, CHAIN), Seat(0, 1), Seat(700, 0, LONE)]
    shape = {"num_kv_heads": num_kv_heads, "num_groups": num_groups, "head_dim": head_dim, "page_size": 128, "dtype": torch.bfloat16}
    forward = forward_of(seats, **shape).to("cuda")
    tiles = plain_tiles(forward.spans, block, 512 // block + 8)
    workspace = Workspace.for_device(block, num_groups, head_dim, torch.device("cuda"))
    found = attend(*forward.arguments, tiles, workspace)
    torch.testing.assert_close(found.double(), dense(forward), rtol=2e-2, atol=2e-2)
    assert torch.equal(found, attend(*forward.arguments, tiles, workspace))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize(("num_kv_heads", "num_groups", "head_dim"), [(8, 4, 128), (3, 5, 128), (3, 3, 64)])
@pytest.mark.parametrize("block", [4, 16, 32])
def test_real_heads_shared_by_several_programs(num_kv_heads: int, num_groups: int, head_dim: int, block: int, is_long: bool) -> None:
    shape = {"num_kv_heads": num_kv_heads, "num_groups": num_groups, "head_dim": head_dim, "page_size": 128, "dtype": torch.bfloat16}
    forward = forward_of([Seat(8191, 0, CHAIN + PLAN), Seat(700, 0, LONE)], **shape).to("cuda")
    tiles = plain_tiles(forward.spans, block, 3, is_long)
    workspace = Workspace.for_device(block, num_groups, head_dim, torch.device("cuda"))
    tile_rows = padded_rows(block, num_groups)
    assert choose_config(3, num_kv_heads, tile_rows, head_dim, torch.bfloat16, workspace.num_parts, is_long).splits > 1
    found = attend(*forward.arguments, tiles, workspace)
    torch.testing.assert_close(found.double(), dense(forward), rtol=2e-2, atol=2e-2)
    assert torch.equal(found, attend(*forward.arguments, tiles, workspace))
