"""What goes with offload: rules of `config_rules`, kept apart for their number.

DeepSpeed takes most of these keys anywhere and uses them in one place; what would do nothing is refused.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.ds_config import ADAM_LIKE, optimizer_is_offloaded
from pretrain.ds_offload import Section, buffers_needed, offload_place, offload_ratio
from pretrain.nested import get
from pretrain.optimizer_rules import Rule

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run

SECTIONS: tuple[Section, Section] = ("offload_param", "offload_optimizer")
FEWEST_SUB_GROUPS = 10  # a ratio is met to a tenth then


def optimizer_offload_needs_zero(run: "Run") -> str | None:
    if optimizer_is_offloaded(dict(run.deepspeed)) and run.zero_stage == 0:
        return "zero_optimization.offload_optimizer with stage=0: DeepSpeed offloads in stages 1, 2 and 3; use stage 1"
    return None


def optimizer_nvme_needs_zero_3(run: "Run") -> str | None:
    if offload_place(run.deepspeed, "offload_optimizer") == "nvme" and run.zero_stage < 3:
        return (
            f"zero_optimization.offload_optimizer.device=nvme with stage={run.zero_stage}: DeepSpeed swaps "
            "to NVMe in stage 3 only and would keep everything in memory; use stage 3 (pp=1), or device=cpu"
        )
    return None


def parameter_offload_needs_zero_3(run: "Run") -> str | None:
    device = offload_place(run.deepspeed, "offload_param")
    if device != "none" and run.zero_stage < 3:
        return (
            f"zero_optimization.offload_param.device={device} with stage={run.zero_stage}: only stage 3 "
            "splits parameters; use stage 3 (pp=1), or leave offload_param out"
        )
    return None


def nvme_needs_a_folder(run: "Run") -> str | None:
    for section in SECTIONS:
        if offload_place(run.deepspeed, section) != "nvme":
            continue
        path = get(dict(run.deepspeed), f"zero_optimization.{section}.nvme_path")
        if path is None:
            return f"zero_optimization.{section}.device=nvme needs a folder: set nvme_path=/folder/on/a/local/disk"
        if not Path(path).is_dir():
            return f"nvme_path={path}: no such folder; make it on a local disk (mkdir -p {path})"
    return None


def nvme_buffers_hold_the_largest_parameter(run: "Run") -> str | None:
    size = get(dict(run.deepspeed), "zero_optimization.offload_param.buffer_size")
    if (
        offload_place(run.deepspeed, "offload_param") == "nvme"
        and size is not None
        and size < run.largest_shard
    ):
        return (
            f"zero_optimization.offload_param.buffer_size={size}: the largest parameter's shard has "
            f'{run.largest_shard} elements; use at least that, or "auto"'
        )
    return None


def swap_buffers_suffice(run: "Run") -> str | None:
    optimizer = _section(run, "offload_optimizer")
    needed = buffers_needed(optimizer)
    if optimizer.get("device") == "nvme" and optimizer.get("buffer_count", needed) < needed:
        ahead = [key for key in ("pipeline_read", "pipeline_write") if optimizer.get(key)]
        return (
            f"zero_optimization.offload_optimizer.buffer_count={optimizer['buffer_count']}"
            f"{' with ' + ' and '.join(ahead) if ahead else ''}: DeepSpeed runs out of swap buffers in its first step; "
            f'use {needed} or more, or "auto"'
        )
    return None


def swapping_keys_need_nvme(run: "Run") -> str | None:
    optimizer = _section(run, "offload_optimizer")
    idle = [key for key in ("pipeline_read", "pipeline_write", "fast_init") if optimizer.get(key)]
    if idle and optimizer.get("device") != "nvme":
        return (
            f"zero_optimization.offload_optimizer.{idle[0]}=true with device={optimizer.get('device', 'none')}: it "
            "is for swapping to NVMe and would do nothing; leave it out, or use device=nvme"
        )
    return None


def fast_init_has_buffers(run: "Run") -> str | None:
    """It reads whole sub-groups of parameters into the parameters' buffers."""
    zero = run.deepspeed["zero_optimization"]
    optimizer, parameters = (_section(run, name) for name in ("offload_optimizer", "offload_param"))
    if not (optimizer.get("fast_init") and optimizer.get("device") == "nvme"):
        return None
    if parameters.get("device") != "nvme":
        return (
            "zero_optimization.offload_optimizer.fast_init=true without offload_param.device=nvme: DeepSpeed uses it "
            "for parameters that lie on NVMe, and it would do nothing; leave it out"
        )
    needed = run.largest_shard + int(zero.get("sub_group_size", 0))
    if parameters.get("buffer_size", needed) < needed:
        return (
            f"zero_optimization.offload_optimizer.fast_init=true with offload_param.buffer_size="
            f'{parameters["buffer_size"]}: a sub-group has up to {needed} elements; use that, or "auto"'
        )
    return None


