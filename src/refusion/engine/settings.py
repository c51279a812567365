"""How much the engine may take: seats, rows of a forward, memory of the KV cache."""

from dataclasses import dataclass

from refusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Limits of the engine; none of them changes a token in exact arithmetic. What is left out depends on the device."""

    max_num_seqs: int | None = None
    """Requests decoded together at most, at least 1; None: 128 on a GPU, 4 on a CPU."""
    max_prompt_rows: int | None = None
    """Prompt tokens one forward prefills at most, at least 1; None: 2048 on a GPU, 512 on a CPU."""
    max_decode_rows: int | None = None
    """Rows one forward decodes at most; a block of n slot tokens needs room for 2 n of them per request. None: 4096, 2048 on a CPU."""
    cache_tokens: int | None = None
    """Tokens the KV cache holds, all requests together; None: what gpu_memory_fraction leaves, on a CPU 512 MiB."""
    gpu_memory_fraction: float = 0.85
    """Share of the GPU's memory for weights and KV cache together, in (0, 1]; without effect where cache_tokens is given."""
    page_size: int | None = None
    """Tokens of a cache page, a power of two; requests with the same beginning share whole pages. None: 128 on a GPU, 16 on a CPU."""
    prefix_caching: bool | None = None
    """Keep the pages of finished prompts for later requests that begin alike, until the memory is needed. None: unless batch_invariant."""
    batch_invariant: bool = False
    """In bfloat16 on a GPU, a greedy request gets the same tokens, bit for bit, alone and in any batch. Slower: see docs/engine.md."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_prompt_rows", "max_decode_rows", "cache_tokens", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.page_size is not None and self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size is {self.page_size}; it must be a power of two")
        if self.batch_invariant and self.prefix_caching:
            raise ConfigError("prefix_caching changes roundings, which batch_invariant forbids; leave one of them out")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ConfigError(f"gpu_memory_fraction is {self.gpu_memory_fraction}; it must be in (0, 1]")

    def seats(self, device_type: str) -> int:
        """max_num_seqs on this kind of device."""
        return self.max_num_seqs or (128 if device_type == "cuda" else 4)

    def prompt_rows(self, device_type: str) -> int:
        """max_prompt_rows on this kind of device."""
        return self.max_prompt_rows or (2048 if device_type == "cuda" else 512)

    def decode_rows(self, device_type: str) -> int:
        """max_decode_rows on this kind of device."""
        return self.max_decode_rows or (4096 if device_type == "cuda" else 2048)

    @property
    def shares_prefixes(self) -> bool:
        """prefix_caching, decided."""
        return not self.batch_invariant if self.prefix_caching is None else self.prefix_caching

    def page_tokens(self, device_type: str) -> int:
        """page_size on this kind of device; on a GPU a block of attention's columns then lies in one page."""
        return self.page_size or (128 if device_type == "cuda" else 16)
