"""Pages of the KV cache: which are free, and how many hold on to each of the others. What lies in them is the runner's business."""

import numpy as np


class PagePool:
    """A fixed number of pages. A page is free while nobody refers to it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._references = np.zeros(num_pages, dtype=np.int32)
        self._counts = self._references.data
        """The same numbers; one at a time they are several times as fast so."""
        self._next = 0  # behind the pages given out last; free, if nothing has been given back below

    def allocate(self, count: int, after: int = -1) -> list[int]:
        """`count` free pages with one reference each, neighbours where possible, best right behind page `after`."""
        assert count <= self.num_free, f"{count} pages wanted, {self.num_free} are free"
        pages = self._neighbours(after + 1, count) if after >= 0 else []
        pages = pages or self._neighbours(self._next, count)
        if not pages and count:
            free = np.flatnonzero(self._references == 0)
            pages = free[_first_run(free, count) :][:count].tolist()
        for page in pages:
            self._counts[page] = 1
        self.num_free -= count
        if pages:
            self._next = pages[-1] + 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more reference to each of these pages, which are in use."""
        for page in pages:
            assert self._counts[page], f"page {page} is free and cannot be shared"
            self._counts[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each of these pages."""
        for page in pages:
            assert self._counts[page], f"page {page} is free and cannot be released"
            self._counts[page] -= 1
            self.num_free += self._counts[page] == 0

    def num_references(self, page: int) -> int:
        """How many hold on to this page."""
        return self._counts[page]

    def _neighbours(self, first: int, count: int) -> list[int]:
        """The pages from `first` on, or none if one of them is taken."""
        run = self._counts[first : first + count]
        return list(range(first, first + count)) if len(run) == count and not any(run) else []


def _first_run(free: np.ndarray, count: int) -> int:
    """Index in `free` (ascending pages) of the first `count` neighbours, 0 if there are none."""
    starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
    return int(starts[0]) if len(starts) else 0
