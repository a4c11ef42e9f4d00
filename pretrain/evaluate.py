"""Losses of held-out sets: the same samples at every call and in every layout."""

from collections.abc import Mapping

from data_tools.loader import SampleSource
from pretrain.batches import evaluation_steps
from pretrain.config_io import Run
from pretrain.engine.base import Engine


def evaluate_all(engine: Engine, sets: Mapping[str, SampleSource], run: Run) -> dict[str, float]:
    """Mean loss per token of each set; every rank calls it and gets the same numbers."""
    return {name: evaluate(engine, source, run) for name, source in sets.items()}


def evaluate(engine: Engine, source: SampleSource, run: Run) -> float:
    """Mean loss per token over the first ``train.eval_samples`` samples of a set.

    A step of evaluation counts by its tokens, which are not equally many where an objective masks some.
    """
    train = run.config.train
    micro_size = train.eval_micro_size or run.micro_size
    steps = evaluation_steps(source, engine.groups, micro_size=micro_size, num_samples=train.eval_samples)
    losses, counts = [], []
    for number, (batches, num_counted) in enumerate(steps, start=1):
        engine.timers.heartbeat.doing(f"step {number}")
        losses.append(engine.eval_step(batches, micro_size=micro_size))
        counts.append(num_counted)
    return engine.groups.mean_by(losses, counts)
