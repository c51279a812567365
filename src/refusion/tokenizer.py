"""Text to token ids and back, for any checkpoint with a `tokenizer.json`.

Three things are settled here once: what a user writes never becomes a special token, however much it looks like one; a chat is
rendered by the checkpoint's own template in a sandbox, whose specials *are* specials; and text can be read off a growing list of ids
without showing half a character. Which ids a model may emit is read by the decoder from `special_ids`, `eos_token_ids` and
`vocab_size`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from refusion.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import jinja2

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_CONTEXT = 4  # shown tokens kept for context; one character never spans more tokens than its four bytes
_SPACE = r"\s*"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer; make one with `Tokenizer.from_pretrained`.

    `mask_token_id`, `bos_token_id` and `pad_token_id` are None where the checkpoint has none. `vocab_size` counts the ids that the
    tokenizer knows; the embedding may have more rows, which are never emitted. `special_ids` are all ids marked special.
    """

    def __init__(self, file: Path, settings: TokenizerSettings) -> None:
        self._file = file
        self._settings = settings
        self._literal = _load(file)
        self._literal.encode_special_tokens = True
        self._texts = {token_id: token.content for token_id, token in self._literal.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(self._texts)
        self.vocab_size: int = self._literal.get_vocab_size(with_added_tokens=True)
        self.mask_token_id = settings.mask_token_id
        self.bos_token_id = settings.bos_token_id
        self.pad_token_id = settings.pad_token_id
        self.eos_token_ids = settings.eos_token_ids or self._eos_by_name()

    @classmethod
    def from_pretrained(cls, path: Path | str) -> Tokenizer:
        """Read `tokenizer.json` and what the config files beside it say. Raises CheckpointError if it is missing or damaged."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path} has no tokenizer.json; write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return cls(file, TokenizerSettings.from_pretrained(path))

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template. Raises CheckpointError if the template is broken."""
        other = Tokenizer(self._file, dataclasses.replace(self._settings, chat_template=template))
        assert other._template is not None
        return other

    @property
    def has_chat_template(self) -> bool:
        return self._settings.chat_template is not None

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that token ids depend on: the tokenizer's file, its settings, the chat template."""
        return hashlib.sha256(self._file.read_bytes() + repr(self._settings).encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; what looks like a special token in it stays text.

        `add_special_tokens` lets the tokenizer add what it puts around a text, such as Llama 3's begin-of-text.
        """
        return self._literal.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a chat in the checkpoint's template: the template's specials are special tokens, the messages are text.

        A default system prompt is part of the template. Raises RequestError if there is no template or it refuses the messages.
        """
        hidden: list[str] = []
        if self._special_pattern is not None:
            messages = [{key: self._hide(value, hidden) for key, value in message.items()} for message in messages]
        text = self.render_chat(messages, add_generation_prompt)
        if not hidden:
            return self._plain.encode(text, add_special_tokens=False).ids
        return [token_id for piece in self._split_at_specials(text) for token_id in self._encode_piece(piece, hidden)]

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the template writes it, for reading; encode chats with `encode_chat`."""
        from jinja2 import TemplateError

        if self._template is None:
            raise RequestError("this checkpoint has no chat template; pass the prompt as text or token ids instead of messages")
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._settings.special_texts
            )
        except (TemplateError, KeyError, TypeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that the tokenizer does not know vanish."""
        return self._literal.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A reader that turns ids into text as they come."""
        return IncrementalDetokenizer(self)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer with special-token text matched, for renderings without any in their messages."""
        return _load(self._file)

    @cached_property
    def _template(self) -> jinja2.Template | None:
        return None if self._settings.chat_template is None else _compile(self._settings.chat_template)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Any special token, with the white space it swallows; longer texts first, so that none hides behind its own beginning."""
        tokens = sorted(self._literal.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content))
        alternatives = [
            f"{_SPACE if token.lstrip else ''}(?P<id{token_id}>{re.escape(token.content)}){_SPACE if token.rstrip else ''}"
            for token_id, token in tokens
            if token.special
        ]
        return re.compile("|".join(alternatives)) if alternatives else None

    def _hide(self, value: Any, hidden: list[str]) -> Any:
        """`value` with every special-token text replaced by a place holder; the texts go to `hidden`."""
        if not isinstance(value, str):
            return value
        assert self._special_pattern is not None

        def replace(match: re.Match[str]) -> str:
            assert match.lastgroup is not None
            start, end = match.span(match.lastgroup)
            hidden.append(match.group(match.lastgroup))
            return f"{match.string[match.start() : start]}{_place_holder(len(hidden) - 1)}{match.string[end : match.end()]}"

        return self._special_pattern.sub(replace, value)

    def _split_at_specials(self, text: str) -> Iterator[int | str]:
        """The rendering as special ids and the text between them."""
        assert self._special_pattern is not None
        start = 0
        for match in self._special_pattern.finditer(text):
            assert match.lastgroup is not None
            if match.start() > start:
                yield text[start : match.start()]
            yield int(match.lastgroup.removeprefix("id"))
            start = match.end()
        if start < len(text):
            yield text[start:]

    def _encode_piece(self, piece: int | str, hidden: list[str]) -> list[int]:
        if isinstance(piece, int):
            return [piece]
        for index, text in enumerate(hidden):
            piece = piece.replace(_place_holder(index), text)
        return self.encode(piece)

    def _eos_by_name(self) -> tuple[int, ...]:
        text = self._settings.special_texts.get("eos_token")
        token_id = None if text is None else self._literal.token_to_id(text)
        return () if token_id is None else (token_id,)


class IncrementalDetokenizer:
    """Text of a growing list of ids: what `push` returns, joined, is the text of all ids, characters never cut in two."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ids shown and those held back: some decoders treat a text's first token otherwise
        self._num_shown = 0  # characters of their text that were shown

    def push(self, ids: Sequence[int]) -> str:
        """The new text that `ids` complete; an unfinished character is held back until its last byte comes."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(_REPLACEMENT)
        new = whole[self._num_shown :]
        self._num_shown = max(self._num_shown, len(whole))
        if len(whole) == len(text) and len(self._ids) > _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._num_shown = len(self._tokenizer.decode(self._ids))
        return new

    def flush(self) -> str:
        """What is still held back, unfinished characters shown as the replacement character."""
        text = self._tokenizer.decode(self._ids)
        new = text[self._num_shown :]
        self._num_shown = len(text)
        return new


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """What the JSON files beside `tokenizer.json` say."""

    mask_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_texts: dict[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` and the like, as a chat template sees them."""
    chat_template: str | None = None

    @classmethod
    def from_pretrained(cls, path: Path) -> TokenizerSettings:
        """Read the files under `path`; generation_config.json has the last word on the ids that end a text."""
        config = _read_json(path / "config.json")
        ids = {**config, **{key: value for key, value in _read_json(path / "generation_config.json").items() if value is not None}}
        texts = _read_json(path / "tokenizer_config.json")
        eos = ids.get("eos_token_id")
        return cls(
            mask_token_id=config.get("mask_token_id"),
            bos_token_id=ids.get("bos_token_id"),
            pad_token_id=ids.get("pad_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            special_texts={name: _content(texts[name]) for name in _SPECIAL_NAMES if texts.get(name) is not None},
            chat_template=_chat_template(path, texts),
        )


def _chat_template(path: Path, texts: dict[str, Any]) -> str | None:
    """chat_template.jinja where it exists, else the entry of tokenizer_config.json; of several named ones, the default."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = texts.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the checkpoint again") from error


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise CheckpointError(f"{file} cannot be read: {error}; fetch the checkpoint again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _place_holder(index: int) -> str:
    """Stands for a special-token text in a message while the template runs; private-use characters that no template looks for."""
    return f"\U0010fffd{index}\U0010fffc"


def _compile(source: str) -> jinja2.Template:
    """The template with the same environment as in `transformers`: sandboxed, blocks trimmed, the same extra functions."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _strftime_now
    # `{% generation %}` only marks the assistant's part for training: a comment does.
    source = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template of this checkpoint is broken: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter, no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_template_error(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
