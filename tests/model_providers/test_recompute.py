"""What is forgotten in the forward pass comes back the same in the backward pass, dropout masks included."""

from typing import Any

import pytest
import torch

from model_providers import weight_gradients
from model_providers.building import checkpoint
from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.layer_plan import GPTInputs, GPTValue, Recompute
from model_providers.layout import Layout
from model_providers.partial_gradients import sum_partial_gradients
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import LLAMA_LIKE, SEQUENCE, Built, batch, build, llama_like, tensor_groups

FACTS = LLAMA_LIKE | {"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_layers": 3}
SEGMENTS = torch.tensor([[0] * 6 + [1] * 10] * 2, dtype=torch.int32)


class Run:
    """Applies a plan as an engine does, checkpointing groups of layers under full recompute."""

    def __init__(self, built: Built):
        self.built, self.recompute = built, built.plan.recompute

    def __call__(self, wire: Any) -> Any:
        layers = list(zip(self.built.plan.layers, self.built.layers.values(), strict=True))
        while layers:
            group = [layers.pop(0)]
            if self.recompute.mode == "full" and group[0][0].checkpointable:
                while layers and layers[0][0].checkpointable and len(group) < self.recompute.every:
                    group.append(layers.pop(0))
                wire = self._checkpointed([module for _, module in group], wire)
            else:
                wire = group[0][1](wire)
        return wire

    def _checkpointed(self, modules: list[Any], wire: Any) -> Any:
        def run(*tensors: torch.Tensor) -> Any:
            value: Any = tensors[0] if len(tensors) == 1 else tensors
            for module in modules:
                value = module(value)
            return value

        return self.built.plan.checkpoint_function(run, *(wire if isinstance(wire, tuple) else (wire,)))


def gradients_after_one_step(
    tp: int, sequence_parallel: bool, recompute: Recompute, with_segments: bool, **facts: Any
) -> tuple[float, list[torch.Tensor], list[int]]:
    """Loss, gradients, and the state of the random streams afterwards."""
    model = ModelConfig(**FACTS | facts)
    groups = tensor_groups(tp) if tp > 1 else None
    layout = Layout(tp=tp, sequence_parallel=sequence_parallel)
    built = build(model, layout, groups, recompute=recompute)
    if groups is not None:
        sum_partial_gradients(built.layers, groups.tp)
    tokens, targets = batch(model)
    seed_streams(5, step=3, tp_rank=groups.tp.rank() if groups is not None else 0)
    output = Run(built)((tokens, SEGMENTS) if with_segments else tokens)
    loss = built.plan.loss(output, targets)
    loss.backward()
    gradients = [parameter.grad for parameter in built.layers.parameters() if parameter.grad is not None]
    return loss.item(), gradients, torch.get_rng_state().tolist()


PARTS = Recompute("selective", modules=("core_attn", "layernorm", "mlp"))
MODES = [Recompute("selective"), PARTS, Recompute("full"), Recompute("full", every=2)]


