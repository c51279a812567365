"""A ReFusion checkpoint as a model of lm-evaluation-harness: generation by any decoder, likelihoods, windows of long texts.

    lm_eval --model refusion --model_args pretrained=smollm2-135m-refusion,decoder=refusion --tasks gsm8k_cot --apply_chat_template

Text is tokenised the way the harness's own `hf` model does it, so that both see the same ids; which tokens win is up to `LLM.generate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tokenizers
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from refusion.decoding.params import SamplingParams, SlotParams
from refusion.engine.settings import EngineSettings
from refusion.errors import CheckpointError, ConfigError
from refusion.evaluation.diffusion_likelihood import diffusion_bounds
from refusion.evaluation.likelihood import BoundSettings, Likelihood, Pair, chain_likelihoods, slot_bounds
from refusion.llm import DECODERS, DIFFUSION, LLM, RequestOutput

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

SLOT_FIELDS = tuple(field.name for field in fields(SlotParams))
"""Slot settings that model arguments and a task's generation settings may name."""
_SAMPLING_FIELDS = ("max_gen_toks", "until", "do_sample", "temperature", "top_p", "seed")
_CUTS = ("block_size", "serial_blocks")
_WITHOUT_MASK = ("autoregressive", "auto")
"""Decoders that a checkpoint without a mask token can use."""

_log = logging.getLogger(__name__)


