"""Whether everything is right on a GPU, in a few minutes: no speeds, and so side by side.

    python benchmarks/gpu_checks.py --data heldout.jsonl.gz --output runs/gpu-checks.json
    python benchmarks/gpu_checks.py --only tests texts

- `tests`: `pytest -m gpu`: kernels at real shapes, batch invariance, golden traces of the authors' release through CUDA graphs in float32.
- `texts`: in float32, the engine's CUDA graphs against the plain padded decoder on real prompts: the same tokens.
- `carrier`: the 8B carrier in float32 has the logits of the small model (33 GB).
- `products`, `attention`, `small`, `engine`: compute-sanitizer's memcheck over all kernels of our own (`kernels_once.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness

from refusion import LLM, SamplingParams, SlotParams
from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.refusion import ReFusionDecoder
from refusion.evaluation.results import Result, Run, write_result
from refusion.llm import EngineSettings

HERE = Path(__file__).resolve().parent
TESTS = [
    *(f"tests/model/test_kernels_{name}.py" for name in ("linear", "attention", "readout", "invariant")),
    "tests/decoding/test_rounds_kernels.py",
    "tests/decoding/test_sliding_kernels.py",
    "tests/decoding/test_diffusion_kernels.py",
    "tests/engine/test_diffusion_lanes.py",
    "tests/engine/test_golden_runner.py",
    "tests/benchmarks/test_forward_times.py",
]
PARTS = ("products", "attention", "small", "engine")
SANITIZER = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "60"]
NARROW = SlotParams(slot_size=4, block_size=4, max_candidates=1, sliding=False, acceptance="argmax")
"""Few shapes: float32 kernels take long to compile."""
EXACT = SlotParams(slot_size=8, sliding=True, acceptance="exact", alternatives=1, infill_length=2, max_candidates=1)
"""The same; these write what autoregressive decoding does."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check said."""

    name: str
    code: int
    seconds: float
    tail: str


def main() -> None:
    args = flags()
    if args.run == "texts":
        compare_texts(args)
        return
    commands = {name: commands_of(name, args) for name in args.only}
    with ThreadPoolExecutor(args.workers) as pool:
        outcomes = list(pool.map(lambda item: outcome_of(*item, timeout=args.timeout), commands.items()))
    runs = []
    for outcome in outcomes:
        figures = {"exit_code": outcome.code, "seconds": outcome.seconds} | figures_in(outcome.tail)
        runs.append(Run(label=outcome.name, settings={"tail": outcome.tail[-600:]}, figures=figures))
        print(f"{outcome.name:10} {'right' if outcome.code == 0 else f'WRONG ({outcome.code})':10} {outcome.seconds:6.0f} s", flush=True)
        if outcome.code:
            print(outcome.tail, flush=True)
    result = Result(name="gpu-checks", settings={"model": args.model}, runs=runs, notes=args.notes, device=args.device)
    write_result(args.output, result)
    sys.exit(1 if any(outcome.code for outcome in outcomes) else 0)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks on a GPU.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["tests", "texts", "carrier", *PARTS], choices=["tests", "texts", "carrier", *PARTS])
    parser.add_argument("--model", default="smollm2-135m-refusion", help="named model or directory")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run of `texts`")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--num-prompts", type=int, default=6, help="of `texts`")
    parser.add_argument("--max-tokens", type=int, default=48, help="of `texts`")
    parser.add_argument("--workers", type=int, default=7, help="checks at a time")
    parser.add_argument("--timeout", type=float, default=280, help="seconds of one check")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "gpu-checks.json", help="result file")
    parser.add_argument("--notes", default="", help="a sentence for the result file")
    parser.add_argument("--run", default=None, choices=["texts"], help=argparse.SUPPRESS)
    return parser.parse_args()


