"""Which edits of a run make it fit a device's memory: single ones first, then pairs, cheap ones before dear ones.

Each keeps the samples of a step.  What an edit costs in time is for whoever joins this with a model of time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from launch.memory import memory
from launch.scenario import Scenario
from model_providers.activation_memory import is_there
from model_providers.errors import ModelError
from model_providers.loss_chunks import AUTO_CHUNK_TOKENS
from pretrain.ds_config import ADAM_LIKE

MOST_TOLD = 3
MOST_TP = 8  # ranks that share one machine's fast links


@dataclass(frozen=True)
class Remedy:
    """One or two edits, and the heaviest rank's bytes with them."""

    words: tuple[str, ...]  # as a user writes them
    scenario: Scenario
    device_bytes: int


Edit = Callable[[Scenario], tuple[str, Scenario] | None]
Judge = Callable[[Scenario], Scenario | None]  # as a run would be, or None where it would be refused


def remedies(scenario: Scenario, limit_bytes: float, judged: Judge) -> list[Remedy]:
    """The first few that fit; pairs only where no single edit does."""
    singles = [((found[0],), found[1]) for edit in EDITS if (found := edit(scenario)) is not None]
    fitting = [one for one in (_tried(*single, judged) for single in singles) if one is not None]
    fitting = [one for one in fitting if one.device_bytes <= limit_bytes]
    if not fitting:
        fitting = [one for one in _pairs(scenario, judged) if one.device_bytes <= limit_bytes]
    return fitting[:MOST_TOLD]


def _pairs(scenario: Scenario, judged: Judge) -> Iterator[Remedy]:
    for first, second in combinations(EDITS, 2):
        once = first(scenario)
        twice = None if once is None else second(once[1])
        if once is None or twice is None:
            continue
        found = _tried((once[0], twice[0]), twice[1], judged)
        if found is not None:
            yield found


def _tried(words: tuple[str, ...], edited: Scenario, judged: Judge) -> Remedy | None:
    try:
        allowed = judged(edited)
        return None if allowed is None else Remedy(words, allowed, memory(allowed).heaviest.device.total)
    except ModelError:  # a partition that was given for another number of stages
        return None


def _sequence_parallel(scenario: Scenario) -> tuple[str, Scenario] | None:
    layout = scenario.layout
    if layout.tp == 1 or layout.sequence_parallel:
        return None
    return "layout.sequence_parallel=true", replace(
        scenario, layout=layout.model_copy(update={"sequence_parallel": True})
    )


def _chunked_loss(scenario: Scenario) -> tuple[str, Scenario] | None:
    """An eighth of the logits at a time, but no more tokens than keep a device's products fast."""
    if scenario.chunk_tokens is not None or scenario.model.electra is not None:
        return None
    chunk = min(AUTO_CHUNK_TOKENS, max(1, scenario.loss_tokens // 8))
    return f"loss.chunk_tokens={chunk}", replace(scenario, chunk_tokens=chunk)


def _modules(scenario: Scenario) -> tuple[str, Scenario] | None:
    """Norms and activations are cheap to make again, and are more than fused attention keeps."""
    if scenario.recompute == "full" or len(scenario.recompute_modules) > 1:
        return None
    model = scenario.model
    modules = [name for name in ("core_attn", "layernorm", "mlp", "moe") if is_there(name, model)]
    if model.position_embedding == "relative":
        modules.remove("core_attn")
    edited = replace(scenario, recompute="selective", recompute_every=1, recompute_modules=tuple(modules))
    word = f"recompute.mode=selective recompute.modules=[{','.join(modules)}]"
    return word, edited


def _recompute(mode: Any) -> Edit:
    order = ("none", "selective", "full")

    def edit(scenario: Scenario) -> tuple[str, Scenario] | None:
        if order.index(scenario.recompute) >= order.index(mode):
            return None
        edited = replace(scenario, recompute=mode, recompute_every=1, recompute_modules=("core_attn",))
        return f"recompute={mode}", edited

    return edit


def _zero(stage: int, file: str, **places: Any) -> Edit:
    def edit(scenario: Scenario) -> tuple[str, Scenario] | None:
        edited = replace(scenario, zero_stage=stage, buckets=None, **places)
        is_as_much = stage < scenario.zero_stage or (stage == scenario.zero_stage and not places)
        return None if is_as_much or scenario.offload_optimizer != "none" else (f"deepspeed={file}", edited)

    return edit


def _moments_in_8_bit(scenario: Scenario) -> tuple[str, Scenario] | None:
    """AdamW's settings serve the 8-bit one as they are (Dettmers et al. 2022, arXiv:2110.02861, abstract)."""
    if scenario.optimizer.kind not in ADAM_LIKE or scenario.offload_optimizer != "none":
        return None
    edited = replace(scenario, optimizer=scenario.optimizer._replace(kind="adamw8bit"))
    return "optimizer.type=AdamW8bit", edited


def _smaller_micro_batch(scenario: Scenario) -> tuple[str, Scenario] | None:
    if scenario.micro_size == 1:
        return None
    batches = scenario.num_micro_batches * scenario.micro_size
    return "batch.micro_size=1", replace(scenario, micro_size=1, num_micro_batches=batches)


def _more_ranks(axis: str, factor: int) -> Edit:
    """``factor`` times as many ranks share a model, so there are fewer copies of it."""

    def edit(scenario: Scenario) -> tuple[str, Scenario] | None:
        layout = scenario.layout
        size = getattr(layout, axis) * factor
        if layout.dp % factor or (axis == "tp" and size > MOST_TP):
            return None
        update = {axis: size, "dp": layout.dp // factor}
        word = f"layout.{axis}={size}"
        if axis == "tp" and not layout.sequence_parallel:
            update["sequence_parallel"] = True
            word += " layout.sequence_parallel=true"
        edited = replace(
            scenario,
            layout=layout.model_copy(update=update),
            num_micro_batches=scenario.num_micro_batches * factor,
            buckets=None,
            partition=scenario.partition if axis == "tp" or isinstance(scenario.partition, str) else "cost",
        )
        return word, edited

    return edit


EDITS: tuple[Edit, ...] = (
    _sequence_parallel,
    _chunked_loss,
    _smaller_micro_batch,
    _recompute("selective"),
    _modules,
    _zero(1, "zero1.json"),
    _zero(2, "zero2.json"),
    _recompute("full"),
    _zero(3, "zero3.json"),
    _moments_in_8_bit,
    *(_more_ranks("tp", factor) for factor in (2, 4, 8)),
    *(_more_ranks("pp", factor) for factor in (2, 4, 8, 16)),
    _zero(2, "zero2_cpu_offload.json", offload_optimizer="cpu"),
    _zero(3, "zero3_cpu_offload.json", offload_optimizer="cpu", offload_parameters="cpu"),
)
