"""The text of one answer while it is being written: only what can no longer change, in text order, each character once."""

from collections.abc import Collection, Sequence

from refusion.decoding.events import Event
from refusion.decoding.params import SamplingParams
from refusion.tokenizer import Tokenizer


class AnswerStream:
    """Feed it the events of one request; it knows the answer from its beginning to the first gap.

    Slots may be committed in any order: a token is shown once all before it are committed. The text ends where the finished answer
    will end (first EOS, stop string, max_tokens); a character or a stop string that is only half there is held back.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, eos_ids: Collection[int]) -> None:
        self.text = ""
        self.num_tokens = 0
        self._detokenizer = tokenizer.detokenizer()
        self._stop, self._max_tokens = sampling.stop, sampling.max_tokens
        self._ends = {*eos_ids, *sampling.stop_token_ids}
        self._pending: dict[int, tuple[int, ...]] = {}  # place in the answer -> committed tokens from there on
        self._held = ""
        self._is_over = False

    def push(self, event: Event) -> str:
        """The new text this event makes certain."""
        if event.kind != "committed" or self._is_over:
            return ""
        self._pending[event.offset] = event.token_ids
        new: list[int] = []
        while not self._is_over and (token_ids := self._pending.pop(self.num_tokens, None)) is not None:
            new += self._take(token_ids)
        text = self._detokenizer.push(new) if new else ""
        return self._release(text + self._detokenizer.flush() if self._is_over else text)

    def _take(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens of one commit that belong to the answer."""
        taken: list[int] = []
        for token in token_ids:
            taken.append(token)
            self.num_tokens += 1
            self._is_over = token in self._ends or self.num_tokens >= self._max_tokens
            if self._is_over:
                break
        return taken

    def _release(self, text: str) -> str:
        """`text` behind what was held back, up to a stop string or the beginning of one."""
        text = self._held + text
        cuts = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        num_held = 0 if self._is_over else max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = min(cuts) if cuts else len(text) - num_held
        self._is_over = self._is_over or bool(cuts)
        self._held = text[certain:]
        self.text += text[:certain]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, the whole excepted: "ab<|" and "<|x" share 2."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
