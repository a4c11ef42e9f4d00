"""Whose FP8 a run gets by what it says itself, and which of torch's products are no faster; the rules are in
`test_config_rules`.
"""

from pathlib import Path
from typing import Any

import pytest

from pretrain.fp8_rules import emulated_on_cuda
from pretrain.fp8_te_rules import TE_MULTIPLES, settled_fp8
from tests.runs import checked, tiny

FITTING = {"kernels": "auto", "precision": "bf16", "data__sequence_length": 64}


def run_of(corpus: str, out: Path, recipe: str, **changes: Any) -> Any:
    return checked(tiny(corpus, out, fp8={"recipe": recipe}, **changes), changes.get("world", 1))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"kernels": "torch"}, "kernels=torch: its FP8 is that of its own layers"),
        ({**FITTING, "data__sequence_length": 24}, "sequence_length=24: tokens are no multiple of 16"),
        ({**FITTING, "deepspeed": "zero3.json"}, "zero_optimization.stage=3: from forward to backward"),
    ],
    ids=str,
)
def test_auto_is_torch_where_transformer_engine_is_refused(
    corpus: str, out: Path, changes: dict[str, Any], why: str
) -> None:
    fp8, said = settled_fp8(run_of(corpus, out, "current", **changes))
    assert fp8 is not None and fp8.backend == "torch"
    assert said is not None and said.startswith(f"fp8.backend=auto: torch, because of {why}")


@pytest.mark.parametrize("changes", [{}, {"deepspeed": "zero3.json", "recompute": "full"}], ids=str)
def test_auto_stays_open_where_the_hardware_decides(corpus: str, out: Path, changes: dict[str, Any]) -> None:
    fp8, said = settled_fp8(run_of(corpus, out, "current", **{**FITTING, **changes}))
    assert fp8 is not None and fp8.backend == "auto" and said is None


def test_no_fp8_is_no_fp8(corpus: str, out: Path) -> None:
    assert settled_fp8(checked(tiny(corpus, out), 1)) == (None, None)


@pytest.mark.parametrize(
    "recipe, changes, said",
    [
        ("current", {}, None),
        ("current", {"data__sequence_length": 28}, "a micro-batch is 56 tokens, no multiple of 16"),
        ("blockwise", {}, "a micro-batch is 64 tokens, no multiple of 128"),
        ("blockwise", {"data__sequence_length": 64}, "the model is 32 wide, no multiple of 128"),
        ("mxfp8", {}, None),
    ],
)
def test_products_that_torch_emulates_on_cuda_are_told(
    corpus: str, out: Path, recipe: str, changes: dict[str, Any], said: str | None
) -> None:
    run = run_of(corpus, out, recipe, **changes)
    found = emulated_on_cuda(run, run.config.fp8)
    assert found is None if said is None else found is not None and said in found and "emulated" in found


def test_every_recipe_has_its_multiple() -> None:
    assert TE_MULTIPLES == {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32, "nvfp4": 16}
