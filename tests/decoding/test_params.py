from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
from refusion.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot_size", 0),
        ("slot_threshold", 1.5),
        ("slot_threshold", -0.1),
        ("slot_threshold", float("nan")),
        ("token_threshold", 2.0),
        ("acceptance", "maybe"),
        ("correction", "none"),
        ("alternatives", 4),
        ("infill_length", 0),
        ("alternatives", -1),
        ("max_candidates", -1),
        ("serial_blocks", 0),
        ("block_size", 0),
    ],
)
def test_slot_params_name_the_field_that_is_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is {value!r}; it must be "):
        SlotParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.5),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("stop", ("",)),
    ],
)
def test_sampling_params_name_the_field_that_is_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is "):
        SamplingParams(**{field: value})


def test_block_size_is_a_multiple_of_slot_size_and_excludes_serial_blocks() -> None:
    with pytest.raises(ConfigError, match="block_size is 12; it must be a multiple of slot_size=8"):
        SlotParams(slot_size=8, block_size=12)
    with pytest.raises(ConfigError, match="serial_blocks"):
        SlotParams(block_size=8, serial_blocks=2)


def test_block_size_alone_is_checked_against_the_slot_size_of_the_checkpoint() -> None:
    params = SlotParams(block_size=12)
    assert params.resolve({"slot_size": 4, "block_size": 4}).block_size == 12
    with pytest.raises(ConfigError, match="multiple of slot_size=8"):
        params.resolve({"slot_size": 8})


def test_fields_left_out_come_from_the_checkpoint_then_from_the_defaults() -> None:
    recommended = {"slot_size": 4, "block_size": 16, "token_threshold": 0.2}
    assert SlotParams(slot_threshold=0.7).resolve(recommended) == SlotSettings(
        slot_size=4, block_size=16, token_threshold=0.2, slot_threshold=0.7
    )
    # A given slot size does not keep the checkpoint's block size, which may be no multiple of it.
    assert SlotParams(slot_size=3).resolve(recommended) == SlotSettings(slot_size=3, token_threshold=0.2)
    assert SlotParams(serial_blocks=2).resolve(recommended) == SlotSettings(slot_size=4, serial_blocks=2, token_threshold=0.2)
    assert SlotParams().resolve({}) == SlotSettings()
    # Alternatives need the autoregressive correction: the paper's leaves the checkpoint's out, and refuses those that are asked for.
    recommended = {"alternatives": 2, "infill_length": 6}
    assert SlotParams(correction="paper").resolve(recommended) == SlotSettings(correction="paper")
    assert SlotParams(slot_size=16).resolve(recommended) == SlotSettings(slot_size=16, **recommended)
    with pytest.raises(ConfigError, match="alternatives is 2"):
        SlotParams(correction="paper", alternatives=2)
    # What slides has no blocks of several slots: who asks for those, or for the paper's correction, does not get a checkpoint's sliding.
    recommended = {"slot_size": 16, "sliding": True}
    assert SlotParams(slot_size=8).resolve(recommended) == SlotSettings(slot_size=8, sliding=True)
    assert SlotParams(block_size=32).resolve(recommended) == SlotSettings(slot_size=16, block_size=32)
    assert SlotParams(correction="paper").resolve(recommended) == SlotSettings(slot_size=16, correction="paper")
    assert SlotParams(sliding=True).resolve({"max_candidates": 3}).candidates() == 2


def test_an_unknown_key_in_the_checkpoint_is_an_error() -> None:
    with pytest.raises(ConfigError, match="slot_sise"):
        SlotParams().resolve({"slot_sise": 4})


@pytest.mark.parametrize(
    ("settings", "max_tokens", "num_slots", "slots_per_block"),
    [
        ({"slot_size": 32, "serial_blocks": 4}, 512, 16, 4),  # the paper's gsm8k row
        ({"slot_size": 8, "serial_blocks": 64}, 512, 64, 1),
        ({"slot_size": 32, "serial_blocks": 4}, 100, 4, 1),  # rounded up to 128 inside
        ({"slot_size": 4, "serial_blocks": 2}, 17, 5, 3),  # 24 tokens inside, blocks of 12; the sixth slot does not exist
        ({"slot_size": 4, "block_size": 8}, 17, 5, 2),
        ({"slot_size": 4}, 3, 1, 1),
    ],
)
def test_the_answer_is_cut_into_blocks(settings: dict[str, int], max_tokens: int, num_slots: int, slots_per_block: int) -> None:
    resolved = SlotSettings(**settings)
    assert (resolved.num_slots(max_tokens), resolved.slots_per_block(max_tokens)) == (num_slots, slots_per_block)


