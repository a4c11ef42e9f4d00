"""How long a device multiplies two matrices, by their shapes: in 16 bits or more, and in eight."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from launch.hardware import Device
from model_providers.fp8.config import Fp8Config, Recipe
from pretrain.config import Dtype

# A product is cut into tiles of 256 x 128, the largest that tensor cores of Ampere and Hopper are fed with (NVIDIA,
# "Matrix multiplication background user's guide", section 4); the last wave of tiles is half empty on average.
TILE = (256, 128)
LOST_WAVES = 0.5
# Filling and draining a tile costs about as much as this many steps of its inner dimension.
LOST_DEPTH = 256
MEMORY_SHARE = 0.8  # of the printed bandwidth, as copies reach it
KERNEL_S = 4e-6  # to start a kernel and to let it end
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Of the eight-bit peak, over what 16-bit products of the same shapes reach of theirs: bare products of an MLP of 2048
# and 8192 on an H100, 1.46 and 1.59 times bf16's per tensor, 1.36 and 1.07 in blocks (benchmarks/RESULTS.md).  Others
# were not measured, and are taken for per-tensor ones, whose kernels they share on Blackwell.
FP8_SHARES: dict[Recipe, float] = {
    "delayed": 0.76,
    "current": 0.76,
    "blockwise": 0.61,
    "mxfp8": 0.76,
    "nvfp4": 0.76,
}
FP8_BYTES = 2 + 2 * 1  # of a number that is quantised: read in 16 bit, written by rows and by columns
FP8_WEIGHT_BYTES = 2 + FP8_BYTES  # and its largest magnitude looked for


class Gemm(NamedTuple):
    """``batch`` products of [rows, depth] and [depth, columns]."""

    rows: float
    columns: float
    depth: float
    batch: float = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.depth * self.batch

    def seconds(self, device: Device, peak_flops_per_s: float, bytes_per_value: int) -> float:
        tiles = self.batch * math.ceil(self.rows / TILE[0]) * math.ceil(self.columns / TILE[1])
        waves = tiles / device.num_cores
        depth = self.depth + LOST_DEPTH
        tile_flops = 2.0 * TILE[0] * TILE[1] * depth * device.num_cores
        arithmetic_s = (waves + LOST_WAVES) * tile_flops / (peak_flops_per_s * device.gemm_share)
        values = self.rows * self.depth + self.depth * self.columns + self.rows * self.columns
        memory_s = self.batch * values * bytes_per_value / (device.memory_bytes_per_s * MEMORY_SHARE)
        return max(arithmetic_s, memory_s) + KERNEL_S

    def backward(self) -> tuple["Gemm", "Gemm"]:
        """For the gradients of the left factor (inputs) and of the right one (weights)."""
        rows, columns, depth, batch = self
        return Gemm(rows, depth, columns, batch), Gemm(depth, columns, rows, batch)


def gemm_s(products: Iterable[Gemm], device: Device, dtype: Dtype) -> float:
    """Seconds of all of them, one after the other."""
    peak = device.peak_flops_per_s(dtype)
    return sum(product.seconds(device, peak, BYTES[dtype]) for product in products)


def fp8_gemm_s(products: Iterable[Gemm], device: Device, dtype: Dtype, fp8: Fp8Config) -> float:
    """Bare, of operands that are eight bits wide; as in ``dtype`` where a device has no such products, and by torch,
    whose steps were no faster (benchmarks/RESULTS.md).
    """
    peak = device.fp8_flops_per_s(fp8.recipe) * FP8_SHARES[fp8.recipe]
    if not peak or fp8.backend == "torch":
        return gemm_s(products, device, dtype)
    return sum(product.seconds(device, peak, 1) for product in products)


def quantised_bytes(products: Iterable[Gemm], dtype: Dtype, fp8: Fp8Config) -> tuple[float, float]:
    """That quantising inputs moves, and gradients of outputs, by rows and by columns."""
    size = FP8_BYTES + (
        BYTES[dtype] if fp8.recipe == "current" else 0
    )  # which looks for the largest number first
    shapes = [(product.rows * product.depth, product.rows * product.columns) for product in products]
    return size * sum(inputs for inputs, _ in shapes), size * sum(outputs for _, outputs in shapes)
