"""Which optimizer goes with which stage, offload and layout: rules of `config_rules`, kept apart for their number."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from pretrain.ds_config import TAKES, optimizer_is_offloaded
from pretrain.ds_schema import nearest
from pretrain.optimizer_facts import (
    BY_ROWS,
    CPU_OFFLOADABLE,
    LIGHT_EXTRA,
    LIGHT_PACKAGE,
    LIGHT_PARAMETERS,
    OPTIMIZERS,
    TRIED_BY_DEEPSPEED,
    TRIED_HERE,
    canonical,
)

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from model_providers.config import ModelConfig
    from pretrain.config_io import Run

Rule = Callable[["Run"], str | None]

ONE_BIT_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")
# Keys of zero_optimization under which a partition is not a group's parameters, end to end, or its state not as long.
REARRANGING = ("round_robin_gradients", "elastic_checkpoint", "parameter_alignment")


def optimizer_exists(run: "Run") -> str | None:
    kind = run.config.optimizer.type
    if kind.lower() in ONE_BIT_OPTIMIZERS:
        return (
            f"optimizer.type={kind}: DeepSpeed 0.19 has no 1-bit optimizers any more; use AdamW8bit or Lion"
        )
    if canonical(kind) not in OPTIMIZERS:
        return f"optimizer.type={kind}: there are {', '.join(OPTIMIZERS)}"
    return None


def the_optimizer_hears_its_words(run: "Run") -> str | None:
    """betas and eps have names of their own in the run file, and not every optimizer has them."""
    optimizer = run.config.optimizer
    kind = canonical(optimizer.type)
    stated = {
        key
        for key in ("betas", "eps")
        if getattr(optimizer, key) != type(optimizer).model_fields[key].default
    }
    deaf = sorted(stated - TAKES.get(kind.lower(), set()))
    if not deaf or optimizer_exists(run) is not None:
        return None
    own = ", ".join(LIGHT_PARAMETERS.get(kind, {}))
    way_out = f"leave it out; optimizer.params has {own}" if own else "leave it out"
    return f"optimizer.{deaf[0]}={getattr(optimizer, deaf[0])} with optimizer.type={kind}: it has none; {way_out}"


def zero_knows_the_optimizer(run: "Run") -> str | None:
    kind = run.config.optimizer.type
    if optimizer_exists(run) is not None:
        return None
    if (
        run.zero_stage
        and kind.lower() not in TRIED_BY_DEEPSPEED | TRIED_HERE
        and not run.deepspeed.get("zero_allow_untested_optimizer")
    ):
        return (
            f"optimizer.type={kind} with zero_optimization.stage={run.zero_stage}: nobody has tried them together; set "
            f'"zero_allow_untested_optimizer": true in the DeepSpeed JSON if it updates each number by itself, or use '
            f"stage 0"
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


def light_parameters_are_known(run: "Run") -> str | None:
    """DeepSpeed and torch judge those of theirs."""
    kind, given = canonical(run.config.optimizer.type), run.config.optimizer.params
    known = LIGHT_PARAMETERS.get(kind)
    if known is None:
        return None
    for key, value in given.items():
        if key not in known:
            there = ", ".join(known)
            return (
                f"optimizer.params.{key} with optimizer.type={kind}: there are {there}{nearest(key, known)}"
            )
        fault = known[key](value)
        if fault is not None:
            return f"optimizer.params.{key}={value!r} with optimizer.type={kind}: must be {fault}"
    return None


def rows_need_whole_rows(run: "Run") -> str | None:
    kind = canonical(run.config.optimizer.type)
    if kind.lower() not in BY_ROWS:
        return None
    if run.config.model.moe is not None:
        return (
            f"optimizer.type={kind} with model.moe: a rank's experts lie in one tensor, which it would take for one "
            "matrix; use AdamW8bit or Lion"
        )
    if run.layout.tp > 1:
        return (
            f"optimizer.type={kind} with layout.tp={run.layout.tp}: it looks at whole matrices, which tp splits; use "
            "tp=1 (with pp and dp as you like), or AdamW8bit or Lion"
        )
    if run.zero_stage == 3:
        return (
            f"optimizer.type={kind} with zero_optimization.stage=3: every parameter is cut over all ranks there; use "
            "stage 1 or 2, or AdamW8bit or Lion"
        )
    return None


def light_partitions_lie_in_order(run: "Run") -> str | None:
    kind, zero = canonical(run.config.optimizer.type), run.deepspeed["zero_optimization"]
    if kind not in LIGHT_PARAMETERS or not run.zero_stage:
        return None
    for key in REARRANGING:
        if zero.get(key) is True or zero.get(key, 1) not in (False, 1):
            return f"zero_optimization.{key}={zero[key]} with optimizer.type={kind}: not tried together; leave it out"
    return None


class Shared(NamedTuple):
    """Weights that several layers use, so that pipeline stages hold copies of them."""

    what: str
    is_by_choice: bool  # whether untying head and embedding ends it


def shared_over_stages(model: "ModelConfig") -> Shared | None:
    """None if every weight is one layer's."""
    if model.t5 is not None:
        return Shared("model.t5, whose stacks share tables", False)
    if model.mtp is not None:
        return Shared(f"model.mtp.depth={model.mtp.depth}, whose layers embed once more", False)
    if model.electra is not None:
        return Shared("model.electra, whose two models share the embedding", False)
    return Shared("model.tie_embeddings=true", True) if model.tie_embeddings else None


