"""The forward benchmark on a tiny shape: every contender computes the same, and the result file says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from refusion.evaluation.results import read_result

CPU = torch.device("cpu")


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import forward  # type: ignore[import-not-found]  # a script of the benchmarks folder

    return forward


@pytest.fixture
def main(forward: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    def main(*options: object) -> dict:
        output = tmp_path / "forward.json"
        monkeypatch.setattr("sys.argv", ["forward.py", "--shapes", "tiny", "--repeats", "2", "--output", str(output), *map(str, options)])
        forward.main()
        return read_result(output)

    return main


def test_every_contender_is_timed_beside_floor_and_mark(main: Callable[..., dict], tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    content = main("--profile", profile)
    labels = [run["label"] for run in content["runs"]]
    assert labels[:6] == [
        f"tiny, 16 cached: {who}" for who in ("floor", "static", "eager", "transformers", "transformers-graph", "mark of an H100")
    ]
    figures = {run["label"]: run["figures"] for run in content["runs"]}
    for who in ("static", "eager", "transformers"):
        assert {*figures[f"tiny, 48 cached: {who}"]} == {"forward_ms_1", "forward_ms_5"}
        assert figures[f"tiny, 48 cached: {who}"]["forward_ms_5"]["value"] > 0
    assert figures["tiny, 16 cached: transformers-graph"] == {}  # there is no GPU here
    assert content["settings"]["shapes"]["tiny"]["hidden_size"] == 32
    first = json.loads(profile.read_text())[0]
    assert (first["shape"], first["num_rows"]) == ("tiny", 1)
    assert first["kernels"][0]["us"] >= first["kernels"][-1]["us"] > 0


def test_flags_narrow_what_is_measured(main: Callable[..., dict]) -> None:
    content = main("--contenders", "eager", "--widths", 3, "--cached", 32)
    assert [run["label"] for run in content["runs"]] == [f"tiny, 32 cached: {who}" for who in ("floor", "eager", "mark of an H100")]
    assert {*content["runs"][1]["figures"]} == {"forward_ms_3"}


def test_static_and_transformers_forwards_agree_on_the_same_cache(forward: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bench = forward.Bench(forward.random_model(forward.CASES["tiny"].config, CPU, torch.float32), 20, None)
    pool = bench.random_cache(32)
    monkeypatch.setattr(bench, "random_cache", lambda num_rows: pool.first(num_rows))
    found = [forward.CONTENDERS[name](bench, 5)() for name in ("static", "transformers")]
    assert found[0].token_ids.tolist() == found[1][0].tolist()
    assert forward.CONTENDERS["transformers"](bench, 5)().tolist() == found[1].tolist()  # the cache is cut back after each forward


def test_floor_counts_what_a_forward_reads(forward: ModuleType) -> None:
    with torch.device("meta"):
        model = forward.Transformer(forward.QWEN3_8B).to(torch.bfloat16)
        tied = forward.Transformer(forward.SMOLLM2_135M).to(torch.bfloat16)
    found = forward.Bench(model, 512, None).bytes()
    assert found["weight_bytes"] == pytest.approx(15.14e9, rel=1e-3)  # 15.14 GB, the weights an H100 streams at 3 TB/s in 5.05 ms
    assert found["cache_bytes"] == 512 * 36 * 2 * 8 * 128 * 2
    assert forward.Bench(tied, 512, None).bytes()["weight_bytes"] == pytest.approx(2 * 134.5e6, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_are_captured_and_timed_on_a_gpu(main: Callable[..., dict]) -> None:
    content = main("--device", "cuda", "--dtype", "bfloat16")
    figures = {run["label"]: run["figures"] for run in content["runs"]}
    assert figures["tiny, 16 cached: static"]["forward_ms_1"]["value"] > 0
