"""Every optimizer that DeepSpeed has for this device trains, and shards of it train the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.parity import compare
from tests.conftest import OneProcess
from tests.parity.record import record_raw
from tests.parity.test_layouts import assert_same
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells

STEPS = 6
UNTESTED = {"zero_allow_untested_optimizer": True}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"type": "Adam", "lr": 1e-3},
    "AdamW": {"type": "AdamW", "lr": 1e-3, "params": {"torch_adam": True, "fused": False}},
    "Lion": {"type": "Lion", "lr": 1e-4},
    "Muon": {"type": "Muon", "lr": 5e-3, "gradient_clipping": 0.0, "params": {"momentum": 0.9}},
    "Adagrad": {"type": "Adagrad", "lr": 1e-2, "weight_decay": 0.0},
    "SGD": {"type": "SGD", "lr": 0.5, "weight_decay": 0.0, "params": {"momentum": 0.9}},
    "RAdam": {"type": "RAdam", "lr": 1e-3},
}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", cells([1, 2, 3], thorough=["2"]))
@pytest.mark.parametrize("name", cells(OPTIMIZERS, thorough=["Adagrad", "SGD", "RAdam"]))
def test_sharded_optimizers_do_what_whole_ones_do(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path, name: str, stage: int
) -> None:
    document = tmp_path / "deepspeed.json"
    document.write_text(json.dumps({"zero_optimization": {"stage": stage}, **UNTESTED}))
    reference = one_process(STEPS, optimizer=OPTIMIZERS[name])
    raw = tiny(corpus, out, optimizer=OPTIMIZERS[name], deepspeed=str(document))
    trace = ranks.run(record_raw, 2, raw, STEPS)[0]
    assert min(reference.losses) < reference.losses[0] - 0.02, "the reference itself must learn"
    if name == "Muon":  # under ZeRO, DeepSpeed's gradients and norms are those of the orthogonalised update
        difference = compare(trace, reference)
        assert difference.loss < 1e-5 and difference.weights < 1e-5, difference
        return
    # Lion takes the sign of a difference of gradients: rounding flips single signs.
    assert_same(trace, reference, tolerance=1e-4 if name == "Lion" else 1e-5)
