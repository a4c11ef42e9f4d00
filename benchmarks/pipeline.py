"""Step times of pipeline schedules, measured with layers that sleep, against simulation, theory and other engines.

Sleeping layers let two cores stand for many ranks: what is measured is the engine and the order of work.  Real gloo
ranks, real engines: ours with each schedule, DeepSpeed's own, and torch.distributed.pipelining, one after the
other in one pool of processes; medians of a few steps.

    python -m benchmarks.pipeline                              # 4 ranks, 8 micro-batches, 8 layers of 50 + 50 + 50 ms
    python -m benchmarks.pipeline --link-ms 20                 # every message takes 20 ms
    python -m benchmarks.pipeline --jitter 0.4 | --slow 3:2    # uneven times | layer 3 takes twice as long
    python -m benchmarks.pipeline --numel 8388608              # activations of 32 MB
    python -m benchmarks.pipeline --pp 8 --micro-batches 16 --layers 16
    python -m benchmarks.pipeline --layer-ms 0                 # nothing but the engines' own work
    python -m benchmarks.pipeline --pp 2 --dp 2 --reduce-ms 200   # two copies; a chunk's gradients take 200 ms to sum
"""

import argparse
import queue
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from tests.ranks import RankPool

WARM_UP = 2
PER_KIND = 3  # forward, gradients of inputs, gradients of weights: equally long


@dataclass(frozen=True)
class Case:
    """What all contenders compute."""

    pp: int
    micro_batches: int
    layers: int
    layer_s: float  # of each third of a layer's work
    link_s: float
    jitter: float
    slow: tuple[int, float] | None  # layer, factor
    numel: int
    steps: int
    dp: int = 1
    reduce_s: float = 0.0  # one average of gradients over the copies of the model

    def factor(self, layer: int) -> float:
        return self.slow[1] if self.slow is not None and self.slow[0] == layer else 1.0


@dataclass(frozen=True)
class Contender:
    engine: str  # ours, deepspeed or torch
    schedule: str
    chunks: int = 1
    averages_last: bool = False  # gradients are averaged after the last operation, as DeepSpeed does

    @property
    def title(self) -> str:
        names = {"ours": "Megaloom", "deepspeed": "DeepSpeed", "torch": "torch.distributed.pipelining"}
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{names[self.engine]} {self.schedule}{chunks}" + (
            ", averages last" if self.averages_last else ""
        )


CONTENDERS = (
    Contender("deepspeed", "1f1b"),
    Contender("torch", "1f1b"),
    Contender("ours", "gpipe"),
    Contender("ours", "1f1b"),
    Contender("ours", "eager"),
    Contender("torch", "interleaved", 2),
    Contender("ours", "interleaved", 2),
    Contender("ours", "zb-h1"),
    Contender("torch", "zb-v", 2),
    Contender("ours", "zb-v", 2),
    Contender("ours", "interleaved-zb", 2),
)
# With copies of the model: averages of finished chunks while others work, against all of them at the end.
COPIED = tuple(
    Contender("ours", schedule, chunks, last)
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("zb-v", 2))
    for last in (True, False)
)


class Sleeper(nn.Module):
    """A layer of one weight whose forward pass, and both halves of whose backward pass, take their time."""

    def __init__(self, case: Case, index: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self._case, self._seconds = case, case.layer_s * case.factor(index)
        self._chance = random.Random(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Inputs.apply(x, self) * _Weight.apply(self.weight, self)

    def nap(self) -> None:
        spread = self._case.jitter
        seconds = self._seconds * (1 + self._chance.uniform(-spread, spread))
        if seconds:
            time.sleep(seconds)


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Sleeper) -> torch.Tensor:
        ctx.layer = layer
        layer.nap()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.layer.nap()
        return gradient, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, layer: Sleeper) -> torch.Tensor:
        ctx.layer = layer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        from model_providers.weight_gradients import open_store

        def work() -> torch.Tensor:
            ctx.layer.nap()
            return gradient.clone()

        store = open_store()
        if store is None:
            return work(), None
        store.put(ctx.layer.weight, work)
        return None, None


