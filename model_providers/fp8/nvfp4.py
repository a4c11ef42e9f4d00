"""NVFP4 emulated: four-bit numbers with two levels of scales, rotated and rounded as its paper says.

"Pretraining Large Language Models with NVFP4" (NVIDIA 2025, arXiv:2509.25149), section 2 and 4: E2M1 elements, an E4M3
scale for each 16 and one fp32 scale for all; weights in squares of 16x16, so that they are the same numbers in the
forward and the backward pass; gradients rounded at random, which is right on average; both operands of a weight's
gradient rotated by random Hadamard matrices of 16, which spreads outliers and cancels in the product.

The payload lies in E4M3, which holds every E2M1 number: nothing is saved in memory here, and no four-bit kernel runs.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from model_providers.fp8.formats import E4M3, cast
from model_providers.fp8.quantised import Quantised, in_blocks, out_of_blocks

BLOCK = 16
LARGEST = 6.0  # of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6
SIGNS_SEED = 20250929  # the signs are drawn once and for all (section 4.2)


def unit_of_whole(magnitude: torch.Tensor) -> torch.Tensor:
    """The fp32 scale [] with which the largest block's own scale is E4M3's largest; NaN where it is not finite."""
    unit = torch.where(magnitude == 0, 1.0, magnitude / (LARGEST * E4M3.largest))
    return torch.where(torch.isfinite(magnitude), unit, torch.nan)


def quantise_nvfp4(
    x: torch.Tensor, unit: torch.Tensor, block: tuple[int, int], generator: torch.Generator | None = None
) -> Quantised:
    """[m k] with blocks of 1x16 or 16x16; rounded at random where there is a generator, else to the nearest."""
    blocks = in_blocks(x.float() / unit, block)  # [m/r r k/c c]
    scales = cast(blocks.abs().amax(dim=(1, 3)) / LARGEST, E4M3).float()  # [m/r k/c]
    divisor = torch.where(scales == 0, 1.0, scales)[:, None, :, None]
    payload = round_e2m1(blocks / divisor, generator)
    payload = torch.where(scales[:, None, :, None] == 0, payload * 0, payload)
    return Quantised(out_of_blocks(payload.to(E4M3.dtype), x.shape), unit, scales, block)


def round_e2m1(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """fp32 -> fp32 numbers of E2M1; with a generator up or down at random, so that the mean is x."""
    size = x.abs().clamp(max=LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    if generator is None:
        steps = torch.round(size / step)  # half to even, which is half to an even last bit
    else:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        steps = torch.floor(size / step + noise)
    return torch.copysign(steps * step, x)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """[m t] -> [m t up to a whole 16], fp32: each 16 numbers of a row by the same orthogonal matrix.

    (x R)(y R)^T = x y^T: the rotation of both operands cancels in their product.
    """
    filled = F.pad(x.float(), (0, -x.size(1) % BLOCK))
    turned = filled.unflatten(1, (-1, BLOCK)) @ rotation(x.device)
    return turned.flatten(1, 2)


@lru_cache(maxsize=8)
def rotation(device: torch.device) -> torch.Tensor:
    """[16 16]: random signs, then Hadamard's matrix in Sylvester's order, of length one."""
    matrix = torch.ones(1, 1)
    while matrix.size(0) < BLOCK:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    draws = torch.randint(0, 2, (BLOCK, 1), generator=torch.Generator().manual_seed(SIGNS_SEED))
    return ((2 * draws - 1) * matrix / BLOCK**0.5).to(device)
