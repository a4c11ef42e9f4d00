"""A number that is not finite stops the run before it does harm, and is named with its layer and rank."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from pretrain.engine.base import StepResult
from pretrain.loop import Loop, NotFinite
from pretrain.monitor.guards import MAX_SKIPPED_IN_A_ROW, FiniteGuard, StopSignal
from pretrain.parity import whole_model
from tests.opened import loop_on, opened
from tests.ranks import RankPool
from tests.runs import tiny

SPOILT_STEP = 2


def train_with_fault(raw: dict[str, Any], layer: str, phase: str, rank: int) -> tuple[str, bool, list[int]]:
    """Train until ``layer`` on ``rank`` breaks at the third step; the message, whether weights stayed, steps told."""
    told: list[int] = []
    state = {"step": 0, "weights": b""}

    class Watcher:
        def write(self, record: Any) -> None:
            told.append(record.step)

        def close(self) -> None: ...

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if state["step"] != SPOILT_STEP or dist.get_rank() != rank or not torch.is_grad_enabled():
            return None
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if phase == "forward":
            return tensor * math.inf
        tensor.register_hook(lambda gradient: gradient * math.nan)
        return None

    class Counting(Loop):
        def _one_step(self, step: int, *rest: Any) -> Any:
            state["step"] = step
            if step == SPOILT_STEP:
                state["weights"] = snapshot(self.engine)
            return super()._one_step(step, *rest)

    with opened(raw) as here:
        for built in here.engine.layers:
            if built.plan.name == layer:
                built.module.register_forward_hook(spoil)
        loop = loop_on(here, Counting, sinks=[Watcher()])
        try:
            loop.train(0)
        except NotFinite as stop:
            return str(stop), snapshot(here.engine) == state["weights"], told
    return "went on", False, told


def snapshot(engine: Any) -> bytes:
    """The whole model's fp32 weights, on rank 0."""
    return b"".join(
        tensor.numpy().tobytes() for tensor in whole_model(engine, safe_get_full_fp32_param).values()
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"deepspeed": "zero0.json"}, 1),
        ({"deepspeed": "zero1.json"}, 1),
        ({"deepspeed": "zero1.json", "precision": "bf16"}, 1),
        ({"deepspeed": "zero2.json", "precision": "bf16"}, 0),
        ({"deepspeed": "zero3.json"}, 1),
        ({"layout": {"pp": 2}, "deepspeed": "pipeline.json"}, 1),
        ({"layout": {"pp": 2}, "deepspeed": "zero0.json"}, 1),
    ],
    ids=["zero0", "zero1", "zero1-bf16", "zero2-bf16", "zero3", "pp2", "pp2-zero0"],
)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_first_layer_and_rank_are_named_and_no_weight_moves(
    ranks: RankPool, corpus: str, out: Path, changes: dict[str, Any], rank: int, phase: str
) -> None:
    results = ranks.run(train_with_fault, 2, tiny(corpus, out, **changes), "layers.3", phase, rank)
    message, weights_stayed, told = results[0]
    # A hook of the test sits behind the block: in the backward pass the gradient of its output is still whole.
    named = (
        "output of layers.3 in the forward pass" if phase == "forward" else "layers.2 in the backward pass"
    )
    assert named in message or (phase == "backward" and "layers.3 in the backward pass" in message), message
    assert f"on rank {rank}" in message
    assert f"step {SPOILT_STEP + 1}:" in message and "The weights are those of step 2" in message
    assert weights_stayed
    assert told == [1, 2, 3]


@pytest.mark.ranks
def test_training_goes_on_where_the_guard_is_off(ranks: RankPool, corpus: str, out: Path) -> None:
    raw = tiny(corpus, out, train={"steps": 5, "stop_on_nan": False})
    message, _, told = ranks.run(train_with_fault, 2, raw, "layers.3", "forward", 1)[0]
    assert message == "went on" and told == [1, 2, 3, 4, 5]


def test_fp16_may_skip_steps_but_not_for_ever() -> None:
    skipped = StepResult(loss=2.0, grad_norm=math.inf, applied=False, loss_scale=1024.0)
    fine = StepResult(loss=2.0, grad_norm=1.0, applied=True, loss_scale=1024.0)
    assert FiniteGuard(is_fp16=False).objects(skipped)
    guard = FiniteGuard(is_fp16=True)
    assert not any(guard.objects(skipped) for _ in range(MAX_SKIPPED_IN_A_ROW))
    assert not guard.objects(fine)
    assert not guard.objects(skipped)
    assert [guard.objects(skipped) for _ in range(MAX_SKIPPED_IN_A_ROW)][-1]


def ask_one_rank_to_stop(raw: dict[str, Any], number: int) -> tuple[str, int, bool]:
    """Signal rank 1 alone after its second step; how the loop ended, steps saved, whether a late signal is harmless."""
    saved: list[int] = []

    def save(step: int) -> bool:
        saved.append(step)
        return True

    class Signaller:
        def write(self, record: Any) -> None:
            if record.step == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), number)

        def close(self) -> None: ...

    signal.signal(number, signal.SIG_DFL)
    with opened(raw) as here:
        loop = loop_on(here, save=save, sinks=[Signaller()])
        outcome = loop.train(0)
    is_ignored = signal.getsignal(number) == signal.SIG_IGN
    signal.signal(number, signal.SIG_DFL)
    return outcome.name, saved[-1], is_ignored


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_step_and_saves(
    ranks: RankPool, corpus: str, out: Path, number: int
) -> None:
    ended = ranks.run(ask_one_rank_to_stop, 2, tiny(corpus, out, layout={"pp": 2}), number)
    assert ended == [("SIGNALLED", 3, True)] * 2


def test_signals_are_given_back_after_listening() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
