"""What each optimizer keeps on ranks is what is estimated, to the byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.memory import memory
from launch.optimizer_states import BY_SHAPE, NUMBERS
from launch.scenario import Scenario
from model_providers.layout import Layout
from model_providers.presets import get_preset
from pretrain.optimizer_facts import OPTIMIZERS, OptimizerChoice
from tests.launch.alive import measure_states
from tests.launch.test_memory import EXPERTS, GPT2, SIZES, T5
from tests.ranks import RankPool
from tests.runs import tiny
from tests.thorough import cells

UNTIED = {"model__tie_embeddings": False}
PIPELINE = {"layout": {"pp": 2}, "batch": {"micro_size": 2, "accumulation_steps": 2}}
GALORE = {"type": "GaLore", "params": {"rank": 24}}
MUON = {"type": "Muon", "gradient_clipping": 0.0}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "AdamW zero0": (1, {"type": "AdamW"}, {"deepspeed": "zero0.json"}),
    "Lion zero0": (1, {"type": "Lion"}, {"deepspeed": "zero0.json"}),
    "Lion zero2 bf16": (2, {"type": "Lion"}, {"deepspeed": "zero2.json", "precision": "bf16"}),
    "SGD": (2, {"type": "SGD"}, {}),
    "SGD momentum": (2, {"type": "SGD", "params": {"momentum": 0.9}}, {}),
    "RAdam": (2, {"type": "RAdam"}, {}),
    "Muon zero0": (1, MUON, {"deepspeed": "zero0.json"}),
    "Muon zero1": (2, MUON, UNTIED),
    "Muon zero2": (2, MUON, {"deepspeed": "zero2.json"}),
    "Muon zero3": (2, MUON, {"deepspeed": "zero3.json"}),
    "AdamW8bit zero0": (1, {"type": "AdamW8bit"}, {"deepspeed": "zero0.json"}),
    "AdamW8bit zero1 bf16": (2, {"type": "AdamW8bit"}, {"precision": "bf16"}),
    "AdamW8bit zero3": (2, {"type": "AdamW8bit"}, {"deepspeed": "zero3.json"}),
    "AdamW8bit tp": (2, {"type": "AdamW8bit"}, {"layout": {"tp": 2}, "deepspeed": "zero0.json", **GPT2}),
    "AdamW8bit pipeline": (4, {"type": "AdamW8bit", "weight_decay": 0.0}, {**PIPELINE, **UNTIED}),
    "AdamW8bit experts": (2, {"type": "AdamW8bit"}, {"model__moe": EXPERTS, "layout": {"ep": 2}}),
    "AdamW8bit smaller ones too": (
        1,
        {"type": "AdamW8bit", "params": {"min_8bit_size": 64}},
        {"deepspeed": "zero0.json", **T5},
    ),
    "Adafactor zero0": (1, {"type": "Adafactor"}, {"deepspeed": "zero0.json", **GPT2}),
    "Adafactor zero1 bf16": (2, {"type": "Adafactor"}, {"precision": "bf16"}),
    "Adafactor zero2 t5": (2, {"type": "Adafactor"}, {"deepspeed": "zero2.json", **T5}),
    "Adafactor pipeline": (2, {"type": "Adafactor"}, {**PIPELINE, "deepspeed": "zero0.json"}),
    "GaLore zero0": (1, GALORE, {"deepspeed": "zero0.json"}),
    "GaLore zero1 bf16": (2, {**GALORE, "decay_embeddings": False}, {"precision": "bf16"}),
    "GaLore embeddings": (2, {"type": "GaLore", "params": {"rank": 24, "embeddings": True}}, UNTIED),
    "GaLore zero2": (4, {**GALORE, "weight_decay": 0.0}, {"deepspeed": "zero2.json"}),
    "GaLore pipeline": (4, GALORE, PIPELINE),
}
ORDINARY = {
    "Lion zero2 bf16",
    "Muon zero1",
    "AdamW8bit zero0",
    "AdamW8bit zero1 bf16",
    "AdamW8bit zero3",
    "Adafactor zero0",
    "Adafactor zero1 bf16",
    "GaLore zero1 bf16",
    "GaLore pipeline",
}
# torch keeps the number of a step as a tensor for each parameter, or each partition.
STEP_BYTES = 4
KEEPS_STEPS = ("AdamW", "RAdam", "Muon")


@pytest.mark.ranks
@pytest.mark.parametrize("case", cells(CASES, thorough=set(CASES) - ORDINARY))
def test_states_take_what_is_estimated(ranks: RankPool, corpus: str, out: Path, case: str) -> None:
    world_size, optimizer, changes = CASES[case]
    raw = tiny(corpus, out, **SIZES | changes)
    raw["optimizer"] = {"lr": 1e-3, "gradient_clipping": 0.5} | optimizer
    by_stage: dict[int, list[tuple[int, int]]] = {}
    for found, planned in ranks.run(measure_states, world_size, raw):
        by_stage.setdefault(planned.stage, []).append((found, planned.device.optimizer))
    for members in by_stage.values():
        most, planned_bytes = max(found for found, _ in members), members[0][1]
        steps = 100 * STEP_BYTES if optimizer["type"] in KEEPS_STEPS else 0
        assert planned_bytes <= most <= planned_bytes + min(steps, 0.005 * planned_bytes)


def test_every_optimizer_has_its_bytes() -> None:
    assert {name.lower() for name in OPTIMIZERS} == BY_SHAPE | NUMBERS.keys()


@pytest.mark.parametrize("kind", [name.lower() for name in OPTIMIZERS])
def test_no_other_takes_more_than_adamw(kind: str) -> None:
    """And what ZeRO shards comes down with the number of copies."""
    scenario = Scenario(get_preset("gpt2-124m"), Layout(dp=8), 1024, optimizer=OptimizerChoice(kind))
    adamw = replace(scenario, optimizer=OptimizerChoice())
    assert optimizer_bytes(scenario) <= optimizer_bytes(adamw)
    assert optimizer_bytes(scenario) < optimizer_bytes(replace(scenario, zero_stage=0)) / 4


def optimizer_bytes(scenario: Scenario) -> int:
    return memory(scenario).heaviest.device.optimizer
