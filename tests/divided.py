"""A partly offloaded optimizer where there is no device but the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pretrain import run as run_module
from pretrain.engine.zero import ZeroEngine, build_zero_engine

HALF = {
    "zero_optimization": {
        "stage": 3,
        "sub_group_size": "auto",
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
    }
}


@contextmanager
def two_devices() -> Iterator[list[Any]]:
    """Half of the sub-groups are said to be on another device, for DeepSpeed's second optimizer to step: it is in the
    list when an engine was built.
    """
    seconds: list[Any] = []

    def build(*arguments: Any, **named: Any) -> ZeroEngine:
        engine = build_zero_engine(*arguments, **named)
        optimizer = engine.deepspeed.optimizer
        number = len(optimizer.subgroup_to_device)
        optimizer.subgroup_to_device |= dict.fromkeys(range(number // 2), "another")
        seconds.append(optimizer.backup_optimizer)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_zero_engine", build)
        yield seconds
