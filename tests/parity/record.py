"""What the ranks do in parity tests."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

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
