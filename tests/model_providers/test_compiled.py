"""What torch.compile makes of our functions: quantising to the bit, the others but for rounding.

tests/gpu does the same on CUDA.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_providers import compiled, cross_entropy, fused, rotary
from model_providers.building import solo_groups
from model_providers.compiled import compiled_on_cuda
from model_providers.cross_entropy import TokenLosses, VocabularyShare
from model_providers.fp8 import quantised
from model_providers.fp8.formats import E4M3, E5M2, Format, largest_magnitude, unit_of
from model_providers.fp8.quantised import Quantised, fine_sides, quantise_blocks, quantise_whole, whole_sides
from model_providers.fused import GatedSiLU, SplitHeads
from model_providers.rotary import RotaryTable, rotate
from tests.model_providers.plans import llama_like


def hard_numbers(rows: int = 256, columns: int = 384) -> torch.Tensor:
    """Of all magnitudes, with zeros, a block of zeros, and ties."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    x *= 2.0 ** torch.linspace(-30, 30, columns)
    x[:, 7] = 0
    x[:, 128:256] = 0
    x[:, 300] = 448.0
    return x


def bits(part: Quantised) -> list[torch.Tensor]:
    return [part.payload.view(torch.uint8), part.unit, *([] if part.scales is None else [part.wide_scales])]


def made(x: torch.Tensor) -> list[list[torch.Tensor]]:
    """All that quantising gives."""
    found = []
    for form in (E4M3, E5M2):
        sides = whole_sides(x, form, largest_magnitude(x), margin=1, both=True)
        assert sides.columns is not None
        found += [bits(sides.rows), bits(sides.columns)]
    sides = fine_sides(x, 128, both=True)
    assert sides.columns is not None
    found += [bits(sides.rows), bits(sides.columns)]
    for block, given in (((1, 128), x), ((1, 128), x.t()), ((128, 128), x), ((1, 32), x.t())):
        found.append(bits(quantise_blocks(given, E4M3, block)))
    return found


def test_compiled_quantising_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = made(hard_numbers())
    monkeypatch.setattr(compiled, "pays", lambda x: True)
    for found, eager in zip(made(hard_numbers()), wanted, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, eager, strict=True))
    assert quantised._scaled.works and quantised._scaled_blocks.works


def test_compiled_quantising_keeps_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "pays", lambda x: True)
    x = torch.tensor([[1.0, torch.inf], [2.0, torch.nan]])
    form: Format = E4M3
    whole = quantise_whole(x, form, unit_of(torch.tensor(2.0), form.largest))
    assert torch.isnan(whole.values(torch.float32)[1, 1])
    assert not torch.isfinite(quantise_blocks(x, E4M3, (1, 128)).values(torch.float32)).any()


def test_it_goes_on_eagerly_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(graph: object, inputs: object) -> None:
        raise OSError("no compiler here")

    def compiling(function: object, **options: object) -> object:
        return torch._dynamo.optimize(no_compiler)(function)  # type: ignore[arg-type]

    monkeypatch.setattr(compiled, "pays", lambda x: True)
    monkeypatch.setattr(torch, "compile", compiling)
    doubled = compiled_on_cuda(lambda x: x * 2)
    with caplog.at_level(logging.WARNING, logger="model_providers.compiled"):
        assert [float(doubled(torch.ones(()))) for _ in range(2)] == [2.0, 2.0]
    assert [record for record in caplog.messages if "no compiler here" in record] == caplog.messages
    assert len(caplog.messages) == 1


def outcome(function: Callable[..., Any], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Of an autograd function: what it gives, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    given = function(*[x * 1 for x in leaves])
    given = given if isinstance(given, tuple) else (given,)
    loss = sum(
        (x.double() * torch.arange(x.numel(), dtype=torch.float64, device=x.device).view(x.shape).sin()).sum()
        for x in given
    )
    assert isinstance(loss, torch.Tensor)
    return [*given, *torch.autograd.grad(loss, leaves)]


def functions(device: str, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """All that `fused` and the loss compile, on small tensors."""
    torch.manual_seed(0)
    x, joined, logits = (
        torch.randn(12, 2, *shape).bfloat16().to(device, dtype) for shape in ((64,), (2, 4, 16), (40,))
    )
    labels = torch.randint(0, 37, (12, 2)).to(device)
    share = VocabularyShare(37, 40, solo_groups().tp)
    halves = RotaryTable(llama_like(rotary_fraction=0.5, hidden_size=64)).cos_sin(0, 12, joined)
    return {
        "gated": outcome(GatedSiLU.apply, x),
        "heads": outcome(lambda x: SplitHeads.apply(x, *halves), joined),
        "heads without positions": outcome(lambda x: SplitHeads.apply(x, None, None), joined),
        "rotated": outcome(lambda x: rotate(x, *halves), joined[:, :, 0].contiguous()),
        "loss": outcome(lambda x: TokenLosses.apply(x, labels, share), logits),
    }


def assert_compiled_as_eager_on_the_cpu(device: str, dtype: torch.dtype, *, slack: float) -> None:
    """And that nothing fell back to eager torch, which would be compared with itself; `pays` is to be patched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "pays", lambda x: False)
        wanted = functions("cpu", torch.float32)
    for name, tensors in functions(device, dtype).items():
        for found, exact in zip(tensors, wanted[name], strict=True):
            torch.testing.assert_close(found.float().cpu(), exact, rtol=slack, atol=slack, msg=name)
    parts = (fused._gated, fused._gated_gradient, fused._split, fused._joined, rotary._turned)
    assert all(part.works for part in (*parts, cross_entropy._log_sum, cross_entropy._write_at_once))


@pytest.mark.thorough  # half a minute of compiling
@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_compiled_functions_compute_what_eager_ones_do(
    dtype: torch.dtype, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "pays", lambda x: True)
    assert_compiled_as_eager_on_the_cpu("cpu", dtype, slack=slack)