def layers_on_nvme_are_let_go(run: "Run") -> str | None:
    zero = run.deepspeed["zero_optimization"]
    reuse = zero.get("stage3_max_reuse_distance", zero.get("max_reuse_distance"))
    parameters = _section(run, "offload_param")
    if parameters.get("device") == "nvme" and not parameters.get("max_in_cpu") and reuse:
        return (
            f"zero_optimization.stage3_max_reuse_distance={reuse} with offload_param.device=nvme: layers that are used "
            f"again so soon would stay in swap buffers, of which there are {parameters.get('buffer_count', 5)}, until "
            "DeepSpeed has none left; use 0"
        )
    return None


def partial_offload_is_heard(run: "Run") -> str | None:
    """ZeRO-Offload++ (DeepSpeed's twin-flow): sub-groups by their number, the first ones on the device."""
    ratio = _section(run, "offload_optimizer").get("ratio")
    if ratio is None or float(ratio) == 1.0:
        return None
    where = f"zero_optimization.offload_optimizer.ratio={ratio}"
    device = offload_place(run.deepspeed, "offload_optimizer")
    if device != "cpu":
        why = "DeepSpeed swaps every sub-group to NVMe" if device == "nvme" else "nothing is offloaded"
        return f"{where} with device={device}: {why}; use device=cpu, or leave ratio out"
    if run.zero_stage != 3:
        return (
            f"{where} with stage={run.zero_stage}: DeepSpeed divides the optimizer in stage 3 only and would "
            "offload all of it; use stage 3 (pp=1), or leave ratio out"
        )
    optimizer = run.deepspeed["optimizer"]
    if optimizer["type"].lower() not in ADAM_LIKE or optimizer["params"].get("torch_adam"):
        return (
            f"{where}: DeepSpeed divides its own CPU Adam only; use optimizer.type=AdamW without torch_adam"
        )
    if optimizer["params"].get("adam_w_mode") is False:
        return (
            f"{where} with adam_w_mode=false: the share on the device is stepped by AdamW, which decays weights apart "
            "from the gradient; use AdamW's way for both, or leave ratio out"
        )
    return None


def partial_offload_has_sub_groups(run: "Run") -> str | None:
    if offload_ratio(run.deepspeed) in (0.0, 1.0) or run.zero_stage != 3:
        return None
    size = run.deepspeed["zero_optimization"].get("sub_group_size")
    most = run.shard_elements // FEWEST_SUB_GROUPS
    if size is None or size > max(run.largest_shard, most):
        return (
            f"zero_optimization.offload_optimizer.ratio with sub_group_size={size}: a sub-group is on one side or the "
            f'other, and these are too large to meet the ratio; use {most} or less, or "auto"'
        )
    return None


def newer_offloads_are_not_tried(run: "Run") -> str | None:
    if _section(run, "offload_optimizer").get("super_offload"):
        return (
            "zero_optimization.offload_optimizer.super_offload=true: DeepSpeed's optimizer for Grace-Hopper machines "
            "steps in another process and was not tried here; leave it out"
        )
    if run.deepspeed["zero_optimization"].get("zenflow"):
        return (
            "zero_optimization.zenflow: it updates most weights some steps late, so that a run would not compute what "
            "its layout-free reference does; leave it out"
        )
    return None


def _section(run: "Run", name: Section) -> dict[str, Any]:
    found = run.deepspeed["zero_optimization"].get(name)
    return found if isinstance(found, dict) else {}


OFFLOAD_RULES: tuple[Rule, ...] = (
    optimizer_offload_needs_zero,
    optimizer_nvme_needs_zero_3,
    parameter_offload_needs_zero_3,
    nvme_needs_a_folder,
    nvme_buffers_hold_the_largest_parameter,
    swap_buffers_suffice,
    swapping_keys_need_nvme,
    fast_init_has_buffers,
    layers_on_nvme_are_let_go,
    partial_offload_is_heard,
    partial_offload_has_sub_groups,
    newer_offloads_are_not_tried,
)
