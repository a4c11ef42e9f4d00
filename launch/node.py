"""DeepSpeed's launcher of one host (deepspeed/launcher/launch.py), without the rest of DeepSpeed.

``python -m launch.node deepspeed.launcher.launch [OPTIONS]`` runs that file unchanged.  The file needs a logger,
numactl's arguments and the name of one environment variable, but importing it imports all of DeepSpeed and torch:
1.5 s of CPU time before any rank starts (`benchmarks/startup.py`).  In this process, which ends with the launcher,
the packages around the file are empty, and what it asks of torch is here.  This is done for versions of the file that
were read (by hash), and for devices that CUDA_VISIBLE_DEVICES chooses; otherwise DeepSpeed is imported in full.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from launch.devices import num_gpus

MODULE = "deepspeed.launcher.launch"
KNOWN_SHA256 = {"ea1e6888ce1142749bf3f6f6ecaff859f04b0363b724d3f8ab688adf179ad446"}  # DeepSpeed 0.19.8
DEVICES = "CUDA_VISIBLE_DEVICES"  # deepspeed/accelerator/{cpu,cuda}_accelerator.py, visible_devices_envs


class Accelerator:
    """The part of DeepSpeed's CPU and CUDA accelerators that its launcher calls; both have the same."""

    def visible_devices_envs(self) -> list[str]:
        return [DEVICES]

    def set_visible_devices_envs(
        self, current_env: dict[str, str], local_accelerator_ids: Sequence[int]
    ) -> None:
        current_env[DEVICES] = ",".join(map(str, local_accelerator_ids))


def main() -> None:
    """DeepSpeed's own `main`, with the arguments after the module's name."""
    assert sys.argv.pop(1) == MODULE
    folder = _deepspeed_folder()
    if folder is not None and _is_known(folder):
        stand_in(folder)
    importlib.import_module(MODULE).main()


def stand_in(folder: Path) -> None:
    """Register packages under the names that the launcher imports; they import nothing themselves."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # deepspeed/__init__.py; ranks inherit it
    _package("deepspeed", folder)
    utils = _package("deepspeed.utils", folder / "utils")
    logger = _logger()
    vars(utils).update(
        logger=logger,
        set_log_level_from_string=lambda name: logger.setLevel(name.upper()),
        get_numactl_cmd=importlib.import_module("deepspeed.utils.numa").get_numactl_cmd,
    )
    accelerator = _package("deepspeed.accelerator", folder / "accelerator")
    vars(accelerator)["get_accelerator"] = Accelerator


def _is_known(folder: Path) -> bool:
    accelerator = os.environ.get("DS_ACCELERATOR")
    by_cuda_variable = accelerator in ("cpu", "cuda") or (accelerator is None and num_gpus() > 0)
    return by_cuda_variable and _hash_of_launcher(folder) in KNOWN_SHA256


def _hash_of_launcher(folder: Path) -> str:
    return hashlib.sha256((folder / "launcher" / "launch.py").read_bytes()).hexdigest()


def _deepspeed_folder() -> Path | None:
    spec = importlib.util.find_spec("deepspeed")  # finds it and does not import it
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _package(name: str, folder: Path) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package


def _logger() -> logging.Logger:
    """As deepspeed/utils/logging.py makes it: `watch.py` knows its lines."""
    logger = logging.getLogger("DeepSpeed")
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    form = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
    handler.setFormatter(logging.Formatter(form))
    logger.addHandler(handler)
    return logger


if __name__ == "__main__":
    main()
