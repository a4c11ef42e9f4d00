"""What the formulae count is what gets built, and what the papers print."""

from typing import Any

import pytest
import torch

from model_providers.config import ModelConfig
from model_providers.cost import (
    block_forward_flops,
    layer_costs,
    parameters,
    state_bytes_per_parameter,
    train_flops_per_token,
)
from model_providers.errors import ModelError
from model_providers.layer_plan import Recompute, T5Inputs
from model_providers.presets import get_preset
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import build, gpt2_like, llama_like

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

MIXES = {
    "llama": llama_like(),
    "gpt2": gpt2_like(),
    "untied, qkv bias, qk-norm": llama_like(tie_embeddings=False, qkv_bias=True, qk_norm=True),
    "layernorm with qk-norm": gpt2_like(qk_norm=True, tie_embeddings=False),
    "wide heads, multi-query, squared relu": llama_like(
        head_dim=16, num_kv_heads=1, activation="squared_relu"
    ),
    "derived ffn, no positions": llama_like(ffn_hidden_size=None, position_embedding="none"),
    "derived plain ffn, unpadded": gpt2_like(ffn_hidden_size=None, pad_vocab_to_multiple_of=1),
    "experts": llama_like(moe=MOE),
    "latent": llama_like(num_kv_heads=None, mla=LATENT),
    "latent queries too": llama_like(num_kv_heads=None, mla=LATENT | {"q_lora_rank": 24}),
    "gelu experts": gpt2_like(moe=MOE, linear_bias=False),
    "encoder": gpt2_like(activation="gelu", bert={}),
    "encoder with norms before": gpt2_like(bert={"norm": "pre", "token_types": 0, "sentence_head": False}),
}

STACKS = {
    "electra": get_preset("tiny-electra"),
    "electra, norms before, rotary": llama_like(
        num_kv_heads=None,
        bert={"norm": "pre", "sentence_head": False, "token_types": 0},
        electra={"generator_layers": 1, "generator_hidden_size": 16, "generator_heads": 2},
    ),
    "t5": llama_like(num_kv_heads=None, position_embedding="relative", t5={"num_encoder_layers": 3}),
    "t5 1.1, rotary": llama_like(num_kv_heads=None, tie_embeddings=False, t5={"num_encoder_layers": 1}),
}

# Whose routers keep a little more or less than is planned.
MIXES_IN_ROUTING = {
    "gated shared experts": llama_like(
        moe=MOE | {"shared_ffn_hidden_size": 24, "shared_gate": True, "aux_loss": 0.1}
    ),
    "grouped sigmoid": llama_like(
        moe=MOE | {"score": "sigmoid", "bias_update_rate": 0.1, "num_groups": 2, "group_top_k": 1}
    ),
    "all losses": llama_like(
        moe=MOE | {"aux_loss": 0.1, "sequence_aux_loss": 0.1, "global_aux_loss": 0.1, "z_loss": 0.1}
    ),
    "a deep one": llama_like(
        num_kv_heads=None,
        mla=LATENT,
        moe=MOE | {"first_dense": 1, "shared_ffn_hidden_size": 24},
        mtp={"depth": 2},
    ),
}


@pytest.mark.parametrize(
    "model", (MIXES | MIXES_IN_ROUTING | STACKS).values(), ids=MIXES | MIXES_IN_ROUTING | STACKS
)
def test_parameters_are_those_of_the_built_model(model: ModelConfig) -> None:
    built = build(model)
    assert sum(parameter.numel() for parameter in built.layers.parameters()) == parameters(model)
    seen: set[int] = set()
    for layer, module in zip(built.plan.layers, built.layers.values(), strict=True):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        assert layer.cost.parameters == sum(parameter.numel() for parameter in own), layer.name


@pytest.mark.parametrize(
    ("attention", "share"), [("full", 12), ("causal", 6)], ids=["Narayanan 2021", "Megatron-LM since 2025"]
)
def test_train_flops_follow_the_published_conventions(attention: Any, share: int) -> None:
    """6 (L (2 h^2 (1 + kv/heads) + m h ffn) + V h) + A L h s, with A = 12 or 6 (gated m = 3)."""
    for name, m in (("llama3-8b", 3), ("megatron-1t", 2)):
        model, s = get_preset(name), 2048
        layers, h, kv = model.num_layers, model.hidden_size, model.kv_heads / model.num_attention_heads
        linear = layers * (2 * h**2 * (1 + kv) + m * h * model.ffn_width) + model.known_vocab_size * h
        wanted = 6 * linear + share * layers * h * s
        assert train_flops_per_token(model, s, attention) == pytest.approx(wanted, rel=1e-12)


