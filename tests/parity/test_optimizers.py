"""Every optimizer that DeepSpeed has for this device trains, and shards of it train the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.parity import compare
from tests.conftest import OneProcess
from tests.parity.agreement import assert_alike
from tests.parity.models import UNTIED
from tests.parity.record import record_muon, record_raw
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells, everyday

STEPS = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"type": "Adam", "lr": 1e-3},
    "AdamW": {"type": "AdamW", "lr": 1e-3, "params": {"torch_adam": True, "fused": False}},
    "Lion": {"type": "Lion", "lr": 1e-4},
    "Muon": {"type": "Muon", "lr": 5e-3, "gradient_clipping": 0.0, "params": {"momentum": 0.9}},
    "Adagrad": {"type": "Adagrad", "lr": 1e-2, "weight_decay": 0.0},
    "SGD": {"type": "SGD", "lr": 0.5, "weight_decay": 0.0, "params": {"momentum": 0.9}},
    "RAdam": {"type": "RAdam", "lr": 1e-3},
    "AdamW8bit": {"type": "AdamW8bit", "lr": 1e-3},
    "Adafactor": {"type": "Adafactor", "lr": 1e-2},
    "GaLore": {"type": "GaLore", "lr": 4e-3, "params": {"rank": 16, "update_gap": 3, "scale": 0.5}},
}
BY_ROWS = ("Adafactor", "GaLore")
# Pipelines, number formats and what lies across partitions; each against one process of the same numbers.
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Adafactor pp2": ("Adafactor", 2, {"layout": {"pp": 2}, "deepspeed": "zero0.json"}),
    "Adafactor pp2-dp2 zb-h1": ("Adafactor", 4, {"layout": {"pp": 2, "schedule": "zb-h1"}, **UNTIED}),
    "Adafactor bf16 full": ("Adafactor", 2, {"precision": "bf16", "recompute": "full"}),
    "GaLore pp2-dp2": ("GaLore", 4, {"layout": {"pp": 2}}),
    "GaLore bf16 zero2": ("GaLore", 2, {"precision": "bf16", "deepspeed": "zero2.json"}),
    "GaLore all matrices": ("GaLore", 2, {"optimizer__params__embeddings": True}),
    "AdamW8bit tp2+sp": ("AdamW8bit", 2, {"layout": {"tp": 2, "sequence_parallel": True}}),
    "AdamW8bit pp2-dp2": ("AdamW8bit", 4, {"layout": {"pp": 2}, **UNTIED}),
    "AdamW8bit bf16": ("AdamW8bit", 2, {"precision": "bf16"}),
}


@pytest.mark.ranks
@everyday("AdamW-3", "Muon-1", "AdamW8bit-1", "GaLore-1")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_optimizers_do_what_whole_ones_do(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, tmp_path: Path, name: str, stage: int
) -> None:
    if name in BY_ROWS and stage == 3:
        return  # refused: rows_need_whole_rows
    document = tmp_path / "deepspeed.json"
    document.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    raw = tiny(corpus, out, optimizer=OPTIMIZERS[name], deepspeed=str(document))
    if name == "Muon":
        reference = ranks.run(record_muon, 1, {**raw, "deepspeed": "zero0.json"}, STEPS)[0]
        trace = ranks.run(record_muon, 2, raw, STEPS)[0]
    else:
        reference = one_process(STEPS, optimizer=OPTIMIZERS[name])
        trace = ranks.run(record_raw, 2, raw, STEPS)[0]
    assert min(reference.losses) < reference.losses[0] - 0.02, "the reference itself must learn"
    if name == "Muon":  # under ZeRO, DeepSpeed's gradients and norms are those of the orthogonalised update
        difference = compare(trace, reference)
        assert difference.loss < 1e-5 and difference.weights < 1e-5, difference
        return
    assert_alike(name, trace, reference)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case",
    cells(
        LAYOUTS, thorough=["Adafactor bf16 full", "GaLore all matrices", "AdamW8bit bf16", "Adafactor pp2"]
    ),
)
def test_light_optimizers_take_the_same_steps_in_every_layout(
    ranks: RankPool, corpus: str, one_process: OneProcess, out: Path, case: str
) -> None:
    name, world_size, changes = LAYOUTS[case]
    same = {key: value for key, value in changes.items() if key in ("model__tie_embeddings", "precision")}
    same |= {"deepspeed": "zero1.json"} if "precision" in changes else {}
    settings = {key: value for key, value in changes.items() if key.startswith("optimizer__")}
    reference = one_process(STEPS, optimizer=OPTIMIZERS[name], **same, **settings)
    raw = tiny(corpus, out, optimizer=OPTIMIZERS[name], **changes)
    assert_alike(name, ranks.run(record_raw, world_size, raw, STEPS)[0], reference)


@pytest.mark.ranks
@everyday("Muon", "Adafactor")
@pytest.mark.parametrize("name", ["Lion", "Muon", "AdamW8bit", "Adafactor", "GaLore"])
def test_light_optimizers_train(ranks: RankPool, corpus: str, out: Path, name: str) -> None:
    """In bf16 on two ranks, with warm-up, decay of weights and clipping where there is one: it falls by a sixth."""
    optimizer = OPTIMIZERS[name] | ({"lr": 1e-3} if name == "Lion" else {})
    raw = tiny(corpus, out, optimizer=optimizer, precision="bf16", deepspeed="zero2.json")
    losses = ranks.run(record_raw, 2, raw, 16)[0].losses
    assert losses[-1] < 5 / 6 * losses[0]
