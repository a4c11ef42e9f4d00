"""What this machine has to train on, seen without torch."""

import os
import shutil
import subprocess
from typing import Literal

DeviceType = Literal["cpu", "cuda"]


def num_gpus() -> int:
    """GPUs that a run started here would see; 0 where DS_ACCELERATOR=cpu asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def device_type() -> DeviceType:
    return "cuda" if num_gpus() else "cpu"


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
