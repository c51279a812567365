"""Keys and values of committed tokens, in commit order, with their positions kept apart.

A forward writes the K/V of all its tokens behind the longest committed prefix of the batch; `keep` then moves the rows worth keeping
to the end of each request's committed part, and everything else is overwritten by the next forward. Which rows those are is the
decoder's business.
"""

import torch
from torch import Tensor

from refusion.errors import RequestError
from refusion.model.config import ModelConfig

# L = layers, B = requests, H = key/value heads, C = capacity in tokens, D = head dimension, T = new tokens of one forward, M = rows kept


class KVCache:
    """K/V of `num_requests` requests, at most `capacity` tokens each, new rows of a forward included."""

    def __init__(self, config: ModelConfig, num_requests: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, num_requests, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [L, B, H, C, D]
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # [L, B, H, C, D]
        self.lengths = torch.zeros(num_requests, dtype=torch.long, device=device)  # [B] committed tokens
        self.longest = 0  # max of `lengths`, known on the host; new rows are written from here on

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` rows behind the committed part.

        Raises `RequestError` if memory does not suffice.
        """
        if self.longest + num_new <= self.capacity:
            return
        extra = max(self.longest + num_new - self.capacity, self.capacity // 2)
        try:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RequestError("out of memory for the KV cache; lower the batch size or max_tokens") from error

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new rows [B, H, T, D] of one layer; returns views of committed and new rows together [B, H, longest + T, D]."""
        end = self.longest + keys.shape[2]
        self.keys[layer, :, :, self.longest : end] = keys
        self.values[layer, :, :, self.longest : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def is_committed(self) -> Tensor:
        """[B, longest] bool: which of the columns before the new rows hold a committed token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def keep(self, rows: Tensor, is_kept: Tensor) -> None:
        """Commit rows of the last forward.

        rows [B, M]: indices into its tokens, in commit order; is_kept [B, M] bool, a prefix of each row.
        """
        num_kept = is_kept.sum(dim=1)  # [B]
        most = int(num_kept.max())  # one host synchronisation a forward: the next write has to know where to start
        if most == 0:
            return
        rows, is_kept = rows[:, :most], is_kept[:, :most]
        request, place = is_kept.nonzero(as_tuple=True)  # the moved rows
        source = self.longest + rows[request, place]
        target = self.lengths[request] + place
        # Advanced indexing copies before it writes, so rows may move over one another.
        self.keys[:, request, :, target] = self.keys[:, request, :, source]
        self.values[:, request, :, target] = self.values[:, request, :, source]
        self.lengths = self.lengths + num_kept
        self.longest = int(self.lengths.max())

    def select(self, requests: Tensor) -> None:
        """Keep only these requests [R] (indices), in this order: finished ones give their memory back."""
        self.keys = self.keys[:, requests]
        self.values = self.values[:, requests]
        self.lengths = self.lengths[requests]
        self.longest = int(self.lengths.max()) if len(requests) else 0
