"""What goes with experts: rules of `config_rules`, kept apart for their number."""

from typing import TYPE_CHECKING

from pretrain.optimizer_rules import Rule

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run


def shared_out_experts_need_zero(run: "Run") -> str | None:
    layout = run.layout
    if layout.ep > 1 and run.zero_stage == 0:
        return (
            f"zero_optimization.stage=0 with layout.ep={layout.ep}: DeepSpeed clips by the norm of a rank's own "
            "experts there; use stage 1 (at dp=1 it needs the same memory), or layout.ep=1"
        )
    if layout.ep > 1 and run.zero_stage == 3 and layout.expert_tp > 1:
        return (
            f"zero_optimization.stage=3 with layout.ep={layout.ep} and layout.etp={layout.expert_tp}: DeepSpeed takes "
            "a wrong norm of experts that are split over ranks; use layout.etp=1, or stage 1 or 2"
        )
    if layout.ep > 1 and run.zero_stage == 2 and layout.pp > 1:
        return (
            f"zero_optimization.stage=2 with layout.pp={layout.pp} and layout.ep={layout.ep}: not tried together; use "
            "stage 1"
        )
    return None


def dispatcher_can_pad(run: "Run") -> str | None:
    moe = run.config.model.moe
    if moe is not None and moe.pad_to_capacity and run.layout.dispatcher == "allgather":
        return (
            "model.moe.pad_to_capacity=true with layout.dispatcher=allgather: megatron-core pads in all-to-alls only; "
            "use alltoall, or pad_to_capacity=false"
        )
    return None


def dropping_needs_a_capacity(run: "Run") -> str | None:
    moe = run.config.model.moe
    if moe is not None and moe.drop != "probs" and moe.capacity_factor is None:
        return (
            f"model.moe.drop={moe.drop}: nothing is dropped without a capacity; give model.moe.capacity_factor=1.25 or "
            "the like, or leave drop out"
        )
    return None


def dispatcher_needs_experts(run: "Run") -> str | None:
    dispatcher = run.layout.dispatcher
    if dispatcher == "alltoall" or run.layout.ep > 1:
        return None
    return f"layout.dispatcher={dispatcher} with layout.ep=1: tokens stay where they are; leave it out, or use ep > 1"


def upcycling_makes_experts_of_something(run: "Run") -> str | None:
    checkpoint = run.config.checkpoint
    if not checkpoint.upcycle:
        return None
    if checkpoint.weights_from is None:
        return "checkpoint.upcycle=true: of what? give checkpoint.weights_from=A_DENSE_RUN"
    moe = run.config.model.moe
    if moe is None:
        return "checkpoint.upcycle=true: model.moe is not set, so there are no experts to make; leave it out"
    if not moe.normalize_top_k:
        return (
            "checkpoint.upcycle=true with model.moe.normalize_top_k=false: the chosen experts' weights do not add up "
            "to 1, so the model would not begin as the dense one; use normalize_top_k=true"
        )
    return None


EXPERT_RULES: tuple[Rule, ...] = (
    shared_out_experts_need_zero,
    dispatcher_can_pad,
    dropping_needs_a_capacity,
    dispatcher_needs_experts,
    upcycling_makes_experts_of_something,
)
