"""Pages of prompts that later requests with the same beginning can share.

The keys and values of a prompt token depend on the tokens before it alone, so a page that lies wholly inside a prompt serves every prompt
that begins alike. Pages are known by their chain: the page before them and their own tokens. The cache holds a reference of its own on
each page; pages that nobody else holds are given up when memory is needed, the longest unused first.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from refusion.engine.pages import PagePool

ROOT = 0
"""The chain before the first page."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known beginning of a prompt."""

    pages: list[int]
    chain: int  # where the next page of the prompt would hang


class PrefixCache:
    """A tree of pages; `chain` names its nodes. A name is never used twice, so nothing can hang under a page that was given up."""

    def __init__(self, pool: PagePool, page_size: int, *, is_on: bool = True) -> None:
        self.pool, self.page_size, self.is_on = pool, page_size, is_on
        self._nodes: OrderedDict[tuple[int, bytes], tuple[int, int]] = OrderedDict()  # (parent, tokens) -> (chain, page), oldest first
        self._keys: dict[int, tuple[int, bytes]] = {}  # chain -> its key
        self._last_chain = ROOT

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, token_ids: np.ndarray) -> Match:
        """Share the pages that hold the beginning of a prompt; the caller releases them like its own."""
        chain, pages = ROOT, []
        for page_tokens in self._whole_pages(token_ids):
            key = (chain, page_tokens.tobytes())
            if key not in self._nodes:
                break
            chain, page = self._nodes[key]
            pages.append(page)
        self.touch(chain)
        self.pool.share(pages)
        return Match(pages, chain)

    def add(self, chain: int, token_ids: np.ndarray, page: int) -> int:
        """Remember the page behind `chain` that holds these tokens; returns its own chain."""
        if not self.is_on:
            return chain
        key = (chain, token_ids.tobytes())
        if key not in self._nodes:
            self._last_chain += 1
            self._nodes[key], self._keys[self._last_chain] = (self._last_chain, page), key
            self.pool.share([page])
        return self._nodes[key][0]

    def touch(self, chain: int) -> None:
        """Make the pages up to `chain` the youngest, the last one before the first: a page outlives those that hang on it."""
        while chain in self._keys:
            key = self._keys[chain]
            self._nodes.move_to_end(key)
            chain = key[0]

    def make_room(self, num_pages: int) -> bool:
        """Give up pages until so many are free; False if too few can be."""
        for _ in range(len(self._nodes)):
            if self.pool.num_free >= num_pages:
                break
            key, (chain, page) = self._nodes.popitem(last=False)
            if self.pool.num_references(page) > 1:
                self._nodes[key] = (chain, page)  # in use: as young as can be
            else:
                del self._keys[chain]
                self.pool.release([page])
        return self.pool.num_free >= num_pages

    def _whole_pages(self, token_ids: np.ndarray) -> list[np.ndarray]:
        size = self.page_size
        return [token_ids[start : start + size] for start in range(0, len(token_ids) - size + 1, size)] if self.is_on else []
