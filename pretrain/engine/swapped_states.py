"""Optimizer states that live on NVMe: exact resume, and nothing that stays in memory by mistake.

DeepSpeed 0.19 copies the swap files into a checkpoint and back, but a new process does not know that they hold
moments and begins with none; it loads neither the steps taken nor the sub-groups that are too small to be swapped
(deepspeed/runtime/engine.py, load_checkpoint, skips `_load_zero_checkpoint` there).  So a file of ours per rank
says which states each sub-group has, and holds those that are not in swap files.  States come and go by sub-group.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = "states_beside_nvme.rank{rank:05d}.pt"
SWAPPED = "swapped"  # in a state's place: it is in a swap file


def are_swapped(engine: Any) -> bool:
    """Whether the engine's optimizer keeps states on NVMe."""
    return bool(engine.zero_nvme_offload_optimizer())


def save(engine: Any, folder: Path) -> None:
    """Of this rank, beside DeepSpeed's own files."""
    torch.save([_record(engine.optimizer, group) for group in _groups(engine)], _path(engine, folder))


def make_known(engine: Any, folder: Path) -> None:
    """Before DeepSpeed copies the swap files back: make states of zeros, whose files the copies will replace."""
    optimizer = engine.optimizer
    for group, record in zip(_groups(engine), _records(engine, folder), strict=True):
        if optimizer._swappable_optimizer_subgroup(group):
            optimizer._prepare_sub_group(group, set())
            optimizer.optimizer.state[_master(optimizer, group)] = {
                key: torch.zeros(
                    optimizer.fp16_partitioned_groups_flat_numel[group],
                    dtype=optimizer.master_weights_and_grads_dtype,
                )
                if value == SWAPPED
                else value
                for key, value in record["state"].items()
            }
            optimizer._release_sub_group(group, set())


def restore(engine: Any, folder: Path) -> None:
    """After that: the sub-groups that are in memory, and their weights."""
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    for group, record in zip(_groups(engine), _records(engine, folder), strict=True):
        if optimizer._swappable_optimizer_subgroup(group):
            continue
        master = _master(optimizer, group)
        master.data.copy_(record["master"])
        optimizer.optimizer.state[master] = record["state"]
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def release_as_it_steps(engine: Any) -> None:
    """Let each sub-group's states go when the next one steps.

    DeepSpeed's pipelined swapper writes moments that the first step made, and keeps them in memory too until they are
    read again in the second (deepspeed/runtime/swap_tensor/pipelined_optimizer_swapper.py, _complete_swap_out): at the
    end of the first step all moments would be there.
    """
    optimizer, last = engine.optimizer, [""]

    def release_the_last(inner: torch.optim.Optimizer, *_: Any) -> None:
        stepping = next(group["params"][0] for group in inner.param_groups if group["params"])
        infos = optimizer.optimizer_swapper.swap_params_info
        if last[0] != stepping.ds_id and last[0] in infos:
            infos[last[0]].release_memory()
        last[0] = stepping.ds_id

    optimizer.optimizer.register_step_pre_hook(release_the_last)


def _record(optimizer: Any, group: int) -> dict[str, Any]:
    master = _master(optimizer, group)
    state = optimizer.optimizer.state.get(master, {})
    if not optimizer._swappable_optimizer_subgroup(group):
        return {"master": master.detach(), "state": dict(state)}
    swapped = {id(each.compute_tensor) for each in _swap_info(optimizer, master).tensors}
    return {"state": {key: SWAPPED if id(value) in swapped else value for key, value in state.items()}}


def _swap_info(optimizer: Any, master: torch.Tensor) -> Any:
    swapper = optimizer.optimizer_swapper
    return swapper.swap_params_info[swapper.parameter_id(master)]


def _records(engine: Any, folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = torch.load(_path(engine, folder), map_location="cpu", weights_only=True)
    return records


def _master(optimizer: Any, group: int) -> torch.Tensor:
    master: torch.Tensor = optimizer.fp32_partitioned_groups_flat[group]
    return master


def _groups(engine: Any) -> Iterator[int]:
    yield from range(len(engine.optimizer.fp16_groups))


def _path(engine: Any, folder: Path) -> Path:
    return folder / FILE.format(rank=engine.global_rank)
