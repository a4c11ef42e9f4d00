"""What the ranks do in parity tests."""

from typing import Any

import torch.distributed as dist

from pretrain.config_io import make_run
from pretrain.parity import Trace, record


def record_raw(raw: dict[str, Any], steps: int) -> Trace | None:
    """Trace a run given as plain values, on the ranks that are there."""
    return record(make_run(raw, world_size=dist.get_world_size()), steps)
