"""FP8 against bf16 on one device: products by recipe and backend, and whole optimizer steps of a 1B-class Llama.

A product's rows: `bare`, of operands that are eight bits already; `with quantising`, of bf16 operands, as a linear's
forward pass has them.  Transformer Engine's rows are there where it can be loaded and knows the recipe.

    python -m benchmarks.fp8                          # on CUDA
    python -m benchmarks.fp8 --recipes current        # fewer of them
    python -m benchmarks.fp8 --shape 8b --bf16-ends 0 # wider products: a slice of a deeper model
    python -m benchmarks.fp8 --small                  # a toy anywhere; its ratios mean nothing
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.alone import world_of_one  # before DeepSpeed
from benchmarks.mfu import (
    Rate,
    bf16_kernels,
    matrix_flops_per_s,
    parser,
    seconds_of,
    shape_here,
    train_rate,
)

# isort: split
import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table

from benchmarks.throughput import Shape
from model_providers.fp8.choice import recipe_obstacles
from model_providers.fp8.config import RECIPES, Fp8Config, Recipe
from model_providers.fp8.multiply import multiply
from model_providers.fp8.scaling import Scaling
from model_providers.fp8.transformer_engine import open_library, recipe_of


class Product(NamedTuple):
    """[m k] x [n k]"""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.k * self.n


class Row(NamedTuple):
    what: str
    backend: str
    flops_per_s: float


def products(shape: Shape) -> dict[str, Product]:
    """Those of a block's two largest linears."""
    model = shape.model
    gates = 2 if model.is_gated else 1
    return {
        "mlp up": Product(shape.tokens, model.hidden_size, gates * model.ffn_width),
        "mlp down": Product(shape.tokens, model.ffn_width, model.hidden_size),
    }


def facts_of(recipe: Recipe, backend: str, *, bf16_ends: int = 1) -> Fp8Config:
    """``bf16_ends``: blocks in bf16 at the bottom, and as many at the top."""
    ends = {"bf16_first": bf16_ends, "bf16_last": bf16_ends}
    return Fp8Config(recipe=recipe, backend=backend, experiment=recipe == "nvfp4", **ends)  # type: ignore[arg-type]


def torch_rows(product: Product, recipe: Recipe, device: torch.device, repeats: int) -> Iterator[Row]:
    x, weight = operands(product, device)
    scaling = Scaling(facts_of(recipe, "torch"), None, cut=frozenset())

    def quantised() -> tuple[Any, Any]:
        return scaling.input(x, both=False, is_trained=True).rows, scaling.weight(weight).rows

    a, b = quantised()
    bare_s = seconds_of(lambda: multiply(a, b, x.dtype, is_precise=False), repeats=repeats)
    whole_s = seconds_of(lambda: multiply(*quantised(), x.dtype, is_precise=False), repeats=repeats)
    yield Row(f"{recipe}, bare", "torch", product.flops / bare_s)
    yield Row(f"{recipe}, with quantising", "torch", product.flops / whole_s)


def te_rows(product: Product, recipe: Recipe, repeats: int) -> Iterator[Row]:
    """Of Transformer Engine's own linear: it has no bare product to call."""
    library = open_library()
    linear = sys.modules["transformer_engine.pytorch"].Linear(
        product.k, product.n, bias=False, params_dtype=torch.bfloat16
    )
    x, made = torch.randn(product.m, product.k, device="cuda", dtype=torch.bfloat16), facts_of(recipe, "te")
    used = recipe_of(library, made)

    @torch.no_grad()
    def forward() -> None:
        with library.context(enabled=True, recipe=used, group=None):
            linear(x)

    yield Row(f"{recipe}, with quantising", "te", product.flops / seconds_of(forward, repeats=repeats))


def operands(product: Product, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(product.m, product.k, device=device, dtype=torch.bfloat16)
    return x, torch.randn(product.n, product.k, device=device, dtype=torch.bfloat16) * 0.02


def product_rows(
    product: Product, recipes: list[Recipe], device: torch.device, repeats: int, te: dict[str, str | None]
) -> Iterator[Row]:
    x, weight = operands(product, device)
    yield Row("bf16", "torch", product.flops / seconds_of(lambda: x @ weight.t(), repeats=repeats))
    for recipe in recipes:
        yield from torch_rows(product, recipe, device, repeats)
        if te[recipe] is None:
            yield from te_rows(product, recipe, repeats)


def product_table(name: str, product: Product, rows: list[Row]) -> Table:
    """``rows``: bf16 first."""
    table = Table(
        "product", "backend", "TFLOP/s", "over bf16", title=f"{name}: {product.m} x {product.k} x {product.n}"
    )
    for row in rows:
        ratio = row.flops_per_s / rows[0].flops_per_s
        table.add_row(row.what, row.backend, f"{row.flops_per_s / 1e12:,.2f}", f"{ratio:.2f}")
    return table


def step_rates(
    shape: Shape, recipes: list[Recipe], te: dict[str, str | None], *, bf16_ends: int, **measured: Any
) -> dict[str, Rate]:
    """By number format and kernels, bf16 first; ``measured``: further words for `train_rate`."""
    rates = {}
    for kernels in bf16_kernels():
        rates[f"bf16, {kernels}"] = train_rate(shape, kernels=kernels, **measured)
    for recipe in recipes:
        for backend in (["te"] if te[recipe] is None else []) + ["torch"]:
            fp8 = facts_of(recipe, backend, bf16_ends=bf16_ends)
            # Beside our products the other layers are the fastest there are.
            rates[f"{recipe}, {backend}"] = train_rate(shape, fp8=fp8, **measured)
    return rates


def step_table(shape: Shape, rates: dict[str, Rate], peak: float) -> Table:
    """``peak``: bf16 FLOP/s, so that FP8 may exceed 100%."""
    table = Table("steps", "tokens/s", "over bf16", "MFU of bf16's rate", "loss", title=shape.name)
    fastest_bf16 = max(rate.tokens_per_s for name, rate in rates.items() if name.startswith("bf16"))
    for name, rate in rates.items():
        ratio = rate.tokens_per_s / fastest_bf16
        table.add_row(
            name, f"{rate.tokens_per_s:,.0f}", f"{ratio:.2f}", f"{rate.mfu(peak):.1%}", f"{rate.loss:.3f}"
        )
    return table


def main() -> None:
    own = parser(__doc__)
    usual = [recipe for recipe in RECIPES if recipe != "nvfp4"]
    own.add_argument("--recipes", nargs="+", choices=RECIPES, default=usual, metavar="RECIPE")
    own.add_argument("--products-only", action="store_true")
    own.add_argument(
        "--bf16-ends", type=int, default=1, help="blocks in bf16 at either end; a slice of a model has 0"
    )
    words = own.parse_args()
    shape = shape_here(words)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with world_of_one():
        device = torch.device(get_accelerator().current_device_name())
        te = recipe_obstacles(device.type)
        for recipe in words.recipes:
            if te[recipe] is not None:
                console.print(f"{recipe} by Transformer Engine: {te[recipe]}")
        for name, product in products(shape).items():
            rows = list(product_rows(product, words.recipes, device, words.steps, te))
            console.print(product_table(name, product, rows))
        if not words.products_only:
            peak = matrix_flops_per_s(device, torch.bfloat16, repeats=words.steps)
            rates = step_rates(
                shape,
                words.recipes,
                te,
                bf16_ends=words.bf16_ends,
                steps=words.steps,
                micro_batches=words.micro_batches,
                profile=words.profile,
            )
            console.print(step_table(shape, rates, peak))


if __name__ == "__main__":
    main()
