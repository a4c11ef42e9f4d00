"""What the ranks do in parity tests."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import original_muon

from pretrain import run
from pretrain.config_io import make_run
from pretrain.parity import Trace, record


def record_raw(raw: dict[str, Any], steps: int) -> Trace | None:
    """Trace a run given as plain values, on the ranks that are there."""
    return record(make_run(raw, world_size=dist.get_world_size()), steps)


def record_fp64(raw: dict[str, Any], steps: int) -> Trace | None:
    """The same with weights and activations in fp64, which users cannot ask for.

    ZeRO keeps master weights, and sums of gradients over micro-batches, in fp32.
    """
    with patch.dict(run.DTYPES, fp32=torch.float64):
        return record_raw(raw, steps)


def record_muon(raw: dict[str, Any], steps: int) -> Trace | None:
    """The same with DeepSpeed's Muon as on devices without 16-bit formats: it orthogonalises in fp32 there.

    In fp16 or bf16 (`ns_compute_dtype`, by device) a gradient's last bit moves an update by one in 2048 or 256.
    """
    with patch.object(original_muon, "ns_compute_dtype", lambda method="gram": torch.float32):
        return record_raw(raw, steps)
