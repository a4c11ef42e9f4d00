"""One numbering of ranks, megatron-core's; and layouts that cannot cut a model say so."""

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from model_providers.errors import ModelError
from model_providers.layout import AXES, Layout, layout_problems
from tests.model_providers.plans import gpt2_like, llama_like

SIZES = st.integers(min_value=1, max_value=4)


@given(tp=SIZES, pp=SIZES, dp=SIZES)
def test_rank_and_coordinates_are_inverse(tp: int, pp: int, dp: int) -> None:
    layout = Layout(tp=tp, pp=pp, dp=dp)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size == tp * pp * dp
    assert [layout.rank(**place._asdict()) for place in places] == list(range(layout.world_size))


@given(tp=SIZES, pp=SIZES, dp=SIZES)
def test_groups_are_megatron_cores(tp: int, pp: int, dp: int) -> None:
    layout = Layout(tp=tp, pp=pp, dp=dp)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    for axis in AXES:
        assert sorted(layout.groups(axis)) == sorted(generator.get_ranks(axis))


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    layout = Layout(tp=2, dp=2, pp=2)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda layout: layout.coordinates(8), "rank=8: outside the layout's 8 ranks"),
        (lambda layout: layout.rank(tp=2), "tp=2: outside the layout, which has tp=2; count from 0"),
        (lambda layout: layout.groups("ep"), "axis=ep: unknown; choose one of tp, dp, pp"),
    ],
)
def test_places_outside_are_refused(ask: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ask(Layout(tp=2, dp=2, pp=2))


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (
            llama_like(),
            {"tp": 3},
            "layout.tp=3: does not divide model.num_attention_heads=4; choose one of [1, 2, 4]",
        ),
        (
            llama_like(num_attention_heads=12, hidden_size=24, num_kv_heads=6, ffn_hidden_size=48),
            {"tp": 4},
            "layout.tp=4: must divide model.num_kv_heads=6 or be a multiple of it; choose one of [1, 2, 3, 6]",
        ),
        (llama_like(ffn_hidden_size=50), {"tp": 4}, "layout.tp=4: does not divide model.ffn_hidden_size=50"),
        (
            llama_like(pad_vocab_to_multiple_of=1, vocab_size=121),
            {"tp": 2},
            "set model.pad_vocab_to_multiple_of to a multiple",
        ),
        (
            llama_like(),
            {"tp": 4, "sequence_parallel": True},
            "data.sequence_length=18: sequence parallelism shards it",
        ),
        (gpt2_like(max_sequence_length=16), {}, "data.sequence_length=18: the learned positions end at"),
        (
            llama_like(),
            {"pp": 6},
            "layout.pp=6: the model has 5 layers to share out; use layout.pp=5 or fewer",
        ),
    ],
)
def test_a_layout_that_cannot_cut_the_model_says_why(
    model: Any, layout: dict[str, Any], message: str
) -> None:
    problems = layout_problems(model, Layout(**layout), sequence_length=18)
    assert any(message in problem for problem in problems), problems


MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 16}


@pytest.mark.parametrize(
    ("moe", "layout", "message"),
    [
        (
            None,
            {"ep": 2, "dp": 2},
            "layout.ep=2: model.moe is not set, so there are no experts; leave it out",
        ),
        (MOE, {"tp": 2}, "tokens are dispatched by sequence shards; use layout.sequence_parallel=true"),
        (MOE, {"dp": 2, "etp": 2}, "layout.etp=2 with layout.ep=1: nobody would sum"),
        (
            MOE,
            {"ep": 4, "dp": 4},
            "layout.ep=4: does not divide model.moe.num_experts=6; choose one of [1, 2, 3, 6]",
        ),
        (
            MOE,
            {"ep": 2, "dp": 3},
            "layout.etp=1 x layout.ep=2: must divide tp x dp = 1 x 3 ranks of a stage; ",
        ),
        (
            MOE,
            {"tp": 2, "sequence_parallel": True, "ep": 3, "etp": 1, "dp": 3},
            "layout.etp=1 x layout.ep=3: must be a multiple of layout.tp=2",
        ),
        (
            {**MOE, "ffn_hidden_size": 15},
            {"tp": 2, "sequence_parallel": True, "ep": 2, "dp": 2},
            "layout.etp=2: does not divide model.moe.ffn_hidden_size=15; choose one of [1, 3, 5, 15]",
        ),
        (
            {**MOE, "shared_ffn_hidden_size": 15},
            {"tp": 2, "sequence_parallel": True},
            "layout.tp=2: does not divide model.moe.shared_ffn_hidden_size=15",
        ),
    ],
)
def test_experts_that_cannot_be_shared_out_say_why(moe: Any, layout: dict[str, Any], message: str) -> None:
    problems = layout_problems(llama_like(moe=moe), Layout(**layout), sequence_length=18)
    assert any(message in problem for problem in problems), problems


@settings(deadline=None)
@given(
    etp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 3, 4]),
    edp=st.sampled_from([1, 2, 3]),
    pp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2, 4]),
)
def test_expert_coordinates_number_every_stage_anew(etp: int, ep: int, edp: int, pp: int, tp: int) -> None:
    """megatron-core's expert rank generator: etp fastest, then ep, then copies, within each stage."""
    assume((etp * ep * edp) % tp == 0 and (etp * ep) % tp == 0)
    layout = Layout(tp=tp, dp=etp * ep * edp // tp, pp=pp, ep=ep, etp=etp)
    assert layout.expert_dp == edp
    places = [layout.expert_coordinates(rank) for rank in range(layout.world_size)]
    assert places == [(t, e, d) for _ in range(pp) for d in range(edp) for e in range(ep) for t in range(etp)]
    for axis, size in (("etp", etp), ("ep", ep), ("edp", edp), ("copy", etp * ep)):
        groups = layout.expert_groups(axis)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    shares = [layout.tensor_place(rank).expert_share for rank in layout.expert_groups("copy")[0]]
    assert shares == list(range(etp * ep))


def test_sequence_parallelism_needs_something_to_shard_over() -> None:
    assert not Layout(tp=1, sequence_parallel=True).shards_sequence
    assert Layout(tp=2, sequence_parallel=True).shards_sequence
