"""Native parts that DeepSpeed compiles at first use, tried before the engine needs them.

DeepSpeed's own failures here hide the reason (a missing header ends in an AttributeError of a destructor), so
each part is tried once and its absence told in one line with the way out.
"""

import logging
import os
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from pretrain.config_io import Run
from pretrain.ds_config import ADAM_LIKE, optimizer_is_offloaded
from pretrain.engine.groups import Groups, wait_for_all
from pretrain.engine.native_builds import build_obstacle
from pretrain.engine.quiet import without_stdout
from pretrain.engine.swap_folders import hold_folders
from pretrain.errors import RunError
from pretrain.monitor.heartbeat import Heartbeat
from pretrain.nested import get

log = logging.getLogger(__name__)


def faults(run: Run) -> list[str]:
    """What this machine lacks for the run."""
    if "nvme" in _offload_devices(dict(run.deepspeed)) and not libaio_is_there():
        return [
            "offload to device=nvme: asynchronous I/O needs libaio and its headers: apt-get install libaio-dev "
            "(Debian, Ubuntu), or device=cpu"
        ]
    return []


def libaio_is_there() -> bool:
    """Whether a program with libaio compiles and links."""
    with without_stdout():
        return bool(AsyncIOBuilder().is_compatible(verbose=False))


def prepare_native_parts(document: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Compile what the JSON needs, the first rank of each node for all; every rank calls it.

    Returns the JSON, with torch's Adam in place of DeepSpeed's where that does not build.
    """
    if _offload_devices(document) & {"nvme"}:
        obstacle = _build(AsyncIOBuilder(), groups)
        if obstacle is not None:
            raise RunError(f"offload to device=nvme: DeepSpeed's async_io does not build here: {obstacle}")
        hold_folders(document, groups)
    optimizer = document["optimizer"]
    offloaded_adam = optimizer["type"].lower() in ADAM_LIKE and optimizer_is_offloaded(document)
    if not offloaded_adam or optimizer["params"].get("torch_adam"):
        return document
    obstacle = _build(CPUAdamBuilder(), groups)
    if obstacle is None:
        return document
    if groups.is_first:
        log.warning("DeepSpeed's CPU Adam does not build (%s): torch's Adam does its work, slower", obstacle)
    params = {**optimizer["params"], "torch_adam": True}
    return {**document, "optimizer": {**optimizer, "params": params}}


def _build(builder: OpBuilder, groups: Groups) -> str | None:
    """Compile and load a kernel; the first error on any rank, or None."""
    first_on_node = os.environ.get("LOCAL_RANK", "0") == "0"
    obstacle = None
    for turn in (True, False):
        if first_on_node is turn:
            obstacle = build_obstacle(builder, Heartbeat.of(os.environ).doing)
        wait_for_all()
    return groups.first_told(obstacle)


def _offload_devices(document: dict[str, Any]) -> set[str]:
    sections = ("offload_param", "offload_optimizer")
    return {str(get(document, f"zero_optimization.{section}.device")) for section in sections}
