"""The plan: names that depend on nothing, weights that depend on their name, ties, marks and state dicts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_providers.building import solo_groups
from model_providers.errors import ModelError
from model_providers.families import build_plan
from model_providers.layer_plan import GPTInputs, GPTValue, PlanModule
from model_providers.layout import Layout, TensorPlace
from model_providers.logical import LogicalParameter, describe, merge, split
from model_providers.partial_gradients import partial_gradient_parameters, sum_partial_gradients
from tests.model_providers.plans import SEQUENCE, batch, build, gpt2_like, llama_like

BLOCK = {
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}


def test_layers_and_parameters_have_canonical_names() -> None:
    built = build(llama_like(tie_embeddings=False))
    assert [layer.name for layer in built.plan.layers] == [
        "embedding",
        "layers.0",
        "layers.1",
        "final_norm",
        "head",
    ]
    assert [layer.checkpointable for layer in built.plan.layers] == [False, True, True, False, False]
    wanted = {f"layers.{i}.{name}" for i in range(2) for name in BLOCK}
    wanted |= {"embedding.word_embeddings.weight", "final_norm.norm.weight", "head.weight"}
    assert set(built.named_parameters()) == wanted
    assert build(gpt2_like()).layers["embedding"].state_dict().keys() == {
        "word_embeddings.weight",
        "position_embeddings.weight",
    }


def test_state_dicts_hold_tensors_only_and_load_back() -> None:
    built = build(gpt2_like())
    state = built.layers.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    build(gpt2_like(), seed=2).layers.load_state_dict(state, strict=True)


def test_building_again_gives_the_same_weights_and_touches_no_random_state() -> None:
    plan = build(llama_like()).plan
    state = torch.get_rng_state()
    first, second = (plan.layers[2].build().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_depend_on_seed_layer_and_name() -> None:
    weights = build(llama_like(), seed=1).named_parameters()
    other_seed = build(llama_like(), seed=2).named_parameters()
    name = "layers.{}.mlp.linear_fc1.weight"
    assert not torch.equal(weights[name.format(0)], weights[name.format(1)])
    assert not torch.equal(weights[name.format(0)], other_seed[name.format(0)])
    deeper = build(llama_like(num_layers=5, scale_residual_init=False)).named_parameters()
    assert torch.equal(weights[name.format(1)], deeper[name.format(1)]), (
        "a layer's weights depend on other layers"
    )


def test_a_number_format_only_rounds_the_weights() -> None:
    exact = build(llama_like()).named_parameters()
    rounded = build(llama_like(), params_dtype=torch.bfloat16).named_parameters()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_initial_deviations_are_as_configured() -> None:
    model = llama_like(hidden_size=256, ffn_hidden_size=512, init_std=0.02, num_layers=8)
    weights = build(model).named_parameters()
    assert weights["layers.3.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["embedding.word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("mlp.linear_fc2.weight", "self_attention.linear_proj.weight"):
        assert weights[f"layers.3.{name}"].std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert (weights["layers.3.input_layernorm.weight"] == 1).all()


def test_a_tied_head_starts_as_the_embedding() -> None:
    plan = build(llama_like()).plan
    (tie,) = plan.ties
    modules = {layer.name: layer.build() for layer in plan.layers}
    owner = modules[tie.owner].get_parameter(tie.owner_parameter)
    user = modules[tie.user].get_parameter(tie.user_parameter)
    assert owner is not user and torch.equal(owner, user)
    assert build(llama_like(tie_embeddings=False)).plan.ties == ()


def test_parameters_describe_themselves() -> None:
    described = describe(build(gpt2_like()).layers["layers/0"], TensorPlace(tp=2))
    qkv, fc2 = described["self_attention.linear_qkv.weight"], described["mlp.linear_fc2.weight"]
    assert (qkv.shape, qkv.partition_dim, qkv.stride) == ((192, 32), 0, 1)  # twice the local 96 rows
    assert (fc2.shape, fc2.partition_dim) == ((32, 256), 1)
    assert described["mlp.linear_fc2.bias"].replicated and described["input_layernorm.bias"].replicated
    gated = describe(build(llama_like()).layers["layers/0"], TensorPlace())["mlp.linear_fc1.weight"]
    assert gated.stride == 2 and gated.partition_dim == 0


@settings(deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    stride=st.sampled_from([1, 2, 3]),
    dim=st.sampled_from([0, 1]),
    rows=st.integers(min_value=1, max_value=3),
)
def test_splitting_and_merging_are_inverse(tp: int, stride: int, dim: int, rows: int) -> None:
    shape = [5, 5]
    shape[dim] = rows * tp * stride
    full = torch.arange(math.prod(shape)).view(shape)
    description = LogicalParameter("w", tuple(shape), dim, stride)
    shards = [split(full, description, TensorPlace(tp=tp, tp_rank=rank)) for rank in range(tp)]
    assert torch.equal(merge(shards, description), full)
    replicated = LogicalParameter("w", tuple(shape), None)
    assert torch.equal(
        merge([split(full, replicated, TensorPlace(tp=tp, tp_rank=rank)) for rank in range(tp)], replicated),
        full,
    )


@settings(deadline=None)
@given(
    ep=st.sampled_from([1, 2, 3]),
    etp=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    dim=st.sampled_from([1, 2]),
)
def test_experts_are_cut_by_ep_and_then_by_etp(ep: int, etp: int, stride: int, dim: int) -> None:
    shape = [6, 4, 4]
    full = torch.arange(math.prod(shape)).view(shape)
    description = LogicalParameter("w", tuple(shape), dim, stride, is_expert=True)
    places = [
        TensorPlace(tp=5, tp_rank=3, etp=etp, etp_rank=e, ep=ep, ep_rank=r)
        for r in range(ep)
        for e in range(etp)
    ]
    assert [place.expert_share for place in places] == list(range(ep * etp))
    shares = [split(full, description, place) for place in places]
    assert shares[0].shape[0] == 6 // ep and shares[0].shape[dim] == 4 // etp
    assert torch.equal(merge(shares, description, ep=ep), full)


def test_a_gated_shard_holds_a_part_of_gate_and_up() -> None:
    description = LogicalParameter("fc1", (8, 1), 0, stride=2)
    full = torch.arange(8)[:, None]  # gate 0..3, up 4..7
    assert split(full, description, TensorPlace(tp=2, tp_rank=1)).flatten().tolist() == [2, 3, 6, 7]


def test_partial_gradients_are_found() -> None:
    plain = build(gpt2_like(qk_norm=True))
    heads = {"q_layernorm", "k_layernorm"}
    found = {id(parameter) for parameter in partial_gradient_parameters(plain.layers)}
    names = {name for name, parameter in plain.named_parameters().items() if id(parameter) in found}
    assert names == {
        f"layers.{i}.self_attention.{n}.{p}" for i in range(2) for n in heads for p in ("weight", "bias")
    }
    assert sum_partial_gradients(plain.layers, solo_groups().tp) == 0


def test_inputs_and_values_travel_as_tensors() -> None:
    tokens, _ = batch(llama_like())
    segments = torch.zeros_like(tokens, dtype=torch.int32)
    assert GPTInputs(tokens).to_wire() is tokens
    assert GPTInputs.from_wire((tokens, segments)).segments is segments
    with pytest.raises(AssertionError, match="does not travel"):
        GPTValue(tokens, cache=object()).to_wire()
    with pytest.raises(NotImplementedError):
        PlanModule()(torch.zeros(1))


def test_parts_of_a_value_are_told_apart_by_their_number_formats() -> None:
    hidden, ahead = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    tokens, segments = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int32)
    for value in (
        GPTValue(hidden),
        GPTValue(hidden, segments),
        GPTValue(hidden, tokens=tokens),
        GPTValue(hidden, tokens=tokens, ahead=ahead),
        GPTValue(hidden, segments, tokens=tokens, ahead=ahead),
    ):
        back = GPTValue.from_wire(value.to_wire())
        assert all(one is other for one, other in zip(back, value, strict=True)), value


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ModelError, match=r"layout\.tp=3: does not divide model\.num_attention_heads=4"):
        build_plan(llama_like(), Layout(tp=3), solo_groups(), seed=1, sequence_length=SEQUENCE)
