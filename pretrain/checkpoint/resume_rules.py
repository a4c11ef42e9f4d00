"""Under which other settings a run may go on: one table for the run file's keys, one for the DeepSpeed JSON's.

The checkpoint holds the whole run file and JSON of the run that wrote it.  Every value that differs now is judged:

    FREE       takes effect from the next step on
    CONVERTED  what the checkpoint holds is brought into the new terms
    REFUSED    the checkpoint fits no other value
    LAYOUT     judged by the shards and stages that follow from it (`state.layout_of`)
    CONTENT    judged by the corpora's content and the order of samples (`TrainingData.fingerprint`)
    ELSEWHERE  of the JSON: the run file has the same fact under another name

Whatever differs and is not refused is one line in the log, with both values.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from pretrain.nested import leaves


class Rule(Enum):
    FREE = "free"
    CONVERTED = "converted"
    REFUSED = "refused"
    LAYOUT = "by layout"
    CONTENT = "by content"
    ELSEWHERE = "by the run file"


class Change(NamedTuple):
    """A value that differs from the checkpoint's."""

    key: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.now)} (checkpoint: {_shown(self.before)})"


def _keys(rule: Rule, section: str, names: str) -> dict[str, Rule]:
    prefix = f"{section}." if section else ""
    return {f"{prefix}{name}": rule for name in names.split()}


# A key stands for what is below it, unless that has a line of its own.
RUN_FILE: dict[str, Rule] = {
    **_keys(Rule.FREE, "", "name out kernels nvme_path deepspeed"),
    **_keys(Rule.REFUSED, "", "family model"),
    **_keys(
        Rule.FREE,
        "model",
        "hidden_dropout attention_dropout init_std scale_residual_init moe.aux_loss moe.sequence_aux_loss "
        "moe.global_aux_loss moe.z_loss moe.jitter moe.capacity_factor moe.drop moe.pad_to_capacity moe.router_dtype "
        "moe.bias_update_rate mtp.loss_weight",
    ),
    **_keys(Rule.CONTENT, "data", "train split tokenizer sequence_length objective seed"),
    **_keys(Rule.FREE, "data", "validation test documents mask_boundary_loss cache cache_scope verify"),
    "train.seed": Rule.REFUSED,
    **_keys(
        Rule.FREE,
        "train",
        "steps eval_every eval_at_start eval_samples eval_micro_size tie_check_every stop_on_nan",
    ),
    **_keys(Rule.LAYOUT, "layout", "tp pp sequence_parallel ep etp partition chunks schedule"),
    **_keys(Rule.FREE, "layout", "dispatcher messages"),
    "batch.global_size": Rule.CONVERTED,
    **_keys(Rule.FREE, "batch", "micro_size accumulation_steps"),
    **_keys(Rule.FREE, "optimizer", "lr betas eps weight_decay gradient_clipping"),
    **_keys(Rule.REFUSED, "optimizer", "type decay_embeddings params"),
    **_keys(Rule.FREE, "optimizer.params", "update_gap scale d beta2_decay"),
    **_keys(
        Rule.FREE,
        "schedule",
        "kind warmup_steps total_steps min_factor decay_steps decay_shape exponent",
    ),
    **_keys(Rule.REFUSED, "precision", "dtype accumulate"),
    **_keys(
        Rule.FREE,
        "fp8",
        "backend margin bf16_first bf16_last experts start_step watch_every shadow_every experiment guard.gap "
        "guard.overflow guard.retry guard.strikes guard.underflow",
    ),
    **_keys(Rule.CONVERTED, "", "fp8 fp8.recipe fp8.amax_history"),  # scales of another recipe begin anew
    **_keys(Rule.FREE, "recompute", "mode every modules offload offload_above_bytes"),
    "loss.chunk_tokens": Rule.FREE,
    **_keys(Rule.FREE, "checkpoint", "every keep_last resume weights_from upcycle allow_changed"),
    **_keys(
        Rule.FREE,
        "monitor",
        "log_every hang_s experts_every starving_below starving_steps tensorboard peak_tflops",
    ),
}

