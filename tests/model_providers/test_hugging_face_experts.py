"""Mixtral, Qwen3-MoE and DeepSeek: the same logits as transformers, from its files and into its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.hugging_face.architectures import (
    config_to_hugging_face,
    family,
    model_from_hugging_face,
)
from model_providers.hugging_face.weights import weights_from_hugging_face, weights_to_hugging_face
from model_providers.presets import PRESETS
from tests.model_providers.plans import Built, build, llama_like

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen(**facts: Any) -> Any:
    sparse = {"head_dim": 12, "num_experts": 4, "decoder_sparse_step": 1, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | sparse | facts))


def deepseek_v2() -> Any:
    facts = {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
    }
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES | EXPERTS | LATENT | facts, topk_method="greedy"))


def deepseek_v3(**facts: Any) -> Any:
    plain = {
        "q_lora_rank": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    }
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | EXPERTS | LATENT | plain | facts))
    for name, buffer in model.named_buffers():  # small, so that no group of theirs is chosen by its zeros
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.05 * torch.randn_like(buffer))
    return model


THEIRS = {
    "mixtral": mixtral,
    "qwen3-moe": qwen,
    "qwen3-moe, every other layer": lambda: qwen(decoder_sparse_step=2, norm_topk_prob=False),
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3, yarn": lambda: deepseek_v3(rope_parameters=YARN),
    "deepseek-v3, no groups, no latent query": lambda: deepseek_v3(n_group=1, topk_group=1, q_lora_rank=None),
}
TOKENS = torch.randint(0, 100, (2, 48), generator=torch.Generator().manual_seed(0))


def saved(theirs: Any, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    theirs.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def filled(model: ModelConfig, weights: dict[str, torch.Tensor]) -> Built:
    built = build(model, sequence_length=TOKENS.size(1))
    state = built.named_parameters() | {
        name.replace("/", "."): buffer
        for name, buffer in built.layers.named_buffers()
        if "expert_bias" in name
    }
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(weights[name])
    built.layers.eval()
    return built


@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS)
def test_there_and_back(make: Any, tmp_path: Path) -> None:
    """Their files to ours: equal logits; ours to theirs: the same files, which transformers opens."""
    torch.manual_seed(3)
    theirs = make().eval()
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
    config, weights = saved(theirs, tmp_path / "theirs")
    model = model_from_hugging_face(config)
    ours = weights_from_hugging_face(weights, model)
    with torch.no_grad():
        found = filled(model, ours)(TOKENS).transpose(0, 1)[..., : model.known_vocab_size]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())

    back = weights_to_hugging_face(ours, model)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    folder = tmp_path / "ours"
    folder.mkdir()
    save_file(back, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(model)))
    opened = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(opened) is type(theirs)
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, wanted)
    again = model_from_hugging_face(json.loads((folder / "config.json").read_text()))
    assert again.model_copy(update={"head_dim": model.head_dim}) == model  # Mixtral's may leave it out


def test_what_looks_ahead_travels_as_further_layers() -> None:
    model = PRESETS["tiny-deepseek"].model_copy(update={"vocab_size": 100})
    built = build(model)
    state = {name: tensor.detach() for name, tensor in built.named_parameters().items()}
    state |= {
        name.replace("/", "."): buffer
        for name, buffer in built.layers.named_buffers()
        if "expert_bias" in name
    }
    theirs = weights_to_hugging_face(state, model)
    assert torch.equal(theirs["model.layers.3.eh_proj.weight"], state["mtp.0.eh_proj.weight"])
    assert torch.equal(theirs["model.layers.3.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(theirs["model.layers.3.shared_head.head.weight"], theirs["lm_head.weight"])
    back = weights_from_hugging_face(theirs, model)
    rows = {name: 100 if "word_embeddings" in name or name == "head.weight" else None for name in state}
    assert all(torch.equal(back[name][: rows[name]], state[name][: rows[name]]) for name in state)


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name.startswith(("mixtral", "deepseek", "qwen"))]
)
def test_presets_have_a_form_there(name: str) -> None:
    wanted = {"mix": "mixtral", "qwe": "qwen3_moe"}.get(name[:3], name.replace("-lite", "").replace("-", "_"))
    assert family(PRESETS[name]) == wanted


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"capacity_factor": 1.0}, "moe.capacity_factor=1.0"),
        ({"shared_ffn_hidden_size": 16}, "moe.shared_ffn_hidden_size=16"),
        ({"first_dense": 1}, "moe.first_dense=1"),
    ],
)
def test_experts_without_a_form_there_say_why(facts: dict[str, Any], reason: str) -> None:
    model = llama_like(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, **facts})
    with pytest.raises(ModelError, match=reason):
        family(model)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config, weights = saved(mixtral(), tmp_path)
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight is missing"
    ):
        weights_from_hugging_face(weights, model_from_hugging_face(config))


def test_what_stands_against_the_nearest_kind_is_named() -> None:
    """Of a model with experts, not that Llama has none."""
    with pytest.raises(ModelError, match=r"form here: not Mixtral \(moe\.capacity_factor=1\.0\); "):
        family(llama_like(moe={"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "capacity_factor": 1.0}))
