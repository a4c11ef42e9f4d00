"""FP8 on CUDA: our products against the emulated ones, and Transformer Engine's blocks as an engine drives them."""

from typing import Any

import pytest
import torch

from model_providers.fp8 import native
from model_providers.fp8.choice import recipe_obstacles
from model_providers.fp8.config import RECIPES, Fp8Config
from model_providers.fp8.multiply import multiply
from model_providers.fp8.scaling import Scaling
from model_providers.fp8.transformer_engine import EightBitBlocks, eight_bit_blocks
from model_providers.layer_plan import Targets
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import batch, build, llama_like, loss_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

OBSTACLES = recipe_obstacles("cuda" if torch.cuda.is_available() else "cpu")
TE = [
    pytest.param(
        recipe, marks=pytest.mark.skipif(OBSTACLES[recipe] is not None, reason=str(OBSTACLES[recipe]))
    )
    for recipe in RECIPES
]
RATE = 0.01  # of SGD; faster, a rounding in the first step is a large difference in the last
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 512,
    "vocab_size": 256,
    "max_sequence_length": 128,
}


def trained(recipe: str, backend: str, steps: int = 4, **options: Any) -> list[float]:
    """Losses of SGD steps with the engine's calls around them."""
    model = llama_like(**SIZES)
    fp8 = Fp8Config(recipe=recipe, backend=backend, experiment=recipe == "nvfp4")  # type: ignore[arg-type]
    options = {
        "device": "cuda",
        "params_dtype": torch.bfloat16,
        "sequence_length": 128,
        "fp8": fp8,
        **options,
    }
    built = build(model, **options)
    blocks = EightBitBlocks([block for _, _, block in eight_bit_blocks(built.layers)])
    tokens, targets = batch(model, size=2, length=128)
    seed_streams(1, device="cuda")
    losses = []
    for _ in range(steps):
        blocks.begin_passes(keeps_copies=True)
        loss, gradients = loss_and_gradients(
            built, tokens.cuda(), Targets(*(part.cuda() for part in targets))
        )
        blocks.end_passes()
        with torch.no_grad():
            for name, parameter in built.named_parameters().items():
                parameter -= RATE * gradients[name]
        blocks.end_step(applied=True)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("recipe", TE)
def test_transformer_engine_follows_the_loss_of_our_products(recipe: str) -> None:
    ours, theirs = trained(recipe, "torch"), trained(recipe, "te", kernels="te")
    assert theirs[-1] < theirs[0]
    assert theirs == pytest.approx(ours, rel=3e-2)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "nvfp4"])
def test_our_products_on_cuda_follow_the_cpu(recipe: str) -> None:
    found = trained(recipe, "torch", kernels="torch")
    assert found == pytest.approx(trained_on_cpu(recipe), rel=2e-2)


@pytest.mark.parametrize("shape", [(2048, 1024, 768), (48, 64, 80)], ids=["large", "small"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_exact_values(recipe: str, shape: tuple[int, int, int]) -> None:
    """Of a linear's three; what the operands became is the same on a CPU."""
    m, k, n = shape
    facts = Fp8Config(recipe=recipe, experiment=recipe == "nvfp4")  # type: ignore[arg-type]
    scaling = Scaling(facts, None, cut=frozenset())
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*size, generator=generator).bfloat16().cuda() for size in ((m, k), (n, k), (m, n))
    )
    given = scaling.input(x, both=True, is_trained=True)
    kept, back = scaling.weight(weight), scaling.gradient(grad, both=True)
    for a, b in ((given.rows, kept.rows), (back.rows, kept.columns), (back.columns, given.columns)):
        assert a is not None and b is not None
        exact = [part.values(torch.float64) * part.unit.double() for part in (a, b)]
        wanted = exact[0] @ exact[1].t()
        found = multiply(a, b, torch.bfloat16).double()
        assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def trained_on_cpu(recipe: str) -> list[float]:
    model = llama_like(**SIZES)
    built = build(model, params_dtype=torch.bfloat16, sequence_length=128, fp8=Fp8Config(recipe=recipe))  # type: ignore[arg-type]
    tokens, targets = batch(model, size=2, length=128)
    losses = []
    for _ in range(4):
        loss, gradients = loss_and_gradients(built, tokens, targets)
        with torch.no_grad():
            for name, parameter in built.named_parameters().items():
                parameter -= RATE * gradients[name]
        losses.append(loss)
    return losses


@pytest.mark.parametrize("pair", sorted(native.PAIRS))
def test_block_products_are_native_where_the_device_has_them(pair: Any) -> None:
    """Hopper has 1x128 and 128x128, Blackwell 1x32."""
    major, _ = torch.cuda.get_device_capability()
    expected = major == 10 if native.MICRO in pair else major == 9
    assert native.is_trusted(torch.device("cuda", 0), *pair, torch.bfloat16) == expected
