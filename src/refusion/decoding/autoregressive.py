"""Autoregressive decoding in the same interface: one token per request and forward, the yardstick of every speed claim."""

# torch leaves the types of tolist and split open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.forward import ForwardBatch, ForwardFn
from refusion.decoding.params import SamplingParams
from refusion.decoding.sampling import Draw
from refusion.model.cache import KVCache
from refusion.model.segments import Segments

# B = requests, N = most new tokens, P = longest prompt


@dataclass(frozen=True, slots=True)
class AutoregressiveState:
    """The answers being written."""

    prompt_lengths: Tensor  # [B]
    seeds: Tensor  # [B]
    token_ids: Tensor  # [B, N]
    num_tokens: Tensor  # [B]
    is_done: Tensor  # [B]


class AutoregressiveDecoder:
    """Decodes a batch that starts together; the forward that prefills also yields the first token."""

    def __init__(self, forward: ForwardFn, sampling: SamplingParams, *, eos_ids: Tensor) -> None:
        self.forward, self.sampling, self.eos_ids = forward, sampling, eos_ids

    def start(self, prompts: Tensor, prompt_lengths: Tensor, seeds: Tensor) -> None:
        """Begin with right-padded prompts [B, P]."""
        num_requests, most = len(prompts), self.sampling.max_tokens
        zeros = torch.zeros(num_requests, dtype=torch.long, device=prompts.device)
        token_ids = torch.zeros(num_requests, most, dtype=torch.long, device=prompts.device)
        self.state = AutoregressiveState(prompt_lengths, seeds, token_ids, zeros, zeros.bool())
        self.cache: KVCache = self.forward.new_cache(num_requests, prompts.shape[1] + most)
        self.prompts: Tensor | None = prompts

    @property
    def is_done(self) -> Tensor:
        """[B] bool: nothing left to write."""
        return self.state.is_done

    @property
    def num_forwards(self) -> Tensor:
        """[B] forwards each request took part in: one a token."""
        return self.state.num_tokens

    def answer(self, row: int) -> list[int]:
        """The tokens of one request so far."""
        token_ids: list[int] = self.state.token_ids[row, : int(self.state.num_tokens[row])].tolist()
        return token_ids

    def compact(self, requests: Tensor) -> None:
        """Go on with these requests [R] (indices) only."""
        state = self.state
        parts = (state.prompt_lengths, state.seeds, state.token_ids, state.num_tokens, state.is_done)
        self.state = AutoregressiveState(*(part[requests] for part in parts))
        self.cache.select(requests)

    @torch.no_grad()
    def step(self) -> None:
        """One token for every unfinished request."""
        batch, rows, is_kept = self._prefill() if self.prompts is not None else self._next()
        readout = self.forward(batch, self.cache)
        self.cache.keep(rows, is_kept)
        self.prompts = None
        state, active = self.state, ~self.state.is_done
        last = (is_kept.sum(dim=1) - 1).clamp(min=0)[:, None]
        token = readout.token_ids.gather(1, last)  # [B, 1]
        at = state.num_tokens[:, None].clamp(max=state.token_ids.shape[1] - 1)
        token_ids = state.token_ids.scatter(1, at, torch.where(active[:, None], token, state.token_ids.gather(1, at)))
        num_tokens = state.num_tokens + active
        is_done = state.is_done | torch.isin(token[:, 0], self.eos_ids) | (num_tokens >= state.token_ids.shape[1])
        self.state = AutoregressiveState(state.prompt_lengths, state.seeds, token_ids, num_tokens, is_done)

    def _prefill(self) -> tuple[ForwardBatch, Tensor, Tensor]:
        assert self.prompts is not None
        place = torch.arange(self.prompts.shape[1], device=self.prompts.device).expand(self.prompts.shape)
        is_token = place < self.state.prompt_lengths[:, None]
        is_last = place == self.state.prompt_lengths[:, None] - 1
        return self._batch(self.prompts, place, is_token, is_last), place, is_token

    def _next(self) -> tuple[ForwardBatch, Tensor, Tensor]:
        state = self.state
        token = state.token_ids.gather(1, (state.num_tokens - 1)[:, None])
        position = (state.prompt_lengths + state.num_tokens - 1)[:, None]
        active = ~state.is_done[:, None]
        return self._batch(token, position, active, active), torch.zeros_like(token), active

    def _batch(self, token_ids: Tensor, positions: Tensor, is_token: Tensor, is_read: Tensor) -> ForwardBatch:
        draw = Draw(self.sampling.temperature, self.sampling.top_p, self.state.seeds, torch.ones_like(self.state.seeds))
        return ForwardBatch(token_ids, positions, Segments.causal(is_token), is_read, torch.zeros_like(token_ids), draw)
