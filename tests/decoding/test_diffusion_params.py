from __future__ import annotations

import pytest

from refusion.decoding.diffusion_params import BlockDiffusionParams, MaskedDiffusionParams
from refusion.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (MaskedDiffusionParams, {"block_size": 0}, "block_size is 0; it must be at least 1"),
        (MaskedDiffusionParams, {"block_size": 8, "steps": 9}, r"steps is 9; it must be in \[1, block_size=8\]"),
        (MaskedDiffusionParams, {"threshold": 1.1}, r"threshold is 1.1; it must be in \[0, 1\]"),
        (MaskedDiffusionParams, {"threshold": float("nan")}, "threshold is nan"),
        (MaskedDiffusionParams, {"threshold": 0.5, "steps": 4}, "threshold is 0.5; it must be left out where steps is given"),
        (MaskedDiffusionParams, {"cache": "suffix"}, "cache is 'suffix'; it must be 'none', 'prefix' or 'dual'"),
        (BlockDiffusionParams, {"block_size": 257}, r"block_size is 257; it must be in \[1, 256\]"),
        (BlockDiffusionParams, {"steps": 0}, "steps is 0"),
        (BlockDiffusionParams, {"threshold": -0.1}, "threshold is -0.1"),
    ],
)
def test_a_value_out_of_range_names_its_field(kind: type, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**wrong)


def test_block_diffusion_takes_the_block_size_it_was_trained_with() -> None:
    assert BlockDiffusionParams().resolve(8) == BlockDiffusionParams(block_size=8, threshold=0.9)
    assert BlockDiffusionParams(block_size=4).resolve(8).block_size == 4
    assert BlockDiffusionParams(steps=2).resolve(None) == BlockDiffusionParams(block_size=32, steps=2)
    with pytest.raises(ConfigError, match=r"steps is 12; it must be in \[1, block_size=8\]"):
        BlockDiffusionParams(steps=12).resolve(8)


def test_a_block_takes_as_many_forwards_as_tokens_unless_said_otherwise() -> None:
    assert MaskedDiffusionParams(block_size=8).steps_per_block == 8
    assert MaskedDiffusionParams(block_size=8, steps=3).steps_per_block == 3
