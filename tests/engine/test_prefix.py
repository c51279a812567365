from __future__ import annotations

import numpy as np

from refusion.engine.pages import PagePool
from refusion.engine.prefix import ROOT, PrefixCache

SIZE = 2


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def remember(cache: PrefixCache, pool: PagePool, prompt: np.ndarray) -> list[int]:
    """Pages for a whole prompt, told to the cache; the caller holds them."""
    pages, chain = pool.allocate(len(prompt) // SIZE), ROOT
    for index, page in enumerate(pages):
        chain = cache.add(chain, prompt[index * SIZE : (index + 1) * SIZE], page)
    cache.touch(chain)
    return pages


def test_the_longest_known_beginning_in_whole_pages_is_shared() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    pages = remember(cache, pool, tokens(1, 2, 3, 4, 5, 6))
    assert cache.match(tokens(1, 2, 3, 4, 5)).pages == pages[:2]
    assert cache.match(tokens(1, 2, 9, 4, 5, 6)).pages == pages[:1]  # a page is known by all that is before it
    assert cache.match(tokens(3, 4)).pages == []
    assert [pool.num_references(page) for page in pages] == [4, 3, 2]


def test_a_match_goes_on_where_it_ended() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    remember(cache, pool, tokens(1, 2))
    match = cache.match(tokens(1, 2, 7, 8))
    (page,) = pool.allocate(1)
    cache.add(match.chain, tokens(7, 8), page)
    assert cache.match(tokens(1, 2, 7, 8)).pages == [*match.pages, page]


def test_the_same_page_computed_twice_is_kept_once() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, SIZE)
    first, second = remember(cache, pool, tokens(1, 2)), remember(cache, pool, tokens(1, 2))
    assert cache.match(tokens(1, 2)).pages == first
    pool.release(second)
    assert pool.num_references(second[0]) == 0


def test_unused_pages_are_given_up_from_the_ends_of_the_oldest_chain() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    old, new = tokens(1, 2, 3, 4), tokens(5, 6, 7, 8)
    for prompt in (old, new):
        pool.release(remember(cache, pool, prompt))
    assert pool.num_free == 0
    assert cache.make_room(1)
    assert len(cache.match(old).pages) == 1
    assert len(cache.match(new).pages) == 2


def test_a_match_makes_pages_young_again() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    old, new = tokens(1, 2, 3, 4), tokens(5, 6, 7, 8)
    for prompt in (old, new):
        pool.release(remember(cache, pool, prompt))
    pool.release(cache.match(old).pages)
    assert cache.make_room(2)
    assert len(cache.match(old).pages) == 2
    assert cache.match(new).pages == []


def test_pages_in_use_are_never_given_up() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE)
    held = remember(cache, pool, tokens(1, 2, 3, 4))
    pool.release(remember(cache, pool, tokens(5, 6, 7, 8)))
    assert not cache.make_room(3)
    assert pool.num_free == 2
    assert cache.match(tokens(1, 2, 3, 4)).pages == held


def test_switched_off_it_knows_nothing() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, SIZE, is_on=False)
    pool.release(remember(cache, pool, tokens(1, 2)))
    assert cache.match(tokens(1, 2)).pages == []
    assert pool.num_free == 4