def test_a_window_costs_less() -> None:
    full, windowed = llama_like(), llama_like(sliding_window=4)
    assert block_forward_flops(windowed, 64) < block_forward_flops(full, 64)
    assert block_forward_flops(llama_like(sliding_window=64), 64) == block_forward_flops(full, 64)


def korthikanti(tp: int, sequence_parallel: bool, recompute: Any) -> float:
    """Bytes per token and width of one GPT block, unfused attention."""
    model = get_preset("gpt2-124m")
    costs = layer_costs(
        model,
        1024,
        recompute=recompute,
        tp=tp,
        sequence_parallel=sequence_parallel,
        bytes_per_value=2,
        fused=False,
    )
    return costs[1].activation_bytes_per_token / model.hidden_size


def test_activation_bytes_are_those_of_korthikanti() -> None:
    """Table 2 of arXiv:2205.05198, per s b h: 34 + 5as/h, 10 + 24/t + 5as/ht, 34/t + 5as/ht, 34/t, 2."""
    scores = 5 * 12 * 1024 / 768
    assert korthikanti(1, False, "none") == pytest.approx(34 + scores)
    assert korthikanti(4, False, "none") == pytest.approx(10 + 24 / 4 + scores / 4)
    assert korthikanti(4, True, "none") == pytest.approx(34 / 4 + scores / 4)
    assert korthikanti(4, True, "selective") == pytest.approx(34 / 4)
    assert korthikanti(1, False, "full") == pytest.approx(2)


STORED = {
    **{name: model for name, model in MIXES.items() if name != "layernorm with qk-norm"},
    "relu": llama_like(activation="relu"),
    "geglu with biases": llama_like(activation="geglu", linear_bias=True),
    "gelu": gpt2_like(activation="gelu"),
}


