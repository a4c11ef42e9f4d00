"""A matrix in eight bits with its scales, made from one in full precision.

One unit for the whole matrix (delayed and current scaling), or a scale for each block: 1x128 and 128x128 as in
DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), 1x32 with a power of two as in MXFP8 (OCP Microscaling Formats 1.0,
section 5; rounded up, so that nothing is clipped: Mishra et al. 2025, arXiv:2506.08027).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model_providers.compiled import compiled_on_cuda
from model_providers.fp8 import one_pass
from model_providers.fp8.formats import E4M3, Format, cast, one_over, unit_of

POWERS_OF_TWO = torch.float8_e8m0fnu  # exponents alone, and NaN: MXFP8's own format of scales


class Quantised(NamedTuple):
    """[m k]: an element is payload x its block's scale x unit."""

    payload: torch.Tensor  # [m k], eight bits
    unit: torch.Tensor  # [], fp32
    scales: torch.Tensor | None = None  # [m/r k/c] rounded up, eight bits: of each block of r x c
    block: tuple[int, int] | None = None

    @property
    def wide_scales(self) -> torch.Tensor:
        """fp32, [m/r k/c]; torch does not reckon in their own format."""
        assert self.scales is not None
        return self.scales.float()

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """[m k], but for the unit; exact in bf16 too, whose exponents reach as far as fp32's."""
        wide = self.payload.to(dtype)
        if self.scales is None:
            return wide
        assert self.block is not None
        return wide.mul_(spread(self.wide_scales.to(dtype), self.block, wide.shape))

    def first(self, rows: int | None) -> "Quantised":
        """[rows k], of one with whole blocks or blocks of one row; None: all."""
        if rows is None or rows == len(self.payload):
            return self
        tall = 1 if self.block is None else self.block[0]
        scales = None if self.scales is None else self.scales[: -(-rows // tall)]
        return self._replace(payload=self.payload[:rows], scales=scales)

    def transposed(self) -> "Quantised":
        """[k m], laid out anew."""
        scales = None if self.scales is None else self.scales.t().contiguous()
        block = None if self.block is None else (self.block[1], self.block[0])
        return Quantised(self.payload.t().contiguous(), self.unit, scales, block)


class Sides(NamedTuple):
    """One matrix [m k] as the two products need it: summed over its columns' index, and over its rows'."""

    rows: Quantised  # [m k]
    columns: Quantised | None  # [k m]


def quantise_whole(x: torch.Tensor, form: Format, unit: torch.Tensor) -> Quantised:
    """[m k] with one unit, [], a power of two."""
    return Quantised(_scaled(x.detach(), one_over(unit), form), unit)


def whole_sides(
    x: torch.Tensor, form: Format, magnitude: torch.Tensor, *, margin: int = 0, both: bool
) -> Sides:
    """The same with the unit for a largest magnitude, [], and if wanted its columns."""
    if both and one_pass.has_kernels(x):
        payload, turned, unit = one_pass.both_sides(x.detach(), magnitude, form, margin)
        return Sides(Quantised(payload, unit), Quantised(turned, unit))
    rows = quantise_whole(x, form, unit_of(magnitude, form.largest, margin=margin))
    return Sides(rows, rows.transposed() if both else None)


@compiled_on_cuda
def _scaled(x: torch.Tensor, inverse: torch.Tensor, form: Format) -> torch.Tensor:
    return cast(x.float() * inverse, form)


def fine_sides(x: torch.Tensor, size: int, *, both: bool) -> Sides:
    """[m k] in E4M3 with a scale for each ``size`` numbers of a row, of the columns' rows too."""
    is_whole = size == one_pass.FINE and x.shape[0] % size == 0 and x.shape[1] % size == 0
    if both and is_whole and one_pass.has_kernels(x):
        parts = one_pass.both_sides_in_blocks(x.detach())
        unit = x.new_ones((), dtype=torch.float32)
        rows, columns = (
            Quantised(payload, unit, scales.to(POWERS_OF_TWO), (1, size))
            for payload, scales in (parts[:2], parts[2:])
        )
        return Sides(rows, columns)
    columns_too = quantise_blocks(x.t(), E4M3, (1, size)) if both else None
    return Sides(quantise_blocks(x, E4M3, (1, size)), columns_too)


def quantise_blocks(x: torch.Tensor, form: Format, block: tuple[int, int]) -> Quantised:
    """[m k] with a power of two for each block; those at the edges may be smaller."""
    payload, scales = _scaled_blocks(in_blocks(x.detach(), block), form)
    whole = out_of_blocks(payload, x.shape)
    return Quantised(whole, x.new_ones((), dtype=torch.float32), scales.to(POWERS_OF_TWO), block)


@compiled_on_cuda
def _scaled_blocks(blocks: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """[m/r r k/c c] -> eight bits in the same shape, its first two and last two next to each other; fp32 [m/r k/c]"""
    wide = blocks.float()
    scales = unit_of(wide.abs().amax(dim=(1, 3)), form.largest)
    return cast(wide * one_over(scales)[:, None, :, None], form).contiguous(), scales


def in_blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[m k] -> [m/r r k/c c], filled up with zeros"""
    r, c = block
    m, k = x.shape
    if m % r or k % c:
        x = F.pad(x, (0, -k % c, 0, -m % r))
    return x.view(-(-m // r), r, -(-k // c), c)


def out_of_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[m/r r k/c c] -> [m k]"""
    whole = blocks.flatten(2, 3).flatten(0, 1)
    # Of a transposed matrix too: products ask for rows in memory.
    return whole[: shape[0], : shape[1]].contiguous()


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """[m/r k/c] -> [m k]"""
    tall = scales if block[0] == 1 else scales.repeat_interleave(block[0], dim=0)[: shape[0]]
    return tall.repeat_interleave(block[1], dim=1)[:, : shape[1]]
