from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from refusion.convert import NEW_MASK_TOKEN, convert
from refusion.errors import CheckpointError, ConfigError


def _edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None deletes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def source(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint of 264 rows for 262 tokens, without a mask token; token 5 is a special of unknown use."""
    path = tmp_path / "source"
    shutil.copytree(tiny_model_dir, path)
    _edit(path / "config.json", mask_token_id=None)
    _rename_special(path, "<|mask|>", "<|other|>")
    return path


def _rename_special(source: Path, old: str, new: str) -> None:
    file = source / "tokenizer.json"
    file.write_text(file.read_text().replace(old, new))


def _add_special(source: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    tokenizer.save(str(source / "tokenizer.json"))


def _assert_opens(path: Path, *, num_rows: int, num_tokens: int, mask_token_id: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (model.config.mask_token_id, model.config.vocab_size) == (mask_token_id, num_rows)
    assert model.get_input_embeddings().weight.shape[0] == num_rows
    assert model.get_output_embeddings().weight.shape[0] == num_rows
    assert len(tokenizer) == num_tokens
    assert tokenizer.mask_token_id == mask_token_id


def test_a_mask_token_that_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    _edit(source / "config.json", mask_token_id=5)
    mask = convert(source, tmp_path / "out")
    assert (mask.token_id, mask.text, mask.origin) == (5, "<|other|>", "kept")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_checkpoint_without_tokenizer_keeps_its_mask_token(golden_dir: Path, tmp_path: Path) -> None:
    mask = convert(golden_dir / "tiny-refusion", tmp_path / "out")
    assert (mask.token_id, mask.text) == (2, None)


def test_without_mask_token_and_tokenizer_there_is_nothing_to_choose_from(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        convert(source, tmp_path / "out")


def test_a_spare_row_comes_first(source: Path, tmp_path: Path) -> None:
    mask = convert(source, tmp_path / "out")
    assert (mask.token_id, mask.origin, mask.is_new) == (262, "spare row", True)
    _assert_opens(tmp_path / "out", num_rows=264, num_tokens=263, mask_token_id=262)


@pytest.mark.parametrize("is_named", [True, False])
def test_the_tokenizers_own_mask_token_is_used(source: Path, tmp_path: Path, is_named: bool) -> None:
    if is_named:
        _edit(source / "tokenizer_config.json", mask_token="<|other|>")
    else:
        _rename_special(source, "<|other|>", "<mask>")
    assert convert(source, tmp_path / "out").origin == "mask token of the tokenizer"
    _assert_opens(tmp_path / "out", num_rows=264, num_tokens=262, mask_token_id=5)


def test_an_unused_special_is_used_where_no_row_is_spare(source: Path, tmp_path: Path) -> None:
    _add_special(source, "<|reserved_special_token_0|>")
    _add_special(source, "<|reserved_special_token_1|>")
    _edit(source / "tokenizer_config.json", chat_template="<|reserved_special_token_0|>{{ messages }}")
    mask = convert(source, tmp_path / "out")
    assert (mask.token_id, mask.text, mask.origin) == (263, "<|reserved_special_token_1|>", "unused special")
    _assert_opens(tmp_path / "out", num_rows=264, num_tokens=264, mask_token_id=263)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-untied", "llama"])
def test_a_new_row_is_added_as_a_last_resort(kind: str, tiny_checkpoints: dict[str, Path], source: Path, tmp_path: Path) -> None:
    """The tiny checkpoints have 96 rows; a byte tokenizer cut to 96 tokens leaves none to spare."""
    for file in tiny_checkpoints[kind].iterdir():
        shutil.copy(file, source / file.name)
    _edit(source / "config.json", mask_token_id=None)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < 96}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    mask = convert(source, tmp_path / "out")
    assert mask.token_id == 96
    assert mask.origin == "new row"
    _assert_opens(tmp_path / "out", num_rows=104, num_tokens=97, mask_token_id=96)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    assert torch.equal(table[:96], before["model.embed_tokens.weight"])
    torch.testing.assert_close(table[96], table[:96].mean(0))


@pytest.mark.parametrize(("token", "match"), [("a", "ordinary token"), ("<eos>", "another meaning")])
def test_a_token_that_means_something_is_refused(source: Path, tmp_path: Path, token: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        convert(source, tmp_path / "out", mask_token=token)
    assert not (tmp_path / "out").exists()


def test_a_named_special_is_taken(source: Path, tmp_path: Path) -> None:
    mask = convert(source, tmp_path / "out", mask_token="<|other|>")
    assert (mask.token_id, mask.origin) == (5, "named")


def test_shards_stay_shards_and_the_dtype_follows(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert {file.name for file in source.glob("model*")} == {file.name for file in (tmp_path / "out").glob("model*")}
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.dtype == torch.bfloat16
    expected = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in converted.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-untied"])
def test_a_merged_adapter_equals_the_merge_of_peft(kind: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def trained_adapter() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[kind])
        tokens = [5] if kind == "qwen3" else {"embed_tokens": [5, 7], "lm_head": [5]}
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", trainable_token_indices=tokens,
            rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        return model

    adapter = trained_adapter()
    adapter.save_pretrained(tmp_path / "adapter")
    convert(tiny_checkpoints[kind], tmp_path / "out", adapter=tmp_path / "adapter")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = adapter.merge_and_unload()(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "adapter is merged" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("changes", "match"), [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "type 'IA3'")])
def test_adapters_that_are_no_plain_sum_are_refused(source: Path, tmp_path: Path, changes: dict[str, object], match: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1, **changes}))
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        convert(source, tmp_path / "out", adapter=adapter)


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    module = "base_model.model.model.layers.9.mlp.up_proj"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(1, 48), f"{module}.lora_B.weight": torch.ones(80, 1)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="belong to another base"):
        convert(source, tmp_path / "out", adapter=adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(source: Path, tmp_path: Path, changes: dict[str, object], match: str) -> None:
    _edit(source / "config.json", **changes)
    with pytest.raises(CheckpointError, match=match):
        convert(source, tmp_path / "out")


def test_pickled_weights_are_not_read(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        convert(source, tmp_path / "out")


def test_remote_code_is_dropped(source: Path, tmp_path: Path) -> None:
    _edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (source / "modeling.py").write_text("raise SystemExit")
    convert(source, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling.py").exists()


def test_truncated_weights_are_named(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")


def test_a_full_disk_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_model_card_names_no_path(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", mask_token="<|hidden|>")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "`<|hidden|>` (id 262); it was added by the conversion (spare row) and is untrained" in card
    assert NEW_MASK_TOKEN == "<|mask|>"
