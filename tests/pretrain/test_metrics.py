"""One step as one record: rates follow from counted FLOPs and time, MFU from a stated or a published peak."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model_providers.cost import train_flops_per_token
from pretrain.engine.base import StepResult
from pretrain.monitor.metrics import Metrics, peak_flops_per_s, peak_memory_bytes
from pretrain.monitor.sinks import speed
from tests.runs import checked, tiny

CPU = torch.device("cpu")
RESULT = StepResult(loss=2.5, grad_norm=2.0, applied=True, loss_scale=1.0)


def record(corpus: str, out: Path, result: StepResult = RESULT, **changes: Any) -> dict[str, Any]:
    run = checked(tiny(corpus, out, **changes), 2)
    made = Metrics(run, CPU).record(
        3,
        result,
        samples=40,
        tokens=1280,
        learning_rate=1e-3,
        elapsed_s=0.5,
        phases_s={"forward": 0.1},
    )
    return made.as_dict()


def test_rates_follow_from_counts_and_time(corpus: str, out: Path) -> None:
    values = record(corpus, out)
    model = checked(tiny(corpus, out), 2).config.model
    assert values["samples"] == 40 and values["tokens"] == 1280, "what was consumed, not step x batch"
    assert values["tokens_per_s"] == 8 * 32 / 0.5
    flops = 8 * 32 * train_flops_per_token(model, 32)
    assert values["tflops_per_s_per_device"] == pytest.approx(flops / 0.5 / 2 / 1e12)
    assert values["time/forward_s"] == 0.1 and values["step_s"] == 0.5
    assert "mfu" not in values
    assert "FLOP/s per rank" in speed(values)


def test_clipping_is_told_as_a_factor(corpus: str, out: Path) -> None:
    assert record(corpus, out)["clip_factor"] == pytest.approx(0.25, rel=1e-5)
    assert record(corpus, out, optimizer__gradient_clipping=0.0)["clip_factor"] == 1.0
    small = StepResult(loss=2.5, grad_norm=0.1, applied=True, loss_scale=1.0)
    assert record(corpus, out, small)["clip_factor"] == 1.0


def test_a_stated_peak_gives_mfu(corpus: str, out: Path) -> None:
    values = record(corpus, out, monitor__peak_tflops=0.001)
    assert values["mfu"] == pytest.approx(values["tflops_per_s_per_device"] / 0.001)
    assert speed(values) == f"MFU {values['mfu']:.1%}"


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H20", "bf16", 148e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("NVIDIA A100X", "bf16", None),  # another device
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Something New", "bf16", None),
    ],
)
def test_known_devices_have_their_published_peak(
    corpus: str, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    run = checked(tiny(corpus, out, precision=dtype), 1)
    assert peak_flops_per_s(run, torch.device("cuda")) == peak


def test_memory_is_this_processs_peak() -> None:
    assert 5e7 < peak_memory_bytes(CPU) < 1e12
