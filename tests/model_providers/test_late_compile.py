"""What megatron-core and DeepSpeed would have compiled as they are imported is compiled when it is called."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_providers import late_compile
from tests.ranks import CPU_ONLY_ENVIRONMENT

CODE = """
import sys
import model_providers.late_compile, pretrain.run
from megatron.core.fusions.fused_bias_swiglu import swiglu
import torch
assert "torch._inductor.compile_fx" not in sys.modules and "torch._dynamo" not in sys.modules
assert torch.compile is model_providers.late_compile._compile
x = torch.randn(4, 8)
left, right = x.chunk(2, -1)
torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(left) * right)
"""


def test_a_rank_starts_without_torchs_compiler_and_functions_work() -> None:
    environment = {**CPU_ONLY_ENVIRONMENT, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_once_and_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        seen.append(function)
        return lambda x: function(x) + 1

    monkeypatch.setattr(late_compile, "_compile", compiler)

    @late_compile.compile_later
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert not seen and doubled.__name__ == "doubled"
    assert [float(doubled(torch.tensor(3.0))) for _ in range(2)] == [7.0, 7.0]
    assert len(seen) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert float(doubled(torch.tensor(3.0))) == 6.0, "inside another function it is a part of that"
