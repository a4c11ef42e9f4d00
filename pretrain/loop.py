"""The training loop: seed, step, judge, record, evaluate, save, until the end or a signal."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from model_providers.random_streams import seed_streams
from pretrain.batches import Feed
from pretrain.checkpoint import store
from pretrain.config_io import Run
from pretrain.engine.base import Engine
from pretrain.errors import RunError
from pretrain.monitor.eight_bits_watch import EightBitsWatch
from pretrain.monitor.experts import ExpertWatch
from pretrain.monitor.guards import FiniteGuard, StopSignal, first_non_finite
from pretrain.monitor.heartbeat import EVALUATES, SAVES
from pretrain.monitor.metrics import Metrics, Record
from pretrain.monitor.sinks import Sink
from pretrain.monitor.timers import due
from pretrain.optim import learning_rate_factor

log = logging.getLogger(__name__)


class Outcome(Enum):
    """Why the loop ended."""

    DONE = "all steps done"
    SIGNALLED = "stopped by a signal"


class NotFinite(RunError):
    """A step met a number that is not finite; the text names the first tensor and rank."""


class NotSaved(RunError):
    """The run ended, and its last steps are in no checkpoint."""


class TiesApart(RunError):
    """Copies of a tied weight differ between pipeline stages."""


@dataclass
class Loop:
    """What the loop works with.

    ``evaluate`` gives the losses of the validation sets, ``test`` those of the test sets, asked for once at the end;
    ``save`` writes a checkpoint of the step, and says whether there was room for it; ``watch`` looks into models with
    experts or layers that look ahead, ``eight_bits`` into FP8 linears.
    """

    run: Run
    engine: Engine
    feed: Feed
    evaluate: Callable[[], dict[str, float]]
    test: Callable[[], dict[str, float]]
    save: Callable[[int], bool]
    sinks: Sequence[Sink]
    watch: ExpertWatch | None = None
    eight_bits: EightBitsWatch | None = None

    def train(self, first_step: int) -> Outcome:
        """Steps ``first_step`` (0 is the first ever) to the end."""
        run, engine = self.run, self.engine
        heartbeat = engine.timers.heartbeat
        metrics = Metrics(run, engine.groups.device)
        guard = FiniteGuard(is_fp16=run.config.precision.dtype == "fp16")
        with StopSignal().listening() as stop:
            if first_step == 0 and run.config.train.eval_at_start:
                engine.deepspeed.eight_bits.begin(first_step)
                self._tell_start()
            for step in range(first_step, run.config.train.steps):
                started_s = time.perf_counter()
                heartbeat.begin_step(step)
                record = self._one_step(step, metrics, guard, started_s)
                done = step + 1
                is_last, asked = done == run.config.train.steps, stop.asked(engine.groups)
                if is_last or due(done, run.config.train.eval_every):
                    with heartbeat.within(EVALUATES):
                        record.losses_by_set = self.evaluate()
                if is_last:
                    with heartbeat.within(EVALUATES):
                        record.test_losses = self.test()
                if is_last or asked or record.losses_by_set or self._is_told(done):
                    self._look_inside(record, draw=is_last)
                self._tell(record, always=is_last or asked or self._has_looked(done))
                if is_last or asked or due(done, run.config.checkpoint.every):
                    with heartbeat.within(SAVES):
                        is_saved = self.save(done)
                    if not is_saved and (is_last or asked):
                        raise NotSaved(self._unsaved(done))
                if asked and not is_last:
                    log.info("saved step %d; stopping, as asked", done)
                    return Outcome.SIGNALLED
        return Outcome.DONE

    def _unsaved(self, done: int) -> str:
        root = self.run.checkpoints
        kept = next(iter(store.checkpoints(root)), None)
        last = f"the last checkpoint is {kept}" if kept else "there is no checkpoint"
        return (
            f"step {done} was NOT saved for want of room on the disk of {root}: {last}. Free some, or choose another "
            "folder with out=, and start the same command again"
        )

    def _tell_start(self) -> None:
        """Step 0: nothing is trained yet, so validation losses are all there is."""
        with self.engine.timers.heartbeat.within(EVALUATES):
            losses_by_set = self.evaluate()
        tell(self.sinks, Record(0, {}, losses_by_set))

    def _one_step(self, step: int, metrics: Metrics, guard: FiniteGuard, started_s: float) -> Record:
        run, engine = self.run, self.engine
        learning_rate = begin_step(run, engine, step)
        with engine.timers.phase("data"):
            batches = self.feed.next_step()
        if self.eight_bits is not None:
            self.eight_bits.begin(step)
        result = engine.train_step(batches)
        if self.eight_bits is not None and self.eight_bits.wants_again(step, result):
            seed(run, engine, step)
            result = self.eight_bits.again(step, batches, result)
        phases_s = engine.timers.take()
        record = metrics.record(
            step + 1,
            result,
            samples=self.feed.consumed_samples,
            tokens=self.feed.consumed_tokens,
            learning_rate=learning_rate,
            elapsed_s=time.perf_counter() - started_s,
            phases_s=phases_s,
        )
        if run.config.train.stop_on_nan and guard.objects(result):
            self._tell(record, always=True)
            where = first_non_finite(engine, batches, seed=lambda: seed(run, engine, step))
            last = self.feed.consumed_samples - 1
            raise NotFinite(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; {where}. The "
                f"weights are those of step {step}; the last checkpoint stands. Lower optimizer.lr, or look "
                f"at samples {last + 1 - self.feed.samples_per_step} to {last}; "
                "train.stop_on_nan=false skips such steps instead"
            )
        if self.eight_bits is not None:
            record.values |= self.eight_bits.end(step, batches)
        if due(step + 1, run.config.train.tie_check_every):
            self._check_ties(step + 1)
        return record

    def _check_ties(self, done: int) -> None:
        drift = self.engine.tie_drift()
        if drift:
            raise TiesApart(
                f"step {done}: the copies of a tied weight differ by {drift:g} between pipeline stages; the last "
                "checkpoint from before the step that parted them is good. Please report it with the run file"
            )

    def _look_inside(self, record: Record, *, draw: bool) -> None:
        """Experts' loads and the like, where the model has them; every rank calls it."""
        if self.watch is None:
            return
        seen = self.watch.look(record.step)
        record.values |= seen.values
        if draw or due(record.step, self.run.config.monitor.experts_every):
            record.expert_loads = seen.map

    def _has_looked(self, done: int) -> bool:
        return self.eight_bits is not None and self.eight_bits.has_looked(done)

    def _is_told(self, done: int) -> bool:
        return due(done, self.run.config.monitor.log_every)

    def _tell(self, record: Record, *, always: bool) -> None:
        if always or record.losses_by_set or self._is_told(record.step):
            tell(self.sinks, record)


def begin_step(run: Run, engine: Engine, step: int) -> float:
    """Random streams and learning rate of step ``step`` (0 is the first ever); returns the latter."""
    seed(run, engine, step)
    engine.deepspeed.eight_bits.begin(step)
    schedule = run.config.schedule
    if schedule is None:  # the DeepSpeed JSON's own scheduler rules
        return engine.learning_rate
    return engine.set_learning_rate_factor(learning_rate_factor(schedule, step, run.config.train.steps))


def seed(run: Run, engine: Engine, step: int) -> None:
    """Random streams of this rank in ``step``."""
    groups = engine.groups
    seed_streams(run.config.train.seed, step=step, tp_rank=groups.place.tp, device=groups.device.type)


def tell(sinks: Iterable[Sink], record: Record) -> None:
    for sink in sinks:
        sink.write(record)
