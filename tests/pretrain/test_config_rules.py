"""Every rule refuses what it is there for, in one sentence with the way out, before any process starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain import config_rules, optimizer_rules
from pretrain.config_rules import device_faults
from pretrain.errors import RunError
from tests.pretrain.fp8_cases import FP8_CASES
from tests.runs import checked, tiny

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}
STAGE_1_OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}

# rule, ranks, changes of the run, DeepSpeed JSON or None, what the message must say
BERT = {"model": {"preset": "tiny-bert", "vocab_size": None}, "data__objective": {"kind": "mlm"}}
T5 = {"model": {"preset": "tiny-t5", "vocab_size": None}, "data__objective": {"kind": "span_corruption"}}

CASES: tuple[tuple[str, int, dict[str, Any], dict[str, Any] | None, str], ...] = (
    *FP8_CASES,
    (
        "sequence_parallel_needs_tp",
        1,
        {"layout__sequence_parallel": True},
        None,
        r"layout\.sequence_parallel=true with layout\.tp=1.*use tp > 1, or false",
    ),
    (
        "pipeline_needs_zero_below_3",
        2,
        {"layout__pp": 2},
        {"zero_optimization": {"stage": 3}},
        r"stage=3 cannot run with layout\.pp=2.*stage 1 with pp=2; or stage 1 and offload.*or stage 3 with pp=1",
    ),
    (
        "zero_2_in_a_pipeline_is_sound",
        2,
        {"layout__pp": 2, "model__tie_embeddings": True},
        {"zero_optimization": {"stage": 2}},
        r"stage=2 with layout\.pp=2 and model\.tie_embeddings=true.*use stage 1, or model\.tie_embeddings=false",
    ),
    (
        "zero_2_in_a_pipeline_is_sound",
        2,
        {**T5, "model__tie_embeddings": False, "layout__pp": 2},
        {"zero_optimization": {"stage": 2}},
        r"stage=2 with layout\.pp=2 and model\.t5, whose stacks share tables: .*; use stage 1$",
    ),
    (
        "zero_2_in_a_pipeline_is_sound",
        2,
        {"layout": {"pp": 2, "schedule": "zb-h1"}},
        {"zero_optimization": {"stage": 2}},
        r"stage=2 with layout\.pp=2 and layout\.schedule=zb-h1.*use stage 1, or 1f1b or interleaved",
    ),
    (
        "zero_2_in_a_pipeline_is_sound",
        2,
        {"layout__pp": 2, "model__tie_embeddings": False},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        r"stage=2 with layout\.pp=2 and offload_optimizer: not tried together; use stage 1",
    ),
    (
        "shared_out_experts_need_zero",
        2,
        {"layout__ep": 2, "model__moe": MOE},
        {"zero_optimization": {"stage": 0}},
        r"stage=0 with layout\.ep=2.*use stage 1 .*or layout\.ep=1",
    ),
    (
        "shared_out_experts_need_zero",
        4,
        {"layout": {"tp": 2, "sequence_parallel": True, "ep": 2}, "model__moe": MOE},
        {"zero_optimization": {"stage": 3}},
        r"stage=3 with layout\.ep=2 and layout\.etp=2.*use layout\.etp=1, or stage 1 or 2",
    ),
    (
        "shared_out_experts_need_zero",
        4,
        {"layout": {"pp": 2, "ep": 2}, "model__moe": MOE, "model__tie_embeddings": False},
        {"zero_optimization": {"stage": 2}},
        r"stage=2 with layout\.pp=2 and layout\.ep=2: not tried together; use stage 1",
    ),
    (
        "dispatcher_can_pad",
        2,
        {
            "layout": {"ep": 2, "dispatcher": "allgather"},
            "model__moe": {**MOE, "capacity_factor": 1.0, "pad_to_capacity": True},
        },
        None,
        r"pad_to_capacity=true with layout\.dispatcher=allgather.*use alltoall, or pad_to_capacity=false",
    ),
    (
        "dispatcher_needs_experts",
        2,
        {"layout__dispatcher": "allgather"},
        None,
        r"dispatcher=allgather with layout\.ep=1.*leave it out, or use ep > 1",
    ),
    (
        "upcycling_makes_experts_of_something",
        1,
        {"checkpoint__upcycle": True, "model__moe": MOE},
        None,
        r"upcycle=true: of what\? give checkpoint\.weights_from",
    ),
    (
        "muon_needs_whole_matrices",
        1,
        {"optimizer__type": "Muon", "optimizer__gradient_clipping": 0.0, "model__moe": MOE},
        {"zero_optimization": {"stage": 1}},
        r"optimizer\.type=Muon with model\.moe.*use AdamW or Lion",
    ),
    (
        "half_precision_needs_zero",
        1,
        {"precision": "bf16"},
        {"zero_optimization": {"stage": 0}},
        r"stage=0 with precision\.dtype=bf16.*use stage 1",
    ),
    (
        "accumulation_dtype_is_legal",
        1,
        {"precision": {"dtype": "bf16", "accumulate": "fp16"}},
        None,
        r"precision\.accumulate=fp16 with precision\.dtype=bf16: use fp32 or bf16",
    ),
    (
        "optimizer_offload_needs_zero",
        1,
        {},
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        r"offload_optimizer with stage=0.*use stage 1",
    ),
    (
        "optimizer_nvme_needs_zero_3",
        1,
        {"nvme_path": "/"},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        r"offload_optimizer\.device=nvme with stage=1.*use stage 3 \(pp=1\), or device=cpu",
    ),
    (
        "parameter_offload_needs_zero_3",
        1,
        {},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        r"offload_param\.device=cpu with stage=2.*use stage 3",
    ),
    (
        "nvme_needs_a_folder",
        1,
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        r"device=nvme needs a folder: set nvme_path=",
    ),
    (
        "nvme_needs_a_folder",
        1,
        {"nvme_path": "/no/such/disk"},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        r"nvme_path=/no/such/disk: no such folder",
    ),
    (
        "nvme_buffers_hold_the_largest_parameter",
        1,
        {"nvme_path": "/tmp"},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "buffer_size": 1000}}},
        r"offload_param\.buffer_size=1000: the largest parameter's shard has \d+ elements",
    ),
    (
        "swap_buffers_suffice",
        1,
        {"nvme_path": "/tmp"},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "buffer_count": 5, "pipeline_read": True},
            }
        },
        r"buffer_count=5 with pipeline_read: .* use 8 or more",
    ),
    (
        "swapping_keys_need_nvme",
        1,
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "fast_init": True}}},
        r"fast_init=true with device=cpu: .* would do nothing; leave it out",
    ),
    (
        "fast_init_has_buffers",
        1,
        {"nvme_path": "/tmp"},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "fast_init": True}}},
        r"fast_init=true without offload_param\.device=nvme: .* leave it out",
    ),
    (
        "fast_init_has_buffers",
        1,
        {"nvme_path": "/tmp"},
        {
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": 1000000,
                "offload_optimizer": {"device": "nvme", "fast_init": True},
                "offload_param": {"device": "nvme", "buffer_size": 70000},
            }
        },
        r"offload_param\.buffer_size=70000: a sub-group has up to \d+ elements; use that",
    ),
    (
        "layers_on_nvme_are_let_go",
        1,
        {"nvme_path": "/tmp"},
        {
            "zero_optimization": {
                "stage": 3,
                "stage3_max_reuse_distance": 1000,
                "offload_param": {"device": "nvme"},
            }
        },
        r"stage3_max_reuse_distance=1000 with offload_param\.device=nvme: .* use 0",
    ),
    (
        "partial_offload_is_heard",
        1,
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r"ratio=0\.5 with stage=2: DeepSpeed divides the optimizer in stage 3 only.*use stage 3",
    ),
    (
        "partial_offload_is_heard",
        1,
        {"nvme_path": "/tmp"},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "ratio": 0.5}}},
        r"ratio=0\.5 with device=nvme: .* use device=cpu",
    ),
    (
        "partial_offload_is_heard",
        1,
        {"optimizer__type": "Lion"},
        {
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": "auto",
                "offload_optimizer": {"device": "cpu", "ratio": 0.5},
            }
        },
        r"ratio=0\.5: DeepSpeed divides its own CPU Adam only; use optimizer\.type=AdamW",
    ),
    (
        "partial_offload_has_sub_groups",
        1,
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r"ratio with sub_group_size=None: .* use \d+ or less",
    ),
    (
        "newer_offloads_are_not_tried",
        1,
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        r"super_offload=true: .* leave it out",
    ),
    (
        "newer_offloads_are_not_tried",
        1,
        {},
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        r"zero_optimization\.zenflow: .* leave it out",
    ),
    (
        "partitioned_messages_need_whole_activations",
        4,
        {"layout": {"tp": 2, "pp": 2, "sequence_parallel": True}},
        {"zero_optimization": {"stage": 1}, "pipeline": {"pipe_partitioned": True}},
        r"pipeline\.pipe_partitioned=true with layout\.sequence_parallel=true.*use false",
    ),
    (
        "optimizer_exists",
        1,
        {"optimizer__type": "OneBitAdam"},
        None,
        r"no 1-bit optimizers any more; use AdamW",
    ),
    (
        "optimizer_exists",
        1,
        {"optimizer__type": "AdamZ"},
        None,
        r"optimizer\.type=AdamZ: there are Adam, AdamW, Lion",
    ),
    (
        "zero_knows_the_optimizer",
        1,
        {"optimizer__type": "Rprop"},
        None,
        r'Rprop with zero_optimization\.stage=1: nobody.*"zero_allow_untested_optimizer": true.*or use stage 0',
    ),
    (
        "offload_knows_the_optimizer",
        1,
        {"optimizer__type": "Muon"},
        STAGE_1_OFFLOAD,
        r"optimizer\.type=Muon with offload_optimizer: DeepSpeed has CPU kernels for Adam, AdamW",
    ),
    (
        "light_parameters_are_known",
        1,
        {"optimizer": {"type": "GaLore", "params": {"rnak": 4}}},
        None,
        r"optimizer\.params\.rnak with optimizer\.type=GaLore: there are rank, .*, embeddings; did you mean 'rank'",
    ),
    (
        "light_parameters_are_known",
        1,
        {"optimizer": {"type": "Adafactor", "params": {"eps": 1e-30}}},
        None,
        r"optimizer\.params\.eps=1e-30 with optimizer\.type=Adafactor: must be two numbers above 0",
    ),
    (
        "rows_need_whole_rows",
        2,
        {"optimizer__type": "Adafactor", "layout__tp": 2},
        None,
        r"optimizer\.type=Adafactor with layout\.tp=2: .*use tp=1.*or AdamW8bit or Lion",
    ),
    (
        "rows_need_whole_rows",
        1,
        {"optimizer__type": "GaLore", "model__moe": MOE},
        None,
        r"optimizer\.type=GaLore with model\.moe: .*use AdamW8bit or Lion",
    ),
    (
        "rows_need_whole_rows",
        2,
        {"optimizer__type": "galore"},
        {"zero_optimization": {"stage": 3}},
        r"optimizer\.type=GaLore with zero_optimization\.stage=3: .*use stage 1 or 2",
    ),
    (
        "light_partitions_lie_in_order",
        2,
        {"optimizer__type": "Adafactor"},
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        r"round_robin_gradients=True with optimizer\.type=Adafactor: not tried together; leave it out",
    ),
    (
        "tied_copies_take_the_same_steps",
        2,
        {"optimizer__type": "AdamW8bit", "layout__pp": 2},
        None,
        r"AdamW8bit with layout\.pp=2.*stage=1 and model\.tie_embeddings=true: .*use model\.tie_embeddings=false",
    ),
    (
        "tied_copies_take_the_same_steps",
        4,
        {"optimizer__type": "Adafactor", "layout__pp": 2},
        None,
        r"Adafactor with layout\.pp=2.*model\.tie_embeddings=true: .*in another order.*pp=1, or Lion",
    ),
    (
        "tied_copies_take_the_same_steps",
        4,
        {**T5, "model__tie_embeddings": False, "optimizer__type": "Adafactor", "layout__pp": 2},
        None,
        r"Adafactor with layout\.pp=2.*model\.t5, whose stacks share tables: .*; use pp=1, or Lion",
    ),
    (
        "tied_copies_take_the_same_steps",
        2,
        {
            "model__mtp": {"depth": 1},
            "model__tie_embeddings": False,
            "optimizer__type": "AdamW8bit",
            "layout__pp": 2,
        },
        None,
        r"AdamW8bit with layout\.pp=2.*model\.mtp\.depth=1, whose layers embed once more: .*; use pp=1, or Lion",
    ),
    (
        "the_optimizer_hears_its_words",
        1,
        {"optimizer": {"type": "Adafactor", "eps": 1e-6}},
        None,
        r"optimizer\.eps=1e-06 with optimizer\.type=Adafactor: it has none; leave it out; optimizer\.params has",
    ),
    (
        "the_optimizer_hears_its_words",
        1,
        {"optimizer": {"type": "SGD"}},
        {"zero_optimization": {"stage": 0}, "optimizer": {"params": {"betas": [0.9, 0.99]}}},
        r"optimizer\.betas=\(0\.9, 0\.99\) with optimizer\.type=SGD: it has none; leave it out$",
    ),
    (
        "muon_needs_whole_matrices",
        2,
        {"optimizer__type": "Muon", "layout__tp": 2},
        None,
        r"optimizer\.type=Muon with layout\.tp=2.*use tp=1 and pp=1",
    ),
    (
        "muon_has_no_bf16_sums_apart",
        1,
        {"optimizer__type": "Muon", "precision": "bf16"},
        None,
        r"optimizer\.type=Muon with precision\.dtype=bf16 and zero_optimization\.stage=1: .*use stage 2",
    ),
    (
        "muon_wants_whole_gradients",
        1,
        {"optimizer__type": "Muon"},
        {"zero_optimization": {"stage": 3, "reduce_scatter": True}},
        r"reduce_scatter=true with optimizer\.type=Muon and stage=3: use false",
    ),
    (
        "muon_is_not_clipped",
        1,
        {"optimizer__type": "Muon"},
        None,
        r"optimizer\.gradient_clipping=0\.5 with optimizer\.type=Muon.*use 0",
    ),
    (
        "adagrad_decays_everything_under_zero",
        1,
        {"optimizer__type": "Adagrad"},
        None,
        r"optimizer\.weight_decay=0\.1 with optimizer\.type=Adagrad.*use weight_decay=0, or stage 0",
    ),
    (
        "final_decay_begins_after_warmup",
        1,
        {"schedule": {"kind": "wsd", "warmup_steps": 10, "decay_steps": 15}},
        None,
        r"schedule\.decay_steps=15 with warmup_steps=10.*use decay_steps <= 10",
    ),
    (
        "schedule_fits_the_layout",
        2,
        {
            "layout": {"pp": 2, "chunks": 2, "schedule": "interleaved"},
            "batch": {"micro_size": 2, "accumulation_steps": 3},
        },
        None,
        r"layout\.schedule=interleaved with 3 micro-batches: they pass in groups of layout\.pp=2; use 2 or 4",
    ),
    (
        "schedule_fits_the_layout",
        2,
        {"layout": {"chunks": 2, "schedule": "interleaved"}},
        None,
        r"layout\.chunks=2, layout\.schedule=interleaved with layout\.pp=1: there is no pipeline",
    ),
    (
        "split_backward_needs_our_linears",
        2,
        {"layout": {"pp": 2, "schedule": "zb-h1"}, "kernels": "te"},
        None,
        r"layout\.schedule=zb-h1 with kernels=te: .*use kernels=torch, or 1f1b or interleaved",
    ),
    (
        "explicit_partition_is_sound",
        2,
        {"layout": {"pp": 2, "partition": [0, 7, 7]}},
        None,
        r"layout\.partition=\[0, 7, 7\]: needs 3 rising numbers from 0 to 7",
    ),
    (
        "checkpoints_to_begin_from_are_there",
        1,
        {"checkpoint__resume": "/no/such/checkpoint"},
        None,
        r"checkpoint\.resume=/no/such/checkpoint: no checkpoint there; give a run's folder",
    ),
    (
        "checkpoints_to_begin_from_are_there",
        1,
        {"checkpoint__weights_from": "/no/such/run"},
        None,
        r"checkpoint\.weights_from=/no/such/run: no checkpoint there; give a run's folder",
    ),
    (
        "changed_facts_are_of_other_weights",
        1,
        {"checkpoint__allow_changed": ["model.rotary_base"]},
        None,
        r"checkpoint\.allow_changed=\[model\.rotary_base\]: against what\? it goes with checkpoint\.weights_from",
    ),
    (
        "dropping_needs_a_capacity",
        1,
        {"model__moe": MOE | {"drop": "position"}},
        None,
        r"model\.moe\.drop=position: nothing is dropped without a capacity; give model\.moe\.capacity_factor",
    ),
    (
        "family_is_the_models",
        1,
        {"family": "bert"},
        None,
        r"family=bert: the model is of family gpt; leave family out",
    ),
    (
        "objective_fits_the_family",
        1,
        {"data__objective": "mlm", "model__vocab_size": None},
        None,
        r"data\.objective=mlm with a model of family gpt: it is trained with none .*fim, prefix_lm",
    ),
    (
        "second_task_has_a_head",
        1,
        {**BERT, "model__bert__sentence_head": False, "data__objective__second_task": "next_sentence"},
        None,
        r"second_task=next_sentence with model\.bert\.sentence_head=False.*or second_task=none",
    ),
    (
        "masked_text_is_plain",
        1,
        {**BERT, "data__documents": "reset"},
        None,
        r"data\.documents=reset.*with objective mlm: these are for the next token; leave them out",
    ),
    (
        "replaced_tokens_are_told",
        1,
        {**BERT, "data__objective__replaced": True},
        None,
        r"data\.objective\.replaced=true with model\.electra not set: they go together; set both, or neither",
    ),
    (
        "corrupted_text_is_plain",
        1,
        {**T5, "data__mask_boundary_loss": True},
        None,
        r"data\.mask_boundary_loss=True with objective span_corruption: .*leave them out",
    ),
    (
        "prefixes_are_seen",
        1,
        {"data__objective": "prefix_lm"},
        None,
        r"data\.objective=prefix_lm with model\.attention=causal: .*go together; set both, or neither",
    ),
    (
        "looking_ahead_ends_within_the_sample",
        1,
        {"model__mtp": {"depth": 40}},
        None,
        r"model\.mtp\.depth=40 with data\.sequence_length=32: .*use a depth of at most 31",
    ),
    (
        "chunks_of_the_loss_are_known",
        1,
        {"loss": {"chunk_tokens": 0}},
        None,
        r"loss\.chunk_tokens=0: counts tokens; use 1 or more, .*auto or all",
    ),
    (
        "chunks_of_the_loss_are_known",
        1,
        {
            "model": {"preset": "tiny-electra", "vocab_size": None},
            "data__objective": {"kind": "mlm", "replaced": True},
            "loss__chunk_tokens": 64,
        },
        None,
        r"loss\.chunk_tokens=64 with model\.electra: .*whole logits; use auto or all",
    ),
    (
        "modules_are_for_selective_recompute",
        1,
        {"recompute": {"mode": "full", "modules": ["mlp"]}},
        None,
        r"recompute\.modules=\[mlp\] with recompute\.mode=full: .*set recompute\.mode=selective, or leave",
    ),
    (
        "modules_are_for_selective_recompute",
        1,
        {"recompute": {"mode": "selective", "modules": []}},
        None,
        r"recompute\.modules=\[\]: forgets nothing; name some, or set recompute\.mode=none",
    ),
    (
        "modules_to_recompute_are_there",
        1,
        {"recompute": {"mode": "selective", "modules": ["mlp", "moe"]}},
        None,
        r"recompute\.modules=\[mlp,moe\]: the model has no experts, so moe .*choose among core_attn, layernorm, mlp",
    ),
    (
        "what_is_forgotten_does_not_wait",
        1,
        {"recompute": {"mode": "selective", "modules": ["core_attn", "layernorm"], "offload": True}},
        None,
        r"offload=true with recompute\.modules=\[core_attn,layernorm\]: .*leave out layernorm, or use .*=full",
    ),
    (
        "words_of_recompute_are_heard",
        1,
        {"recompute": {"offload_above_bytes": 0}},
        None,
        r"recompute\.offload_above_bytes=0 without recompute\.offload=true: .*set it, or leave",
    ),
    (
        "words_of_recompute_are_heard",
        1,
        {"recompute": {"mode": "selective", "every": 2}},
        None,
        r"recompute\.every=2 with recompute\.mode=selective: .*set recompute\.mode=full, or leave every out",
    ),
    (
        "nothing_is_recomputed_twice",
        1,
        {
            "model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32},
            "recompute": {"mode": "selective", "modules": ["moe", "moe_act"]},
        },
        None,
        r"recompute\.modules=\[moe,moe_act\]: .*leave out moe_act, or moe",
    ),
    (
        "shared_weights_are_reduced_once",
        2,
        {**T5, "recompute": "full", "deepspeed": "zero2.json"},
        None,
        r"recompute\.mode=full with zero_optimization\.stage=2 and model\.position_embedding=relative.*use stage 1, or",
    ),
    (
        "shared_weights_are_reduced_once",
        2,
        {"model__mtp": {"depth": 1}, "recompute": "full", "deepspeed": "zero3.json"},
        None,
        r"recompute\.mode=full with zero_optimization\.stage=3 and model\.mtp\.depth=1.*use stage 1, or",
    ),
    (
        "relative_positions_keep_their_attention",
        1,
        {**T5, "recompute": "selective"},
        None,
        r"mode=selective with model\.position_embedding=relative: .*use recompute\.modules=\[layernorm,mlp\]",
    ),
    (
        "output_folder_can_be_made",
        1,
        {"out": "/dev/null/there"},
        None,
        r"out=/dev/null/there: /dev/null is a file; choose another folder",
    ),
)


@pytest.mark.parametrize(
    ("rule", "world_size", "changes", "document", "message"), CASES, ids=lambda c: str(c)[:40]
)
def test_rule_refuses_with_the_way_out(
    corpus: str,
    out: Path,
    tmp_path: Path,
    rule: str,
    world_size: int,
    changes: dict[str, Any],
    document: dict[str, Any] | None,
    message: str,
) -> None:
    if document is not None:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(document))
        changes = {**changes, "deepspeed": str(path)}
    with pytest.raises(RunError, match=message):
        checked(tiny(corpus, **{"out": out, **changes}), world_size)


def test_every_rule_has_a_failing_case() -> None:
    assert {rule.__name__ for rule in config_rules.RULES} == {case[0] for case in CASES}


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (
            3,
            {"layout__tp": 2},
            r"tp=2 x layout\.pp=1 = 2 ranks per model copy, but there are 3 ranks: start 2 or 4 ranks",
        ),
        (3, {"layout__tp": 3}, r"tp=3: .*num_attention_heads=4.*\[1, 2, 4\]"),
        (
            1,
            {"batch__global_size": 7},
            r"global_size=7, batch\.micro_size=2: not a multiple of 2.*nearest.*: 6 or 8",
        ),
        (
            1,
            {"batch__accumulation_steps": 3},
            r"global must equal micro x accumulation x dp = 2 x 3 x 1 = 6; leave one",
        ),
        (1, {"batch": {}}, r"give batch\.micro_size or batch\.global_size"),
        (
            8,
            {"layout__pp": 8},
            r"^layout\.pp=8: the model has 7 layers to share out; use layout\.pp=7 or fewer",
        ),
        (
            1,
            {"model__position_embedding": "learned", "data__sequence_length": 128},
            r"^data\.sequence_length=128: the learned positions end at model\.max_sequence_length=64",
        ),
        (
            2,
            {"layout": {"tp": 2, "sequence_parallel": True}, "data__sequence_length": 33},
            r"^data\.sequence_length=33: .*layout\.tp=2.*use 32",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(
    corpus: str, out: Path, world_size: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        checked(tiny(corpus, **{"out": out, **changes}), world_size)


def test_all_faults_are_told_at_once(corpus: str, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    raw = tiny(
        corpus, out, layout={"pp": 2, "sequence_parallel": True}, optimizer__type="AdamZ", deepspeed=str(path)
    )
    with pytest.raises(RunError) as told:
        checked(raw, 2)
    text = str(told.value)
    assert text.startswith("3 faults:")
    assert all(
        part in text for part in ("sequence_parallel=true", "stage=3 cannot run", "optimizer.type=AdamZ")
    )


def test_any_two_batch_sizes_give_the_third(corpus: str, out: Path) -> None:
    def sizes(**batch: int) -> tuple[int, int, int]:
        run = checked(tiny(corpus, out, batch=batch), 2)
        return run.global_size, run.micro_size, run.num_micro_batches

    assert sizes(global_size=8, micro_size=2) == (8, 2, 2)
    assert sizes(global_size=8, accumulation_steps=4) == (8, 1, 4)
    assert sizes(micro_size=2, accumulation_steps=4) == (16, 2, 4)
    assert sizes(global_size=8) == (8, 4, 1)
    assert sizes(micro_size=3) == (6, 3, 1)


def test_what_a_cpu_cannot_do_is_refused_there_only(corpus: str, out: Path) -> None:
    run = checked(tiny(corpus, out, precision="fp16", kernels="te"), 1)
    assert len(device_faults(run, "cpu")) == 2
    assert "use precision.dtype=bf16 or fp32 here" in device_faults(run, "cpu")[0]
    assert device_faults(run, "cuda") == []


def test_a_package_that_is_missing_is_told_with_the_command(
    corpus: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checked(tiny(corpus, out, optimizer__type="adamw8bit"), 1)
    assert device_faults(run, "cpu") == []
    monkeypatch.setattr(optimizer_rules, "find_spec", lambda name: None)
    (fault,) = device_faults(run, "cpu")
    assert "bitsandbytes is not installed here: pip install 'megaloom[light]'; or use AdamW or Lion" in fault