def commands_of(name: str, args: argparse.Namespace) -> list[list[str]]:
    """What to run one after the other; kernels are compiled before the sanitizer watches them."""
    data = [] if args.data is None else ["--data", str(args.data)]
    model = ["--model", args.model, "--device", args.device]
    if name == "tests":
        side_by_side = ["-n", "4"] if find_spec("xdist") else []
        return [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *side_by_side, *TESTS]]
    if name == "texts":
        counts = ["--num-prompts", str(args.num_prompts), "--max-tokens", str(args.max_tokens)]
        return [[sys.executable, __file__, "--run", "texts", *model, *data, *counts]]
    if name == "carrier":
        output = ["--output", str(args.output.with_name("carrier-exact.json"))]
        return [[sys.executable, str(HERE / "carrier.py"), *model, "--exact", "--limit", "1", *data, *output]]
    once = [sys.executable, str(HERE / "kernels_once.py"), "--parts", name, "--device", args.device]
    return [once, [*SANITIZER, *once]]


def outcome_of(name: str, commands: list[list[str]], timeout: float) -> Outcome:
    """Run the commands until one fails; exit code 124 if they take too long."""
    started, text, code = time.perf_counter(), "", 0
    # Allocations of their own, so that what reads past the end of one reads past memory; while a graph is captured there can be none.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in PARTS and name != "engine" else {})
    for command in commands:
        left = timeout - (time.perf_counter() - started)
        try:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            done = subprocess.run(command, cwd=HERE.parent, env=environment, timeout=left, check=False, **pipes)
            text, code = text + done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            said = expired.stdout or b""
            text, code = text + (said.decode(errors="replace") if isinstance(said, bytes) else said), 124
        except FileNotFoundError as error:
            text, code = text + str(error), 127
        if code:
            break
    return Outcome(name, code, time.perf_counter() - started, text[-3000:])


def figures_in(text: str) -> dict[str, Any]:
    """Of the last line that is a JSON object."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        return {}
    try:
        found = json.loads(lines[-1])
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def compare_texts(args: argparse.Namespace) -> None:
    """Both decoders in float32, by the engine and by the plain padded decoder, slots that slide as well; exit code 1 if a token differs."""
    engine = EngineSettings(max_num_seqs=1, cache_tokens=4096)
    llm = LLM.from_pretrained(args.model, device=args.device, dtype="float32", engine=engine)
    sampling = SamplingParams(max_tokens=args.max_tokens)
    rows = harness.rows_of(args.data or harness.chat_prompts(), limit=args.num_prompts)
    prompts = [llm.encode(harness.chat(row["query"])) for row in rows]
    num_same = num_tokens = 0
    cases = (("refusion", NARROW, "refusion"), ("autoregressive", NARROW, "autoregressive"), ("refusion", EXACT, "autoregressive"))
    for decoder, slots, plain in cases:
        outputs = llm.generate(prompts, sampling, slots, decoder, batch_size=1)
        expected = [plain_answer(llm, prompt, sampling, plain) for prompt in prompts]
        num_same += sum(list(output.token_ids) == answer for output, answer in zip(outputs, expected, strict=True))
        num_tokens += sum(map(len, expected))
    num_answers = len(cases) * len(prompts)
    print(json.dumps({"num_answers": num_answers, "num_same": num_same, "num_tokens": num_tokens}))
    sys.exit(0 if num_same == num_answers else 1)


def plain_answer(llm: LLM, prompt: list[int], sampling: SamplingParams, name: str) -> list[int]:
    """By the padded decoder over the eager transformer."""
    import torch

    device, forward = llm.model.device, llm.forward_fn()
    eos_ids = torch.tensor(llm.eos_ids(), device=device)
    if name == "autoregressive":
        decoder = AutoregressiveDecoder(forward, sampling, eos_ids=eos_ids)
    else:
        mask_id = llm.config.mask_token_id
        assert mask_id is not None, "slots need a mask token"
        decoder = ReFusionDecoder(forward, llm.resolve_slots(NARROW), sampling, mask_id=mask_id, eos_ids=eos_ids)
    ids = torch.tensor([prompt], device=device)
    decoder.start(ids, torch.tensor([len(prompt)], device=device), torch.tensor([sampling.seed], device=device))
    while not bool(decoder.is_done.all()):
        decoder.step()
    return decoder.answer(0)


if __name__ == "__main__":
    harness.script(main)
