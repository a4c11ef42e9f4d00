"""The environment that ranks start with: the one place where variables are set.

Nothing that the user set is overwritten.  What depends on a host (its cores, its interfaces) is set there, by the
keeper of each rank; what the user set here and the libraries read travels to every host.
"""

import importlib
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from launch.devices import device_type, num_cores

# megatron-core warns at import about optional packages, torch about its own renamings; a run can do neither.
QUIET = (
    "ignore:Transformer Engine and Apex are not installed,ignore::FutureWarning,ignore::DeprecationWarning"
)

LOOPBACK = "127.0.0.1"
LAUNCH_ID = "MEGALOOM_LAUNCH"  # marks every process of one launch, on whatever host
KEEPER_LOGS = "MEGALOOM_LOGS"  # folder of the ranks' logs
KEEPER_SIZE = "MEGALOOM_TERMINAL"  # COLUMNSxLINES of the terminal that rank 0 speaks to
# Read by the libraries on the ranks.  DeepSpeed itself exports MLFLOW, PYTHON, MV2 and UCX only (launcher/runner.py).
EXPORTED = (
    *(
        "NCCL_",
        "GLOO_",
        "UCX_",
        "OMP_",
        "FI_",
        "CUDA_DEVICE_",
        "TORCH",
        "TRITON_",
        "NVTE_",
        "HF_",
        "DS_ACCELERATOR",
    ),
    *("PYTHON", "TOKENIZERS_", "MLFLOW", "WANDB_", "COMET_", "MEGALOOM_"),
)
# Of these the first that is there tells a rank's place: DeepSpeed's and torch's own, Open MPI's, Slurm's.
PLACES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"),
    *(tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")),),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
)


class Place(NamedTuple):
    """Which rank of how many, in all and on this host."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1

    @property
    def spans_hosts(self) -> bool:
        return self.local_size < self.world_size


def rank_environment(num_ranks: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """For ``num_ranks`` ranks that share this machine."""
    environment = dict(os.environ if base is None else base)
    environment.setdefault("PYTHONWARNINGS", QUIET)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device_type() == "cpu":
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    # Megatron-LM's rule for overlapping tensor-parallel communication with the backward pass.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return environment


def place_of(environment: Mapping[str, str]) -> Place:
    """Where whoever started this process put it."""
    for names in PLACES:
        if names[0] in environment:
            rank, local_rank, world_size, local_size = (_number(environment.get(name)) for name in names)
            world_size = world_size or 1
            nodes = _number(environment.get("SLURM_NNODES")) or 1
            return Place(rank or 0, local_rank or 0, world_size, local_size or max(1, world_size // nodes))
    return Place()


def keeper_environment(base: Mapping[str, str]) -> dict[str, str]:
    """What a rank's program needs on this host, with its place in torch's words."""
    place = place_of(base)
    environment = rank_environment(place.local_size, base)
    words = (place.rank, place.local_rank, place.world_size, place.local_size)
    for name, value in zip(PLACES[0], words, strict=True):
        environment[name] = str(value)
    if not place.spans_hosts:  # no other host needs to reach them
        environment["MASTER_ADDR"] = LOOPBACK
    master = environment.get("MASTER_ADDR")
    interface = _interface_towards(master) if master is not None else None
    if (
        interface is not None
    ):  # gloo would take the address of the host's own name, NCCL any interface but loopback
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if not place.spans_hosts:
            environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    return environment


def exported(base: Mapping[str, str], names: tuple[str, ...] = ()) -> dict[str, str]:
    """The variables that travel to other hosts: those of the libraries, and ``names`` that the user asked for."""
    return {name: value for name, value in sorted(base.items()) if name.startswith(EXPORTED) or name in names}


def for_this_process() -> None:
    """Before a command imports torch and DeepSpeed itself, which would remark on a machine without GPUs."""
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("model_providers.late_compile")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _interface_towards(address: str) -> str | None:
    """The network interface by which this host reaches ``address``; nothing is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    return None
