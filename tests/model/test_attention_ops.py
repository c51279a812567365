from __future__ import annotations

import pytest
import torch
from flat_forwards import BLOCKS, CHAIN, GROUPS, LONE, PLAN, TWO_WAY, Seat, dense, forward_of

from refusion.model import attention_ops
from refusion.model.attention_ops import attend, prepare, rotate_and_store, store_rows

BATCHES = {
    "one seat": [Seat(37, 0, CHAIN + PLAN)],
    "lone rows": [Seat(17, 0, LONE), Seat(), Seat(16, 0, LONE)],
    "equal ranks": [Seat(21, 0, TWO_WAY), Seat(0, 0, BLOCKS), Seat(), Seat(9, 0, BLOCKS)],
    "first forward": [Seat(0, 19, PLAN)],
    "all kinds": [Seat(0, 5, CHAIN), Seat(1, 0, CHAIN + GROUPS), Seat(15, 40), Seat(100, 3, CHAIN + PLAN + GROUPS), Seat(16)],
}


@pytest.mark.parametrize(("neighbours", "apart_from"), [(False, 1), (True, 1000), (True, 16)], ids=["gathered", "joined", "apart"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_row_attends_to_what_it_may_see(name: str, neighbours: bool, apart_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ops, "PIECE", 8)
    monkeypatch.setattr(attention_ops, "APART_FROM", apart_from)
    forward = forward_of(BATCHES[name], neighbours=neighbours)
    torch.testing.assert_close(attend(*forward.arguments).double(), dense(forward), rtol=0, atol=2e-6)


def test_a_plan_made_once_serves_every_layer() -> None:
    first, second = (forward_of(BATCHES["all kinds"], seed=0) for _ in range(2))
    second.values.mul_(2)
    second.new_values.mul_(2)
    plan = prepare(first.rows, first.spans, num_groups=3, dtype=torch.float32)
    once, twice = (attend(*forward.arguments, plan=plan) for forward in (first, second))
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=1e-5)


def test_neighbouring_pages_are_not_gathered() -> None:
    plan = prepare(*forward_of([Seat(40, 0, LONE)], neighbours=True).arguments[-2:], num_groups=1, dtype=torch.float32)
    assert plan.seats[0].committed == slice(16, 56)  # page 0 belongs to nobody here
    assert plan.seats[0].pieces[0].bias is None


def test_rotation_is_that_of_the_transformer_and_values_pass_through() -> None:
    num_rows, num_heads, num_kv_heads, head_dim = 5, 6, 2, 8
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    angles = torch.arange(32)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    positions = torch.tensor([3, 0, 31, 7, 7], dtype=torch.int32)
    norm = torch.nn.RMSNorm(head_dim, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    new_keys, new_values = torch.zeros(2, num_rows, 2 * num_kv_heads, head_dim).unbind()
    slices = new_keys[:, :num_kv_heads], new_values[:, :num_kv_heads]
    tables = angles.cos(), angles.sin()
    query = rotate_and_store(qkv, positions, *tables, norm.weight.data, norm.weight.data, 1e-6, num_heads, num_kv_heads, head_dim, *slices)

    heads = norm(qkv.view(num_rows, -1, head_dim)).detach()[:, : num_heads + num_kv_heads]
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones(num_rows, 1, 4), angles[positions.long()][:, None])
    turned = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(query, turned[:, :num_heads])
    torch.testing.assert_close(slices[0], turned[:, num_heads:])
    assert torch.equal(slices[1], qkv.view(num_rows, -1, head_dim)[:, -num_kv_heads:])
    assert not new_keys[:, num_kv_heads:].any()


def test_store_copies_the_named_rows_of_all_layers_and_no_others() -> None:
    new_keys, new_values = torch.arange(2 * 2 * 5 * 3, dtype=torch.float32).view(2, 2, 5, 3, 1)
    keys, values = torch.zeros(2, 2, 8, 3, 1)
    store_rows(new_keys, new_values, keys, values, torch.tensor([4, -1, 0], dtype=torch.int32), torch.tensor([2, 7, 5], dtype=torch.int32))
    for pages, new in ((keys, new_keys), (values, new_values)):
        expected = torch.zeros_like(pages)
        expected[:, 2], expected[:, 5] = new[:, 4], new[:, 0]
        assert torch.equal(pages, expected)