class LateSends:
    """A link that delivers each message some time after it was sent, any number under way."""

    def __init__(self, link_s: float):
        self._link_s = link_s
        self._lines: dict[tuple[int, Any], queue.Queue[Any]] = {}

    def isend(self, tensor: torch.Tensor, peer: int, group: Any) -> "LateSend":
        if (peer, group) not in self._lines:
            line: queue.Queue[Any] = queue.Queue()
            self._lines[peer, group] = line
            threading.Thread(target=self._deliver, args=(line,), daemon=True).start()
        send = LateSend(time.monotonic() + self._link_s)
        self._lines[peer, group].put((send, tensor, peer, group))
        return send

    def _deliver(self, line: "queue.Queue[Any]") -> None:
        while True:
            send, tensor, peer, group = line.get()
            time.sleep(max(0.0, send.due_s - time.monotonic()))
            send.work = dist.isend(tensor, peer, group=group)
            send.gone.set()


class LateSend:
    def __init__(self, due_s: float):
        self.due_s, self.gone, self.work = due_s, threading.Event(), None

    def wait(self) -> None:
        self.gone.wait()
        self.work.wait()  # type: ignore[attr-defined]

    def is_completed(self) -> bool:
        return self.gone.is_set() and self.work.is_completed()  # type: ignore[attr-defined]


class LateSums:
    """Averages of gradients that take their time, one after the other, as on a link that others use too."""

    def __init__(self, reduce_s: float):
        self._reduce_s, self._free_s = reduce_s, 0.0
        self._lock = threading.Lock()

    def due_s(self) -> float:
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + self._reduce_s
            return self._free_s

    def around(self, engine: Any, *, averages_last: bool) -> None:
        """Put the time into an engine's averages, or into their place after the last operation."""
        finished = engine.finished
        start, finish = finished.averages.start, finished.averages.finish
        due = [0.0]
        held: list[Any] = []

        def begin(gradients: Any) -> None:
            if averages_last:
                held.append(gradients)
            else:
                due[0] = self.due_s()
                start(gradients)

        def end() -> None:
            for gradients in held:
                due[0] = self.due_s()
                start(gradients)
            held.clear()
            time.sleep(max(0.0, due[0] - time.monotonic()))
            finish()

        finished.averages.start, finished.averages.finish = begin, end


def loss_of(output: torch.Tensor, targets: Any) -> torch.Tensor:
    return output.mean()


def deepspeed_json(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
        "steps_per_print": 2**31 - 1,
    }


def timed(step: Callable[[], Any], case: Case) -> list[float]:
    times = []
    for _ in range(WARM_UP + case.steps):
        dist.barrier()
        started_s = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - started_s)
    return times[WARM_UP:]


def run_ours(case: Case, contender: Contender) -> list[float]:
    from model_providers.cost import LayerCost
    from model_providers.layer_plan import GPTInputs, GPTValue, LayerPlan, PlannedLayer, Recompute
    from model_providers.layout import Layout
    from pretrain.config import OptimizerConfig
    from pretrain.engine.base import MicroBatch
    from pretrain.engine.groups import join
    from pretrain.engine.pipeline import build_pipeline_engine
    from pretrain.engine.schedules.catalogue import placement_of
    from pretrain.engine.stage_module import PipelineShape

    placement = placement_of(contender.schedule, stages=case.pp, chunks=contender.chunks)
    groups = join(Layout(pp=case.pp, dp=case.dp, chunks=placement.chunks, placement=placement.style))
    cost = LayerCost(*(1,) * len(LayerCost._fields))
    plan = LayerPlan(
        layers=tuple(
            PlannedLayer(f"layers.{i}", lambda i=i: Sleeper(case, i), cost, False)  # type: ignore[misc]
            for i in range(case.layers)
        ),
        ties=(),
        loss=loss_of,
        inputs_type=GPTInputs,
        value_type=GPTValue,
        recompute=Recompute(),
        checkpoint_function=lambda function, *tensors: function(*tensors),
    )
    width = case.layers // placement.total
    bounds = tuple(range(0, case.layers + 1, width))
    shape = PipelineShape(contender.schedule, placement, bounds)
    engine = build_pipeline_engine(
        plan, groups, shape, json={**deepspeed_json(case), "pipeline": {}}, optimizer=OptimizerConfig()
    )
    if case.dp > 1:
        LateSums(case.reduce_s / contender.chunks).around(
            engine.deepspeed, averages_last=contender.averages_last
        )
    if case.link_s:
        late = LateSends(case.link_s)
        mailbox = engine.deepspeed._mailbox
        mailbox._start = lambda entries: [
            (late.isend if entry.op is dist.isend else dist.irecv)(entry.tensor, entry.peer, entry.group)
            for entry in entries
        ]
    batches = [MicroBatch(torch.randn(1, case.numel), (torch.zeros(1), torch.zeros(1)))] * case.micro_batches
    return timed(lambda: engine.train_step(batches), case)


