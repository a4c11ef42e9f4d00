"""What the tests of this room share: small models, a plan run layer by layer, gradients by name and
undivided.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from model_providers.building import solo_groups
from model_providers.config import ModelConfig
from model_providers.families import build_plan
from model_providers.layer_plan import LayerPlan, Targets
from model_providers.layout import Layout, TensorPlace
from model_providers.logical import describe_parameter, merge
from model_providers.partial_gradients import sum_partial_gradients

SEQUENCE = 16

LLAMA_LIKE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 120,
    "max_sequence_length": 64,
    "init_std": 0.1,
}
GPT2_LIKE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_sequence_length": 64,
    "position_embedding": "learned",
    "normalization": "layernorm",
    "activation": "gelu_tanh",
    "linear_bias": True,
    "init_std": 0.1,
}


def llama_like(**facts: Any) -> ModelConfig:
    return ModelConfig(**LLAMA_LIKE | facts)


def gpt2_like(**facts: Any) -> ModelConfig:
    return ModelConfig(**GPT2_LIKE | facts)


@dataclass
class Built:
    """A plan with its modules, tied as an engine ties them."""

    plan: LayerPlan
    layers: nn.ModuleDict

    def __call__(self, inputs: Any) -> Any:
        value = inputs
        for layer in self.layers.values():
            value = layer(value)
        return value

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): parameter for name, parameter in self.layers.named_parameters()}


def build(model: ModelConfig, layout: Layout | None = None, groups: Any = None, **options: Any) -> Built:
    options = {"seed": 1, "sequence_length": SEQUENCE} | options
    plan = build_plan(model, layout or Layout(), groups or solo_groups(), **options)
    layers = nn.ModuleDict({layer.name.replace(".", "/"): layer.build() for layer in plan.layers})
    for tie in plan.ties:
        owner, user = (layers[name.replace(".", "/")] for name in (tie.owner, tie.user))
        assert torch.equal(owner.get_parameter(tie.owner_parameter), user.get_parameter(tie.user_parameter))
        module, _, parameter = tie.user_parameter.rpartition(".")
        setattr(user.get_submodule(module), parameter, owner.get_parameter(tie.owner_parameter))
    return Built(plan, layers)


def batch(
    model: ModelConfig, size: int = 2, length: int = SEQUENCE, seed: int = 0
) -> tuple[torch.Tensor, Targets]:
    """Tokens [b s] and targets with the weights of a mean over all tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.known_vocab_size, (size, length + 1), generator=generator)
    weights = torch.full((size, length), 1.0 / (size * length))
    return tokens[:, :-1].contiguous(), Targets(tokens[:, 1:].contiguous(), weights)


def loss_and_gradients(built: Built, inputs: Any, targets: Targets) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's gradients by full name."""
    for parameter in built.layers.parameters():
        parameter.grad = None
    loss = built.plan.loss(built(inputs), targets)
    loss.backward()
    gradients = {}
    for name, parameter in built.named_parameters().items():
        assert parameter.grad is not None, f"no gradient reached {name}"
        gradients[name] = parameter.grad.clone()
    return loss.item(), gradients


def undivided(built: Built, tensors: dict[str, torch.Tensor], tp_group: Any) -> dict[str, torch.Tensor]:
    """Every tensor rank's shares put together again; replicated ones must be equal on all ranks."""
    parameters, whole = built.named_parameters(), {}
    for name, tensor in tensors.items():
        shards = [torch.empty_like(tensor) for _ in range(tp_group.size())]
        dist.all_gather(shards, tensor.contiguous(), group=tp_group)
        description = describe_parameter(name, parameters[name], TensorPlace(tp=tp_group.size()))
        if description.replicated:
            for shard in shards:
                torch.testing.assert_close(
                    shard, shards[0], rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
                )
        whole[name] = merge(shards, description)
    return whole


def tensor_groups(tp: int, pp: int = 1) -> ProcessGroupCollection:
    """Groups over the default world, through megatron-core's own parallel state."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "pp"])


def tensor_parallel_run(
    facts: dict[str, Any], tp: int, sequence_parallel: bool, **options: Any
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """On a rank: loss, undivided initial weights and undivided gradients."""
    model = ModelConfig(**facts)
    layout = Layout(tp=tp, sequence_parallel=sequence_parallel)
    groups = tensor_groups(tp)
    built = build(model, layout, groups, **options)
    sum_partial_gradients(built.layers, groups.tp)
    weights = undivided(built, {name: p.detach() for name, p in built.named_parameters().items()}, groups.tp)
    loss, gradients = loss_and_gradients(built, *batch(model))
    return loss, weights, undivided(built, gradients, groups.tp)


def assert_same_tensors(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float
) -> None:
    """Largest difference against the largest entry, tensor by tensor; tiny tensors against the largest of
    all.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max(tensor.abs().max().item() for tensor in wanted.values())
    for name, tensor in wanted.items():
        difference = (found[name] - tensor).abs().max().item()
        scale = max(tensor.abs().max().item(), floor)
        assert difference <= relative * scale, f"{name}: {difference:.3e} of {scale:.3e}"
