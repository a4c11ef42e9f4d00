"""Both sides of a matrix in eight bits from one reading of it, on CUDA: kernels in Triton.

A product's columns are its transposed rows, laid out anew, which what torch.compile makes of it writes one byte at a
time (measured on an H100: 1.6 ms for 16384 x 2048, where the product itself takes 1.0).  Here a tile is turned where it
lies.  The scale is reckoned in there too: in eager torch that is two dozen launches for one number, and they, not the
GPU, were what a step waited for.  Bits are those of `quantised.py`, which is the reference, and what runs elsewhere.
"""

import importlib.util

import torch

from model_providers.compiled import pays
from model_providers.fp8.formats import E4M3, Format

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # a torch without CUDA brings none
    triton = None

TILE = 64  # rows and columns of a tile that is only turned
FINE = 128  # numbers that share a scale in `both_sides_in_blocks`


def has_kernels(x: torch.Tensor) -> bool:
    """For a matrix of this size, on this device."""
    return triton is not None and x.dim() == 2 and pays(x)


def both_sides(
    x: torch.Tensor, magnitude: torch.Tensor, form: Format, margin: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[m k], fp32 [] -> eight bits [m k] and [k m], and their unit [], as `formats.unit_of` has it."""
    m, k = x.shape
    rows = torch.empty(m, k, dtype=form.dtype, device=x.device)
    columns = torch.empty(k, m, dtype=form.dtype, device=x.device)
    unit = torch.empty((), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
    strides = (x.stride(0), x.stride(1))
    _scale_and_turn[grid](x, magnitude, rows, columns, unit, m, k, *strides, margin, form.largest, TILE)
    return rows, columns, unit


def both_sides_in_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[m k] -> E4M3 [m k] and its scales [m k/128], then [k m] and [k m/128], scales in fp32; both whole blocks"""
    m, k = x.shape
    rows = torch.empty(m, k, dtype=E4M3.dtype, device=x.device)
    columns = torch.empty(k, m, dtype=E4M3.dtype, device=x.device)
    row_scales = torch.empty(m, k // FINE, dtype=torch.float32, device=x.device)
    column_scales = torch.empty(k, m // FINE, dtype=torch.float32, device=x.device)
    _scale_blocks_and_turn[(m // FINE, k // FINE)](
        x, rows, row_scales, columns, column_scales, m, k, x.stride(0), x.stride(1), E4M3.largest, FINE,
        num_warps=8,
    )  # fmt: skip
    return rows, row_scales, columns, column_scales


if triton is not None:

    @triton.jit
    def _scale_and_turn(
        x, magnitude, rows, columns, unit, m, k, row_stride, column_stride,
        margin: tl.constexpr, largest: tl.constexpr, tile: tl.constexpr,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        one = _unit(tl.load(magnitude).to(tl.int32, bitcast=True) & 0x7FFFFFFF, margin, largest)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(unit, one)
        i = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
        j = (tl.program_id(1) * tile + tl.arange(0, tile)).to(tl.int64)
        there = (i[:, None] < m) & (j[None, :] < k)
        numbers = tl.load(x + i[:, None] * row_stride + j[None, :] * column_stride, mask=there, other=0.0)
        small = _clipped(numbers.to(tl.float32) * _one_over(one), largest).to(rows.dtype.element_ty)
        tl.store(rows + i[:, None] * k + j[None, :], small, mask=there)
        turned = (j[:, None] < k) & (i[None, :] < m)
        tl.store(columns + j[:, None] * m + i[None, :], tl.trans(small), mask=turned)

    @triton.jit
    def _scale_blocks_and_turn(
        x, rows, row_scales, columns, column_scales, m, k, row_stride, column_stride,
        largest: tl.constexpr, size: tl.constexpr,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        top, left = tl.program_id(0), tl.program_id(1)
        i = (top * size + tl.arange(0, size)).to(tl.int64)
        j = (left * size + tl.arange(0, size)).to(tl.int64)
        numbers = tl.load(x + i[:, None] * row_stride + j[None, :] * column_stride).to(tl.float32)
        of_rows = _unit(_peak(numbers, 1), 0, largest)
        of_columns = _unit(_peak(numbers, 0), 0, largest)
        small = _clipped(numbers * _one_over(of_rows)[:, None], largest).to(rows.dtype.element_ty)
        tl.store(rows + i[:, None] * k + j[None, :], small)
        tl.store(row_scales + i * (k // size) + left, of_rows)
        small = _clipped(numbers * _one_over(of_columns)[None, :], largest).to(rows.dtype.element_ty)
        tl.store(columns + j[:, None] * m + i[None, :], tl.trans(small))
        tl.store(column_scales + j * (m // size) + top, of_columns)

    @triton.jit
    def _clipped(numbers, largest: tl.constexpr):  # type: ignore[no-untyped-def]
        return tl.clamp(numbers, -largest, largest, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _peak(numbers, axis: tl.constexpr):  # type: ignore[no-untyped-def]
        """Bits of the largest magnitude: of numbers without a sign they are in the numbers' order, NaN at the end."""
        return tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)

    @triton.jit
    def _unit(bits, margin: tl.constexpr, largest: tl.constexpr):  # type: ignore[no-untyped-def]
        """`formats.unit_of`: ``largest`` is 1.75 times a power of two in both formats."""
        exponents: tl.constexpr = 8 if largest == 448.0 else 15
        field = (bits >> 23) - exponents + margin + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        field = tl.minimum(tl.maximum(field, 1), 253)
        unit = (field << 23).to(tl.float32, bitcast=True)
        unit = tl.where(bits == 0, 1.0, unit)
        return tl.where(bits < 0x7F800000, unit, float("nan"))

    @triton.jit
    def _one_over(unit):  # type: ignore[no-untyped-def]
        bits = unit.to(tl.int32, bitcast=True)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        return tl.where(unit == unit, inverse, float("nan"))
