"""The environment that ranks start with: the one place where variables are set.

Nothing that the user set is overwritten.
"""

import os
from collections.abc import Mapping

from launch.devices import device_type, num_cores

# megatron-core warns at import about optional packages, torch about its own renamings; a run can do neither.
QUIET = (
    "ignore:Transformer Engine and Apex are not installed,ignore::FutureWarning,ignore::DeprecationWarning"
)


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


def for_this_process() -> None:
    """Before a command imports torch and DeepSpeed itself, which would remark on a machine without GPUs."""
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
