"""Products of quantised matrices: by the hardware's eight-bit units where they take them, else from their exact values.

Both give the same numbers but for the order of sums: a product of two such elements is exact in fp32.
"""

from functools import lru_cache

import torch

from model_providers.fp8.formats import E4M3, E5M2
from model_providers.fp8.native import multiply_blocks
from model_providers.fp8.quantised import Quantised

ALIGNMENT = 16  # elements of a row that CUDA's eight-bit products ask for
EIGHT_BITS = (E4M3.dtype, E5M2.dtype)


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype, *, is_precise: bool = True) -> torch.Tensor:
    """[m k] x [n k] -> [m n]; ``is_precise``: sums in fp32 throughout, which gradients want (Hopper can do less)."""
    if has_kernel(a, b) and dtype != torch.float64:
        return torch._scaled_mm(
            a.payload,
            b.payload.t(),
            scale_a=a.unit,
            scale_b=b.unit,
            out_dtype=dtype,
            use_fast_accum=a.payload.is_cuda and not is_precise,
        )
    blocks = multiply_blocks(a, b, dtype)
    if blocks is not None:
        return blocks
    wide = dtype if a.payload.is_cuda or dtype == torch.float64 else torch.float32
    product = a.values(wide) @ b.values(wide).t()
    return (product * (a.unit * b.unit)).to(dtype)


def has_kernel(a: Quantised, b: Quantised) -> bool:
    """On CUDA from Ada and Hopper on; E5M2 is not multiplied with E5M2; a CPU takes any size."""
    formats = (a.payload.dtype, b.payload.dtype)
    if a.scales is not None or b.scales is not None or formats == (E5M2.dtype, E5M2.dtype):
        return False
    if not set(formats) <= set(EIGHT_BITS):
        return False
    if not a.payload.is_cuda:
        return not cpu_has_slow_products()
    sizes = (*a.payload.shape, *b.payload.shape)
    return all(size % ALIGNMENT == 0 for size in sizes) and torch.cuda.get_device_capability() >= (8, 9)


@lru_cache(maxsize=1)
def cpu_has_slow_products() -> bool:
    """With AMX for integers torch hands such products to oneDNN, whose kernels want AMX for fp16; else it loops over
    single numbers (aten/src/ATen/native/Blas.cpp, `_scaled_mm_out_cpu`).
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_int8") or capabilities.get("amx_tile")) and not capabilities.get(
        "amx_fp16"
    )
