"""Several processes: the weights of one, checkpoints that appear whole, and FSDP2 and DeepSpeed ZeRO with the same result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from refusion.errors import ConfigError
from refusion.training import arguments, objectives, trainer
from refusion.training.base import toy_config
from refusion.training.checkpoints import checkpoints
from refusion.training.recipe import Recipe
from refusion.training.run import train

Build = Callable[..., Recipe]
Weights = Callable[[Path], dict[str, Tensor]]

OPTIMIZER = {"epsilon": 1e-3, "schedule": "constant"}  # Adam blows rounding up where gradients are near 0
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # sums in another order


@pytest.mark.parametrize("objective", ["refusion", "block_diffusion"])
def test_two_processes_give_the_weights_of_one(tmp_path: Path, small_recipe: Build, final_weights: Weights, objective: str) -> None:
    options = {"name": objective, **({"serial_share": 0.5} if objective == "refusion" else {})}
    recipe = small_recipe(objective=options, optimizer=OPTIMIZER, data={"validation_rows": 7, "cache": str(tmp_path / "cache")})
    alone = train(recipe, output=tmp_path / "1", report=lambda line: None)
    assert _train_in_processes(recipe, tmp_path / "2") == [0, 0]
    _assert_close(final_weights(tmp_path / "1"), final_weights(tmp_path / "2"))
    together = (tmp_path / "2" / "report.json").read_text()
    assert f'"validation_mdm": {alone.validation_mdm:.4f}'[:-1] in together


def test_a_checkpoint_of_two_processes_appears_whole_or_not_at_all(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process is killed when the second checkpoint is written but has no name yet; the run goes on from the first one."""
    recipe = small_recipe(optimizer=OPTIMIZER, run={"save_steps": 1, "max_steps": 3, "keep_checkpoints": 2})
    publish = trainer.publish
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "publish", lambda draft, target: _kill() if target.name == "checkpoint-2" else publish(draft, target))
        assert _train_in_processes(recipe, tmp_path / "run")[0] == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert {p.name for p in checkpoints(tmp_path / "run")[0].glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert _train_in_processes(recipe, tmp_path / "run") == [0, 0]
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    train(recipe, output=tmp_path / "unbroken", report=lambda line: None)
    _assert_close(final_weights(tmp_path / "unbroken"), final_weights(tmp_path / "run"))


@pytest.mark.parametrize("is_tied", [True, False])
def test_fsdp_gives_the_weights_of_one_process_killed_and_resumed(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, is_tied: bool, fsdp_on_cpu: pytest.MonkeyPatch
) -> None:
    options = {
        "model": {"base": str(_base(tmp_path, is_tied))},
        "optimizer": OPTIMIZER,
        "run": {"save_steps": 2},
        "data": {"validation_rows": 5},
    }
    train(small_recipe(**options), output=tmp_path / "1", report=lambda line: None)
    sharded = small_recipe(**options, parallel={"name": "fsdp"})
    compute_loss = trainer.RefusionTrainer.compute_loss

    def checking(self: trainer.RefusionTrainer, *args: Any, **kwargs: Any) -> Any:
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if self.state.global_step == 3:
            _kill()
        return compute_loss(self, *args, **kwargs)

    with fsdp_on_cpu.context() as patch:
        patch.setattr(trainer.RefusionTrainer, "compute_loss", checking)
        assert -signal.SIGKILL in _train_in_processes(sharded, tmp_path / "2")
    assert [p.name for p in checkpoints(tmp_path / "2")] == ["checkpoint-2"]
    for _ in range(2):  # the second time nothing is left to train
        assert _train_in_processes(sharded, tmp_path / "2") == [0, 0]
        _assert_close(final_weights(tmp_path / "1"), final_weights(tmp_path / "2"))
        shutil.rmtree(tmp_path / "2" / "final")


def test_fsdp_in_bfloat16_rounds_weights_alone(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, fsdp_on_cpu: pytest.MonkeyPatch
) -> None:
    """accelerate's own policy would also round the batch's weights and normalisers, the loss and the sums of gradients."""
    base = _base(tmp_path)
    options = {"model": {"base": str(base), "precision": "bfloat16", "residual": "bfloat16"}, "optimizer": OPTIMIZER}
    train(small_recipe(**options), output=tmp_path / "1", report=lambda line: None)
    packed_loss = objectives.packed_loss

    def checking(model: Any, batch: Any, *args: Any) -> Any:
        assert {batch[name].dtype for name in ("target_weights", "ar_normaliser", "mdm_normaliser")} == {torch.float32}
        assert {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float32}
        terms = packed_loss(model, batch, *args)
        assert {term.dtype for term in terms.values()} == {torch.float32}
        return terms

    with fsdp_on_cpu.context() as patch:
        patch.setattr(objectives, "packed_loss", checking)
        assert _train_in_processes(small_recipe(**options, parallel={"name": "fsdp"}), tmp_path / "2") == [0, 0]
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    alone, sharded = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    for name, value in alone.items():
        # Rounding differs where a weight is gathered in bfloat16 that autocast leaves alone (norms, embedding).
        moved = (value - before[name]).norm()
        assert (sharded[name] - value).norm() < 0.1 * moved, name


@pytest.fixture
def fsdp_on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """accelerate shards on accelerators only, though gloo can; without this it would quietly train whole models."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)

    monkeypatch.setattr(AcceleratorState, "__init__", init)
    monkeypatch.setattr(arguments, "require_gpus_for_fsdp", lambda: None)
    return monkeypatch


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)")
ZERO_3 = {"name": "deepspeed", "zero_stage": 3}
ZERO_STAGES = [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}]


@needs_deepspeed
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("parallel", ZERO_STAGES, ids=str)
def test_zero_gives_the_weights_of_one_process_killed_and_resumed(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, is_tied: bool, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": {"base": str(_base(tmp_path, is_tied))}, "optimizer": OPTIMIZER, "run": {"save_steps": 2}}
    options["data"] = {"validation_rows": 5, "accumulation": 2}
    alone = train(small_recipe(**options), output=tmp_path / "1", report=lambda line: None)
    sharded = small_recipe(**options, parallel={"name": "deepspeed", **parallel})
    compute_loss = trainer.RefusionTrainer.compute_loss

    def checking(self: trainer.RefusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if parallel == {"zero_stage": 3}:  # but for the norms, which are too small to be worth it
            assert all(parameter.numel() == 0 or parameter.ndim == 1 for parameter in self.network.parameters())
        if self.state.global_step == 3:
            _kill()
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RefusionTrainer, "compute_loss", checking)
        assert -signal.SIGKILL in _train_in_processes(sharded, tmp_path / "2")
    assert [p.name for p in checkpoints(tmp_path / "2")] == ["checkpoint-2"]
    assert 1 in _train_in_processes(sharded, tmp_path / "2", count=1)  # its shards are those of two
    for _ in range(2):  # the second time nothing is left to train
        assert _train_in_processes(sharded, tmp_path / "2") == [0, 0]
        _assert_close(final_weights(tmp_path / "1"), final_weights(tmp_path / "2"))
        report = json.loads((tmp_path / "2" / "report.json").read_text())
        assert report["validation_mdm"] == pytest.approx(alone.validation_mdm, rel=1e-5)
        shutil.rmtree(tmp_path / "2" / "final")


@needs_deepspeed
@pytest.mark.parametrize("parallel", [*ZERO_STAGES, {"zero_stage": 3, "cpu_offload": True}], ids=str)
def test_zero_autocasts_as_one_process_does(tmp_path: Path, small_recipe: Build, final_weights: Weights, parallel: dict[str, int]) -> None:
    """DeepSpeed's own bf16 would round weights, the batch's weights and its normalisers."""
    options = {"model": {"base": str(_base(tmp_path)), "precision": "bfloat16", "residual": "bfloat16"}, "optimizer": OPTIMIZER}
    options |= {"data": {"validation_rows": 5}, "objective": {"distill": 0.5, "teacher": str(_base(tmp_path, is_tied=False))}}
    alone = train(small_recipe(**options), output=tmp_path / "1", report=lambda line: None)
    assert _train_in_processes(small_recipe(**options, parallel={"name": "deepspeed", **parallel}), tmp_path / "2") == [0, 0]
    report = json.loads((tmp_path / "2" / "report.json").read_text())
    assert report["loss"] == pytest.approx(alone.loss, rel=2e-4)
    assert report["validation_mdm"] == pytest.approx(alone.validation_mdm, rel=1e-3)  # plain data parallelism is as far away
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base-tied").state_dict()
    together = final_weights(tmp_path / "2")
    for name, value in final_weights(tmp_path / "1").items():
        assert (together[name] - value).norm() < 0.05 * (value - before[name]).norm(), name  # sums of bfloat16 gradients in another order


@needs_deepspeed
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"freeze_embeddings": True}], ids=str)
def test_zero_trains_an_adapter_or_the_mask_row(
    tmp_path: Path, small_recipe: Build, final_weights: Weights, method: dict[str, Any]
) -> None:
    recipe = small_recipe(optimizer=OPTIMIZER, method=method)
    train(recipe, output=tmp_path / "1", report=lambda line: None)
    sharded = small_recipe(optimizer=OPTIMIZER, method=method, parallel={"name": "deepspeed"})
    assert _train_in_processes(sharded, tmp_path / "2") == [0, 0]
    _assert_close(final_weights(tmp_path / "1"), final_weights(tmp_path / "2"))


@needs_deepspeed
def test_zero_without_a_launcher_is_refused(tmp_path: Path, small_recipe: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="'deepspeed' needs a launcher"):
        train(small_recipe(parallel={"name": "deepspeed"}), output=tmp_path, report=lambda line: None)


def test_fsdp_without_gpus_is_refused(tmp_path: Path, small_recipe: Build) -> None:
    with pytest.raises(ConfigError, match="'fsdp' needs GPUs"):
        train(small_recipe(parallel={"name": "fsdp"}), output=tmp_path, report=lambda line: None)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"freeze_embeddings": True}}, "method.freeze_embeddings"),
        ({"run": {"probe_steps": 2}}, "run.probe_steps"),
        ({"method": {"name": "lora"}}, "method.name = 'lora' must be 'full'"),
        ({"parallel": {"name": "ddp", "cpu_offload": True}}, "parallel.cpu_offload = True must be left out"),
        ({"parallel": {"name": "deepspeed", "zero_stage": 4}}, "parallel.zero_stage = 4 must be 1, 2 or 3"),
        ({"parallel": ZERO_3, "method": {"name": "lora"}}, "method.name = 'lora' must be 'full' with parallel.zero_stage = 3"),
        ({"parallel": ZERO_3, "run": {"probe_steps": 2}}, "run.probe_steps = 2 must be 0 with parallel.zero_stage = 3"),
        ({"parallel": ZERO_3, "model": {"compile": True}}, "model.compile = True must be false with parallel.zero_stage = 3"),
    ],
)
def test_what_does_not_go_together_is_refused(small_recipe: Build, sections: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_recipe(**{"parallel": {"name": "fsdp"}, **sections})


def _base(tmp_path: Path, is_tied: bool = True) -> Path:
    base = tmp_path / ("base-tied" if is_tied else "base")
    config = toy_config()
    config.tie_word_embeddings = is_tied
    config.mask_token_id = 2
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    return base


def _train_in_processes(recipe: Recipe, run_dir: Path, count: int = 2) -> list[int]:
    """Train in forked processes with what torchrun puts into their environment; how each ended. The first to fail ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    resume = bool(checkpoints(run_dir))
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                _forget_process_group()
                shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
                train(recipe, output=run_dir, resume=resume, report=lambda line: None)
                os._exit(0)
            finally:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < count:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def _forget_process_group() -> None:
    """accelerate keeps what it found in this process for good."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **TOLERANCE)