class ReFusionLM(TemplateLM):
    """`refusion` of the harness.

    pretrained: named model, directory, or an `LLM`. decoder: "refusion", "autoregressive", ... batch_size: prompts decoded together (an
    `LLM` brings its own number) and rows scored together. likelihood_samples: masked sets per continuation in the bound. check_greedy:
    whether likelihood requests also find out, by decoding, if the continuation is what the model would write (costs a decoding each; the
    chain knows it for nothing).
    Slot settings (slot_size=..., serial_blocks=..., ...) hold for every task that does not bring its own; a diffusion decoder takes its
    own settings (block_size=..., threshold=..., ...) instead, and a task's slot settings mean nothing to it.
    """

    def __init__(
        self,
        pretrained: str | Path | LLM,
        *,
        decoder: str = "refusion",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        seed: int = 0,
        likelihood_samples: int = 32,
        check_greedy: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ConfigError(f"unknown decoder {decoder!r}; use one of {', '.join(DECODERS)}")
        kind = DIFFUSION.get(decoder)
        known = SLOT_FIELDS if kind is None else tuple(field.name for field in fields(kind))
        _refuse_unknown(settings, known, "model argument", ("pretrained", "decoder", "device", "dtype", "seed", "likelihood_samples"))
        slots = settings if kind is None else {}
        diffusion = None if kind is None else kind(**settings)
        self.batch_size = int(batch_size) if batch_size is not None and str(batch_size).isdigit() else None  # "auto" is ours to choose
        if not isinstance(pretrained, LLM):
            engine = EngineSettings(max_num_seqs=self.batch_size)
            pretrained = LLM.from_pretrained(pretrained, device=_device(device), dtype=dtype, engine=engine)
        self.llm = pretrained
        if self.llm.tokenizer is None:
            raise CheckpointError(f"{self.llm.path} has no tokenizer.json; put the tokenizer of its base beside the weights")
        if decoder not in _WITHOUT_MASK and self.llm.model.config.mask_token_id is None:
            raise CheckpointError(
                f"{self.llm.path} has no mask token, which decoder={decoder} needs; add one with `refusion convert`, "
                "or use decoder=autoregressive"
            )
        self.decoder, self.seed, self.check_greedy = decoder, seed, check_greedy
        self.slots = slots
        self.diffusion = self.llm.resolve_diffusion(decoder, diffusion)
        self.num_samples = likelihood_samples
        self.max_gen_toks = max_gen_toks
        self.max_length: int = max_length or self.llm.model.config.max_position_embeddings
        self.outputs: list[RequestOutput] = []
        """Every answer generated so far, for the figures of `get_model_info`."""
        self.likelihoods: list[Likelihood] = []
        """Every likelihood found so far; the harness itself keeps no errors of them."""
        # Unlike `llm.tokenizer`, this one reads special tokens in a text as such: the harness hands over chats already rendered.
        self._rendered = tokenizers.Tokenizer.from_file(str(self.llm.path / "tokenizer.json"))
        self._rendered.no_padding()
        self._rendered.no_truncation()

    # -- text and ids ---------------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.llm.eos_ids()[0]

    @property
    def prefix_token_id(self) -> int:
        assert self.llm.tokenizer is not None
        bos = self.llm.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.llm.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Only a mark for the harness's records; `apply_chat_template` renders."""
        return "of the checkpoint" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered chat; without a generation prompt the last message is the beginning of the answer and stays open."""
        assert self.llm.tokenizer is not None
        if add_generation_prompt:
            return self.llm.tokenizer.render_chat(chat_history)
        return self.llm.tokenizer.render_chat(chat_history[:-1]) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids with what the tokenizer puts around a text, unless the text begins with that already (a rendered chat often does)."""
        if add_special_tokens is None:
            prefix = self._rendered.id_to_token(self.prefix_token_id)
            add_special_tokens = prefix is None or not string.startswith(prefix)
        return self._rendered.encode(string, add_special_tokens=add_special_tokens).ids

    # -- generation -----------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for indices in self._chunks(requests):
                contexts = [_args(requests[i])[0] for i in indices]
                options = _args(requests[indices[0]])[1]
                for i, output in zip(indices, self.answer(contexts, options), strict=True):
                    texts[i] = output.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, output.text)
                bar.update(len(indices))
        return [texts[i] for i in range(len(requests))]

    def answer(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[RequestOutput]:
        """Answers with their costs. options: a task's `generation_kwargs`; slot settings among them go before the model's own.

        A context that leaves no room for the answer loses its beginning, as with the harness's other models.
        """
        sampling, slots = self.settings(options)
        room = self.max_length - sampling.max_tokens
        if room < 1:
            raise ConfigError(f"max_gen_toks is {sampling.max_tokens}; the model's context is {self.max_length}, prompt included")
        prompts = [self.tok_encode(context) for context in contexts]
        if num_long := sum(len(prompt) > room for prompt in prompts):
            _log.warning("%d prompts are longer than %d tokens and lose their beginning", num_long, room)
        outputs = self._generate([prompt[-room:] for prompt in prompts], sampling, slots)
        self.outputs += outputs
        return outputs

    def _generate(self, prompts: Sequence[list[int]], sampling: SamplingParams, slots: SlotParams) -> list[RequestOutput]:
        return self.llm.generate(prompts, sampling, slots, self.decoder, diffusion=self.diffusion, batch_size=self.batch_size)

    def settings(self, options: Mapping[str, Any]) -> tuple[SamplingParams, SlotParams]:
        """What a task's `generation_kwargs` mean. Raises ConfigError for one that is unknown here, rather than ignoring it."""
        options = cast("Mapping[str, Any]", normalize_gen_kwargs(dict(options), self.max_gen_toks))
        _refuse_unknown(options, (*SLOT_FIELDS, *_SAMPLING_FIELDS), "generation option")
        until = [text for text in options.get("until") or [] if text]
        special = {text: token_id for text in until if (token_id := self._special_id(text)) is not None}
        sampling = SamplingParams(
            max_tokens=options["max_gen_toks"],
            temperature=float(options.get("temperature") or 0.0),
            top_p=float(options.get("top_p") or 1.0),
            seed=int(options.get("seed", self.seed)),
            stop=tuple(text for text in until if text not in special),
            stop_token_ids=tuple(special.values()),
        )
        own = {name: options[name] for name in SLOT_FIELDS if name in options}
        inherited = {name: value for name, value in self.slots.items() if not (name in _CUTS and own.keys() & {*_CUTS, "slot_size"})}
        return sampling, SlotParams(**(inherited | own))

    def _special_id(self, text: str) -> int | None:
        """A special token never appears in an answer's text; its id ends the answer instead."""
        assert self.llm.tokenizer is not None
        token_id = self._rendered.token_to_id(text)
        return token_id if token_id in self.llm.tokenizer.special_ids else None

    def _chunks(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Indices of requests with the same options, so many together that batches stay full and the progress bar moves."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(_args(request)[1].items(), key=str)), []).append(index)
        size = chunk_size(self)
        for indices in groups.values():
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    # -- likelihood -----------------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability or bound, is it what greedy decoding yields) of every continuation."""
        results: list[tuple[float, bool]] = []
        size = 8 * self._rows
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(requests), size):
                part = requests[start : start + size]
                pairs = [self._fitted(context, answer) for _, context, answer in part]
                likelihoods = self.score(pairs)
                greedy = [found.is_argmax for found in likelihoods] if self.decoder == "autoregressive" else self._are_greedy(pairs)
                for (texts, _, _), found, is_greedy in zip(part, likelihoods, greedy, strict=True):
                    results.append((found.log_prob, is_greedy))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, results[-1])
                bar.update(len(part))
        return results

    def score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Likelihoods of token continuations under the decoder's own factorisation, kept in `likelihoods`."""
        if self.decoder == "autoregressive":
            found = chain_likelihoods(self.llm.model, pairs, self._rows)
        elif self.decoder == "refusion":
            mask_id = self.llm.model.config.mask_token_id
            assert mask_id is not None, "checked when the model was loaded"
            slot_size = self.llm.resolve_slots(SlotParams(**self.slots)).slot_size
            settings = BoundSettings(slot_size=slot_size, num_samples=self.num_samples, seed=self.seed)
            found = slot_bounds(self.llm.model, pairs, mask_id, settings, self._rows)
        elif self.diffusion is not None:
            mask_id = self.llm.model.config.mask_token_id
            assert mask_id is not None, "checked when the model was loaded"
            noise = {"num_samples": self.num_samples, "seed": self.seed}
            found = diffusion_bounds(self.llm.model, pairs, mask_id, self.diffusion, **noise, batch_size=self._rows)
        else:
            raise ConfigError(f"decoder={self.decoder} has no likelihood here; name the decoder, or use generative tasks")
        self.likelihoods += found
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability, or bound, of whole texts, cut into windows of the model's context whose tokens are each scored once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(_args(request)[0])
            cut = get_rolling_token_windows(ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            parts = [make_disjoint_window(window) for window in cut]
            windows += [(None, list(context), list(answer)) for context, answer in parts]
            counts.append(len(parts))
        check_greedy, self.check_greedy = self.check_greedy, False  # nobody reads it here
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))  # type: ignore[arg-type]  # no texts to remember
        self.check_greedy = check_greedy
        totals = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _fitted(self, context: list[int], answer: list[int]) -> Pair:
        """A pair within the model's context; the beginning of the context is what goes."""
        assert len(answer) <= self.max_length, f"a continuation of {len(answer)} tokens, the context holds {self.max_length}"
        is_chain = self.diffusion is None
        room = max(self.max_length + is_chain - len(answer), 1)  # the last token of the answer is never fed to a chain
        return context[-room:], answer

    def _are_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        if not self.check_greedy:
            return [False] * len(pairs)
        slots = SlotParams(**self.slots)
        found = [False] * len(pairs)
        for length in {len(answer) for _, answer in pairs}:
            indices = [i for i, (_, answer) in enumerate(pairs) if len(answer) == length]
            prompts = [list(pairs[i][0])[-(self.max_length - length) :] for i in indices]
            outputs = self._generate(prompts, SamplingParams(max_tokens=length), slots)
            for i, output in zip(indices, outputs, strict=True):
                found[i] = list(output.token_ids) == list(pairs[i][1])
        return found

    # -- records --------------------------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return self.batch_size or (32 if self.llm.model.device.type == "cuda" else 4)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its result file about the model: settings, and what the answers and bounds were like."""
        info: dict[str, Any] = {"decoder": self.decoder, "model_dtype": str(self.llm.model.dtype), "slots": dict(self.slots)}
        if self.diffusion is not None:
            info["diffusion"] = asdict(self.diffusion)
        if self.outputs:
            stats = [output.stats for output in self.outputs]
            info["num_tokens"], info["num_forwards"] = sum(stat.num_tokens for stat in stats), sum(stat.num_forwards for stat in stats)
            info["tokens_per_forward"] = info["num_tokens"] / info["num_forwards"]
        if self.likelihoods and self.decoder != "autoregressive":
            errors = [found.standard_error for found in self.likelihoods]
            info["likelihood_samples"] = self.num_samples
            info["likelihood_standard_error"] = {"mean": math.fsum(errors) / len(errors), "max": max(errors)}
        return info


def chunk_size(lm: ReFusionLM) -> int:
    """Prompts handed to the engine at once: several batches, so that the last, emptier one weighs little."""
    return 8 * (lm.batch_size or (64 if lm.llm.model.device.type == "cuda" else 1))


def _args(request: Instance) -> tuple[Any, ...]:
    """What the harness hands over; its own annotation says too little."""
    return request.args


def _device(asked: str | None) -> str:
    """The harness's own command line asks for the first GPU where nobody asked for anything; on a machine without one, the CPU is meant."""
    import torch

    if asked in (None, "cuda", "cuda:0") and not torch.cuda.is_available():
        return "cpu"
    return asked or "cuda"


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], what: str, others: Sequence[str] = ()) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, [*known, *others], 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*others, *known])}"
            raise ConfigError(f"unknown {what} {name!r}; {hint}")
