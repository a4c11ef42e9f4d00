"""Who talks to whom: one layout, two libraries, the same process groups.

megatron-core's modules and DeepSpeed's engines both number ranks with tensor fastest and pipeline slowest.
The groups are made once, by megatron-core; DeepSpeed is handed the same ones, and a pipeline's own grid is
compared with them, since libraries that disagree about a group pair wrong ranks without a word.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from model_providers import mcore_on_cpu
from model_providers.dispatch import Nodes
from model_providers.layout import Coordinates, ExpertCoordinates, Layout
from model_providers.random_streams import begin_micro_batch
from pretrain.engine.quiet import without_stdout
from pretrain.engine.rendezvous import init_process_group

DEFAULT_TIMEOUT_S = 1800.0
SHARED_MEMORY_COLLECTIVES = "deepspeed_shm_comm"


class ExpertGroups(NamedTuple):
    """Who shares experts; all of one rank each where there are none."""

    place: ExpertCoordinates
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup  # holds the same experts
    copy: dist.ProcessGroup  # all that hold a part of one copy of the experts, etp fastest
    norm: (
        dist.ProcessGroup
    )  # those of them with this rank's tensor coordinate, among which tp is summed besides
    stage: dist.ProcessGroup  # all that route the tokens of this stage: tp x dp
    nodes: Nodes | None  # how ``ep`` lies on machines; None on a single one


@dataclass(frozen=True)
class Groups:
    """This rank's place and its process groups."""

    layout: Layout
    rank: int
    place: Coordinates
    device: torch.device
    tp: dist.ProcessGroup
    dp: dist.ProcessGroup
    pp: dist.ProcessGroup
    model: dist.ProcessGroup  # all ranks that hold a part of one copy of the model: tp x pp
    experts: ExpertGroups
    collection: ProcessGroupCollection  # the same, in megatron-core's words

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0

    @property
    def holds_inputs(self) -> bool:
        return self.place.pp == 0

    @property
    def holds_loss(self) -> bool:
        return self.place.pp == self.layout.loss_stage

    def begin_micro_batch(self, number: int) -> None:
        """What is computed from now on belongs to this rank's micro-batch ``number`` of the step."""
        begin_micro_batch(number * self.layout.dp + self.place.dp)

    def mean_over_dp(self, value: float) -> float:
        """The average of one number over the copies of the model."""
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.dp)
        return total.item() / self.layout.dp

    def mean_by(self, values: Sequence[float], counts: Sequence[int]) -> float:
        """The mean of ``values``, which all ranks have, by counts that add up over copies of the model.

        Pipeline stages that read no data count nothing, and are told; every rank must call it.
        """
        totals = torch.tensor(counts, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals, group=self.dp)
        dist.all_reduce(totals, op=dist.ReduceOp.MAX)
        of_each = torch.tensor(values, dtype=torch.float64, device=self.device)
        return float((of_each * totals).sum() / totals.sum().clamp(min=1.0))

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank of the world says yes."""
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def first_told(self, text: str | None) -> str | None:
        """The text of the lowest rank that has one, on every rank."""
        told: list[str | None] = [None] * self.layout.world_size
        dist.all_gather_object(told, text)
        return next((word for word in told if word is not None), None)


def device_of_this_rank() -> torch.device:
    """On CPU, DeepSpeed's ``current_device()`` is LOCAL_RANK, which is no device; its name is."""
    return torch.device(get_accelerator().current_device_name())


def wait_for_all() -> None:
    """Until every rank is here; NCCL wants to hear which device is meant, or guesses and warns."""
    device = device_of_this_rank()
    dist.barrier(device_ids=[device.index or 0] if device.type == "cuda" else None)


def leave() -> None:
    """The world, once all is done: NCCL warns where its groups end with the process."""
    if dist.is_initialized() and device_of_this_rank().type == "cuda":
        dist.destroy_process_group()


