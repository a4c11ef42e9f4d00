"""`megaloom run` on CUDA: the losses of the CPU, in every number format and, with several GPUs, in every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ranks import CPU_ONLY_ENVIRONMENT
from tests.runs import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(600),
]

STEPS = 12
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}  # relative; TF32 is off by torch's default


def train(
    corpus: str, folder: Path, *, num_ranks: int = 1, on_cpu: bool = False, **changes: Any
) -> list[dict[str, float]]:
    """The run's records."""
    changes = {"train": {"steps": STEPS, "eval_samples": 8}, "kernels": "auto", **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny(corpus, folder / "out", **changes)), "utf-8")
    subprocess.run(
        [sys.executable, "-m", "launch", "run", str(path), "--ranks", str(num_ranks)],
        env={**os.environ, **(CPU_ONLY_ENVIRONMENT if on_cpu else {})},
        check=True,
    )
    lines = (folder / "out" / "tiny" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def on_cpu(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(corpus, tmp_path_factory.mktemp("cpu"), on_cpu=True)


def assert_close(
    ours: list[dict[str, float]], reference: list[dict[str, float]], tolerance: float, *, skipped: int = 0
) -> None:
    """fp16 skips its first steps while it looks for a loss scale, so it is compared by its fall alone."""
    if skipped == 0:
        pairs = zip(ours, reference, strict=True)
        assert all(abs(a["loss"] - b["loss"]) <= tolerance * b["loss"] for a, b in pairs)
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.mark.parametrize("deepspeed", ["zero0.json", "zero1.json", "zero2.json", "zero3.json"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cuda_computes_what_the_cpu_does(
    corpus: str, tmp_path: Path, on_cpu: list[dict[str, float]], dtype: str, deepspeed: str
) -> None:
    if deepspeed == "zero0.json" and dtype != "fp32":
        pytest.skip("refused: DeepSpeed sums 16-bit gradients in 16 bits without ZeRO")
    records = train(corpus, tmp_path, precision=dtype, deepspeed=deepspeed)
    skipped = sum(record["applied"] == 0.0 for record in records)
    assert_close(records, on_cpu, TOLERANCE[dtype], skipped=skipped)
    assert (records[-1]["loss_scale"] > 1.0) == (dtype == "fp16")
    assert ("mfu" in records[-1]) == (dtype != "fp32")


@pytest.mark.parametrize("deepspeed", ["zero2_cpu_offload.json", "zero3_cpu_offload.json"])
def test_offload_on_cuda_computes_what_the_cpu_does(
    corpus: str, tmp_path: Path, on_cpu: list[dict[str, float]], deepspeed: str
) -> None:
    records = train(corpus, tmp_path, precision="bf16", deepspeed=deepspeed)
    assert_close(records, on_cpu, TOLERANCE["bf16"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"tp": 2}},
        {"layout": {"tp": 2, "sequence_parallel": True}},
        {"layout": {"pp": 2}, "deepspeed": "pipeline.json"},
        {"deepspeed": "zero3.json"},
    ],
    ids=str,
)
def test_layouts_on_cuda_compute_what_one_cpu_does(
    corpus: str, tmp_path: Path, on_cpu: list[dict[str, float]], changes: dict[str, Any]
) -> None:
    assert_close(train(corpus, tmp_path, num_ranks=2, **changes), on_cpu, TOLERANCE["fp32"])
