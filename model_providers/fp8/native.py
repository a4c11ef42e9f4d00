"""CUDA's products of matrices with a scale for each block, where they run and agree with the emulated ones.

Scales as `aten/src/ATen/native/cuda/ScaledBlas.cpp` of torch 2.11 to 2.13 wants them: 1x128 along rows, fp32 [m k/128]
with rows next to each other; 128x128, fp32 [k/128 n/128] with the first size rounded up to 4 and dense; 1x32, powers of
two in eight bits, in tiles of 128x4 (cuBLAS, "1D Block Scaling Factors Layout").  Which devices have them is left to a
trial: a small product is made once on each, and they are used from then on if it is right.
"""

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model_providers.fp8.formats import E4M3
from model_providers.fp8.quantised import Quantised, quantise_blocks

logger = logging.getLogger(__name__)

Block = tuple[int, int]
FINE, SQUARE, MICRO = (1, 128), (128, 128), (1, 32)
PAIRS = {(FINE, SQUARE), (FINE, FINE), (MICRO, MICRO)}  # of the blocks of a [m k] and b [n k]
TRIAL = (128, 384, 256)  # m, k, n: three blocks of k, which is rounded up to four
AGREES = 2e-2  # largest difference over the largest element: bf16's and Hopper's sums


class Shape(NamedTuple):
    """What decides whether a product is CUDA's."""

    m: int
    k: int
    n: int

    def fits(self, block: Block) -> bool:
        """Whole blocks along k, and rows and columns in multiples of 16."""
        return self.k % max(block[1], 16) == 0 and self.m % 16 == 0 and self.n % 16 == 0


def multiply_blocks(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor | None:
    """[m k] x [n k] -> [m n], or None where it has to be emulated."""
    if a.block is None or b.block is None or (a.block, b.block) not in PAIRS or not a.payload.is_cuda:
        return None
    (m, k), (n, _) = a.payload.shape, b.payload.shape
    shape = Shape(m, k, n)
    if not shape.fits(a.block) or not is_trusted(a.payload.device, a.block, b.block, dtype):
        return None
    return scaled_product(a, b, dtype)


def scaled_product(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """By `torch.nn.functional.scaled_mm`; units of blocked operands are 1."""
    assert a.block is not None and b.block is not None
    kinds = {
        FINE: F.ScalingType.BlockWise1x128,
        SQUARE: F.ScalingType.BlockWise128x128,
        MICRO: F.ScalingType.BlockWise1x32,
    }
    swizzle = F.SwizzleType.SWIZZLE_32_4_4 if a.block == MICRO else F.SwizzleType.NO_SWIZZLE
    return F.scaled_mm(
        a.payload,
        b.payload.t(),
        scale_a=laid_out(a),
        scale_recipe_a=kinds[a.block],
        scale_b=laid_out(b),
        scale_recipe_b=kinds[b.block],
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=dtype,
    )


def laid_out(x: Quantised) -> torch.Tensor:
    """The scales [m/r k/c] in the order of the kernel for their block."""
    assert x.scales is not None
    if x.block == MICRO:
        return in_tiles(x.scales)
    wide = x.wide_scales
    if x.block == SQUARE:
        return F.pad(wide, (0, -wide.shape[1] % 4)).t()  # [k/128 n/128], k's next to each other
    return wide.t().contiguous().t()  # [m k/128], m's next to each other


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """[m k/32] -> flat: tiles of 128 rows and 4 columns, in which rows r, r + 32, r + 64 and r + 96 lie together."""
    rows, columns = scales.shape
    bits = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = bits.view(bits.shape[0] // 128, 4, 32, bits.shape[1] // 4, 4)  # [tile 32s row tile column]
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(torch.float8_e8m0fnu).flatten()


@lru_cache(maxsize=64)
def is_trusted(device: torch.device, a: Block, b: Block, dtype: torch.dtype) -> bool:
    """Whether the device's product of such blocks runs and agrees; tried once, and told once if not."""
    m, k, n = TRIAL
    ours, theirs = (_drawn(rows, k, block, device) for rows, block in ((m, a), (n, b)))
    wanted = ours.values(torch.float32) @ theirs.values(torch.float32).t()
    try:
        found = scaled_product(ours, theirs, dtype).float()
        off = float((found - wanted).abs().max() / wanted.abs().max())
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # no such kernel: hardware, CUDA or torch
        reason = str(error).splitlines()[0]
    else:
        if off <= AGREES:
            return True
        reason = f"its product is off by {off:.1%}"
    logger.info("fp8 products of %dx%d and %dx%d blocks are emulated on %s: %s", *a, *b, device, reason)
    return False


def _drawn(rows: int, k: int, block: Block, device: torch.device) -> Quantised:
    """Numbers whose blocks differ in magnitude, so that no order of scales is like another."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator)
    x *= torch.linspace(1.0, 64.0, rows)[:, None] * torch.linspace(1.0, 8.0, k)[None]
    return quantise_blocks(x.to(device), E4M3, block)
