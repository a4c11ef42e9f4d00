"""Which optimizer goes with which stage, offload and layout: rules of `config_rules`, kept apart for their number."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain.ds_config import optimizer_is_offloaded

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run

Rule = Callable[["Run"], str | None]

DEEPSPEED_OPTIMIZERS = ("Adam", "AdamW", "Lion", "Muon", "Adagrad", "Lamb")
TORCH_OPTIMIZERS = ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
ONE_BIT_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")
# deepspeed/runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS; the others need zero_allow_untested_optimizer.
ZERO_TRIED = {"adam", "adamw", "lion", "muon", "adagrad"}
CPU_OFFLOADABLE = ("Adam", "AdamW", "Lion", "Adagrad")


def optimizer_exists(run: "Run") -> str | None:
    kind = run.config.optimizer.type
    names = (*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS)
    if kind.lower() in ONE_BIT_OPTIMIZERS:
        return f"optimizer.type={kind}: DeepSpeed 0.19 has no 1-bit optimizers any more; use AdamW or Lion"
    if kind not in names and kind.lower() not in {name.lower() for name in DEEPSPEED_OPTIMIZERS}:
        return f"optimizer.type={kind}: there are {', '.join(names)}"
    return None


def zero_knows_the_optimizer(run: "Run") -> str | None:
    kind = run.config.optimizer.type
    if optimizer_exists(run) is not None:
        return None
    if (
        run.zero_stage
        and kind.lower() not in ZERO_TRIED
        and not run.deepspeed.get("zero_allow_untested_optimizer")
    ):
        return (
            f"optimizer.type={kind} with zero_optimization.stage={run.zero_stage}: set "
            f'"zero_allow_untested_optimizer": true '
            f"in the DeepSpeed JSON if it updates each number by itself (SGD does), or use stage 0"
        )
    return None


def offload_knows_the_optimizer(run: "Run") -> str | None:
    kind = run.config.optimizer.type
    if optimizer_is_offloaded(dict(run.deepspeed)) and kind.lower() not in {
        name.lower() for name in CPU_OFFLOADABLE
    }:
        names = ", ".join(CPU_OFFLOADABLE)
        return f"optimizer.type={kind} with offload_optimizer: DeepSpeed has CPU kernels for {names}"
    return None


def muon_needs_whole_matrices(run: "Run") -> str | None:
    if run.config.optimizer.type.lower() != "muon":
        return None
    if run.config.model.moe is not None:
        return (
            "optimizer.type=Muon with model.moe: a rank's experts lie in one tensor, which it would take for one "
            "matrix; use AdamW or Lion"
        )
    if run.layout.tp > 1 or run.layout.pp > 1:
        return (
            f"optimizer.type=Muon with layout.tp={run.layout.tp}, layout.pp={run.layout.pp}: it "
            "orthogonalises whole matrices, which tp splits, and DeepSpeed's version is for data "
            "parallelism; use tp=1 and pp=1"
        )
    return None


def muon_wants_whole_gradients(run: "Run") -> str | None:
    zero = run.deepspeed["zero_optimization"]
    if run.config.optimizer.type.lower() == "muon" and zero["stage"] == 3 and zero.get("reduce_scatter"):
        return "zero_optimization.reduce_scatter=true with optimizer.type=Muon and stage=3: use false, or leave it out"
    return None


def muon_is_not_clipped(run: "Run") -> str | None:
    if run.config.optimizer.type.lower() == "muon" and run.deepspeed["gradient_clipping"]:
        return (
            f"optimizer.gradient_clipping={run.deepspeed['gradient_clipping']} with optimizer.type=Muon: "
            "under ZeRO DeepSpeed would clip the orthogonalised update, whose norm says nothing about the "
            "gradient; use 0"
        )
    return None


def adagrad_decays_everything_under_zero(run: "Run") -> str | None:
    optimizer = run.config.optimizer
    if optimizer.type.lower() == "adagrad" and run.zero_stage and optimizer.weight_decay:
        return (
            f"optimizer.weight_decay={optimizer.weight_decay} with optimizer.type=Adagrad and "
            f"zero_optimization.stage={run.zero_stage}: DeepSpeed makes one group of all parameters there, "
            "norms and biases too; use weight_decay=0, or stage 0"
        )
    return None


def final_decay_begins_after_warmup(run: "Run") -> str | None:
    """A warm-up that outlasts the run does no harm: short trials of a long schedule are common."""
    schedule = run.config.schedule
    decay_steps = getattr(schedule, "decay_steps", 0)
    if schedule is None or not decay_steps:
        return None
    total = getattr(schedule, "total_steps", None) or run.config.train.steps
    if schedule.warmup_steps + decay_steps > total:
        return (
            f"schedule.decay_steps={decay_steps} with warmup_steps={schedule.warmup_steps}: they overlap in "
            f"a schedule of {total} steps; use decay_steps <= {max(0, total - schedule.warmup_steps)}, or "
            "raise train.steps"
        )
    return None


OPTIMIZER_RULES: tuple[Rule, ...] = (
    optimizer_exists,
    zero_knows_the_optimizer,
    offload_knows_the_optimizer,
    muon_needs_whole_matrices,
    muon_wants_whole_gradients,
    muon_is_not_clipped,
    adagrad_decays_everything_under_zero,
    final_decay_begins_after_warmup,
)
