from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from refusion import LLM, SamplingParams, SlotParams
from refusion.engine.asynchronous import AsyncEngine
from refusion.engine.core import Engine
from refusion.engine.settings import EngineSettings
from refusion.errors import RequestError
from refusion.llm import RequestOutput

SLOTS = SlotParams(slot_size=4, block_size=8, slot_threshold=0.3, token_threshold=0.1)
SAMPLING = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
PROMPTS = ["a fox", "zebra", "owl", "a much longer prompt", "b", "c", "d"]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    torch.set_num_threads(1)
    return LLM.from_pretrained(tiny_model_dir, dtype="float32", engine=EngineSettings(max_num_seqs=3))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=60))


async def collect(engine: AsyncEngine, prompt: str, decoder: str = "refusion") -> tuple[str, RequestOutput]:
    """All pieces together, and the answer that came with the last."""
    text, output = "", None
    async for piece in engine.generate(prompt, SAMPLING, SLOTS, decoder):
        assert output is None, "something followed the answer"
        text, output = text + piece.text, piece.output
    assert output is not None
    return text, output


def test_many_consumers_get_the_answers_of_generate(llm: LLM) -> None:
    expected = {
        (prompt, kind): llm.generate([prompt], SAMPLING, SLOTS, kind)[0] for prompt in PROMPTS for kind in ("refusion", "autoregressive")
    }

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            found = await asyncio.gather(*(collect(engine, *asked) for asked in expected))
        for (text, output), wanted in zip(found, expected.values(), strict=True):
            assert (output.token_ids, output.text) == (wanted.token_ids, wanted.text)
            assert text == wanted.text

    run(main())


def test_leaving_early_and_being_cancelled_abort_the_request(llm: LLM) -> None:
    async def leave(engine: AsyncEngine) -> None:
        async for _ in engine.generate("zebra", SamplingParams(max_tokens=200), SLOTS, "autoregressive"):
            break

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            await leave(engine)
            task = asyncio.create_task(collect(engine, "a fox"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            text, output = await collect(engine, "owl")  # the others go on
            assert text == output.text
            while llm.engine.has_work:
                await asyncio.sleep(0.01)
        assert not engine._consumers

    run(main())


def test_what_cannot_be_served_is_told_to_who_asked(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            with pytest.raises(RequestError, match="more than the context of 256"):
                await collect(engine, "x" * 300)
            with pytest.raises(RequestError, match="unknown decoder"):
                await collect(engine, "x", "magic")
            assert (await collect(engine, "a fox"))[1].token_ids

    run(main())


def test_an_error_of_the_engine_reaches_every_consumer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, fails = Engine.step, True

    def failing_step(self: Engine) -> None:
        if fails and self.scheduler.num_open == 3:
            raise ZeroDivisionError("a fault")
        step(self)

    monkeypatch.setattr(Engine, "step", failing_step)

    async def main() -> None:
        nonlocal fails
        async with AsyncEngine(llm) as engine:
            found = await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS[:3]), return_exceptions=True)
            assert [str(error) for error in found] == ["a fault"] * 3
            fails = False
            assert (await collect(engine, "a fox"))[1].token_ids  # and the engine goes on

    run(main())


def test_closing_ends_the_thread_and_tells_who_waits(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncEngine(llm)
        tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(0.02)
        await engine.close()
        await engine.close()  # twice is once
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert any("closed before the answer was finished" in str(error) for error in found)
        assert all(isinstance(item, tuple | RequestError) for item in found)
        assert not engine._thread.is_alive()
        with pytest.raises(RequestError, match="the engine is closed"):
            await collect(engine, "a fox")

    run(main())
    assert llm.generate(["a fox"], SAMPLING, SLOTS)[0].token_ids  # the LLM can be used again
