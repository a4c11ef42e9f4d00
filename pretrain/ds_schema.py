"""Every key that DeepSpeed 0.19 reads from its JSON, so that a typo is an error before any process starts.

DeepSpeed itself ignores unknown top-level keys without a word (`gradient_clipp1ng` trains unclipped) and knows
the keys of most sections only through its readers.  A test compares this table with the installed DeepSpeed.
`None` means: a plain value, or a section whose keys are free.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

OPTIMIZER_OFFLOAD = {
    "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    "super_offload", "cpuadam_cores_perc",
}  # fmt: skip
PARAM_OFFLOAD = {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}
ZERO = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size",
    "stage3_prefetch_bucket_size",
    "prefetch_bucket_size", "stage3_param_persistence_threshold", "param_persistence_threshold",
    "stage3_model_persistence_threshold", "model_persistence_threshold", "stage3_max_live_parameters",
    "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold", "module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
    "use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "allgather_sequential",
    "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
    "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
}  # fmt: skip
FP16 = {
    "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
    "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads",
}  # fmt: skip
BF16 = {
    "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states",
}  # fmt: skip

ACCEPTED: dict[str, set[str] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "steps_per_print": None,
    "dump_state": None,
    "disable_python_gc": None,
    "log_level": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "communication_data_type": None,
    "disable_allgather": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "vocabulary_size": None,
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "zero_optimization": ZERO,
    "fp16": FP16,
    "bf16": BF16,
    "bfloat16": BF16,
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "pipeline": {"pipe_partitioned", "grad_partitioned"},
    "tensorboard": {"enabled", "output_path", "job_name"},
    "wandb": {"enabled", "group", "team", "project"},
    "csv_monitor": {"enabled", "output_path", "job_name"},
    "comet": {
        "enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name", "experiment_key",
        "online", "mode",
    },
    "comms_logger": {"enabled", "prof_all", "prof_ops", "verbose", "debug"},
    "flops_profiler": {
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    },
    "timers": {"throughput"},
    "checkpoint": {"tag_validation", "parallel_write", "checkpoint_serialization", "writer"},
}  # fmt: skip

SUBSECTIONS: dict[str, set[str]] = {
    "zero_optimization.offload_optimizer": OPTIMIZER_OFFLOAD,
    "zero_optimization.offload_param": PARAM_OFFLOAD,
}

REFUSED: dict[str, str] = {
    "activation_checkpointing": "recomputation is set in the run file: recompute.mode and recompute.every",
    "tensor_parallel": "tensor parallelism is megatron-core's here: layout.tp in the run file",
    "expert_parallel": "DeepSpeed's AutoEP is not used here",
    "sequence_parallel_size": "Ulysses is not used here; layout.sequence_parallel splits activations over tp ranks",
    "data_parallel_size": "it follows from the world: dp = ranks / (tp x pp)",
    "torch_autocast": "number formats are set by precision.dtype in the run file",
    "data_efficiency": "data order is the run's own, so that a resume repeats it; DeepSpeed's samplers would change it",
    "hybrid_engine": "it serves fine-tuning with generation, not pretraining",
    "autotuning": "it launches runs by itself and knows nothing of tp and pp",
    "compile": "DeepCompile rewrites the engine's graph and was not tried with megatron-core's layers",
    "weight_quantization": "it serves inference, not pretraining",
    "datastates_ckpt": "checkpoints are written by Megaloom, atomically",
    "managed_gradient_accumulation": "accumulation is set by batch.accumulation_steps in the run file",
    "gradient_allreduce_op": "losses are weighted so that gradients are averaged; a sum would change the step",
    "use_data_before_expert_parallelism": "the rank order is fixed: tensor fastest, then data, pipeline slowest",
    "seq_parallel_communication_data_type": "Ulysses is not used here",
    "dataloader_drop_last": "the loader is Megaloom's own; it always gives full batches",
}
REMOVED = (
    "amp", "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
    "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
)  # fmt: skip


def key_faults(document: dict[str, Any]) -> Iterator[str]:
    """One sentence per key that DeepSpeed would ignore or that Megaloom does not let through."""
    for key, value in document.items():
        if key in REFUSED:
            yield f"{key}: not used with Megaloom: {REFUSED[key]}"
        elif key in REMOVED:
            yield f"{key}: DeepSpeed has removed this feature; delete the section"
        elif key not in ACCEPTED:
            yield f"{key}: DeepSpeed knows no such key{nearest(key, ACCEPTED)}"
        elif isinstance(known := ACCEPTED[key], set):
            yield from _section_faults(key, value, known)


def _section_faults(path: str, section: Any, known: set[str]) -> Iterator[str]:
    if not isinstance(section, dict):
        yield f"{path}={section!r}: must be a section {{...}} with keys among {', '.join(sorted(known))}"
        return
    for key, value in section.items():
        if key not in known:
            yield f"{path}.{key}: DeepSpeed knows no such key{nearest(key, known)}"
        elif isinstance(inner := SUBSECTIONS.get(f"{path}.{key}"), set) and value is not None:
            yield from _section_faults(f"{path}.{key}", value, inner)


def nearest(word: str, words: Any) -> str:
    """``"; did you mean 'x'?"`` or nothing."""
    close = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
