"""What the device benchmarks compute from what they measure, and that they say so where there is no device."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.alone import RANK_OF_ONE, world_of_one
from benchmarks.fp8 import Product, Row, product_table, products, step_table
from benchmarks.mfu import LLAMA_1B, NO_CUDA, Rate


def test_a_world_of_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_OF_ONE:
        monkeypatch.delenv(name, raising=False)
    with world_of_one():
        assert os.environ["WORLD_SIZE"] == "1" and torch.distributed.is_initialized()
    assert not RANK_OF_ONE.keys() & os.environ.keys() and not torch.distributed.is_initialized()


def test_utilisation_is_work_over_the_measured_rate() -> None:
    rate = Rate(tokens_per_s=1000.0, flops_per_token=6e9, loss=2.0)
    assert rate.mfu(12e12) == pytest.approx(0.5)


def test_products_are_those_of_a_gated_mlp() -> None:
    assert products(LLAMA_1B) == {
        "mlp up": Product(4 * 4096, 2048, 2 * 8192),
        "mlp down": Product(4 * 4096, 8192, 2048),
    }
    assert Product(2, 3, 4).flops == 48.0


def test_tables_hold_ratios_over_bf16() -> None:
    rows = [Row("bf16", "torch", 100e12), Row("current, bare", "torch", 150e12)]
    assert list(product_table("p", Product(2, 3, 4), rows).columns[3].cells) == ["1.00", "1.50"]
    rates = {"bf16": Rate(100.0, 1e9, 2.0), "current, torch": Rate(130.0, 1e9, 2.1)}
    table = step_table(LLAMA_1B, rates, 2e11)
    assert list(table.columns[2].cells) == ["1.00", "1.30"]
    assert list(table.columns[3].cells) == ["50.0%", "65.0%"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_one_line_and_exit_code_2() -> None:
    ended = subprocess.run([sys.executable, "-m", "benchmarks.mfu"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1] == NO_CUDA
