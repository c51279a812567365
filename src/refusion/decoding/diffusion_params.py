"""Settings of the diffusion baselines: masked diffusion over a whole answer, and block diffusion."""

from dataclasses import dataclass, replace
from typing import Literal

from refusion.errors import ConfigError

BlockCache = Literal["none", "prefix", "dual"]
MAX_BLOCK_SIZE = 256
"""Of block diffusion, whose last block may reach so far past the context."""
DEFAULT_BLOCK_SIZE = 32
DEFAULT_THRESHOLD = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusionParams:
    """How a masked diffusion model writes an answer of fixed length (LLaDA, arXiv 2502.09992; threshold and cache: arXiv 2505.22618)."""

    block_size: int = DEFAULT_BLOCK_SIZE
    """Answer tokens that are finished before the next ones are begun, at least 1; max_tokens or more: one block, pure diffusion."""
    steps: int | None = None
    """Forwards of a block, in [1, block_size]: masks are shared out evenly. None: one token a forward, or what `threshold` makes of it."""
    threshold: float | None = None
    """Instead of steps: a forward commits every prediction more probable than this, in [0, 1], and at least the best one."""
    cache: BlockCache = "none"
    """Keys and values reused within a block, an approximation: none, of all before the block (prefix), or of all but the block (dual)."""
    early_stop: bool = False
    """Stop once an EOS has everything before it committed; without, the whole answer is written, as published."""

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "block_size", self.block_size, "at least 1")
        _check_schedule(self.block_size, self.steps, self.threshold)
        _require(self.cache in ("none", "prefix", "dual"), "cache", self.cache, "'none', 'prefix' or 'dual'")

    @property
    def steps_per_block(self) -> int:
        """Forwards of a block; without effect where there is a threshold."""
        return self.steps or self.block_size


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDiffusionParams:
    """How a block diffusion model writes an answer (BD3-LM, arXiv 2503.09573)."""

    block_size: int | None = None
    """Tokens of a block, in [1, 256]; None: what the checkpoint was trained with, else 32."""
    steps: int | None = None
    """Forwards of a block, in [1, block_size]: masks are shared out evenly; instead of threshold."""
    threshold: float | None = None
    """A forward commits every prediction more probable than this, in [0, 1], at least the best one. None: 0.9, unless steps is given."""
    fuse_commit: bool = True
    """Cache a finished block in the forward that denoises the next one; False: in a forward of its own. The tokens are the same."""

    def __post_init__(self) -> None:
        size = self.block_size
        _require(size is None or 1 <= size <= MAX_BLOCK_SIZE, "block_size", size, f"in [1, {MAX_BLOCK_SIZE}]")
        _check_schedule(MAX_BLOCK_SIZE if size is None else size, self.steps, self.threshold)

    def resolve(self, trained_block_size: int | None) -> "BlockDiffusionParams":
        """Fill what was left out. Raises `ConfigError` if `steps` does not fit the block size."""
        threshold = DEFAULT_THRESHOLD if self.steps is None and self.threshold is None else self.threshold
        return replace(self, block_size=self.block_size or trained_block_size or DEFAULT_BLOCK_SIZE, threshold=threshold)

    @property
    def steps_per_block(self) -> int:
        """Forwards of a block; without effect where there is a threshold."""
        return self.steps or self.size

    @property
    def size(self) -> int:
        """The block size of resolved settings."""
        assert self.block_size is not None, "settings are resolved before they are used"
        return self.block_size


DiffusionParams = MaskedDiffusionParams | BlockDiffusionParams


def _check_schedule(block_size: int, steps: int | None, threshold: float | None) -> None:
    _require(steps is None or 1 <= steps <= block_size, "steps", steps, f"in [1, block_size={block_size}]")
    _require(threshold is None or 0.0 <= threshold <= 1.0, "threshold", threshold, "in [0, 1]")
    _require(steps is None or threshold is None, "threshold", threshold, "left out where steps is given")


def _require(is_fine: bool, field: str, value: object, wanted: str) -> None:
    if not is_fine:
        raise ConfigError(f"{field} is {value!r}; it must be {wanted}")
