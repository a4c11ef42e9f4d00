"""Both sides of a matrix in eight bits from one reading of it, on CUDA: kernels in Triton.

A product's columns are its transposed rows, laid out anew, which what torch.compile makes of it writes one byte at a
time (measured on an H100: 1.6 ms for 16384 x 2048, where the product itself takes 1.0).  Here a tile is turned where it
lies.  The scale is reckoned in there too: in eager torch that is two dozen launches for one number, and they, not the
GPU, were what a step waited for.  Bits are those of `quantised.py`, which is the reference, and what runs elsewhere.
"""

import logging
from functools import lru_cache

import torch

from model_providers.fp8.formats import E4M3, Format, cast, largest_magnitude, one_over, unit_of

logger = logging.getLogger(__name__)

TILE = 64  # rows and columns of a tile that is only turned
FINE = 128  # numbers that share a scale in `both_sides_in_blocks`
WORTH_IT = 2**14  # numbers
HAS_EIGHT_BITS = (8, 9)  # Ada and Hopper: the first devices that convert to them


def has_kernels(x: torch.Tensor) -> bool:
    """For a matrix of this size, on this device."""
    return x.is_cuda and x.dim() == 2 and x.numel() >= WORTH_IT and is_trusted(x.device)


@lru_cache(maxsize=64)
def is_trusted(device: torch.device) -> bool:
    """Whether the kernels run there and make the same bits; tried once, and told once if not."""
    if torch.cuda.get_device_capability(device) < HAS_EIGHT_BITS:
        return False
    x = torch.randn(FINE, FINE, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    magnitude = largest_magnitude(x)
    try:
        rows, _, unit = both_sides(x, magnitude, E4M3, 0)
        both_sides_in_blocks(x)
    except (
        Exception
    ) as error:  # no compiler, no Triton, or one that does not know the device: they fail in any way
        reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
        logger.warning("eight-bit operands are made the slow way on %s: %s", device, reason)
        return False
    wanted = cast(x.float() * one_over(unit_of(magnitude, E4M3.largest)), E4M3)
    is_same = torch.equal(rows.view(torch.uint8), wanted.view(torch.uint8)) and bool(
        unit == unit_of(magnitude, E4M3.largest)
    )
    if not is_same:
        logger.warning("eight-bit operands are made the slow way on %s: its kernel rounds otherwise", device)
    return is_same


def both_sides(
    x: torch.Tensor, magnitude: torch.Tensor, form: Format, margin: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[m k], fp32 [] -> eight bits [m k] and [k m], and their unit [], as `formats.unit_of` has it."""
    from model_providers.fp8.triton_kernels import scale_and_turn

    m, k = x.shape
    rows = torch.empty(m, k, dtype=form.dtype, device=x.device)
    columns = torch.empty(k, m, dtype=form.dtype, device=x.device)
    unit = torch.empty((), dtype=torch.float32, device=x.device)
    grid = (-(-m // TILE), -(-k // TILE))
    strides = (x.stride(0), x.stride(1))
    scale_and_turn[grid](x, magnitude, rows, columns, unit, m, k, *strides, margin, form.largest, TILE)
    return rows, columns, unit


def both_sides_in_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[m k] -> E4M3 [m k] and its scales [m k/128], then [k m] and [k m/128], scales in fp32; both whole blocks"""
    from model_providers.fp8.triton_kernels import scale_blocks_and_turn

    m, k = x.shape
    rows = torch.empty(m, k, dtype=E4M3.dtype, device=x.device)
    columns = torch.empty(k, m, dtype=E4M3.dtype, device=x.device)
    row_scales = torch.empty(m, k // FINE, dtype=torch.float32, device=x.device)
    column_scales = torch.empty(k, m // FINE, dtype=torch.float32, device=x.device)
    tensors = (x, rows, row_scales, columns, column_scales)
    grid = (m // FINE, k // FINE)
    scale_blocks_and_turn[grid](*tensors, m, k, x.stride(0), x.stride(1), E4M3.largest, FINE, num_warps=8)
    return rows, row_scales, columns, column_scales
