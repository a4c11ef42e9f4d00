"""The kernels of `one_pass`, in Triton, which is imported where they are first wanted, and may be missing or broken."""

import triton
import triton.language as tl


@triton.jit
def scale_and_turn(
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
def scale_blocks_and_turn(
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
