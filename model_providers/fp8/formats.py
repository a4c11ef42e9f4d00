"""The two eight-bit formats, and the scale with which a tensor fits into one.

E4M3 and E5M2 are those of Micikevicius et al. 2022 (arXiv:2209.05433), table 1.  Scales are powers of two unless said
otherwise: they cost no precision, since a floating-point format is as fine at every exponent, at most one of 15 (or 30)
binary orders of range; products with them are exact; and a sum that comes out differently in its last bit, as another
layout's does, gives the same scale.
"""

import math
from typing import NamedTuple

import torch

# Of normal fp32 numbers, so that one over the unit is one too.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 126
MANTISSA_BITS, BIAS, INFINITE = 23, 127, 0x7F800000  # of fp32


class Format(NamedTuple):
    name: str
    dtype: torch.dtype
    largest: float


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0)


def largest_magnitude(x: torch.Tensor) -> torch.Tensor:
    """Of all elements, fp32 []; NaN if one is."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def unit_of(magnitude: torch.Tensor, largest: float, *, margin: int = 0) -> torch.Tensor:
    """The smallest power of two times which ``largest`` reaches ``magnitude``, fp32 in its shape: what 1 stands for.

    1 where all is zero.  NaN where ``magnitude`` is not finite, so that what overflowed is not clipped in silence.
    Exact in every kernel, compiled ones too, since it only reckons with the bits of exponents.
    """
    mantissa, exponent = math.frexp(largest)  # mantissa in [0.5, 1)
    last_bits = int((2 * mantissa - 1) * 2**MANTISSA_BITS)
    bits = magnitude.float().view(torch.int32) & 0x7FFFFFFF
    exponents = (bits >> MANTISSA_BITS) - BIAS - (exponent - 1) + margin
    exponents = exponents + ((bits & (2**MANTISSA_BITS - 1)) > last_bits).int()
    exponents = exponents.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT)
    unit = ((exponents + BIAS) << MANTISSA_BITS).view(torch.float32)
    unit = torch.where(bits == 0, 1.0, unit)
    return torch.where(bits < INFINITE, unit, torch.nan)


def one_over(unit: torch.Tensor) -> torch.Tensor:
    """Of `unit_of`'s powers of two, and NaN: exact, which a compiled kernel's division need not be."""
    inverse = (((2 * BIAS) << MANTISSA_BITS) - unit.view(torch.int32)).view(torch.float32)
    return torch.where(torch.isnan(unit), torch.nan, inverse)


def cast(x: torch.Tensor, form: Format) -> torch.Tensor:
    """fp32 -> eight bits, to the nearest, even on ties; what is too large becomes the largest, NaN stays.

    torch's own cast makes infinities of what E5M2 cannot hold.
    """
    return x.clamp(-form.largest, form.largest).to(form.dtype)
