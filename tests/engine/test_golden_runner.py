"""Golden traces through the runner: the tokens of the authors' release, on a CPU operation by operation, on a GPU as CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_runner import decode, lane_of, make_runner

from refusion.engine.network import FlatNetwork
from refusion.engine.ops import PlainOps, TritonOps
from refusion.model.transformer import Transformer

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["decode.json", "decode_infill.json"])
def test_every_eighth_clean_trace_gives_its_tokens(device: str, name: str, golden_dir: Path) -> None:
    model = Transformer.from_pretrained(golden_dir / "tiny-refusion", device=device)
    is_gpu = device == "cuda"
    ops = TritonOps(model.config, model.device) if is_gpu else PlainOps(model.config, model.dtype)
    runner = make_runner(FlatNetwork(model, ops), use_kernels=is_gpu)
    traces = [trace for trace in json.loads((golden_dir / name).read_text(encoding="utf-8")) if trace["clean"]]
    for trace in traces[::8]:
        lane = lane_of(runner, trace)
        assert lane.key.slots is not None
        answer, _ = decode(runner, lane, trace["prompt_ids"], trace["gen_length"], candidates=lane.key.slots.candidates())
        assert answer == trace["output_ids"]
        runner.drop_lane(lane)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sums_that_products_owe_give_the_same_tokens(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.model.kernels import linear
    from refusion.model.kernels.config import Config, Kind

    choose = linear.choose_config

    def owing(num_out: int, num_in: int, num_rows: int, kind: Kind, dtype: str) -> Config | None:
        if kind == "linear_add":
            return Config(32, 16, 2, 3, 4, 16, owes_sum=True)
        return choose(num_out, num_in, num_rows, kind, dtype)

    monkeypatch.setattr(linear, "choose_config", owing)
    test_every_eighth_clean_trace_gives_its_tokens("cuda", "decode_infill.json", golden_dir)
