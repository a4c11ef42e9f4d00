"""Tests that need CUDA.  Transformer Engine would round fp32 factors to TF32, which cuBLAS is told not to."""

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # before torch loads cuBLAS