def stored_bytes_per_token(
    model: ModelConfig,
    dtype: torch.dtype,
    recompute: Any,
    name: str = "layers/0",
    modules: tuple[str, ...] = ("core_attn",),
) -> tuple[float, float]:
    """Found in autograd's graph of one block, and as planned."""
    seed_streams(1)
    length, size = 32, 2
    built = build(
        model, sequence_length=length, params_dtype=dtype, recompute=Recompute(recompute, modules=modules)
    )
    weights = {parameter.data_ptr() for parameter in built.layers.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}  # whose sizes are asked for later: some are emptied

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in weights and tensor.numel() > 1
        ):  # one number says which mask a recompute has
            stored[storage._cdata] = storage
        return tensor

    hidden = torch.randn(length, size, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = built.layers[name](hidden)
    assert output.requires_grad
    planned = next(layer.cost for layer in built.plan.layers if layer.name == name.replace("/", "."))
    found = sum(storage.nbytes() for storage in stored.values())
    return found / (length * size), planned.activation_bytes_per_token


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", STORED.values(), ids=STORED)
def test_activation_bytes_are_what_autograd_stores(
    model: ModelConfig, dtype: torch.dtype, recompute: Any
) -> None:
    found, planned = stored_bytes_per_token(model, dtype, recompute)
    assert found == planned


FORGOTTEN: dict[str, tuple[ModelConfig, tuple[str, ...]]] = {
    "norms": (llama_like(), ("layernorm",)),
    "norms, plain": (gpt2_like(), ("layernorm", "core_attn")),
    "mlp": (gpt2_like(), ("mlp",)),
    "norms and mlp": (llama_like(), ("layernorm", "mlp", "core_attn")),
    "experts": (llama_like(moe=MOE), ("moe",)),
    "experts' activation": (llama_like(moe=MOE), ("moe_act",)),
    "gelu experts' activation": (gpt2_like(moe=MOE, linear_bias=False), ("moe_act", "layernorm")),
    "shared experts": (llama_like(moe=MOE | {"shared_ffn_hidden_size": 24}), ("shared_experts",)),
    "latent": (llama_like(num_kv_heads=None, mla=LATENT), ("mla_up_proj",)),
    "latent queries too": (
        llama_like(num_kv_heads=None, mla=LATENT | {"q_lora_rank": 24}),
        ("mla_up_proj", "core_attn", "layernorm"),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_is_forgotten_is_not_stored(name: str, dtype: torch.dtype) -> None:
    """And what is not, is what the plan says, byte by byte."""
    model, modules = FORGOTTEN[name]
    found, planned = stored_bytes_per_token(model, dtype, "selective", modules=modules)
    _, whole = stored_bytes_per_token(model, dtype, "none")
    assert found == planned < whole


@pytest.mark.parametrize("name", ["t5", "t5 1.1, rotary"])
def test_activation_bytes_of_two_stacks_are_those_of_their_layers(name: str) -> None:
    """A relative bias comes with a table of places, and what the encoder made is there once: neither is any layer's."""
    seed_streams(1)
    model, length, size = STACKS[name], 32, 2
    built = build(model, sequence_length=length, target_length=16)
    seen = {parameter.data_ptr(): 0 for parameter in built.layers.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and tensor.numel() > 1:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # or its place would be another's
        return tensor

    kept: list[torch.Tensor] = []
    value: Any = T5Inputs(torch.randint(0, 100, (size, length)), torch.randint(0, 100, (size, 16)))
    for layer, module in zip(built.plan.layers[:-1], list(built.layers.values())[:-1], strict=True):
        before = sum(seen.values())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = module(value)
        found = (sum(seen.values()) - before) / (length * size)
        once = 0
        if layer.name in ("encoder.0", "decoder.0") and model.position_embedding == "relative":
            once = 8 * (length if layer.name == "encoder.0" else 16 * 16 // length) // size
        if layer.name == "decoder.0":
            once += 4 * model.hidden_size
        assert layer.cost.activation_bytes_per_token == pytest.approx(found - once, rel=0.01), layer.name


@pytest.mark.parametrize("model", MIXES_IN_ROUTING.values(), ids=MIXES_IN_ROUTING)
def test_activation_bytes_of_routers_are_about_what_autograd_stores(model: ModelConfig) -> None:
    found, planned = stored_bytes_per_token(model, torch.float32, "none", "layers/1")
    assert planned == pytest.approx(found, rel=0.03)


def test_experts_keep_what_their_rows_need_whatever_the_layout() -> None:
    """Per token of the whole sequence: experts cut like the rest, or whole on fewer tokens."""
    model = get_preset("mixtral-8x7b")

    def experts(**layout: Any) -> float:
        with_them, without = (
            layer_costs(m, 4096, sequence_parallel=True, **layout)[1].activation_bytes_per_token
            for m in (model, model.model_copy(update={"moe": None, "ffn_hidden_size": 1024}))
        )
        return with_them - without + 2 * 3 * 1024 / layout["tp"]

    rows, routing = 2, 8 * 4 * 2 + 8 + 20 * 2  # scores, and once more for the auxiliary loss
    assert experts(tp=1) == rows * (2 * (4096 + 3 * 14336) + 4) + routing
    assert experts(tp=4, etp=1) == experts(tp=1) / 4
    assert experts(tp=4) == rows * (2 * (4096 + 3 * 14336 / 4) + 4) + routing / 4


def test_activation_bytes_of_normalised_heads_may_be_a_query_too_many() -> None:
    """LayerNorm over heads hands SDPA another layout, in which its output needs no copy."""
    found, planned = stored_bytes_per_token(MIXES["layernorm with qk-norm"], torch.float32, "none")
    assert planned == found + 4 * 32


def test_adam_needs_sixteen_bytes_a_parameter() -> None:
    """Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12."""
    assert state_bytes_per_parameter("bf16") == (2, 2, 12)
    assert state_bytes_per_parameter("bf16", gradient_dtype="fp32") == (2, 4, 12)
    assert state_bytes_per_parameter("fp32").total == 16


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ModelError, match="attention=half: unknown; choose causal or full"):
        train_flops_per_token(llama_like(), 16, "half")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="dtype=fp8: unknown; choose one of fp32, bf16, fp16"):
        state_bytes_per_parameter("fp8")  # type: ignore[arg-type]