def run_deepspeed(case: Case, contender: Contender) -> list[float]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe import p2p

    from pretrain.engine.groups import leave_shared_memory_out
    from pretrain.engine.quiet import without_stdout

    leave_shared_memory_out()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    with without_stdout():
        module = PipelineModule(
            [LayerSpec(Sleeper, case, i) for i in range(case.layers)],
            num_stages=case.pp,
            loss_fn=loss_of,
            partition_method="uniform",
        )
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=deepspeed_json(case)
        )
    kept = p2p.send, p2p.recv
    if case.link_s:  # both ends of its blocking messages wait, as a stream of NCCL's does

        def late(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any, **named: Any) -> Any:
                result = function(*words, **named)
                time.sleep(case.link_s)
                return result

            return call

        p2p.send, p2p.recv = late(kept[0]), late(kept[1])
    data = iter(lambda: (torch.randn(1, case.numel), torch.zeros(1)), None)
    try:
        return timed(lambda: engine.train_batch(data), case)
    finally:
        p2p.send, p2p.recv = kept


def run_torch(case: Case, contender: Contender) -> list[float]:
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleInterleaved1F1B,
        ScheduleZBVZeroBubble,
        schedules,
    )

    rank, total = dist.get_rank(), case.pp * contender.chunks
    mine = [rank] if contender.chunks == 1 else [rank, case.pp + rank]
    if contender.schedule == "zb-v":
        mine = [rank, 2 * case.pp - 1 - rank]
    width = case.layers // total
    stages = [
        PipelineStage(
            nn.Sequential(*(Sleeper(case, stage * width + i) for i in range(width))),
            stage,
            total,
            torch.device("cpu"),
        )
        for stage in mine
    ]
    kinds: dict[str, Any] = {
        "1f1b": Schedule1F1B,
        "interleaved": ScheduleInterleaved1F1B,
        "zb-v": ScheduleZBVZeroBubble,
    }
    schedule = kinds[contender.schedule](
        stages[0] if contender.schedule == "1f1b" else stages,
        n_microbatches=case.micro_batches,
        loss_fn=loss_of,
    )
    kept = schedules._batch_p2p
    if case.link_s:
        late = LateSends(case.link_s)

        def batch(ops: list[Any], desc: str | None = None) -> list[Any]:
            return [
                (late.isend if op.op is dist.isend else dist.irecv)(op.tensor, op.peer, op.group)
                for op in ops
            ]

        schedules._batch_p2p = batch
    inputs = torch.randn(case.micro_batches, case.numel, requires_grad=True)

    def step() -> None:
        words = (inputs,) if 0 in mine else ()
        named = {"target": torch.zeros(case.micro_batches), "losses": []} if total - 1 in mine else {}
        schedule.step(*words, **named)
        for stage in stages:
            stage.submod.zero_grad()

    try:
        return timed(step, case)
    finally:
        schedules._batch_p2p = kept


RUNNERS = {"ours": run_ours, "deepspeed": run_deepspeed, "torch": run_torch}


def on_a_rank(case: Case, contender: Contender) -> list[float]:
    return RUNNERS[contender.engine](case, contender)


def simulated_s(case: Case, contender: Contender) -> float | None:
    """What our simulator says of our schedules; with jitter it knows the means only."""
    from pretrain.engine.schedules.catalogue import make_schedule
    from pretrain.engine.schedules.simulate import Times, simulate

    if contender.engine != "ours":
        return None
    schedule = make_schedule(
        contender.schedule, stages=case.pp, chunks=contender.chunks, num_micro_batches=case.micro_batches
    )
    width = case.layers // schedule.placement.total
    seconds = tuple(
        case.layer_s * sum(case.factor(stage * width + i) for i in range(width))
        for stage in range(schedule.placement.total)
    )
    return simulate(schedule, Times(seconds, seconds, seconds, transfer=case.link_s)).makespan


