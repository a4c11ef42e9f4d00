"""What torch.compile makes of our functions on CUDA: quantising to the bit, the others but for rounding."""

import pytest
import torch

from model_providers import compiled
from model_providers.fp8 import one_pass
from tests.model_providers.test_compiled import assert_compiled_as_eager_on_the_cpu, hard_numbers, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROWS, COLUMNS = 2048, 640


def test_compiled_quantising_gives_the_bits_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = hard_numbers(ROWS, COLUMNS)
    monkeypatch.setattr(compiled, "LARGE", 2**20)
    assert compiled.pays(x.cuda()) and one_pass.has_kernels(x.cuda())
    for found, wanted in zip(made(x.cuda()), made(x), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_eager_quantising_gives_the_bits_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "pays", lambda x: False)
    monkeypatch.setattr(one_pass, "has_kernels", lambda x: False)
    x = hard_numbers(ROWS, COLUMNS)
    for found, wanted in zip(made(x.cuda()), made(x), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_compiled_functions_compute_what_eager_ones_do_on_the_cpu(
    dtype: torch.dtype, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "pays", lambda x: True)
    assert_compiled_as_eager_on_the_cpu("cuda", dtype, slack=slack)
