"""`megaloom schedule`: draw a pipeline schedule, with its bubble and its memory, before anything runs."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.run import positive
from pretrain.engine.schedules import draw
from pretrain.engine.schedules.catalogue import SCHEDULES, make_schedule
from pretrain.engine.schedules.check import check
from pretrain.engine.schedules.ops import peak_live
from pretrain.engine.schedules.simulate import Timeline, Times, ideal, simulate
from pretrain.engine.schedules.streams import makespan
from pretrain.engine.schedules.transfers import Plan, lower
from pretrain.errors import RunError

PIPED_WIDTH = 120


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    check_words(words)
    schedule = make_schedule(
        words.schedule, stages=words.pp, chunks=words.chunks, num_micro_batches=words.micro_batches
    )
    times = Times.even(
        schedule.placement,
        forward=words.forward,
        input_gradient=words.input_gradient,
        weight_gradient=words.weight_gradient,
        transfer=words.transfer,
    )
    plan = lower(schedule, times)
    check(plan)
    timeline = simulate(schedule, times)
    if words.out is not None:
        try:
            draw.as_picture(timeline, words.out)
        except (OSError, ValueError) as fault:  # matplotlib's own word for a suffix that it does not know
            raise RunError(f"--out={words.out}: {fault}") from None
        print(words.out)
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    for line in draw.as_text(timeline, width=console.width, is_coloured=console.is_terminal):
        console.print(line, no_wrap=True, overflow="crop")
    console.print(draw.legend(timeline))
    console.print(facts(timeline, plan, times))


def facts(timeline: Timeline, plan: Plan, times: Times) -> Table:
    """What the drawing shows, in numbers."""
    schedule = timeline.schedule
    best = ideal(times, schedule.placement, schedule.num_micro_batches)
    live = [peak_live(order) / schedule.placement.chunks for order in schedule.orders]
    table = Table.grid(padding=(0, 2))
    table.add_row("step", f"{timeline.makespan:g}, of which the busiest rank computes {best:g}")
    table.add_row("bubble", f"{timeline.bubble:.1%} of all ranks' time")
    table.add_row(
        "live activations", f"{', '.join(f'{n:g}' for n in live)} micro-batches of a rank's layers, by rank"
    )
    if times.transfer:
        slower = {mode: makespan(plan, mode, times) for mode in ("pair", "batch", "blocking")}
        told = ", ".join(f"{mode} {time:g}" for mode, time in slower.items())
        table.add_row("where messages wait for each other", f"step {told}")
    return table


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="megaloom schedule",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="schedules:\n" + "\n".join(f"  {name:<15} {kind.help}" for name, kind in SCHEDULES.items()),
    )
    own.add_argument("--schedule", default="1f1b", metavar="NAME", help="one of those below (default: 1f1b)")
    own.add_argument("--pp", type=positive, default=4, help="pipeline stages (default: 4)")
    own.add_argument("--chunks", type=positive, default=1, help="runs of layers on each rank (default: 1)")
    own.add_argument("--micro-batches", type=positive, default=8, help="of one optimizer step (default: 8)")
    for name, what in (
        ("forward", "a rank's forward pass of one micro-batch"),
        ("input-gradient", "the half of its backward pass that the stage before waits for"),
        ("weight-gradient", "the other half"),
    ):
        own.add_argument(f"--{name}", type=float, default=1.0, metavar="TIME", help=f"{what} (default: 1)")
    own.add_argument("--transfer", type=float, default=0.0, metavar="TIME", help="one message (default: 0)")
    own.add_argument("--out", type=Path, metavar="FILE", help="draw into an .svg, .png or .pdf instead")
    return own


def check_words(words: argparse.Namespace) -> None:
    for name in ("forward", "input_gradient", "weight_gradient"):
        if not 0 < getattr(words, name) < float("inf"):
            raise RunError(f"--{name.replace('_', '-')}={getattr(words, name):g}: must be above 0")
    if not 0 <= words.transfer < float("inf"):
        raise RunError(f"--transfer={words.transfer:g}: must be 0 or more")
    if words.out is not None and not words.out.parent.is_dir():
        raise RunError(f"--out={words.out}: no folder {words.out.parent}; make it first")
