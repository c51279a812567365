from __future__ import annotations

import random

import pytest

from refusion.engine.pages import PagePool


def test_pages_are_neighbours_where_possible() -> None:
    pool = PagePool(10)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    assert pool.allocate(1, after=4) == [5]
    pool.release(first)
    assert pool.allocate(4) == [6, 7, 8, 9]  # behind the gap of three
    assert pool.allocate(2, after=9) == [0, 1]  # nothing is behind the last page
    assert pool.allocate(1, after=2) == [2]  # its neighbour is taken
    assert pool.num_free == 0


def test_scattered_pages_serve_as_well() -> None:
    pool = PagePool(5)
    pages = pool.allocate(5)
    pool.release(pages[::2])
    assert pool.allocate(3) == [0, 2, 4]


def test_a_page_is_free_when_the_last_holder_lets_go() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert (pool.num_free, pool.num_references(0), pool.num_references(1)) == (1, 1, 0)
    pool.release(pages[:1])
    assert pool.num_free == 2


@pytest.mark.parametrize("misuse", [lambda pool: pool.allocate(3), lambda pool: pool.release([0]), lambda pool: pool.share([0])])
def test_misuse_is_noticed(misuse: object) -> None:
    with pytest.raises(AssertionError):
        misuse(PagePool(2))  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(10))
def test_no_page_has_two_owners_and_none_is_lost(seed: int) -> None:
    draw, pool = random.Random(seed), PagePool(17)
    held: list[list[int]] = []
    for _ in range(200):
        if held and draw.random() < 0.5:
            pool.release(held.pop(draw.randrange(len(held))))
        else:
            count = draw.randint(0, pool.num_free)
            held.append(pool.allocate(count, after=draw.randint(-1, 16)))
            assert len(held[-1]) == count
        pages = [page for pages in held for page in pages]
        assert len(set(pages)) == len(pages) == 17 - pool.num_free
