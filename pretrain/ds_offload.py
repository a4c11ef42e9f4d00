"""What DeepSpeed's JSON says of offload, and the values that follow from the model's largest parameter.

DeepSpeed's defaults for NVMe are for models far larger than the CPU's memory, and below that they are not offload at
all: a thousand million parameters stay in memory (``max_in_cpu``), and a layer that is used again within as many stays
gathered, in a swap buffer, of which there are five (``stage3_max_reuse_distance``; then "Not enough swap in buffers").
So whatever goes to NVMe goes there wholly here, unless the JSON says otherwise.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

from pretrain.nested import get

AUTO = "auto"
Place = Literal["none", "cpu", "nvme"]
Section = Literal["offload_optimizer", "offload_param"]

ADAM_BUFFERS = 4  # of a sub-group: weights, gradients, two moments (deepspeed/runtime/zero/offload_config.py)
PARAMETER_BUFFERS = 5
SUB_GROUPS_OF_THE_LARGEST = (
    8  # a sub-group ends with the parameter that fills it: this much over the largest one
)
WHOLE_SUB_GROUP, LARGE_BUFFER = 1_000_000_000, 100_000_000  # DeepSpeed's defaults


class Sizes(Protocol):
    """Of `ds_config.Facts`, what offload goes by."""

    @property
    def nvme_path(self) -> str | None: ...

    @property
    def largest_shard(self) -> int: ...


def offload_place(document: Mapping[str, Any], section: Section) -> Place:
    """Where optimizer states or parameters live."""
    return cast(Place, get(dict(document), f"zero_optimization.{section}.device") or "none")


def offload_ratio(document: Mapping[str, Any]) -> float:
    """The share of optimizer states that is offloaded, where they are (ZeRO-Offload++)."""
    if offload_place(document, "offload_optimizer") == "none":
        return 0.0
    ratio = get(dict(document), "zero_optimization.offload_optimizer.ratio")
    return 1.0 if ratio is None else float(ratio)


def offload_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Of what a user wrote: places that are none, shares that are no shares."""
    zero = document.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        section = _section(zero, name) if isinstance(zero, dict) else {}
        device = section.get("device")
        if device not in (None, *get_args(Place)):
            yield f"zero_optimization.{name}.device={device}: choose none, cpu or nvme"
        ratio = section.get("ratio")
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if ratio is not None and not (is_number and 0 <= ratio <= 1):
            yield f"zero_optimization.{name}.ratio={ratio}: must be a share between 0 and 1"


class SwapBuffers(NamedTuple):
    """In the CPU's memory, for states and parameters on their way to NVMe and back."""

    sub_group: int  # elements of the largest sub-group at most
    optimizer_buffers: int
    parameter: int  # elements of a buffer
    parameter_buffers: int


def swap_buffers(document: Mapping[str, Any], largest_shard: int) -> SwapBuffers | None:
    """Of a complete JSON; None without NVMe."""
    zero = document["zero_optimization"]
    optimizer, parameters = (_section(zero, name) for name in ("offload_optimizer", "offload_param"))
    if "nvme" not in (optimizer.get("device"), parameters.get("device")):
        return None
    return SwapBuffers(
        sub_group=int(zero.get("sub_group_size", WHOLE_SUB_GROUP)) + largest_shard,
        optimizer_buffers=int(optimizer.get("buffer_count", ADAM_BUFFERS)),
        parameter=int(parameters.get("buffer_size", LARGE_BUFFER)),
        parameter_buffers=int(parameters.get("buffer_count", PARAMETER_BUFFERS)),
    )


def usual_swap_buffers(largest_shard: int) -> SwapBuffers:
    """Of ds_configs/zero3_nvme_offload.json."""
    sub_group = largest_shard + largest_shard // SUB_GROUPS_OF_THE_LARGEST
    return SwapBuffers(sub_group, 3 * ADAM_BUFFERS, largest_shard, PARAMETER_BUFFERS)


def fill_offload(zero: dict[str, Any], sizes: Sizes) -> None:
    """Fill "auto" and what is better not left to DeepSpeed, in a ``zero_optimization`` section."""
    optimizer, parameters = (_section(zero, name) for name in ("offload_optimizer", "offload_param"))
    for section in (optimizer, parameters):
        if section.get("device") == "nvme" and sizes.nvme_path is not None and _is_open(section, "nvme_path"):
            section["nvme_path"] = sizes.nvme_path
    if zero.get("sub_group_size") == AUTO:
        zero["sub_group_size"] = _sub_group(optimizer, sizes)
    if optimizer.get("device") == "nvme" and _is_open(optimizer, "buffer_count"):
        optimizer["buffer_count"] = buffers_needed(optimizer)
    if parameters.get("buffer_size") == AUTO:
        parameters["buffer_size"] = sizes.largest_shard
        if optimizer.get("fast_init"):
            parameters["buffer_size"] += int(zero.get("sub_group_size", WHOLE_SUB_GROUP))
    if parameters.get("device") == "nvme":
        parameters["max_in_cpu"] = 0 if _is_open(parameters, "max_in_cpu") else parameters["max_in_cpu"]
        if _is_open(zero, "stage3_max_reuse_distance") and "max_reuse_distance" not in zero:
            zero["stage3_max_reuse_distance"] = 0


def buffers_needed(optimizer: Mapping[str, Any]) -> int:
    """Of a sub-group's size each, for Adam: those at work, read ahead and being written
    (deepspeed/runtime/swap_tensor/pipelined_optimizer_swapper.py).
    """
    at_once = 1 + bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write"))
    return ADAM_BUFFERS * at_once


def _sub_group(optimizer: Mapping[str, Any], sizes: Sizes) -> int:
    """Elements. Small ones are small buffers on the way to NVMe, and let a ratio be met; else there is one group."""
    ratio = optimizer.get("ratio")
    is_in_parts = optimizer.get("device") == "nvme" or (ratio is not None and ratio < 1)
    return max(1, sizes.largest_shard // SUB_GROUPS_OF_THE_LARGEST) if is_in_parts else WHOLE_SUB_GROUP


def _section(zero: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = zero.get(name)
    return found if isinstance(found, dict) else {}


def _is_open(section: Mapping[str, Any], key: str) -> bool:
    return section.get(key) in (None, AUTO)
