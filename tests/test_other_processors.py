"""Equality does not depend on the instruction set or on the number of threads.

Sensitive tests run a second time, as on a CPU without vector instructions, with four threads: torch, oneDNN and MKL
each choose their kernels by themselves, and other kernels sum in another order.
"""

import os
import subprocess
import sys

import pytest

from tests.patience import patient_s

OLD_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "4",
    "MKL_DYNAMIC": "FALSE",  # four even where there are fewer cores
}
ROUNDING = "test_fp8_computes_what_one_process_does"
TESTS = (
    "tests/model_providers/fp8/test_experts.py",
    "tests/model_providers/fp8/test_linears.py",
    "tests/model_providers/fp8/test_quantised.py",
    "tests/model_providers/fp8/test_nvfp4.py",
    "tests/model_providers/fp8/test_tensor_parallel.py::test_two_tensor_ranks_round_as_one[gpt2-current-tp2+sp]",
    f"tests/parity/test_fp8.py::{ROUNDING}[blockwise-dp2]",
    f"tests/parity/test_fp8.py::{ROUNDING}[nvfp4-zero3]",
)
CHECKED = """
import sys, pytest, torch
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT", torch.backends.cpu.get_cpu_capability()
assert torch.get_num_threads() == 4, torch.get_num_threads()
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.ranks
def test_sensitive_tests_pass_as_on_another_cpu() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        [sys.executable, "-c", CHECKED, *TESTS],
        env=environment | OLD_CPU,
        capture_output=True,
        text=True,
        timeout=patient_s(280),
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-6000:]