def test_candidates_end_where_a_slot_has_no_further_length() -> None:
    assert [SlotSettings(slot_size=4, max_candidates=most).candidates() for most in (None, 0, 2, 9)] == [3, 0, 2, 3]
    assert SlotSettings(slot_size=1).candidates() == 0


def test_long_slots_prepare_only_what_free_rows_hold() -> None:
    # 31 + 30 + 29 + 28 + 27 + 26 = 171 rows; the seventh length would need 25 more than the 192 that are free.
    assert [SlotSettings(slot_size=size).candidates() for size in (8, 16, 32, 256)] == [7, 15, 6, 0]
    assert SlotSettings(slot_size=32, infill_length=6).candidates() == 31  # 26 groups of 6 and 15 rows more


@pytest.mark.parametrize(("field", "value"), [("seed", 2**63), ("temperature", 1e-38), ("stop", "abc")])
def test_sampling_settings_that_would_misbehave_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


SHIPPED = {"slot_size": 16, "sliding": True, "acceptance": "exact", "correction": "autoregressive", "alternatives": 2, "infill_length": 4}
STAYS = {"sliding": False, "acceptance": "argmax", "token_threshold": 1.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"sliding": True, "acceptance": "exact", "slot_size": 16}),
        ({"slot_size": 32}, {"sliding": True, "acceptance": "exact", "slot_size": 32}),
        ({"block_size": 16}, {"sliding": True, "acceptance": "exact"}),
        ({"acceptance": "exact"}, {"sliding": True, "acceptance": "exact"}),
        ({"alternatives": 0, "max_candidates": 1}, {"sliding": True, "acceptance": "exact", "alternatives": 0, "max_candidates": 1}),
        ({"sliding": False}, STAYS),
        ({"block_size": 64}, STAYS | {"block_size": 64}),
        ({"serial_blocks": 4}, STAYS | {"serial_blocks": 4}),
        ({"acceptance": "argmax"}, {"sliding": True, "acceptance": "argmax", "token_threshold": 1.0}),
        ({"token_threshold": 0.3}, {"sliding": True, "acceptance": "argmax", "token_threshold": 0.3}),
        ({"acceptance": "paper"}, {"sliding": True, "acceptance": "paper", "token_threshold": 0.4}),
        ({"correction": "paper"}, STAYS | {"correction": "paper", "alternatives": 0, "infill_length": None}),
    ],
    ids=str,
)
def test_what_is_given_over_a_checkpoint_of_exact_sliding_slots(given: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = SlotParams(**given).resolve(SHIPPED)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    "given",
    [
        {"slot_threshold": 0.5},
        {"fuse_plan": False},
        {"acceptance": "exact", "token_threshold": 0.9},
        {"acceptance": "exact", "serial_blocks": 4},
    ],
    ids=str,
)
def test_what_has_no_effect_on_exact_sliding_slots_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(slot_threshold|fuse_plan|token_threshold|acceptance) is "):
        SlotParams(**given).resolve(SHIPPED)


def test_the_default_model_recommends_what_the_tests_above_say() -> None:
    shipped = json.loads((resources.files("refusion.weights") / "smollm2-135m-refusion.json").read_text())["slots"]
    for slots in shipped.values():
        settings = SlotParams().resolve({name: value for name, value in slots.items() if name != "tokens_per_forward"})
        assert (settings.sliding, settings.acceptance) == (True, "exact")


def test_exact_slots_need_a_checkpoint_or_a_word_to_slide() -> None:
    with pytest.raises(ConfigError, match="unless slots slide"):
        SlotParams(acceptance="exact").resolve({"slot_size": 8})
    assert SlotParams(acceptance="exact", sliding=True).resolve({"slot_size": 8}).acceptance == "exact"
