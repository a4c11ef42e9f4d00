"""The architectures of theirs that convert; a model of ours takes the first that can express it.  Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face import bert, deepseek, gpt2, llama, t5

Family = Literal[
    "gpt2",
    "llama",
    "bert",
    "megatron-bert",
    "roberta",
    "t5",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
]  # their `model_type`


class Architecture(NamedTuple):
    """One of theirs: how it is called, what of a model it cannot express, its config.json in both directions."""

    title: str
    obstacles: Callable[[ModelConfig], list[str]]
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


# Obstacles that say that an architecture is of another kind altogether.
KINDS = {
    "moe",
    "mla",
    "bert",
    "t5",
    "no experts",
    "no latent attention",
    "no bidirectional attention",
    "no encoder beside the decoder",
}
ARCHITECTURES: dict[Family, Architecture] = {
    "gpt2": Architecture("GPT-2", gpt2.obstacles, gpt2.config_from, gpt2.config_to),
    "llama": Architecture("Llama", llama.obstacles, llama.config_from, llama.config_to),
    "bert": Architecture("BERT", bert.obstacles, bert.config_from, bert.config_to),
    "megatron-bert": Architecture(
        "Megatron-BERT", bert.megatron_obstacles, bert.megatron_from, bert.megatron_to
    ),
    "roberta": Architecture("RoBERTa", bert.roberta_obstacles, bert.roberta_from, bert.roberta_to),
    "t5": Architecture("T5", t5.obstacles, t5.config_from, t5.config_to),
    "mixtral": Architecture("Mixtral", llama.mixtral_obstacles, llama.mixtral_from, llama.mixtral_to),
    "qwen3_moe": Architecture(
        "Qwen3-MoE", llama.qwen3_moe_obstacles, llama.qwen3_moe_from, llama.qwen3_moe_to
    ),
    "deepseek_v2": Architecture("DeepSeek-V2", deepseek.v2_obstacles, deepseek.v2_from, deepseek.v2_to),
    "deepseek_v3": Architecture("DeepSeek-V3", deepseek.v3_obstacles, deepseek.v3_from, deepseek.v3_to),
}


def model_from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """A config.json, as a dict, to our facts."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"model_type={kind}: not known here; convertible are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind].read(config)


def config_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """What transformers needs in config.json to load our exported weights."""
    return ARCHITECTURES[family(model)].write(model)


def family(model: ModelConfig) -> Family:
    """The first architecture that can express ``model``; if none can, what stands against the nearest."""
    reasons = []
    for name, architecture in ARCHITECTURES.items():
        obstacles = architecture.obstacles(model)
        if not obstacles:
            return name
        is_another_kind = any(obstacle in KINDS for obstacle in obstacles)
        reason = f"not {architecture.title} ({', '.join(obstacles)})"
        reasons.append((is_another_kind, len(obstacles), reason))
    nearest = [reason for _, _, reason in sorted(reasons, key=lambda item: item[:2])[:2]]
    raise ModelError(
        f"this model has no Hugging Face form here: {'; '.join(nearest)}; change what stands against one of "
        "them, or keep our own checkpoint format"
    )