def join(layout: Layout, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Groups:
    """Join the world that the launcher's environment describes, and make all groups; every rank must call it."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        leave_shared_memory_out()
    if not dist.is_initialized():
        accelerator.set_device(_local_rank())
    backend, timeout = accelerator.communication_backend_name(), datetime.timedelta(seconds=timeout_s)
    with without_stdout():
        init_process_group(backend, timeout=timeout)  # before DeepSpeed, which would make a store of its own
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    assert dist.get_world_size() == layout.world_size, f"{dist.get_world_size()} ranks for {layout}"
    mcore_on_cpu.install(device_of_this_rank().type)
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        create_gloo_process_groups=False,
    )
    rank = dist.get_rank()
    groups = Groups(
        layout=layout,
        rank=rank,
        place=layout.coordinates(rank),
        device=device_of_this_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        experts=_expert_groups(layout, rank),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for axis, group in (("tp", groups.tp), ("dp", groups.dp), ("pp", groups.pp)):
        assert_same_ranks(axis, group, next(ranks for ranks in layout.groups(axis) if rank in ranks))
    for axis in ("ep", "etp", "edp"):
        expected = next(ranks for ranks in layout.expert_groups(axis) if rank in ranks)
        assert_same_ranks(axis, getattr(groups.experts, axis), expected)
    return groups


def _expert_groups(layout: Layout, rank: int) -> ExpertGroups:
    """megatron-core's, and where experts are shared out three of our own."""
    copy, norm, nodes = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        None,
    )
    if layout.ep > 1:
        copies = layout.expert_groups("copy")
        copy = _group_of(rank, copies)
        norm = _group_of(rank, [ranks[first :: layout.tp] for ranks in copies for first in range(layout.tp)])
        nodes = _nodes(layout, rank)
    return ExpertGroups(
        place=layout.expert_coordinates(rank),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        edp=parallel_state.get_expert_data_parallel_group(),
        copy=copy,
        norm=norm,
        stage=parallel_state.get_tensor_and_data_parallel_group(),
        nodes=nodes,
    )


def _nodes(layout: Layout, rank: int) -> Nodes | None:
    """Of this rank's expert group; None where it lies on one machine, or on none evenly."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))
    groups = layout.expert_groups("ep")
    by_node = [_runs_on_one_node(ranks, per_node) for ranks in groups]
    sizes = {len(ranks) for runs in by_node for ranks in runs}
    if len(sizes) > 1 or sizes == {layout.ep}:
        return None
    (ranks_per_node,) = sizes
    inner = [ranks for runs in by_node for ranks in runs]
    outer = [list(ranks) for runs in by_node for ranks in zip(*runs, strict=True)]
    return Nodes(_group_of(rank, inner), _group_of(rank, outer), ranks_per_node)


def _runs_on_one_node(ranks: list[int], per_node: int) -> list[list[int]]:
    return [list(run) for _, run in groupby(ranks, key=lambda rank: rank // per_node)]


def _group_of(rank: int, all_ranks: Sequence[list[int]]) -> dist.ProcessGroup:
    """The one that holds this rank, of groups that every rank must make together."""
    ours = None
    for ranks in all_ranks:
        group = dist.new_group(ranks)
        if rank in ranks:
            ours = group
    assert ours is not None
    return ours


def leave_shared_memory_out() -> None:
    """Joining would compile DeepSpeed's collectives in shared memory, 40 s to minutes, and keep 69 MB a rank for them.

    DeepSpeed 0.19 uses them in `inference_all_reduce` alone (deepspeed/comm/torch.py), which its inference layers call
    and training does not; all other collectives are gloo's either way.  It reads this table, which it keeps so that
    "edits to it persist" (deepspeed/ops/__init__.py).
    """
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_COLLECTIVES] = False


def assert_same_ranks(name: str, group: dist.ProcessGroup, expected: list[int]) -> None:
    """A library's group must hold exactly the ranks that the layout says."""
    found = dist.get_process_group_ranks(group)
    assert found == expected, f"{name} group has ranks {found}, the layout says {expected}"


class ModelParallelUnit:
    """What DeepSpeed asks of an ``mpu`` where there is no pipeline (deepspeed/utils/groups.py, zero/*.py)."""

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.dp)

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.dp

    def get_data_parallel_rank(self) -> int:
        return self._groups.place.dp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    def get_model_parallel_world_size(self) -> int:
        return self._groups.layout.tp

    def get_model_parallel_rank(self) -> int:
        return self._groups.place.tp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.layout.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.place.tp

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._groups.tp)[0]

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
