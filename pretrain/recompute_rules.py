"""What a run may forget and compute again: sentences about users' mistakes, as in config_rules.py."""

from typing import TYPE_CHECKING

from model_providers.activation_memory import RECOMPUTE_MODULES, is_there
from pretrain.optimizer_rules import Rule

if TYPE_CHECKING:
    from pretrain.config_io import Run

INSIDE_MOE = ("moe_act", "shared_experts")
OUTPUTS = ("layernorm", "moe_act", "mla_up_proj")  # forgotten by their outputs, not by what they keep
WHY_NOT = {
    "layernorm": "model.bert.norm=post, whose norms stand after the sums",
    "mlp": "experts in every layer",
    "moe": "no experts",
    "moe_act": "no experts",
    "shared_experts": "no shared experts",
    "mla_up_proj": "no latent attention",
}


def modules_are_for_selective_recompute(run: "Run") -> str | None:
    recompute = run.config.recompute
    if recompute.modules is not None and recompute.mode != "selective":
        return (
            f"recompute.modules={told(recompute.modules)} with recompute.mode={recompute.mode}: only selective has "
            "modules; set recompute.mode=selective, or leave modules out"
        )
    if recompute.modules is not None and not recompute.modules:
        return "recompute.modules=[]: forgets nothing; name some, or set recompute.mode=none"
    return None


def modules_to_recompute_are_there(run: "Run") -> str | None:
    recompute, model = run.config.recompute, run.config.model
    if recompute.mode != "selective":
        return None
    lacking = [name for name in recompute.forgotten if not is_there(name, model)]
    if not lacking:
        return None
    usable = [name for name in RECOMPUTE_MODULES if is_there(name, model)]
    return (
        f"recompute.modules={told(recompute.forgotten)}: the model has {WHY_NOT[lacking[0]]}, so {lacking[0]} forgets "
        f"nothing; choose among {', '.join(usable)}"
    )


def nothing_is_recomputed_twice(run: "Run") -> str | None:
    recompute = run.config.recompute
    inside = [name for name in INSIDE_MOE if name in recompute.forgotten]
    if recompute.mode != "selective" or "moe" not in recompute.forgotten or not inside:
        return None
    return (
        f"recompute.modules={told(recompute.forgotten)}: moe forgets the whole layer of experts, {inside[0]} with it; "
        f"leave out {inside[0]}, or moe"
    )


def what_is_forgotten_does_not_wait(run: "Run") -> str | None:
    """megatron-core forgets these outputs after the next module has kept them (tensor_parallel/random.py,
    CheckpointWithoutOutput): a copy on the host would be what that module reads, and nothing would be forgotten.
    """
    recompute = run.config.recompute
    kept = [name for name in recompute.forgotten if name in OUTPUTS]
    if not (recompute.offload and recompute.mode == "selective" and kept):
        return None
    return (
        f"recompute.offload=true with recompute.modules={told(recompute.forgotten)}: what the next module keeps of "
        f"{kept[0]} would wait in the CPU's memory all the same, and nothing be forgotten; leave out "
        f"{', '.join(kept)}, or use recompute.mode=full"
    )


def words_of_recompute_are_heard(run: "Run") -> str | None:
    recompute = run.config.recompute
    usual = type(recompute).model_fields["offload_above_bytes"].default
    if recompute.offload_above_bytes != usual and not recompute.offload:
        return (
            f"recompute.offload_above_bytes={recompute.offload_above_bytes} without recompute.offload=true: nothing is "
            "offloaded; set it, or leave offload_above_bytes out"
        )
    if recompute.every != 1 and recompute.mode != "full":
        return (
            f"recompute.every={recompute.every} with recompute.mode={recompute.mode}: only full recompute counts "
            "layers; set recompute.mode=full, or leave every out"
        )
    return None


def relative_positions_keep_their_attention(run: "Run") -> str | None:
    recompute = run.config.recompute
    forgets = recompute.mode == "selective" and "core_attn" in recompute.forgotten
    if forgets and run.config.model.position_embedding == "relative":
        return (
            "recompute.mode=selective with model.position_embedding=relative: its bias would lose its gradient under "
            "core_attn; use recompute.modules=[layernorm,mlp], full or none, or rotary positions"
        )
    return None


def shared_weights_are_reduced_once(run: "Run") -> str | None:
    """Each recomputed layer has a separate backward pass, with a separate gradient of a shared weight.

    Where ZeRO shards gradients it has reduced the first by then, and stops at the second (deepspeed/runtime/zero,
    stage_1_and_2.py and stage3.py: "Gradient computed twice for this partition").
    """
    model = run.config.model
    if run.config.recompute.mode != "full" or run.zero_stage < 2:
        return None
    if model.mtp is not None:
        shared = f"model.mtp.depth={model.mtp.depth}, whose layers share the embedding"
    elif model.position_embedding == "relative":
        shared = "model.position_embedding=relative, whose layers share a table"
    else:
        return None
    return (
        f"recompute.mode=full with zero_optimization.stage={run.zero_stage} and {shared}: DeepSpeed reduces the "
        "gradient of a shared weight once, and full recompute brings it layer by layer; use stage 1, or "
        "recompute.mode=selective"
    )


def told(modules: tuple[str, ...]) -> str:
    """As a user writes them."""
    return f"[{','.join(modules)}]"


RECOMPUTE_RULES: tuple[Rule, ...] = (
    modules_are_for_selective_recompute,
    modules_to_recompute_are_there,
    nothing_is_recomputed_twice,
    what_is_forgotten_does_not_wait,
    words_of_recompute_are_heard,
    relative_positions_keep_their_attention,
    shared_weights_are_reduced_once,
)