def tied_copies_take_the_same_steps(run: "Run") -> str | None:
    """Each stage that holds a tied weight updates its own copy, which lies elsewhere in its own partitions."""
    kind = canonical(run.config.optimizer.type)
    shared = shared_over_stages(run.config.model)
    if run.layout.pp == 1 or not run.zero_stage or shared is None:
        return None
    if kind == "AdamW8bit":
        why = "the stages that hold the same weights would round them in other blocks of 256, and part"
    elif run.layout.dp > 1 and (
        kind == "Adafactor" or (kind == "GaLore" and run.config.optimizer.params.get("embeddings"))
    ):
        why = "the stages that hold the same weights would sum their rows in another order, and part"
    else:
        return None
    return (
        f"optimizer.type={kind} with layout.pp={run.layout.pp}, zero_optimization.stage={run.zero_stage} and "
        f"{shared.what}: {why}; use {'model.tie_embeddings=false, ' if shared.is_by_choice else ''}pp=1, or Lion"
    )


def missing_package(run: "Run") -> str | None:
    """Asked where the run would start; each host's answers are compared beforehand."""
    if canonical(run.config.optimizer.type) != "AdamW8bit" or find_spec(LIGHT_PACKAGE) is not None:
        return None
    return f"optimizer.type=AdamW8bit: {LIGHT_PACKAGE} is not installed here: {LIGHT_EXTRA}; or use AdamW or Lion"


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


def muon_has_no_bf16_sums_apart(run: "Run") -> str | None:
    """deepspeed/runtime/bf16_optimizer.py, __init__: not with a layout that is told from outside."""
    precision = run.config.precision
    is_muon = run.config.optimizer.type.lower() == "muon"
    if is_muon and run.zero_stage == 1 and (precision.dtype, precision.accumulate) == ("bf16", "fp32"):
        return (
            "optimizer.type=Muon with precision.dtype=bf16 and zero_optimization.stage=1: DeepSpeed's optimizer of "
            "that stage does not take it; use stage 2"
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
    the_optimizer_hears_its_words,
    zero_knows_the_optimizer,
    offload_knows_the_optimizer,
    light_parameters_are_known,
    rows_need_whole_rows,
    light_partitions_lie_in_order,
    tied_copies_take_the_same_steps,
    muon_needs_whole_matrices,
    muon_has_no_bf16_sums_apart,
    muon_wants_whole_gradients,
    muon_is_not_clipped,
    adagrad_decays_everything_under_zero,
    final_decay_begins_after_warmup,
)
