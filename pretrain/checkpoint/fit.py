"""Whether a run may go on from a checkpoint, or begin with its weights; told before any rank starts where possible."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_tools.training_data import TrainingData
from pretrain.checkpoint import store
from pretrain.checkpoint.resume_rules import DEEPSPEED, RUN_FILE, Change, Rule, changes, worth_telling
from pretrain.checkpoint.source import check_source, is_readable
from pretrain.checkpoint.state import (
    SAMPLES_COMPARED,
    RunState,
    facts_of,
    json_facts_of,
    layout_of,
    readable_state,
)
from pretrain.config import RunConfig
from pretrain.config_io import Run
from pretrain.config_rules import AUTO_SCHEDULE
from pretrain.errors import RunError
from pretrain.optim import learning_rate_factor

ON_OR_OFF = {
    "optimizer.weight_decay",
    "model.moe.bias_update_rate",
}  # above 0 there are states that 0 has not
SAME_RATE = 0.01  # learning rates that differ by less are one


def check_before_start(run: Run, data: TrainingData | None = None) -> None:
    """What can be told of checkpoints without a rank: raises the `RunError` with which the ranks would refuse."""
    resume, source = run.config.checkpoint.resume, run.config.checkpoint.weights_from
    own = store.checkpoints(run.checkpoints) if resume != "never" else []
    folders = own
    if resume not in ("auto", "never") and not own:
        named = store.checkpoint_in(Path(resume))
        folders = [named] if named is not None else []
    for folder in folders:  # the newest whose state is whole, as the ranks will find it
        state = readable_state(folder)
        if state is not None:
            is_chosen_later = (
                run.config.layout.schedule == AUTO_SCHEDULE
            )  # by ranks: what fits the checkpoint
            check_fits(state, run, folder, with_layout=not is_chosen_later)
            if data is not None:
                check_data_is_the_same(state, data, run, folder)
            return
    if source is not None and not own:
        there = store.meant(source, key="checkpoint.weights_from")
        check_source(run, next(filter(is_readable, there), there[0]), data)


def check_fits(state: RunState, run: Run, folder: Path, *, with_layout: bool = True) -> None:
    """Refuse to go on with what the checkpoint does not fit, naming both sides."""
    ours = layout_of(run)
    if with_layout and state.layout != ours:
        raise RunError(
            f"checkpoint {folder} was written with {_told(state.layout)}, this run has {_told(ours)}: optimizer "
            f"states fit only the layout that wrote them. Start the run in the old layout; or {weights_alone(folder)}"
        )
    found = differences(state, run)
    refused = [change for change in found if change.rule is Rule.REFUSED]
    model = [change for change in refused if change.key.startswith("model.")]
    if model:
        raise RunError(
            f"checkpoint {folder} holds another model: {_listed(model)}; put that back; or start a run with another "
            f"name, which may take what fits with checkpoint.weights_from={folder}"
        )
    if refused:
        raise RunError(
            f"checkpoint {folder} does not fit: {_listed(refused)}; put that back; or {weights_alone(folder)}"
        )


def differences(state: RunState, run: Run) -> list[Change]:
    """Every value of run file and JSON that is not the checkpoint's."""
    found = changes(RUN_FILE, state.run, facts_of(run)) + changes(
        DEEPSPEED, state.deepspeed, json_facts_of(run)
    )
    return [
        change._replace(rule=Rule.REFUSED)
        if change.key in ON_OR_OFF and not (change.before and change.now)
        else change
        for change in found
    ]


def check_data_is_the_same(state: RunState, data: TrainingData, run: Run, folder: Path) -> None:
    """The samples that come next must be those that would have come, in the same vocabulary."""
    if state.tokenizer != data.tokenizer.fingerprint:
        raise RunError(
            f"data: the tokenizer is another than that of checkpoint {folder}; put it back, or prepare the corpora "
            "with it"
        )
    if state.data_fingerprint != data.fingerprint():
        raise RunError(_other_data(state, run, folder))


def check_same_order(state: RunState, data: TrainingData, run: Run) -> None:
    """A resumed run must meet the samples that it would have met; every rank calls it, once orders are built."""
    folder = run.checkpoints / store.folder_name(state.step)
    check_data_is_the_same(state, data, run, folder)
    found = data.next_samples_hash(state.consumed_samples, num_samples=SAMPLES_COMPARED)
    if state.next_samples != found:
        raise RunError(_other_data(state, run, folder))


def _other_data(state: RunState, run: Run, folder: Path) -> str:
    changed = [
        change for change in changes(RUN_FILE, state.run, facts_of(run)) if change.rule is Rule.CONTENT
    ]
    what = _listed(changed) if changed else "a corpus of data.train was prepared again or exchanged"
    return (
        f"data: {what}, against checkpoint {folder} after {state.consumed_samples} samples: samples would repeat or be "
        f"left out. Put it back; or start another run from these weights (name=..., checkpoint.weights_from={folder})"
    )


def told_at_resume(state: RunState, run: Run) -> list[str]:
    """One line for what takes effect from here on, and one where the learning rate jumps."""
    lines = []
    found = list(worth_telling(differences(state, run)))
    if found:
        lines.append(f"goes on with other settings than the checkpoint's: {_listed(found)}")
    if any(change.key == "batch.global_size" for change in found):
        lines.append(f"the data go on at sample {state.consumed_samples}, whatever the batch")
    jump = _rate_jump(state, run)
    return [*lines, jump] if jump else lines


def _rate_jump(state: RunState, run: Run) -> str | None:
    """Of the next step, by the schedule of then and of now."""
    try:
        before = RunConfig(**state.run)
    except ValidationError:  # of an older version
        return None
    then, now = _rate(before, state.step), _rate(run.config, state.step)
    if then is None or now is None or abs(now - then) <= SAME_RATE * max(then, now):
        return None
    steps = before.train.steps
    is_longer = steps != run.config.train.steps and getattr(run.config.schedule, "total_steps", 0) is None
    advice = f"; schedule.total_steps={steps} keeps the decay as it was" if is_longer else ""
    return (
        f"learning rate of step {state.step + 1}: {now:.3g} by this run's schedule (train.steps="
        f"{run.config.train.steps}), {then:.3g} by the checkpoint's (train.steps={steps}){advice}"
    )


def _rate(config: RunConfig, step: int) -> float | None:
    """None: the JSON's scheduler rules."""
    if config.schedule is None:
        return None
    return config.optimizer.lr * learning_rate_factor(config.schedule, step, config.train.steps)


def weights_alone(folder: Path) -> str:
    return f"keep the weights alone with checkpoint.weights_from={folder} checkpoint.resume=never and another name"


def _listed(found: Iterable[Change]) -> str:
    return ", ".join(str(change) for change in found)


def _told(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())
