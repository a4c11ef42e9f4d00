"""Learning rates as functions of the step, and what is decayed."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from model_providers.building import solo_groups
from model_providers.families import build_plan
from model_providers.layout import Layout
from model_providers.presets import PRESETS
from pretrain.config import OptimizerConfig, Schedule
from pretrain.engine.layers import tied_to_embedding
from pretrain.optim import learning_rate_factor, parameter_groups

STEPS = 100
KINDS = [
    {"kind": "constant", "warmup_steps": 10},
    {"kind": "cosine", "warmup_steps": 10, "min_factor": 0.1},
    {"kind": "linear", "warmup_steps": 10, "min_factor": 0.05},
    *(
        {"kind": "wsd", "warmup_steps": 10, "decay_steps": 30, "decay_shape": s}
        for s in ("linear", "cosine", "sqrt")
    ),
    {"kind": "inverse_square_root", "warmup_steps": 10},
    {"kind": "power", "warmup_steps": 10, "decay_steps": 20},
]


def schedule(**facts: object) -> Schedule:
    return TypeAdapter(Schedule).validate_python(facts)


@pytest.mark.parametrize("facts", KINDS, ids=str)
@given(step=st.integers(0, 3 * STEPS))
def test_factors_lie_between_zero_and_one(facts: dict[str, object], step: int) -> None:
    assert 0.0 <= learning_rate_factor(schedule(**facts), step, STEPS) <= 1.0


@pytest.mark.parametrize("facts", KINDS, ids=str)
def test_warmup_is_a_straight_line_to_the_peak(facts: dict[str, object]) -> None:
    factors = [learning_rate_factor(schedule(**facts), step, STEPS) for step in range(STEPS)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == factors[9] == 1.0


@pytest.mark.parametrize(
    ("facts", "middle", "last"),
    [
        (KINDS[1], 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 46 / 90)), 0.1),
        (KINDS[2], 0.05 + 0.95 * (1 - 46 / 90), 0.05),
        (KINDS[3], 1.0, 0.0),
        (KINDS[6], math.sqrt(10 / 56), math.sqrt(10 / 100)),
        (KINDS[7], 5.6**-0.51, 0.0),
    ],
    ids=["cosine", "linear", "wsd", "inverse-sqrt", "power"],
)
def test_shapes_have_their_published_values(facts: dict[str, object], middle: float, last: float) -> None:
    assert learning_rate_factor(schedule(**facts), 55, STEPS) == pytest.approx(middle)
    assert learning_rate_factor(schedule(**facts), STEPS - 1, STEPS) == pytest.approx(last, abs=1e-12)


def test_wsd_holds_the_peak_and_then_falls() -> None:
    factors = [learning_rate_factor(schedule(**KINDS[5]), step, STEPS) for step in range(STEPS)]
    assert set(factors[9:70]) == {1.0}
    assert factors[70] == pytest.approx(1 - math.sqrt(1 / 30))
    assert all(later < earlier for earlier, later in pairwise(factors[69:]))


def test_norms_and_biases_are_never_decayed_embeddings_if_asked() -> None:
    named = [
        ("embedding.word_embeddings.weight", SimpleNamespace(shape=(8, 4))),
        ("layers.0.mlp.linear_fc1.weight", SimpleNamespace(shape=(4, 4))),
        ("layers.0.mlp.linear_fc1.bias", SimpleNamespace(shape=(4,))),
        ("layers.0.input_layernorm.weight", SimpleNamespace(shape=(4,))),
        ("head.weight", SimpleNamespace(shape=(0,), ds_shape=(8, 4))),
    ]

    def decayed(tied: set[str] = frozenset(), **facts: object) -> list[int]:  # type: ignore[assignment]
        groups = parameter_groups(named, OptimizerConfig(weight_decay=0.1, **facts), tied)  # type: ignore[arg-type]
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        return [[p for _, p in named].index(p) for p in groups[0]["params"]]

    assert decayed() == [0, 1, 4]
    assert decayed(decay_embeddings=False) == [1, 4]
    assert decayed({"head.weight"}, decay_embeddings=False) == [1]
    (single,) = parameter_groups(named, OptimizerConfig(weight_decay=0.0))
    assert len(single["params"]) == 5


def test_copies_of_what_layers_share_are_decayed_alike_on_every_stage() -> None:
    """A T5's table of distances is no embedding, neither where it is owned nor where it is used."""
    model = PRESETS["tiny-t5"]
    plan = build_plan(model, Layout(), solo_groups(), seed=1, sequence_length=32, target_length=16)
    tied = tied_to_embedding(plan)
    for tie in plan.ties:
        named = [
            (f"{tie.owner}.{tie.owner_parameter}", SimpleNamespace(shape=(8, 4))),
            (f"{tie.user}.{tie.user_parameter}", SimpleNamespace(shape=(8, 4))),
        ]
        groups = parameter_groups(named, OptimizerConfig(weight_decay=0.1, decay_embeddings=False), tied)
        assert sorted(len(group["params"]) for group in groups) == [0, 2], tie
    assert any("relative" in tie.user_parameter for tie in plan.ties)
