"""Hugging Face's config.json of GPT-2 and Llama, from and to ours: plain dicts, without transformers."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.presets import model_from

Family = Literal["gpt2", "llama"]  # their `model_type`

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
PLAIN: dict[str, Any] = {"qk_norm": False, "sliding_window": None}  # neither architecture has these


class Architecture(NamedTuple):
    """One of theirs: how it is called, what of a model it cannot express, and its config.json in both directions."""

    title: str
    obstacles: Callable[[ModelConfig], list[str]]
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


def model_from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """A config.json, as a dict, to our facts."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"model_type={kind}: not known here; convertible are {' and '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind].read(config)


def config_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """What transformers needs in config.json to load our exported weights."""
    return ARCHITECTURES[family(model)].write(model)


def family(model: ModelConfig) -> Family:
    """The first architecture that can express ``model``; if none can, what stands against each."""
    reasons = []
    for name, architecture in ARCHITECTURES.items():
        obstacles = architecture.obstacles(model)
        if not obstacles:
            return name
        reasons.append(f"not {architecture.title} ({', '.join(obstacles)})")
    raise ModelError(
        f"this model has no Hugging Face form here: {'; '.join(reasons)}; change what stands against one of "
        "them, or keep our own checkpoint format"
    )


def _obstacles_to_gpt2(model: ModelConfig) -> list[str]:
    wanted = PLAIN | {"position_embedding": "learned", "normalization": "layernorm", "linear_bias": True}
    obstacles = _differences(model, wanted | {"tie_embeddings": True})
    if model.activation not in GPT2_ACTIVATIONS.values():
        obstacles.append(f"activation={model.activation}")
    if model.kv_heads != model.num_attention_heads or model.query_width != model.hidden_size:
        obstacles.append("heads that do not fill hidden_size")
    return obstacles


def _obstacles_to_llama(model: ModelConfig) -> list[str]:
    wanted = PLAIN | {"position_embedding": "rotary", "normalization": "rmsnorm", "activation": "swiglu"}
    obstacles = _differences(model, wanted | {"rotary_fraction": 1.0})
    if model.qkv_bias and not model.linear_bias:
        obstacles.append("qkv_bias=True")
    return obstacles


def _differences(model: ModelConfig, wanted: Mapping[str, Any]) -> list[str]:
    return [f"{key}={getattr(model, key)}" for key, value in wanted.items() if getattr(model, key) != value]


def _from_gpt2(config: Mapping[str, Any]) -> ModelConfig:
    activation = config.get("activation_function", "gelu_new")
    if activation not in GPT2_ACTIVATIONS:
        raise ModelError(
            f"activation_function={activation}: not known here; choose one of {', '.join(GPT2_ACTIVATIONS)}"
        )
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise ModelError(f"{key}={config[key]}: has no counterpart here; only False converts")
    return model_from(
        {
            "num_layers": config.get("n_layer"),
            "hidden_size": config.get("n_embd"),
            "num_attention_heads": config.get("n_head"),
            "ffn_hidden_size": config.get("n_inner"),
            "vocab_size": config.get("vocab_size"),
            "max_sequence_length": config.get("n_positions", 1024),
            "position_embedding": "learned",
            "normalization": "layernorm",
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "activation": GPT2_ACTIVATIONS[activation],
            "linear_bias": True,
            "tie_embeddings": True,
            "hidden_dropout": config.get("resid_pdrop", 0.1),
            "attention_dropout": config.get("attn_pdrop", 0.1),
            "init_std": config.get("initializer_range", 0.02),
        }
    )


def _to_gpt2(model: ModelConfig) -> dict[str, Any]:
    activation = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}[model.activation]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_width,
        "n_positions": model.max_sequence_length,
        "vocab_size": model.known_vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": activation,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": True,
    }


def _from_llama(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act={config['hidden_act']}: not known here; Llama uses silu")
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise ModelError(
            "attention_bias and mlp_bias differ: our linear_bias is for both; convert with both or none"
        )
    # transformers 5 says rope_parameters; before, rope_scaling beside rope_theta.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return model_from(
        {
            "num_layers": config.get("num_hidden_layers"),
            "hidden_size": config.get("hidden_size"),
            "num_attention_heads": config.get("num_attention_heads"),
            "num_kv_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "ffn_hidden_size": config.get("intermediate_size"),
            "vocab_size": config.get("vocab_size"),
            "max_sequence_length": config.get("max_position_embeddings", 2048),
            "position_embedding": "rotary",
            "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            "rope_scaling": _rope_scaling(rope),
            "normalization": "rmsnorm",
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "activation": "swiglu",
            "linear_bias": bool(config.get("attention_bias")),
            "tie_embeddings": bool(config.get("tie_word_embeddings")),
            "attention_dropout": config.get("attention_dropout", 0.0),
            "init_std": config.get("initializer_range", 0.02),
        }
    )


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    same = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    }
    if kind not in same:
        raise ModelError(f"rope_type={kind}: not known here; convertible are default, {', '.join(same)}")
    facts = {key: rope[key] for key in same[kind] if rope.get(key) is not None}
    if kind != "linear":
        facts["original_max_positions"] = rope["original_max_position_embeddings"]
    return {"kind": kind, **facts}


def _to_llama(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {key: value for key, value in model.rope_scaling.model_dump().items() if value is not None}
        rope["rope_type"] = rope.pop("kind")
        if "original_max_positions" in rope:
            rope["original_max_position_embeddings"] = rope.pop("original_max_positions")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_parameters": rope | {"rope_theta": model.rotary_base},
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }


ARCHITECTURES: dict[Family, Architecture] = {
    "gpt2": Architecture("GPT-2", _obstacles_to_gpt2, _from_gpt2, _to_gpt2),
    "llama": Architecture("Llama", _obstacles_to_llama, _from_llama, _to_llama),
}
