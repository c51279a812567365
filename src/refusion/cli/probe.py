"""A probe for training: the model under training answers a few validation prompts, and its answers are measured.

Training knows probes only as functions; this one is made here because decoding stands above training.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from refusion.training.base import BaseModel
    from refusion.training.data import Examples
    from refusion.training.recipe import Recipe
    from refusion.training.trainer import Probe

MAX_TOKENS = 64


def make_probe(recipe: Recipe, base: BaseModel, validation: Examples) -> Probe:
    """Tokens per forward of ReFusion decoding at its default settings, and agreement of its tokens with the base's argmax.

    The base is kept as it was before training, on the host between probes.
    """
    import torch

    from refusion.decoding.forward import EagerForward
    from refusion.decoding.params import SamplingParams, SlotSettings
    from refusion.decoding.refusion import ReFusionDecoder
    from refusion.decoding.transformers_network import TransformersNetwork
    from refusion.model.config import ModelConfig
    from refusion.training.objectives import inner_causal_lm

    prompts = [validation.pair(i)[0].tolist() for i in range(len(validation))]
    reference = copy.deepcopy(base.model).float().cpu().eval()
    with tempfile.TemporaryDirectory() as place:
        base.model.config.save_pretrained(place)
        config = ModelConfig.from_pretrained(Path(place))
    eos = _eos_ids(base)
    banned = _banned_ids(base, eos)
    slots, sampling = SlotSettings(slot_size=min(8, min(recipe.objective.slot_sizes))), SamplingParams(max_tokens=MAX_TOKENS)

    def probe(model: Any) -> dict[str, float]:
        causal_lm = inner_causal_lm(model)
        device = next(causal_lm.parameters()).device
        forward = EagerForward(TransformersNetwork(causal_lm, config), banned.to(device))
        decoder = ReFusionDecoder(forward, slots, sampling, mask_id=base.mask_token_id, eos_ids=torch.tensor(eos, device=device))
        attention = causal_lm.config._attn_implementation
        causal_lm.config._attn_implementation = "sdpa"  # decoding brings dense masks
        try:
            with torch.compiler.set_stance("force_eager"):  # every forward has a shape of its own
                decoder.start(*_padded(prompts, device), torch.zeros(len(prompts), dtype=torch.long, device=device))
                while not bool(decoder.is_done.all()):  # a synchronisation a forward; a probe is short
                    decoder.step()
        finally:
            causal_lm.config._attn_implementation = attention
        answers = [decoder.answer(i) for i in range(len(prompts))]
        num_tokens = sum(map(len, answers))
        agreed = sum(_num_agreed(reference.to(device), p, a, banned.to(device)) for p, a in zip(prompts, answers, strict=True))
        reference.cpu()
        return {"tpf": num_tokens / int(decoder.num_forwards.sum()), "agreement": agreed / max(num_tokens, 1)}

    return probe


def _num_agreed(reference: Any, prompt: list[int], answer: list[int], banned: Tensor) -> int:
    """Answer tokens that are the base's argmax given the true text before them, in float32."""
    import torch

    if not answer:
        return 0
    ids = torch.tensor([prompt + answer], device=banned.device)
    logits = reference(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return int((logits.index_fill(1, banned, -torch.inf).argmax(-1) == ids[0, len(prompt) :]).sum())


def _padded(prompts: list[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device), lengths


def _eos_ids(base: BaseModel) -> list[int]:
    if base.tokenizer is not None:
        return list(base.tokenizer.eos_token_ids)
    eos = base.model.config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def _banned_ids(base: BaseModel, eos: list[int]) -> Tensor:
    """The mask token, specials that end nothing, rows past the tokenizer's vocabulary."""
    import torch

    rows = base.model.get_input_embeddings().num_embeddings
    banned = {base.mask_token_id}
    if base.tokenizer is not None:
        banned |= {*base.tokenizer.special_ids, *range(base.tokenizer.vocab_size, rows)} - set(eos)
    return torch.tensor(sorted(banned))
