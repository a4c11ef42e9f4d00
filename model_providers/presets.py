"""Known models by name, each size with the table it comes from.

A run file names a preset and states what differs.  Published parameter counts are checked in the tests.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.moe_config import BERTConfig, ELECTRAConfig, MLAConfig, MoEConfig, MTPConfig, T5Config


def _gpt2(num_layers: int, hidden_size: int, num_attention_heads: int, **facts: Any) -> ModelConfig:
    """What GPT-2, GPT-3 and Megatron's GPT share: LayerNorm, learned positions, tanh GELU, biases, tied."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    facts = {"vocab_size": 50257, "max_sequence_length": 1024} | dropout | facts
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        position_embedding="learned",
        normalization="layernorm",
        activation="gelu_tanh",
        linear_bias=True,
        tie_embeddings=True,
        **facts,
    )


def _gpt3(num_layers: int, hidden_size: int, num_attention_heads: int) -> ModelConfig:
    """Brown et al. 2020 (arXiv:2005.14165), who name no dropout; their sparse layers (2.1) are left out."""
    facts = {"max_sequence_length": 2048, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _gpt2(num_layers, hidden_size, num_attention_heads, **facts)


def _megatron(num_layers: int, hidden_size: int, num_attention_heads: int) -> ModelConfig:
    """Narayanan et al. 2021 (arXiv:2104.04473), Table 1: vocabulary 51,200, sequences of 2048."""
    facts = {"vocab_size": 51200, "max_sequence_length": 2048}
    return _gpt2(num_layers, hidden_size, num_attention_heads, **facts)


def _llama(num_layers: int, hidden_size: int, num_attention_heads: int, **facts: Any) -> ModelConfig:
    """RMSNorm, rotary, SwiGLU, no biases, untied (Touvron et al. 2023)."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        tie_embeddings=False,
        **facts,
    )


def _llama3(num_layers: int, hidden_size: int, num_attention_heads: int, ffn_hidden_size: int) -> ModelConfig:
    """Grattafiori et al. 2024 (arXiv:2407.21783), Table 3; sequences of 8192 before its last stage."""
    return _llama(
        num_layers,
        hidden_size,
        num_attention_heads,
        num_kv_heads=8,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=128256,
        max_sequence_length=8192,
        rotary_base=500000.0,
    )


def _mixtral(
    num_layers: int, hidden_size: int, num_attention_heads: int, ffn: int, **facts: Any
) -> ModelConfig:
    """Jiang et al. 2024 (arXiv:2401.04088), Table 1, and the configs released on Hugging Face: 8 experts, 2 chosen."""
    return _llama(
        num_layers,
        hidden_size,
        num_attention_heads,
        num_kv_heads=8,
        ffn_hidden_size=ffn,
        moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=ffn, aux_loss=0.02),
        rotary_base=1000000.0,
        **facts,
    )


def _qwen3_moe(
    num_layers: int, hidden_size: int, num_attention_heads: int, expert_ffn: int, dense_ffn: int
) -> ModelConfig:
    """Yang et al. 2025 (arXiv:2505.09388), Table 2: 128 experts, 8 chosen, balance over the global batch; QK norm."""
    return _llama(
        num_layers,
        hidden_size,
        num_attention_heads,
        num_kv_heads=4,
        head_dim=128,
        ffn_hidden_size=dense_ffn,
        qk_norm=True,
        norm_eps=1e-6,
        vocab_size=151936,
        max_sequence_length=32768,
        rotary_base=1000000.0,
        moe=MoEConfig(num_experts=128, top_k=8, ffn_hidden_size=expert_ffn, global_aux_loss=0.001),
    )


def _deepseek(num_layers: int, hidden_size: int, num_attention_heads: int, **facts: Any) -> ModelConfig:
    """Latent attention, a dense layer or three at the bottom, shared experts, sequences of 4096."""
    plain = {"norm_eps": 1e-6, "max_sequence_length": 4096, "init_std": 0.006}
    return _llama(num_layers, hidden_size, num_attention_heads, **plain | facts)


def _bert(num_layers: int, hidden_size: int, num_attention_heads: int, **facts: Any) -> ModelConfig:
    """Devlin et al. 2019 (arXiv:1810.04805), section 3, and their released configurations."""
    plain = {
        "position_embedding": "learned",
        "normalization": "layernorm",
        "norm_eps": 1e-12,
        "activation": "gelu",
        "linear_bias": True,
        "scale_residual_init": False,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "vocab_size": 30522,
        "max_sequence_length": 512,
        "bert": BERTConfig(),
    }
    sizes = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
    return ModelConfig(**sizes | plain | facts)


def _roberta(num_layers: int, hidden_size: int, num_attention_heads: int) -> ModelConfig:
    """Liu et al. 2019 (arXiv:1907.11692), table 9: BERT's sizes, byte-level BPE, no second task."""
    alone = BERTConfig(token_types=1, sentence_head=False)
    return _bert(num_layers, hidden_size, num_attention_heads, vocab_size=50265, norm_eps=1e-5, bert=alone)


def _electra(
    num_layers: int, hidden_size: int, heads: int, generator_layers: int, share: int, **facts: Any
) -> ModelConfig:
    """Clark et al. 2020 (arXiv:2003.10555), table 6: the generator a ``share``-th as wide, with as few heads."""
    return _bert(
        num_layers,
        hidden_size,
        heads,
        bert=BERTConfig(token_types=0, sentence_head=False),
        electra=ELECTRAConfig(
            generator_layers=generator_layers,
            generator_hidden_size=hidden_size // share,
            generator_heads=max(1, heads // share),
        ),
        **facts,
    )


def _megatron_bert(num_layers: int, hidden_size: int, num_attention_heads: int) -> ModelConfig:
    """Shoeybi et al. 2019 (arXiv:1909.08053), table 4 and section 5.3: norms before, residual outputs scaled."""
    return _bert(
        num_layers,
        hidden_size,
        num_attention_heads,
        norm_eps=1e-5,
        activation="gelu_tanh",
        scale_residual_init=True,
        bert=BERTConfig(norm="pre"),
    )


def _t5(layers: int, hidden_size: int, heads: int, head_dim: int, ffn: int, **facts: Any) -> ModelConfig:
    """Raffel et al. 2020 (arXiv:1910.10683), sections 2.1 and 3.1, and the released configurations."""
    plain = {
        "position_embedding": "relative",
        "norm_eps": 1e-6,
        "activation": "relu",
        "scale_residual_init": False,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "vocab_size": 32128,
        "max_sequence_length": 512,
        "t5": T5Config(num_encoder_layers=layers),
    }
    sizes = {"num_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads}
    return ModelConfig(**sizes | {"head_dim": head_dim, "ffn_hidden_size": ffn} | plain | facts)


def _t5_v11(layers: int, hidden_size: int, heads: int, ffn: int) -> ModelConfig:
    """Shazeer 2020 (arXiv:2002.05202): gated GELU; a head of its own; trained without dropout."""
    newer = {
        "activation": "geglu_tanh",
        "tie_embeddings": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return _t5(layers, hidden_size, heads, 64, ffn, **newer)


PRESETS: Mapping[str, ModelConfig] = {
    # Ours: small enough for a test, and for minutes on two cores.
    "tiny": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=64,
        vocab_size=128,
        max_sequence_length=64,
    ),
    # Wide rather than deep: at equal seconds a step, 4 x 320 was 0.16 nats ahead of 6 x 256 (measured, 200 steps).
    "demo": ModelConfig(
        num_layers=4,
        hidden_size=320,
        num_attention_heads=8,
        num_kv_heads=4,
        vocab_size=1024,
        max_sequence_length=512,
        init_std=0.05,
    ),
    "tiny-moe": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=64,
        vocab_size=128,
        max_sequence_length=64,
        moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=32, aux_loss=0.01),
    ),
    # As many active parameters in its MLPs as "demo", of four times as many.
    "demo-moe": ModelConfig(
        num_layers=4,
        hidden_size=320,
        num_attention_heads=8,
        num_kv_heads=4,
        vocab_size=1024,
        max_sequence_length=512,
        init_std=0.05,
        moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=512, aux_loss=0.01, z_loss=0.001),
    ),
    # Every part of DeepSeek-V3 in small: latent attention, groups of experts, balance by a bias, a look ahead.
    "tiny-deepseek": ModelConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=128,
        max_sequence_length=64,
        tie_embeddings=False,
        mla=MLAConfig(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        mtp=MTPConfig(),
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            ffn_hidden_size=24,
            shared_ffn_hidden_size=24,
            first_dense=1,
            score="sigmoid",
            num_groups=4,
            group_top_k=1,
            scaling_factor=2.5,
            bias_update_rate=0.001,
            sequence_aux_loss=0.0001,
        ),
    ),
    "tiny-bert": _bert(
        2, 32, 4, vocab_size=128, max_sequence_length=64, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "tiny-electra": _electra(
        2,
        32,
        4,
        1,
        2,
        vocab_size=128,
        max_sequence_length=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "demo-bert": _bert(
        4,
        256,
        8,
        vocab_size=1024,
        max_sequence_length=128,
        norm_eps=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_std=0.05,
        bert=BERTConfig(norm="pre"),
    ),
    "tiny-t5": _t5(2, 32, 4, 8, 64, vocab_size=128, hidden_dropout=0.0, attention_dropout=0.0),
    "demo-t5": _t5(
        3,
        256,
        8,
        32,
        768,
        vocab_size=1024,
        norm_eps=1e-5,
        activation="swiglu",
        init_std=0.05,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        t5=T5Config(num_encoder_layers=3, scaled_scores=True),
    ),
    # Radford et al. 2019, Table 2; heads and dropout as in the configs released on Hugging Face.
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # Brown et al. 2020, Table 2.1.
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),  # the table prints 24 heads of 128, but only 16 give its 2048 and 1.3B
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),  # the table prints 5140, which 40 heads of 128 do not fill
    "gpt3-175b": _gpt3(96, 12288, 96),
    # Narayanan et al. 2021, Table 1.
    "megatron-1.7b": _megatron(24, 2304, 24),
    "megatron-3.6b": _megatron(30, 3072, 32),
    "megatron-7.5b": _megatron(36, 4096, 32),
    "megatron-18b": _megatron(40, 6144, 48),
    "megatron-39b": _megatron(48, 8192, 64),
    "megatron-76b": _megatron(60, 10240, 80),
    "megatron-145b": _megatron(80, 12288, 96),
    "megatron-310b": _megatron(96, 16384, 128),
    "megatron-530b": _megatron(105, 20480, 128),
    "megatron-1t": _megatron(128, 25600, 160),
    # Touvron et al. 2023 (arXiv:2307.09288), and the released config of Llama-2-7b.
    "llama2-7b": _llama(32, 4096, 32, ffn_hidden_size=11008, vocab_size=32000, max_sequence_length=4096),
    "llama3-8b": _llama3(32, 4096, 32, 14336),
    "llama3-70b": _llama3(80, 8192, 64, 28672),
    "llama3-405b": _llama3(126, 16384, 128, 53248),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "electra-base": _electra(12, 768, 12, 12, 3),
    "electra-large": _electra(24, 1024, 16, 24, 4),
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "megatron-bert-336m": _megatron_bert(24, 1024, 16),
    "megatron-bert-1.3b": _megatron_bert(24, 2048, 32),
    "megatron-bert-3.9b": _megatron_bert(48, 2560, 40),
    "t5-small": _t5(6, 512, 8, 64, 2048),
    "t5-base": _t5(12, 768, 12, 64, 3072),
    "t5-large": _t5(24, 1024, 16, 64, 4096),
    "t5-3b": _t5(24, 1024, 32, 128, 16384),
    "t5-11b": _t5(24, 1024, 128, 128, 65536),
    "t5-v1.1-small": _t5_v11(8, 512, 6, 1024),
    "t5-v1.1-base": _t5_v11(12, 768, 12, 2048),
    "t5-v1.1-large": _t5_v11(24, 1024, 16, 2816),
    "t5-v1.1-xl": _t5_v11(24, 2048, 32, 5120),
    "t5-v1.1-xxl": _t5_v11(24, 4096, 64, 10240),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 14336, vocab_size=32000, max_sequence_length=32768),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 16384, vocab_size=32768, max_sequence_length=65536),
    # DeepSeek-AI 2024 (arXiv:2405.04434), appendix B, and the released config of DeepSeek-V2-Lite: softmax scores over
    # all experts that are not made to add up to 1.  Trained on sequences of 4096, so without the YaRN of the release.
    "deepseek-v2-lite": _deepseek(
        27,
        2048,
        16,
        ffn_hidden_size=10944,
        vocab_size=102400,
        mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            ffn_hidden_size=1408,
            shared_ffn_hidden_size=2 * 1408,
            first_dense=1,
            normalize_top_k=False,
            sequence_aux_loss=0.001,
        ),
    ),
    # DeepSeek-AI 2024 (arXiv:2412.19437), section 4.2, and the released config of DeepSeek-V3.
    "deepseek-v3": _deepseek(
        61,
        7168,
        128,
        ffn_hidden_size=18432,
        vocab_size=129280,
        mla=MLAConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        mtp=MTPConfig(depth=1, loss_weight=0.3),
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            ffn_hidden_size=2048,
            shared_ffn_hidden_size=2048,
            first_dense=3,
            score="sigmoid",
            num_groups=8,
            group_top_k=4,
            scaling_factor=2.5,
            bias_update_rate=0.001,
            sequence_aux_loss=0.0001,
        ),
    ),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 768, 6144),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 1536, 12288),
}


def get_preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ModelError(f"preset={name}: unknown; {hint}known: {', '.join(PRESETS)}")
    return PRESETS[name]


def model_from(facts: Mapping[str, Any], *, preset: str | None = None) -> ModelConfig:
    """The preset with ``facts`` on top (or ``facts`` alone), checked; all faults come in one ModelError."""
    base = {} if preset is None else get_preset(preset).model_dump()
    try:
        return ModelConfig.model_validate(base | dict(facts))
    except ValidationError as error:
        raise ModelError("; ".join(_sentence(fault) for fault in error.errors())) from error


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, ModelConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        return f"{key}={fault['input']}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: missing; give it, or name a preset"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}={fault['input']}: {message}" if key else message
