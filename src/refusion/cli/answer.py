"""One answer in the terminal: text that grows while it is written, the slots of `--watch`, or only the finished text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from refusion.decoding.events import Event
from refusion.engine.stream import AnswerStream

if TYPE_CHECKING:
    from refusion.decoding.diffusion_params import DiffusionParams
    from refusion.decoding.params import SamplingParams, SlotParams
    from refusion.llm import LLM, Prompt, RequestOutput


class Display(Protocol):
    """Where an answer appears."""

    def show(self, event: Event, new_text: str) -> None:
        """Something happened; `new_text` is what it added to the certain text."""
        ...

    def end(self, text: str) -> None:
        """The whole text, finished or interrupted."""
        ...


class GrowingText:
    """Prints text as soon as it is certain."""

    def __init__(self) -> None:
        self.num_printed = 0

    def show(self, event: Event, new_text: str) -> None:
        if new_text:
            self.num_printed += len(new_text)
            print(new_text, end="", flush=True)

    def end(self, text: str) -> None:
        print(text[self.num_printed :], flush=True)


class WholeText:
    """Prints the text once it is whole."""

    def show(self, event: Event, new_text: str) -> None:
        pass

    def end(self, text: str) -> None:
        print(text, flush=True)


class NoText:
    """Prints nothing: the caller does."""

    def show(self, event: Event, new_text: str) -> None:
        pass

    def end(self, text: str) -> None:
        pass


def make_display(llm: LLM, sampling: SamplingParams, *, watch: bool) -> Display:
    """The slots if they are to be watched, else growing text; only the whole text where standard output is not a terminal."""
    if not sys.stdout.isatty():
        if watch:
            print("--watch draws on a terminal only; here comes the text alone", file=sys.stderr)
        return WholeText()
    if not watch:
        return GrowingText()
    from refusion.cli.watch import LiveSlots

    assert llm.tokenizer is not None, "checked when the model was loaded"
    return LiveSlots(llm.tokenizer, {*llm.eos_ids(), *sampling.stop_token_ids}, sampling.max_tokens)


def answer(
    llm: LLM,
    prompt: Prompt,
    sampling: SamplingParams,
    slots: SlotParams,
    decoder: str,
    display: Display,
    diffusion: DiffusionParams | None = None,
) -> RequestOutput:
    """Decode one prompt into a display. On Ctrl-C the display gets what was final by then, and `Interrupted` is raised."""
    assert llm.tokenizer is not None, "checked when the model was loaded"
    stream = AnswerStream(llm.tokenizer, sampling, llm.eos_ids())

    def on_event(event: Event) -> None:
        display.show(event, stream.push(event))

    try:
        output = llm.generate([prompt], sampling, slots, decoder, diffusion=diffusion, on_event=on_event)[0]
    except KeyboardInterrupt as error:
        display.end(stream.text)
        raise Interrupted(stream.text) from error
    display.end(output.text)
    return output


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while an answer was being written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        """What was final by then."""