def theory_s(case: Case, contender: Contender) -> float:
    """Narayanan et al. 2021 and Qi et al. 2023, 2024, for even times and links that take none."""
    rank_s = PER_KIND * case.layer_s * case.layers / case.pp
    bubble = {
        "gpipe": 1.0,
        "1f1b": 1.0,
        "eager": 1.0,
        "interleaved": 1 / contender.chunks,
        "zb-h1": 1 / 3,
        "zb-v": 1 / 6,
        "interleaved-zb": 1 / (3 * contender.chunks),
    }[contender.schedule]
    return rank_s * (case.micro_batches + (case.pp - 1) * bubble)


def main() -> None:
    words = parser().parse_args()
    slow = None
    if words.slow:
        layer, factor = words.slow.split(":")
        slow = (int(layer), float(factor))
    case = Case(
        pp=words.pp,
        micro_batches=words.micro_batches,
        layers=words.layers,
        layer_s=words.layer_ms / 1e3,
        link_s=words.link_ms / 1e3,
        jitter=words.jitter,
        slow=slow,
        numel=words.numel,
        steps=words.steps,
        dp=words.dp,
        reduce_s=words.reduce_ms / 1e3,
    )
    contenders = CONTENDERS if case.dp == 1 else COPIED
    wanted = [c for c in contenders if not words.only or c.schedule in words.only]
    num_ranks = case.pp * case.dp
    pool = RankPool(size=num_ranks)
    times: dict[Contender, float] = {}
    console = Console(width=None if sys.stdout.isatty() else 120)
    for contender in wanted:
        result = pool.run(on_a_rank, num_ranks, case, contender, timeout_s=600)[0]
        times[contender] = statistics.median(result)
        print(f"{contender.title}: {1e3 * times[contender]:.1f} ms", file=sys.stderr, flush=True)
    console.print(table(case, times))


def table(case: Case, times: dict[Contender, float]) -> Table:
    work = replace(case, jitter=0.0)
    copies = f" x {case.dp} copies, averages {1e3 * case.reduce_s:g} ms" if case.dp > 1 else ""
    title = f"{case.pp} ranks{copies}, {case.micro_batches} micro-batches, "
    title += f"{case.layers} layers of 3 x {1e3 * case.layer_s:g} ms"
    title += f", links {1e3 * case.link_s:g} ms" if case.link_s else ""
    title += f", jitter {case.jitter:.0%}" if case.jitter else ""
    title += f", layer {case.slow[0]} x {case.slow[1]:g}" if case.slow else ""
    title += f", {4 * case.numel / 1e6:.0f} MB activations" if case.numel > 2**18 else ""
    rows = Table("contender", "ms", "simulated", "ratio", "theory", "against 1F1B", title=title)
    plain = times.get(Contender("ours", "1f1b"))
    for contender, seconds in times.items():
        expected = None if case.dp > 1 else simulated_s(work, contender)
        rows.add_row(
            contender.title,
            f"{1e3 * seconds:.1f}",
            "" if expected is None else f"{1e3 * expected:.0f}",
            "" if not expected else f"{seconds / expected:.3f}",
            f"{1e3 * theory_s(work, contender):.0f}" if case.layer_s and not case.slow else "",
            "" if plain is None else f"{seconds / plain:.3f}",
        )
    return rows


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--pp", type=int, default=4)
    own.add_argument("--micro-batches", type=int, default=8)
    own.add_argument("--layers", type=int, default=8, help="a multiple of twice the ranks")
    own.add_argument("--layer-ms", type=float, default=50.0, help="of each third of a layer's work")
    own.add_argument("--link-ms", type=float, default=0.0)
    own.add_argument("--jitter", type=float, default=0.0, help="share by which every time varies")
    own.add_argument("--slow", metavar="LAYER:FACTOR")
    own.add_argument("--numel", type=int, default=1024, help="numbers in an activation")
    own.add_argument("--dp", type=int, default=1, help="copies of the model")
    own.add_argument(
        "--reduce-ms", type=float, default=0.0, help="what averaging a rank's gradients over the copies takes"
    )
    own.add_argument("--steps", type=int, default=3)
    own.add_argument("--only", nargs="+", metavar="SCHEDULE")
    return own


if __name__ == "__main__":
    main()
