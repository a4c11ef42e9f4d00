"""Quantising, held against a slow reference in float64 that knows only the formats' definitions."""

import math

import pytest
import torch

from model_providers.fp8.formats import E4M3, E5M2, Format, cast, largest_magnitude, unit_of
from model_providers.fp8.multiply import multiply
from model_providers.fp8.quantised import quantise_blocks, quantise_whole

EXPONENT_BIAS = {"e4m3": 7, "e5m2": 15}
MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
WIDTHS = pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)


def to_the_nearest(value: float, form: Format) -> float:
    """Of all numbers of the format, half to even; what is too large becomes the largest."""
    if value == 0:
        return 0.0
    lowest = 1 - EXPONENT_BIAS[form.name]
    exponent = max(math.floor(math.log2(abs(value))), lowest)
    step = 2.0 ** (exponent - MANTISSA_BITS[form.name])
    return math.copysign(min(round(abs(value) / step) * step, form.largest), value)


@WIDTHS
def test_a_cast_is_the_nearest_number_of_the_format(form: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 19, (4000,), generator=generator)
    x = torch.randn(4000, generator=generator) * 2.0**exponents
    grid = torch.arange(-64, 65) * 2.0 ** -(
        EXPONENT_BIAS[form.name] + MANTISSA_BITS[form.name]
    )  # and all ties
    x = torch.cat((x, grid / 2, torch.tensor([0.0, -0.0, form.largest, form.largest * 1.1])))
    wanted = torch.tensor([to_the_nearest(value, form) for value in x.tolist()])
    assert torch.equal(cast(x, form).float(), wanted)


def test_what_is_not_finite_is_not_clipped_in_silence() -> None:
    for bad in (math.inf, math.nan):
        x = torch.tensor([[1.0, bad], [2.0, 3.0]])
        for quantised in (
            quantise_whole(x, E4M3, unit_of(largest_magnitude(x), E4M3.largest)),
            quantise_blocks(x, E4M3, (1, 128)),
        ):
            assert not torch.isfinite(quantised.values(torch.float32) * quantised.unit).all()


@WIDTHS
def test_a_unit_is_the_smallest_power_of_two_that_fits(form: Format) -> None:
    magnitudes = torch.tensor([form.largest, form.largest * 1.001, form.largest / 2, 1.0, 3e-20, 7e30])
    units = unit_of(magnitudes, form.largest)
    for magnitude, unit in zip(magnitudes.double().tolist(), units.double().tolist(), strict=True):
        assert math.log2(unit).is_integer()
        assert form.largest * unit / 2 < magnitude <= form.largest * unit
    assert unit_of(torch.zeros(()), form.largest) == 1
    assert unit_of(torch.tensor(1.0), form.largest, margin=2) == 4 * unit_of(torch.tensor(1.0), form.largest)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 5)], ids=str)
def test_blocks_are_quantised_each_by_its_own_scale(block: tuple[int, int], shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x *= 2.0 ** torch.linspace(-12, 12, shape[1])  # as channels differ
    quantised = quantise_blocks(x, E4M3, block)
    wanted = torch.empty(shape, dtype=torch.float64)
    for top in range(0, shape[0], block[0]):
        for left in range(0, shape[1], block[1]):
            part = x[top : top + block[0], left : left + block[1]].double()
            unit = 2.0 ** math.ceil(math.log2(part.abs().max().item() / E4M3.largest))
            rounded = [[to_the_nearest(value / unit, E4M3) * unit for value in row] for row in part.tolist()]
            wanted[top : top + block[0], left : left + block[1]] = torch.tensor(rounded, dtype=torch.float64)
    assert torch.equal(quantised.values(torch.float64), wanted)
    assert torch.equal(quantised.values(torch.bfloat16).double(), wanted), "bf16 holds such numbers exactly"
    assert torch.equal(quantised.transposed().values(torch.float64), wanted.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, (1, 128)], ids=["whole", "blocks"])
def test_a_product_is_that_of_the_exact_values(block: tuple[int, int] | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(size, 300, generator=generator, dtype=dtype) for size in (40, 24))
    if block is None:
        sides = [
            quantise_whole(x, form, unit_of(largest_magnitude(x), form.largest))
            for x, form in ((a, E5M2), (b, E4M3))
        ]
    else:
        sides = [quantise_blocks(x, E4M3, block) for x in (a, b)]
    exact = [side.values(torch.float64) * side.unit.double() for side in sides]
    wanted = exact[0] @ exact[1].t()
    found = multiply(*sides, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=2e-4
    )
