"""Whether a run could be as a scenario says: by the same rules that judge a run file, and no others."""

from dataclasses import replace
from functools import lru_cache

from launch.scenario import Scenario
from model_providers.config import ModelConfig
from model_providers.layout import Layout, layout_problems
from pretrain import config_rules
from pretrain.config import RunConfig
from pretrain.config_io import Run
from pretrain.fp8_te_rules import settled_fp8
from pretrain.optimizer_facts import canonical

# Disks and checkpoints are for those who start the run.
RULES = tuple(rule for rule in config_rules.RULES if rule not in config_rules.RULES_OF_THIS_MACHINE)


def illegal(config: RunConfig, scenario: Scenario) -> str | None:
    """The first sentence that a run file of this layout would be refused with."""
    cut = _cannot_be_cut(scenario.model, scenario.layout, scenario.sequence_length, scenario.target_length)
    if cut is not None:
        return cut
    run = as_run(config, scenario)
    return next((sentence for rule in RULES if (sentence := rule(run)) is not None), None)


@lru_cache(maxsize=65536)
def _cannot_be_cut(
    model: ModelConfig, layout: Layout, sequence_length: int, target_length: int | None
) -> str | None:
    return next(iter(layout_problems(model, layout, sequence_length, target_length)), None)


def as_run(config: RunConfig, scenario: Scenario) -> Run:
    """A run as far as rules look at it; its JSON is not completed."""
    layout = scenario.layout
    stated = config.layout.model_copy(
        update={
            "tp": layout.tp,
            "pp": layout.pp,
            "ep": layout.ep,
            "etp": layout.etp,
            "sequence_parallel": layout.sequence_parallel,
            "chunks": layout.chunks,
            "schedule": scenario.schedule,
        }
    )
    recompute = config.recompute.model_copy(
        update={"mode": scenario.recompute, "modules": modules_stated(scenario)}
    )
    loss = config.loss.model_copy(update={"chunk_tokens": scenario.chunk_tokens or "all"})
    zero: dict[str, object] = {"stage": scenario.zero_stage}
    for section, place in (
        ("offload_optimizer", scenario.offload_optimizer),
        ("offload_param", scenario.offload_parameters),
    ):
        if place != "none":
            zero[section] = {"device": place}
    document = {
        "zero_optimization": zero,
        "train_batch_size": scenario.global_size,
        "train_micro_batch_size_per_gpu": scenario.micro_size,
        "gradient_accumulation_steps": scenario.num_micro_batches,
        "gradient_clipping": config.optimizer.gradient_clipping,
    }
    optimizer = config.optimizer
    if scenario.optimizer.kind != canonical(optimizer.type).lower():
        optimizer = optimizer.model_copy(update={"type": canonical(scenario.optimizer.kind)})
    edited = config.model_copy(
        update={"layout": stated, "recompute": recompute, "loss": loss, "optimizer": optimizer}
    )
    return Run(edited, document, layout, {})


def allowed(config: RunConfig, scenario: Scenario) -> Scenario | None:
    """As a run would be; None where it would be refused."""
    return None if illegal(config, scenario) is not None else settled(config, scenario)


def settled(config: RunConfig, scenario: Scenario) -> Scenario:
    """With torch's FP8 where a run like this would not get Transformer Engine's."""
    if scenario.fp8 is None:
        return scenario
    fp8, _ = settled_fp8(as_run(config, scenario))
    return replace(scenario, fp8=fp8)


def modules_stated(scenario: Scenario) -> tuple[str, ...] | None:
    """As a run file would have them: only where they mean something."""
    is_usual = scenario.recompute != "selective" or scenario.recompute_modules == ("core_attn",)
    return None if is_usual else scenario.recompute_modules
