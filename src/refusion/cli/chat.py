"""`refusion chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from refusion.cli import options
from refusion.errors import RequestError
from refusion.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from refusion.decoding.diffusion_params import DiffusionParams
    from refusion.decoding.params import SamplingParams, SlotParams
    from refusion.llm import LLM

_HELP = """/reset     forget the conversation
/decoder   switch between the decoder of the command and one token per forward
/quit      leave (so does Ctrl-D)
Ctrl-C     stop an answer; what is there of it stays in the conversation"""


def command(
    model: options.Model = DEFAULT_MODEL,
    decoder: options.Decoder = options.DecoderName.refusion,
    watch: Annotated[bool, typer.Option("--watch", help="Show slots as they are planned, verified, infilled and committed.")] = False,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    slot_size: options.SlotSize = None,
    block_size: options.BlockSize = None,
    serial_blocks: options.SerialBlocks = None,
    slot_threshold: options.SlotThreshold = None,
    token_threshold: options.TokenThreshold = None,
    acceptance: options.Acceptance = None,
    correction: options.Correction = None,
    alternatives: options.Alternatives = None,
    infill_length: options.InfillLength = None,
    sliding: options.Sliding = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    block_cache: options.BlockCache = None,
    early_stop: options.EarlyStop = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    cache_tokens: options.CacheTokens = None,
) -> None:
    """Talk with a model; /help lists what can be typed. Piped input is one question a line.

    When the conversation outgrows the context, its oldest turns are forgotten, and you are told.

    \b
    refusion chat
    refusion chat --watch --block-size 32
    printf 'My name is Ada.\\nWhat is my name?\\n' | refusion chat
    """
    sampling = options.sampling_params(max_tokens, temperature, top_p, seed, stop)
    diffusion = options.diffusion_params(decoder, block_size, steps, threshold, block_cache, early_stop)
    slot_block = block_size if diffusion is None else None
    slots = options.slot_params(
        slot_size, slot_block, serial_blocks, slot_threshold, token_threshold, acceptance, correction, alternatives, infill_length, sliding
    )
    options.refuse_slots(decoder, slots)
    engine = options.engine_settings(cache_tokens)
    with options.interruptible():
        llm = options.load(model, device, dtype, engine, quantization)
        options.warn_of_untaught(decoder, llm)
        chat = Chat(llm, sampling, slots, decoder.value, diffusion, watch=watch)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            typer.echo(f"{model}, {options.settings_text(chat.settings, chat.used)}; /help for help", err=True)
        for line in _lines(is_terminal):
            if line == "/quit":
                return
            _take(chat, line, is_terminal)


def _take(chat: Chat, line: str, is_terminal: bool) -> None:
    """One line of the user. A question that cannot be served ends a piped conversation, not one at the terminal."""
    try:
        chat.take(line)
    except RequestError as error:
        if not is_terminal:
            raise
        typer.echo(str(error), err=True)


class Chat:
    """A conversation: its turns and how answers are written."""

    def __init__(
        self,
        llm: LLM,
        sampling: SamplingParams,
        slots: SlotParams,
        decoder: str,
        diffusion: DiffusionParams | None = None,
        *,
        watch: bool = False,
    ) -> None:
        self.llm, self.sampling, self.slots, self.decoder, self.watch = llm, sampling, slots, decoder, watch
        self.diffusion, self.used = diffusion, llm.resolve_diffusion(decoder, diffusion)
        self._parallel = "refusion" if decoder == "autoregressive" else decoder
        self.settings = options.resolve_slots(slots, llm)
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> None:
        """Obey a command or answer a question."""
        if line == "/help":
            typer.echo(_HELP, err=True)
        elif line == "/reset":
            self.messages = []
            typer.echo("the conversation is forgotten", err=True)
        elif line == "/decoder":
            self.decoder = self._parallel if self.decoder == "autoregressive" else "autoregressive"
            typer.echo(f"decoder: {self.decoder}", err=True)
        elif line.startswith("/"):
            typer.echo(f"unknown command {line}; /help lists them", err=True)
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Answer a question, print the answer and what it cost, and remember both. Raises `RequestError` if it is too long by itself."""
        from refusion.cli.answer import Interrupted, answer, make_display

        messages = self._fitting([*self.messages, {"role": "user", "content": question}])
        try:
            display = make_display(self.llm, self.sampling, watch=self.watch)
            diffusion = None if self.decoder == "autoregressive" else self.diffusion
            output = answer(self.llm, messages, self.sampling, self.slots, self.decoder, display, diffusion)
        except Interrupted as interrupted:
            if not sys.stdin.isatty():
                raise
            text = interrupted.text
            typer.echo("stopped", err=True)
        else:
            text = output.text
            typer.echo(options.summary(output, self.settings, self.used), err=True)
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def _fitting(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The latest turns that leave room for an answer; says so if older ones had to go."""
        room = self.llm.config.max_position_embeddings - self.sampling.max_tokens
        kept = messages
        while len(kept) > 2 and len(self.llm.encode(kept)) > room:  # type: ignore[arg-type]  # messages are a prompt
            kept = kept[2:]
        if len(kept) < len(messages):
            num_dropped = (len(messages) - len(kept)) // 2
            typer.echo(f"the conversation outgrew the context; its oldest {num_dropped} turn(s) are forgotten", err=True)
        return kept


def _lines(is_terminal: bool) -> Iterator[str]:
    """What the user types, line by line, until the end of input."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  # gives `input` line editing and history

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
