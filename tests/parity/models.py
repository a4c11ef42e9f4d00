"""Tiny models of every family, as changes of the tests' run (`tests/runs.py`): what tables of parity train."""

from typing import Any

Changes = dict[str, Any]

GPT2: Changes = {
    "model__normalization": "layernorm",
    "model__activation": "gelu",
    "model__linear_bias": True,
    "model__position_embedding": "learned",
    "model__num_kv_heads": 4,
    "model__qk_norm": False,
}
WINDOW: Changes = {
    "model__sliding_window": 8,
    "model__activation": "squared_relu",
    "model__position_embedding": "none",
}
UNTIED: Changes = {"model__tie_embeddings": False}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 32,
    "shared_ffn_hidden_size": 32,
    "aux_loss": 0.01,
    "z_loss": 0.001,
}
DEEPSEEK: Changes = {
    "model__preset": "tiny-deepseek",
    "model__num_layers": 3,
    "model__qk_norm": False,
    "model__tie_embeddings": True,
}
BERT: Changes = {
    "model": {"preset": "tiny-bert", "num_layers": 4, "vocab_size": None, "init_std": 0.1},
    "data__objective": {"kind": "mlm", "second_task": "next_sentence", "unit": "word"},
}
ROBERTA: Changes = {
    **BERT,
    "model__bert": {"token_types": 0, "sentence_head": False},
    **UNTIED,
    "data__objective": {"kind": "mlm", "unit": "span"},
}
ELECTRA: Changes = {
    "model": {"preset": "tiny-electra", "num_layers": 3, "vocab_size": None, "init_std": 0.1},
    "data__objective": {"kind": "mlm", "replaced": True},
}
T5: Changes = {
    "model": {"preset": "tiny-t5", "num_layers": 3, "vocab_size": None, "init_std": 0.1},
    "data__objective": {"kind": "span_corruption"},
}
T5_UL2: Changes = {
    **T5,
    "model__activation": "geglu_tanh",
    **UNTIED,
    "model__position_embedding": "rotary",
    "data__objective": {"kind": "span_corruption", "mixture": "ul2", "target_length": 24},
}
FIM: Changes = {"model__vocab_size": None, "data__objective": "fim"}
PREFIX_LM: Changes = {"model__attention": "prefix", "data__objective": "prefix_lm"}
