"""Native parts that DeepSpeed compiles at first use, tried before the engine needs them.

DeepSpeed's own failures here hide the reason (a missing header ends in an AttributeError of a destructor), so
each part is tried once and its absence told in one line with the way out.
"""

import logging
import re
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

from pretrain.config_io import Run
from pretrain.ds_config import ADAM_LIKE, get, optimizer_is_offloaded

log = logging.getLogger(__name__)


def faults(run: Run) -> list[str]:
    """What this machine lacks for the run."""
    document = dict(run.deepspeed)
    on_nvme = [
        f"zero_optimization.{section}.device=nvme"
        for section in ("offload_param", "offload_optimizer")
        if get(document, f"zero_optimization.{section}.device") == "nvme"
    ]
    if on_nvme and not AsyncIOBuilder().is_compatible(verbose=False):
        return [
            f"{on_nvme[0]}: asynchronous I/O needs the headers of libaio: install Debian's libaio-dev (apt "
            "install libaio-dev)"
        ]
    return []


def with_working_optimizer(document: dict[str, Any]) -> dict[str, Any]:
    """The JSON as it is if DeepSpeed's CPU Adam can be built here, else with torch's AdamW in its place."""
    optimizer = document["optimizer"]
    offloaded_adam = optimizer["type"].lower() in ADAM_LIKE and optimizer_is_offloaded(document)
    if not offloaded_adam or optimizer["params"].get("torch_adam"):
        return document
    obstacle = cpu_adam_obstacle()
    if obstacle is None:
        return document
    log.warning(
        "DeepSpeed's CPU Adam does not build here (%s); torch's %s does its work, slower",
        obstacle,
        optimizer["type"],
    )
    params = {**optimizer["params"], "torch_adam": True}
    return {**document, "optimizer": {**optimizer, "params": params}}


def cpu_adam_obstacle() -> str | None:
    """The compiler's first error, or None when the kernel is built and loaded."""
    try:
        CPUAdamBuilder().load(verbose=False)
    except (
        Exception
    ) as failure:  # a build fails in any way it likes: no compiler, no ninja, a header, a linker
        return first_error(f"{failure}")
    return None


def first_error(output: str) -> str:
    """The first line of a build's output that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [
        line
        for line in lines
        if re.search(r"\b(fatal )?error\b|not found|No such file|required", line, re.IGNORECASE)
    ]
    return (named or lines[-1:] or ["no output"])[0]