@pytest.mark.parametrize("with_segments", [False, True], ids=["plain", "segments"])
@pytest.mark.parametrize("recompute", MODES, ids=str)
def test_recompute_repeats_the_dropout_masks(recompute: Recompute, with_segments: bool) -> None:
    wanted = gradients_after_one_step(1, False, Recompute(), with_segments)
    found = gradients_after_one_step(1, False, recompute, with_segments)
    assert found[0] == wanted[0] and found[2] == wanted[2]
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "shared_ffn_hidden_size": 16, "aux_loss": 0.01}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
PLACES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "norms": (("layernorm",), {}),
    "mlp": (("mlp",), {}),
    "mlp with biases": (("mlp", "layernorm"), {"linear_bias": True, "normalization": "layernorm"}),
    "experts": (("moe", "layernorm"), {"moe": MOE}),
    "inside experts": (("moe_act", "shared_experts"), {"moe": MOE}),
    "inside experts, gelu": (("moe_act",), {"moe": MOE, "activation": "gelu"}),
    "latent": (("mla_up_proj", "layernorm"), {"mla": MLA, "num_kv_heads": None}),
    "latent, and its attention": (("mla_up_proj", "core_attn"), {"mla": MLA, "num_kv_heads": None}),
    "whole queries": (("mla_up_proj",), {"mla": MLA | {"q_lora_rank": None}, "num_kv_heads": None}),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_part_of_a_layer_comes_back_the_same(place: str) -> None:
    modules, facts = PLACES[place]
    wanted = gradients_after_one_step(1, False, Recompute(), False, **facts)
    found = gradients_after_one_step(1, False, Recompute("selective", modules=modules), False, **facts)
    assert found[0] == wanted[0] and found[2] == wanted[2] and len(found[1]) == len(wanted[1])
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
def test_weight_gradients_of_what_came_back_can_wait(place: str) -> None:
    """The split backward pass of zero-bubble schedules goes through the second forward pass too."""
    modules, facts = PLACES[place]
    wanted = gradients_after_one_step(1, False, Recompute(), False, **facts)[1]
    model = ModelConfig(**FACTS | facts)
    built = build(model, recompute=Recompute("selective", modules=modules))
    tokens, targets = batch(model)
    seed_streams(5, step=3)
    with weight_gradients.may_wait():
        loss = built.plan.loss(Run(built)(tokens), targets)
        with weight_gradients.put_aside() as store:
            loss.backward()
        assert len(store) > 0
        store.compute(_add)
    found = [parameter.grad for parameter in built.layers.parameters() if parameter.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
def test_recompute_repeats_the_dropout_masks_on_two_ranks(ranks: Any, sequence_parallel: bool) -> None:
    wanted = ranks.run(gradients_after_one_step, 2, 2, sequence_parallel, Recompute(), False)
    for recompute in MODES:
        found = ranks.run(gradients_after_one_step, 2, 2, sequence_parallel, recompute, False)
        for mine, reference in zip(found, wanted, strict=True):
            assert mine[0] == reference[0] and mine[2] == reference[2], recompute
            for one, other in zip(mine[1], reference[1], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_full_recompute_keeps_less() -> None:
    """Bytes saved for the backward pass, counted as autograd stores them."""
    kept = {}
    for recompute in (Recompute(), Recompute("full")):
        built = build(llama_like(num_layers=4), recompute=recompute)
        tokens, targets = batch(llama_like())
        stored: dict[int, int] = {}

        def pack(tensor: torch.Tensor, stored: dict[int, int] = stored) -> torch.Tensor:
            stored[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = built.plan.loss(Run(built)(tokens), targets)
        parameters = {parameter.data_ptr() for parameter in built.layers.parameters()}
        kept[recompute.mode] = sum(size for pointer, size in stored.items() if pointer not in parameters)
        loss.backward()
    assert kept["full"] < 0.6 * kept["none"], kept


def test_checkpoint_carries_integer_tensors_through() -> None:
    hidden = torch.randn(SEQUENCE, 2, 4, requires_grad=True)
    seed_streams(1)
    output, segments = checkpoint(lambda h, s: (h * 2, s), hidden, SEGMENTS)
    output.sum().backward()
    assert torch.equal(segments, SEGMENTS) and torch.equal(hidden.grad, torch.full_like(hidden, 2.0))


@pytest.mark.parametrize(
    "recompute",
    [Recompute("some"), Recompute("full", every=0), Recompute("selective", modules=("mpl",))],
    ids=str,
)  # type: ignore[arg-type]
def test_unknown_recompute_is_refused(recompute: Recompute) -> None:
    with pytest.raises(ModelError, match=r"recompute\."):
        build(llama_like(), recompute=recompute)


def test_values_and_their_wire_form_mean_the_same() -> None:
    built = build(llama_like())
    tokens, _ = batch(llama_like())
    as_value, as_wire = built(GPTInputs(tokens, SEGMENTS)), built((tokens, SEGMENTS))
    assert torch.equal(as_value, as_wire)
    value = GPTValue(torch.zeros(1), SEGMENTS)
    assert GPTValue.from_wire(value.to_wire()) == value
    assert isinstance(GPTValue(torch.zeros(1)).to_wire(), torch.Tensor)
