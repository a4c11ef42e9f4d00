"""One step as one record with units in its keys, computed once and handed to every sink.

FLOPs are the model's own (no recomputation counted), with causal attention counted as causal: half of the full
square.  MFU is their rate over the device's dense peak for the run's number format (Chowdhery et al. 2022,
appendix B).
"""

import re
import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from model_providers.cost import train_flops_per_token
from pretrain.config_io import Run
from pretrain.engine.base import StepResult
from pretrain.monitor.heat_map import LoadMap

# Dense bf16/fp16 peaks in TFLOP/s, from the vendors' data sheets, by the device's name without its vendor's; the first
# that the whole name begins with, word by word, wins: an H100 NVL, an H20 and a GH200 are no H100s.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H800 PCIe": 756.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "V100 PCIE": 112.0,
    "V100": 125.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 191.5,  # per die, which is one device
    "MI250": 181.0,
}
VENDORS = {"nvidia", "amd", "instinct", "tesla", "radeon"}


@dataclass
class Record:
    """What one step came to."""

    step: int
    values: dict[str, float]
    losses_by_set: dict[str, float] = field(default_factory=dict)  # of validation sets
    test_losses: dict[str, float] = field(default_factory=dict)  # of test sets, at the end
    expert_loads: LoadMap | None = None  # now and then
    trained_s: float = 0.0  # in steps, since the run was started

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **self.values,
            **{f"eval/{name}": loss for name, loss in self.losses_by_set.items()},
            **{f"test/{name}": loss for name, loss in self.test_losses.items()},
        }


class Metrics:
    """Turns a step's result and times into a record."""

    def __init__(self, run: Run, device: torch.device):
        self._run, self._device = run, device
        self._flops_per_step = run.tokens_per_step * train_flops_per_token(
            run.config.model, run.config.data.sequence_length, target_length=run.config.target_length
        )
        self._peak_flops_per_s = peak_flops_per_s(run, device)
        self._trained_s = 0.0

    def record(
        self,
        step: int,
        result: StepResult,
        *,
        samples: int,
        tokens: int,
        learning_rate: float,
        elapsed_s: float,
        phases_s: dict[str, float],
    ) -> Record:
        """``step`` counts from 1: the number of optimizer steps done; ``samples``, ``tokens``: of all of them."""
        run = self._run
        limit = run.config.optimizer.gradient_clipping
        per_device = self._flops_per_step / elapsed_s / run.layout.world_size
        values = {
            "samples": samples,
            "tokens": tokens,
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "clip_factor": min(1.0, limit / (result.grad_norm + 1e-6)) if limit > 0 else 1.0,
            "loss_scale": result.loss_scale,
            "applied": float(result.applied),
            "step_s": elapsed_s,
            "tokens_per_s": run.tokens_per_step / elapsed_s,
            "tflops_per_s_per_device": per_device / 1e12,
            "memory_gb": peak_memory_bytes(self._device) / 1e9,
        }
        if self._peak_flops_per_s is not None:
            values["mfu"] = per_device / self._peak_flops_per_s
        values |= {f"time/{name}_s": seconds for name, seconds in sorted(phases_s.items())}
        self._trained_s += elapsed_s
        return Record(step, values, trained_s=self._trained_s)


def peak_flops_per_s(run: Run, device: torch.device) -> float | None:
    """What ``monitor.peak_tflops`` says, or the data sheet, or None: then there is no MFU, only FLOP/s."""
    stated = run.config.monitor.peak_tflops
    if stated is not None:
        return stated * 1e12
    if device.type != "cuda" or run.config.precision.dtype == "fp32":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """FLOP/s of a device by its name, such as "NVIDIA H100 80GB HBM3"; None of one that is not known."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word not in VENDORS]
    for known, peak in PEAK_TFLOPS.items():
        first, *variant = known.lower().split()
        if words[:1] == [first] and set(variant) <= set(words):
            return peak * 1e12
    return None


def peak_memory_bytes(device: torch.device) -> float:
    """Of this process: what torch held on a GPU, or the resident set on a CPU, at its largest."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
