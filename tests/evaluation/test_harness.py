"""The model inside lm-evaluation-harness: the same texts and likelihoods as the harness's own `hf` model, and the rest of its interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from benchmark_rows import edit_json, write_rows
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from refusion.errors import CheckpointError, ConfigError, RequestError
from refusion.evaluation.harness import ReFusionLM
from refusion.evaluation.plugin import NAME, on_torch_import, register

# Greedy text of the tiny model behind these holds none of the ids that we never emit and `hf` does (specials, rows past the tokenizer).
SENTENCES = ("The cat sat on the mat.", "Two and two make four", "Nobody knows why.")


def task_files(place: Path) -> list[Path]:
    """A generative, a multiple-choice and a perplexity task over three sentences, as files of the harness."""
    write_rows(place / "rows.jsonl", [{"text": text, "choices": [" yes", " no way", "?"], "gold": 1} for text in SENTENCES])
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "fewshot_config": {"samples": []},
    }
    kinds: dict[str, dict[str, Any]] = {
        "write": {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
            "generation_kwargs": {"until": ["zz", "Q:"], "max_gen_toks": 12, "do_sample": False},
        },
        "choose": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
                   "target_delimiter": ""},
        "read": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    }  # fmt: skip
    for name, config in kinds.items():
        (place / f"{name}.yaml").write_text(json.dumps({"task": f"tiny_{name}"} | common | config))  # JSON is YAML
    return [place / f"{name}.yaml" for name in kinds]


def evaluate(model: str, arguments: dict[str, Any], tasks: list[Path], *, chat: bool = False) -> dict[str, list[Any]]:
    """Responses by task, in the order of the rows."""
    register()
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[json.loads(task.read_text()) for task in tasks],
        task_manager=TaskManager(include_defaults=False),  # the harness's own thousands of tasks take half a minute to list
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    assert results is not None
    return {name: [row["resps"] for row in rows] for name, rows in results["samples"].items()}


def test_without_a_gpu_the_device_that_the_harness_asks_for_by_itself_is_the_cpu(
    roomy_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked in ("cuda", "cuda:0"):  # what versions of its command line ask for
        assert ReFusionLM(str(roomy_model_dir), device=asked).llm.model.device.type == "cpu"
    with pytest.raises(RequestError, match="unknown device 'abacus'"):
        ReFusionLM(str(roomy_model_dir), device="abacus")


@pytest.mark.parametrize("chat", [False, True])
def test_autoregressive_scores_are_those_of_the_harness_itself(roomy_model_dir: Path, tmp_path: Path, chat: bool) -> None:
    tasks = task_files(tmp_path)[: 2 if chat else 3]  # a chat template does not fit a plain text
    ours = evaluate("refusion", {"pretrained": str(roomy_model_dir), "decoder": "autoregressive", "dtype": "float32"}, tasks, chat=chat)
    theirs = evaluate("hf", {"pretrained": str(roomy_model_dir), "dtype": "float32", "device": "cpu"}, tasks, chat=chat)
    assert ours["tiny_write"] == theirs["tiny_write"]
    for one, other in zip(ours["tiny_choose"], theirs["tiny_choose"], strict=True):
        for ((log_prob, is_greedy),), ((expected, was_greedy),) in zip(one, other, strict=True):
            assert log_prob == pytest.approx(expected, abs=1e-3)
            assert is_greedy == was_greedy
    if not chat:
        for ((log_prob,),), ((expected,),) in zip(ours["tiny_read"], theirs["tiny_read"], strict=True):
            assert log_prob == pytest.approx(expected, abs=1e-3)


def test_windows_of_a_long_text_are_those_of_the_harness(tiny_model_dir: Path, tmp_path: Path) -> None:
    task = task_files(tmp_path)[2]
    write_rows(tmp_path / "rows.jsonl", [{"text": "A longer text. " * 30}])  # 450 bytes, the context holds 256
    ours = evaluate("refusion", {"pretrained": str(tiny_model_dir), "decoder": "autoregressive", "dtype": "float32"}, [task])
    theirs = evaluate("hf", {"pretrained": str(tiny_model_dir), "dtype": "float32", "device": "cpu"}, [task])
    assert ours["tiny_read"][0][0][0] == pytest.approx(theirs["tiny_read"][0][0][0], abs=1e-3)


def test_refusion_generates_and_bounds_likelihoods(roomy_model_dir: Path, tmp_path: Path) -> None:
    arguments = {"pretrained": str(roomy_model_dir), "dtype": "float32", "likelihood_samples": 4, "slot_size": 4}
    found = evaluate("refusion", arguments, task_files(tmp_path))
    assert evaluate("refusion", arguments | {"batch_size": 3}, task_files(tmp_path)).keys() == found.keys()
    assert all(isinstance(resps[0][0], str) for resps in found["tiny_write"])
    assert all(log_prob < 0 for row in found["tiny_choose"] for ((log_prob, _),) in row)


@pytest.mark.parametrize(("batch_size", "seats"), [(None, None), ("auto", None), (1, 1), ("3", 3)])
def test_so_many_prompts_as_the_batch_size_says_are_decoded_together(
    tiny_model_dir: Path, batch_size: int | str | None, seats: int | None
) -> None:
    lm = ReFusionLM(tiny_model_dir, decoder="autoregressive", device="cpu", batch_size=batch_size)
    assert lm.llm.engine_settings.max_num_seqs == seats


@pytest.mark.parametrize(("decoder", "settings"), [("masked_diffusion", {"steps": 4}), ("block_diffusion", {"threshold": 0.5})])
def test_diffusion_decoders_generate_and_bound_likelihoods(
    roomy_model_dir: Path, tmp_path: Path, decoder: str, settings: dict[str, Any]
) -> None:
    arguments = {"pretrained": str(roomy_model_dir), "dtype": "float32", "likelihood_samples": 4, "decoder": decoder, "block_size": 8}
    found = evaluate("refusion", arguments | settings, task_files(tmp_path))
    assert all(isinstance(resps[0][0], str) for resps in found["tiny_write"])
    assert all(log_prob < 0 for row in found["tiny_choose"] for ((log_prob, _),) in row)
    lm = ReFusionLM(str(roomy_model_dir), device="cpu", decoder=decoder, block_size=8, **settings)
    # A task may bring slot settings; they mean nothing here.
    (output,) = lm.answer(["Why?"], {"until": [], "max_gen_toks": 6, "slot_size": 4})
    assert output.decoder == decoder
    assert lm.get_model_info()["diffusion"]["block_size"] == 8


@pytest.fixture(scope="module")
def lm(roomy_model_dir: Path) -> ReFusionLM:
    return ReFusionLM(str(roomy_model_dir), dtype="float32", device="cpu", slot_size=4, likelihood_samples=3)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_is_greedy_says_whether_decoding_writes_the_continuation(lm: ReFusionLM) -> None:
    prompt = lm.tok_encode("Why?")
    (output,) = lm.answer(["Why?"], {"until": [], "max_gen_toks": 6})
    written = list(output.token_ids)
    pairs = [(prompt, written), (prompt, [written[0] + 1, *written[1:]])]
    assert lm._are_greedy(pairs) == [len(written) == 6, False]


def test_errors_of_bounds_are_reported(lm: ReFusionLM) -> None:
    lm.likelihoods.clear()
    lm.loglikelihood([request("loglikelihood", "Why?", " Because it is so.")], disable_tqdm=True)
    info = lm.get_model_info()
    assert info["likelihood_samples"] == 3
    assert info["likelihood_standard_error"]["max"] > 0


def test_a_task_brings_its_slot_settings_and_a_cut_of_the_model_goes_with_its_slot_size(roomy_model_dir: Path) -> None:
    lm = ReFusionLM(str(roomy_model_dir), device="cpu", slot_size=4, block_size=8, slot_threshold=0.5)
    _, slots = lm.settings({"until": ["x"]})
    assert (slots.slot_size, slots.block_size, slots.slot_threshold) == (4, 8, 0.5)
    sampling, slots = lm.settings({"until": ["x", "", "<eos>", "<|user|>"], "max_gen_toks": 9, "slot_size": 16, "serial_blocks": 2})
    assert (slots.slot_size, slots.block_size, slots.serial_blocks, slots.slot_threshold) == (16, None, 2, 0.5)
    assert (sampling.max_tokens, sampling.stop, sampling.stop_token_ids) == (9, ("x",), (2, 3))


def test_an_answer_that_was_begun_stays_open(lm: ReFusionLM) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "```python\n"}]
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "<|user|>Hi<eos><|assistant|>```python\n"
    assert lm.tok_encode("<|user|>Hi<eos>")[0] == 3


def test_a_prompt_without_room_for_the_answer_loses_its_beginning(tiny_model_dir: Path) -> None:
    lm = ReFusionLM(str(tiny_model_dir), device="cpu", decoder="autoregressive")
    long, short = lm.answer(["x" * 300 + "end", "end"], {"until": [], "max_gen_toks": 200})
    assert len(long.prompt_ids) == 56
    assert len(short.prompt_ids) < 10
    with pytest.raises(ConfigError, match="max_gen_toks is 256; the model's context is 256"):
        lm.answer(["x"], {"until": []})


def test_bad_arguments_are_one_clear_line(roomy_model_dir: Path, lm: ReFusionLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown model argument 'decodr'; did you mean decoder"):
        ReFusionLM(str(roomy_model_dir), decodr="x")
    with pytest.raises(ConfigError, match="unknown model argument 'slot_size'"):
        ReFusionLM(str(roomy_model_dir), decoder="block_diffusion", slot_size=4)
    with pytest.raises(ConfigError, match="unknown decoder 'magic'"):
        ReFusionLM(str(roomy_model_dir), decoder="magic")
    with pytest.raises(ConfigError, match="unknown generation option 'top_k'"):
        lm.settings({"until": [], "top_k": 5})
    with pytest.raises(ConfigError, match="decoder=auto has no likelihood here"):
        ReFusionLM(str(roomy_model_dir), device="cpu", decoder="auto").score([([1], [2])])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in roomy_model_dir.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    edit_json(bare / "config.json", mask_token_id=None)
    with pytest.raises(CheckpointError, match="no mask token, which decoder=refusion needs"):
        ReFusionLM(str(bare), device="cpu")
    assert ReFusionLM(str(bare), device="cpu", decoder="autoregressive").decoder == "autoregressive"


def test_torch_does_not_load_the_harness() -> None:
    code = "import sys, torch; from refusion.evaluation.plugin import on_torch_import; on_torch_import(); print('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    on_torch_import()
    register()  # twice is no error


@pytest.mark.skipif(
    not any(point.name == NAME for point in entry_points(group="torch.backends")), reason="installed without entry points; pip install -e ."
)
def test_the_stock_command_reaches_the_model(roomy_model_dir: Path, tmp_path: Path) -> None:
    write, choose, _ = task_files(tmp_path)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "refusion", "--model_args", f"pretrained={roomy_model_dir},slot_size=4",
        "--tasks", f"{write},{choose}", "--device", "cpu", "--apply_chat_template", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "tiny_write" in found.stdout
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["config"]["decoder"] == "refusion"
