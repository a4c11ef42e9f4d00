"""Linears whose operands have any number of mantissa and exponent bits: what each bit is worth, before hardware has it.

As in "To FP8 and Back Again" (Lee et al. 2024, arXiv:2405.18710), which takes bits away one by one; numbers are rounded
to the nearest here, as the eight-bit formats do it, and short exponents reach down from the operand's largest number,
as they do under scaling by the tensor's own magnitude.
"""

from typing import Any

import torch

from model_providers.fp8.config import Fp8Config
from model_providers.fp8.formats import SMALLEST_EXPONENT
from model_providers.fp8.quantised import Quantised, Sides
from model_providers.fp8.scaling import Operand, Scaling

# Binary orders of normal numbers: E5M2 keeps one exponent for infinities, E4M3 none (arXiv:2209.05433, table 1).
BINADES = {4: 15, 5: 30}
FULL_EXPONENT = 8  # bits: that of fp32 and bf16


def rounded(x: torch.Tensor, *, exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """fp32 in any shape: to the nearest such number, even on ties; below the smallest normal one in even steps."""
    wide = x.float()
    exponents = torch.frexp(wide).exponent - 1  # of 1.m x 2^e
    lowest = SMALLEST_EXPONENT
    if exponent_bits < FULL_EXPONENT and x.numel():
        top = int(torch.frexp(wide.abs().max()).exponent) - 1
        lowest = max(lowest, top - BINADES[exponent_bits] + 1)
    steps = torch.ldexp(torch.ones_like(wide), exponents.clamp(min=lowest) - mantissa_bits)
    return torch.round(wide / steps) * steps


class SimulatedScaling(Scaling):
    """Stands for a linear's scaling; its operands are fp32 numbers that such a format holds."""

    def __init__(self, group: Any, *, cut: frozenset[Operand], exponent_bits: int, mantissa_bits: int):
        super().__init__(Fp8Config(recipe="current"), group, cut=cut)
        self._bits = {"exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits}

    def _sides(self, operand: Operand, x: torch.Tensor, expert: int, *, both: bool) -> Sides:
        rows = Quantised(rounded(x, **self._bits), x.new_ones((), dtype=torch.float32))
        return Sides(rows, rows.transposed() if both else None)