DEEPSPEED: dict[str, Rule] = {
    **_keys(
        Rule.ELSEWHERE,
        "",
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer.type "
        "optimizer.params data_types.grad_accum_dtype tensorboard.enabled bf16.enabled bfloat16.enabled fp16.enabled",
    ),
    **_keys(
        Rule.FREE,
        "",
        "steps_per_print dump_state disable_python_gc log_level wall_clock_breakdown memory_breakdown "
        "prescale_gradients gradient_predivide_factor communication_data_type disable_allgather "
        "zero_allow_untested_optimizer vocabulary_size aio pipeline tensorboard wandb csv_monitor comet comms_logger "
        "flops_profiler timers checkpoint",
    ),
    **_keys(Rule.REFUSED, "", "zero_force_ds_cpu_optimizer optimizer.legacy_fusion scheduler data_types"),
    # DeepSpeed takes the loss scale with all that rules it from the checkpoint.
    **_keys(
        Rule.REFUSED,
        "fp16",
        "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale "
        "fp16_master_weights_and_grads",
    ),
    **_keys(
        Rule.REFUSED, "bf16", "bf16_master_weights_and_grads bf16_optimizer_states immediate_grad_update"
    ),
    **_keys(Rule.FREE, "bf16", "check_grad_overflow"),
    "bfloat16": Rule.REFUSED,
    "zero_optimization.stage": Rule.LAYOUT,
    **_keys(
        Rule.FREE,
        "zero_optimization",
        "contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
        "allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights stage3_prefetch_bucket_size "
        "prefetch_bucket_size stage3_param_persistence_threshold param_persistence_threshold "
        "stage3_model_persistence_threshold model_persistence_threshold stage3_max_live_parameters "
        "max_live_parameters stage3_max_reuse_distance max_reuse_distance stage3_gather_16bit_weights_on_model_save "
        "gather_16bit_weights_on_model_save stage3_module_granularity_threshold module_granularity_threshold "
        "stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "allgather_sequential ignore_unused_parameters log_trace_cache_warnings enable_sanity_checks "
        "memory_efficient_linear override_module_apply pipeline_loading_checkpoint zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients",
    ),
    # They change which elements a rank keeps, in which order or in what form.
    **_keys(
        Rule.REFUSED,
        "zero_optimization",
        "round_robin_gradients sub_group_size elastic_checkpoint parameter_alignment zero_hpz_partition_size zenflow "
        "save_muon_momentum_buffer_in_memory leaf_module offload_param offload_optimizer",
    ),
    **_keys(
        Rule.FREE,
        "zero_optimization.offload_optimizer",
        "nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init cpuadam_cores_perc",
    ),
    **_keys(
        Rule.FREE,
        "zero_optimization.offload_param",
        "nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    ),
}

# They change no number.
UNTOLD = {"name", "out", "deepspeed", "checkpoint", "monitor", "nvme_path", "kernels", "tensorboard", "wandb"}
UNTOLD |= {"csv_monitor", "comet", "comms_logger", "flops_profiler", "steps_per_print"}


def rule_of(table: Mapping[str, Rule], key: str) -> Rule | None:
    """Of the key itself, or of the section that it is in."""
    while key:
        if key in table:
            return table[key]
        key = key.rpartition(".")[0]
    return None


def changes(table: Mapping[str, Rule], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every value that differs, of two documents of the same kind."""
    theirs, ours = dict(leaves(dict(before))), dict(leaves(dict(now)))
    keys = [key for key in sorted({*theirs, *ours}) if _plain(theirs.get(key)) != _plain(ours.get(key))]
    # A section that is {} or null on one side and filled on the other is told by what fills it.
    told = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    return [Change(key, theirs.get(key), ours.get(key), rule_of(table, key) or Rule.REFUSED) for key in told]


def worth_telling(found: list[Change]) -> Iterator[Change]:
    """Those that take effect, as far as they have anything to do with numbers."""
    for change in found:
        is_quiet = change.key.split(".")[0] in UNTOLD
        if change.rule in (Rule.FREE, Rule.CONVERTED) and not is_quiet:
            yield change


def _plain(value: Any) -> Any:
    """As JSON keeps it: lists for tuples; false, null and {} say alike that something is not there."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value is False or value == {} else value


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value).replace("'", "")
