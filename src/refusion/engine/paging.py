"""The pages of requests: their own, those they share with others whose prompts begin alike, and a few ahead of what they need.

Who gets a seat, and who makes room for whom, is the scheduler's business.
"""

from refusion.engine.lanes import LaneKey
from refusion.engine.pages import PagePool
from refusion.engine.prefix import PrefixCache
from refusion.engine.requests import Request, cache_room, first_room
from refusion.engine.seats import Seats

PAGES_AHEAD = 4
"""So many more than it needs next a request gets, as long as half of the pages stay free."""


class Paging:
    """Hands out the pages of one pool."""

    def __init__(self, num_pages: int, page_size: int, *, shares_prefixes: bool) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(self.pool, page_size, is_on=shares_prefixes)
        self.num_shared_tokens = 0
        """Prompt tokens so far that were found in the cache."""

    @property
    def num_tokens(self) -> int:
        """Room in all pages."""
        return self.pool.num_pages * self.page_size

    def reset(self) -> None:
        """Forget who holds what."""
        self.pool = PagePool(self.pool.num_pages)
        self.prefix = PrefixCache(self.pool, self.page_size, is_on=self.prefix.is_on)

    def take(self, request: Request, key: LaneKey, most_committed: int, num_others: int) -> list[int] | None:
        """Pages for all a request had, or for its whole prompt, and for its next round; None if there are too few.

        What others left of its prompt counts as prefilled. num_others: a page is left to each of so many.
        """
        cached = 0 if request.saved is None else request.saved.num_cached
        held = max(cached, first_room(request.new, key))
        most = cache_room(request.new, key)
        shared, chain = [], request.chain
        if request.saved is None:
            match = self.prefix.match(request.sharable_ids)
            shared, chain = match.pages, match.chain
        missing = self._pages_of(min(held + most_committed, most)) - len(shared)
        if not self.prefix.make_room(missing + num_others):
            self.pool.release(shared)
            return None
        if request.saved is None:
            self.num_shared_tokens += len(shared) * self.page_size
            request.num_prefilled, request.chain, request.num_known_pages = len(shared) * self.page_size, chain, len(shared)
        missing = self._with_some_ahead(missing, self._pages_of(most) - len(shared))
        return shared + self.pool.allocate(missing, after=shared[-1] if shared else -1)

    def extend(self, seats: Seats, request: Request) -> bool:
        """Pages for all that the next forward may commit; False if there are too few."""
        missing = self._pages_of(seats.wanted(request.seat)) - len(request.pages)
        if missing <= 0:
            return True  # somebody who moved
        if not self.prefix.make_room(missing):
            return False
        missing = self._with_some_ahead(missing, self._pages_of(int(seats.most_cached[request.seat])) - len(request.pages))
        pages = self.pool.allocate(missing, after=request.pages[-1] if request.pages else -1)
        seats.add_pages(request, pages, self.page_size)
        return True

    def remember(self, request: Request) -> None:
        """Whole pages of its prompt are there for others."""
        size = self.page_size
        for index in range(request.num_known_pages, request.num_prefilled // size):
            tokens = request.prefill_ids[index * size : (index + 1) * size]
            request.chain = self.prefix.add(request.chain, tokens, request.pages[index])
            request.num_known_pages = index + 1
        self.prefix.touch(request.chain)

    def _with_some_ahead(self, missing: int, most: int) -> int:
        """Pages to allocate where so many are missing and `most` could ever be used."""
        spare = self.pool.num_free - self.pool.num_pages // 2
        return max(missing, min(missing + PAGES_AHEAD, most, spare))

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
