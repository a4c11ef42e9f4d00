"""A run up to its engine and its feed, on the ranks that are there: what most tasks of tests begin with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from data_tools.training_data import TrainingData
from pretrain.batches import Feed, open_run_data
from pretrain.config_io import Run, make_run
from pretrain.engine.base import Engine
from pretrain.engine.groups import Groups, join
from pretrain.loop import Loop
from pretrain.run import make_engine, make_plan


@dataclass(frozen=True)
class Opened:
    run: Run
    groups: Groups
    data: TrainingData
    engine: Engine
    feed: Feed


@contextmanager
def opened(raw: dict[str, Any]) -> Iterator[Opened]:
    """A run given as plain values, at its first sample; the feed is closed afterwards."""
    run = make_run(raw, world_size=dist.get_world_size())
    groups = join(run.layout)
    data = open_run_data(run, groups)
    engine = make_engine(run, make_plan(run, groups), groups)
    feed = Feed(data.train, run, groups, consumed_samples=0)
    try:
        yield Opened(run, groups, data, engine, feed)
    finally:
        feed.close()


def loop_on(
    here: Opened,
    kind: type[Loop] = Loop,
    *,
    save: Callable[[int], bool] = lambda step: True,
    sinks: Sequence[Any] = (),
) -> Loop:
    """A loop that evaluates nothing."""
    return kind(
        run=here.run, engine=here.engine, feed=here.feed, evaluate=dict, test=dict, save=save, sinks=sinks
    )
