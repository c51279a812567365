"""The products of a forward at their real shapes, and how each is called; shared by the checks, the sweep and the compile workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusion.model.kernels import launch, linear, readout
from refusion.model.kernels.config import SKINNY_ROWS, Config, Kind, key
from refusion.model.kernels.owed import normed
from refusion.model.quantize import QuantizedWeight, quantize

EPS = 1e-6
Weight = Tensor | QuantizedWeight
QUANTIZED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Product:
    """One weight of a model and the operator it is used in."""

    model: str
    name: str
    kind: Kind
    num_out: int  # rows of the weight; a gated product writes half as many
    num_in: int

    def key(self, num_rows: int, dtype: str) -> str:
        return key(self.kind, self.num_out, self.num_in, num_rows, dtype)


def products(model: str) -> list[Product]:
    """The products of a layer, and the head."""
    hidden, heads, kv_heads, head_dim, intermediate, vocabulary = {
        "qwen3-8b": (4096, 32, 8, 128, 12288, 151936),
        "smollm2-135m": (576, 9, 3, 64, 1536, 49152),
        "tiny": (48, 3, 1, 16, 80, 75),
    }[model]
    return [
        Product(model, "qkv_proj", "norm_linear", (heads + 2 * kv_heads) * head_dim, hidden),
        Product(model, "o_proj", "linear_add", hidden, heads * head_dim),
        Product(model, "gate_up_proj", "norm_gated", 2 * intermediate, hidden),
        Product(model, "down_proj", "linear_add", hidden, intermediate),
        Product(model, "lm_head", "readout", vocabulary, hidden),
    ]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything but the weight."""

    x: Tensor  # [T, K]
    norm_weight: Tensor  # [K]
    residual: Tensor  # [T, N]
    next_norm: Tensor  # [N] of the norm behind a product that is added to the residual stream
    bias_banned: Tensor  # [N] float32
    given_ids: Tensor  # [T] int32


def make_inputs(product: Product, num_rows: int, device: str, dtype: torch.dtype, generator: torch.Generator | None = None) -> Inputs:
    """Random inputs; nothing but shapes on the meta device."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    bias_banned = torch.zeros(product.num_out, device=device)
    bias_banned[5:17] = -torch.inf
    return Inputs(
        x=normal(num_rows, product.num_in).to(dtype),
        norm_weight=(1 + 0.1 * normal(product.num_in)).to(dtype),
        residual=normal(num_rows, product.num_out).to(dtype),
        next_norm=(1 + 0.1 * normal(product.num_out)).to(dtype),
        bias_banned=bias_banned,
        given_ids=torch.randint(product.num_out, (num_rows,), device=device, generator=generator, dtype=torch.int32),
    )


def make_weight(product: Product, device: str, dtype: torch.dtype, quantized: str | None = None, generator: Any = None) -> Weight:
    """A random weight of the usual size, so that outputs are about as large as inputs; nothing but shapes on the meta device."""
    shape = (product.num_out, product.num_in)
    if quantized and device == "meta":
        return QuantizedWeight(torch.empty(shape, device=device, dtype=QUANTIZED[quantized]), torch.empty(shape[0], device=device))
    weight = torch.randn(shape, device=device, dtype=dtype, generator=generator) * product.num_in**-0.5
    return quantize(weight, "int8" if quantized == "int8" else "float8") if quantized else weight


def run(product: Product, inputs: Inputs, weight: Weight, config: Config | None = linear.AUTO, *, in_place: bool = False) -> Any:
    """Call the operator; `config` None = the library's product. in_place: as in a forward, a residual may be overwritten."""
    match product.kind:
        case "norm_linear":
            return linear.norm_linear(inputs.x, inputs.norm_weight, EPS, weight, config=config)
        case "norm_gated":
            return linear.norm_gated(inputs.x, inputs.norm_weight, EPS, weight, config=config)
        case "linear_add" if in_place and len(inputs.x) > SKINNY_ROWS:
            # With the norm that follows: it is a kernel of its own with so many rows, and may have parts to add up.
            return normed(linear.linear_add_owed(inputs.x, weight, inputs.residual, config=config), inputs.next_norm, EPS)
        case "linear_add":
            return linear.linear_add(inputs.x, weight, inputs.residual, in_place=in_place, config=config)
        case "readout":
            return readout.readout(inputs.x, inputs.norm_weight, EPS, weight, inputs.bias_banned, inputs.given_ids, config=config)


def compile_for_h100(product: Product, num_rows: int, config: Config, quantized: str | None, use_pdl: bool = True) -> list[Any]:
    """Compile what `run` would launch, on any machine: needs neither the data nor a GPU. Returns the compiled kernels."""
    with compiling_for_h100(use_pdl) as compiled:
        inputs = make_inputs(product, num_rows, "meta", torch.bfloat16)
        run(product, inputs, make_weight(product, "meta", torch.bfloat16, quantized), config)
        return list(compiled)


@contextmanager
def compiling_for_h100(use_pdl: bool = True) -> Iterator[list[Any]]:
    """Inside, launches compile for an H100 and run nothing; yields the compiled kernels.

    Triton's driver is replaced by one that only names the target: contexts on the GPU would cost each worker seconds and memory.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class H100:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    driver.set_active(H100())  # pyright: ignore[reportArgumentType]  # the part of a driver that compiling needs
    launch.set_pdl(use_pdl)
    with launch.compile_only() as compiled:
        yield compiled
