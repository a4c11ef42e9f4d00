"""Fewer bits are those of the formats that exist, where one exists."""

import itertools

import pytest
import torch

from model_providers.building import solo_groups
from model_providers.fp8.simulated import SimulatedScaling, rounded


def numbers() -> torch.Tensor:
    chance = torch.Generator().manual_seed(3)
    spread = torch.randn(64, 48, generator=chance) * torch.exp(4 * torch.randn(64, 48, generator=chance))
    return torch.cat((spread, torch.zeros(1, 48)))


def test_eight_and_seven_bits_are_bf16() -> None:
    x = numbers()
    assert torch.equal(rounded(x, exponent_bits=8, mantissa_bits=7), x.bfloat16().float())


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits", "dtype", "largest"),
    [(4, 3, torch.float8_e4m3fn, 448.0), (5, 2, torch.float8_e5m2, 57344.0)],
)
def test_short_exponents_are_those_of_eight_bit_formats(
    exponent_bits: int, mantissa_bits: int, dtype: torch.dtype, largest: float
) -> None:
    """Zero comes where it comes there, and so does every step between the smallest numbers."""
    x = numbers()
    x = x / x.abs().max() * largest
    bits = {"exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits}
    wanted = x.to(dtype).float()
    assert torch.equal(rounded(x, **bits), wanted)
    assert int((wanted == 0).sum()) > 48
    assert torch.equal(rounded(x * 2.0**-60, **bits), wanted * 2.0**-60), "the scale is the tensor's own"


def test_every_bit_less_doubles_the_error() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    errors = [
        float((rounded(x, exponent_bits=8, mantissa_bits=m) - x).norm() / x.norm()) for m in range(7, 0, -1)
    ]
    for better, worse in itertools.pairwise(errors):
        assert 1.5 < worse / better < 2.7


def test_a_linear_takes_it_for_its_scaling() -> None:
    x = numbers()
    scaling = SimulatedScaling(solo_groups().tp, cut=frozenset(), exponent_bits=8, mantissa_bits=2)
    sides = scaling.input(x, both=True, is_trained=True)
    assert torch.equal(sides.rows.values(torch.float32), rounded(x, exponent_bits=8, mantissa_bits=2))
    assert sides.columns is not None and torch.equal(sides.columns.payload, sides.rows.payload.t())
