"""Failing cases of the rules of FP8, for `test_config_rules`: rule, ranks, changes, DeepSpeed JSON, what is said."""

from typing import Any

CURRENT = {"recipe": "current"}
TE = {"recipe": "current", "backend": "te"}
AUTO = {"kernels": "auto", "precision": "bf16"}

FP8_CASES: tuple[tuple[str, int, dict[str, Any], dict[str, Any] | None, str], ...] = (
    (
        "fp8_has_a_wide_format_beside_it",
        1,
        {"fp8": CURRENT, "precision": "fp16"},
        None,
        r"fp8\.recipe=current with precision\.dtype=fp16.*use precision\.dtype=bf16",
    ),
    (
        "four_bits_are_an_experiment",
        1,
        {"fp8": {"recipe": "nvfp4"}},
        None,
        r"fp8\.recipe=nvfp4.*set fp8\.experiment=true.*or use mxfp8",
    ),
    (
        "some_blocks_are_fp8",
        1,
        {"fp8": {**CURRENT, "bf16_first": 2, "bf16_last": 2}},
        None,
        r"bf16_first=2, fp8\.bf16_last=2 with 4 blocks.*use less",
    ),
    (
        "options_belong_to_the_recipe",
        1,
        {"fp8": {**CURRENT, "amax_history": 16}},
        None,
        r"fp8\.amax_history=16 with fp8\.recipe=current: it belongs to delayed; leave it out",
    ),
    (
        "experts_are_there",
        1,
        {"fp8": {**CURRENT, "experts": True}},
        None,
        r"fp8\.experts=true: the model has no routed experts; leave it out, or give it model\.moe\.num_experts",
    ),
    (
        "blocks_are_not_cut_by_tp",
        2,
        {
            "fp8": {"recipe": "mxfp8"},
            "layout__tp": 2,
            "layout__sequence_parallel": True,
            "layout__etp": 2,
            "model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32},
            "model__num_kv_heads": None,
            "model__hidden_size": 64,
        },
        None,
        r"fp8\.recipe=mxfp8 with layout\.tp=2: a rank's share of an expert is 16 wide, no multiple of the 32",
    ),
    (
        "blocks_are_not_cut_by_tp",
        2,
        {"fp8": {"recipe": "blockwise"}, "layout__tp": 2},
        None,
        r"fp8\.recipe=blockwise with layout\.tp=2.*no multiple of the 128.*use a smaller tp",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": TE},
        None,
        r"fp8\.backend=te with kernels=torch: its FP8 is that of its own layers; .*kernels=te or auto",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": TE, "kernels": "auto"},
        None,
        r"fp8\.backend=te with kernels=auto: in fp32 auto takes torch's layers.*use fp8\.backend=torch, or kernels=te",
    ),
    (
        "transformer_engine_can",
        2,
        {"fp8": TE, **AUTO, "layout": {"pp": 2, "schedule": "zb-h1"}, "deepspeed": "pipeline.json"},
        None,
        r"fp8\.backend=te with layout\.schedule=zb-h1.*use fp8\.backend=torch, or 1f1b or interleaved",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": {**TE, "margin": 1}, **AUTO},
        None,
        r"fp8\.backend=te with fp8\.margin=1: .*leaves none; use fp8\.backend=torch, or delayed",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": TE, **AUTO},
        {"zero_optimization": {"stage": 3}},
        r"fp8\.backend=te with zero_optimization\.stage=3.*whole on every rank.*or recompute=full, or stage 2",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": TE, **AUTO, "data__sequence_length": 40},
        None,
        r"fp8\.backend=te with sequence_length=40: tokens are no multiple of 16, as current wants; .*, or 48",
    ),
    (
        "transformer_engine_can",
        2,
        {
            "fp8": {"recipe": "delayed", "backend": "te"},
            **AUTO,
            "data__sequence_length": 48,
            "layout": {"tp": 2, "sequence_parallel": True},
        },
        None,
        r"sequence_length=48: tokens, 24 on each of 2 tensor ranks, are no multiple of 16.*, or 64",
    ),
    (
        "transformer_engine_can",
        1,
        {"fp8": {"recipe": "blockwise", "backend": "te"}, **AUTO, "data__sequence_length": 128},
        None,
        r"fp8\.backend=te with layout\.tp=1: the model is 32 wide on a rank, no multiple of 128, as blockwise wants",
    ),
    (
        "limits_are_looked_at",
        1,
        {"fp8": {"recipe": "current", "guard": {"gap": 0.1}}},
        None,
        r"fp8\.guard\.gap=0\.1 with fp8\.shadow_every=0.*set fp8\.shadow_every=100, or leave the limit out",
    ),
    (
        "looks_are_at_our_linears",
        1,
        {"fp8": {"recipe": "current", "backend": "te", "watch_every": 10}, "kernels": "auto"},
        None,
        r"fp8\.watch_every=10 with fp8\.backend=te.*use fp8\.backend=torch, or leave fp8\.watch_every out",
    ),
)
