"""`megaloom plot`: a run's loss curve, its experts' loads, or a run file's learning rate, as a PNG."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files; no screen is needed

from matplotlib import pyplot as plt

from pretrain.config_io import load_run
from pretrain.errors import RunError
from pretrain.monitor.heat_map import LoadMap, heat_map
from pretrain.monitor.records import read_lines
from pretrain.optim import learning_rate_factor

INK, MUTED, ACCENTS = "#1f2430", "#9aa5b1", ("#d1495b", "#2e86ab", "#3d9970", "#8d5fd3")
SMOOTHED_SHARE = 0.03  # of all steps: the window of the thick line; the thin one is every step as it was


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="megaloom plot", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    loss = kinds.add_parser("loss", help="training and validation loss of one or more runs")
    loss.add_argument("runs", nargs="+", type=Path, help="run folders")
    loss.add_argument("--out", type=Path, help="PNG (default: loss.png in the first folder)")
    rate = kinds.add_parser("lr", help="the learning rate of a run file, step by step")
    rate.add_argument("run", type=Path, help="run file (YAML)")
    rate.add_argument(
        "words", nargs="*", metavar="key=value", help="overrides, such as schedule.warmup_steps=100"
    )
    rate.add_argument("--out", type=Path, default=Path("lr.png"), help="PNG (default: lr.png in this folder)")
    loads = kinds.add_parser("experts", help="how many tokens each expert took, layer by layer")
    loads.add_argument("run", type=Path, help="run folder")
    loads.add_argument("--step", type=int, help="the last map up to this step (default: the last of all)")
    loads.add_argument("--out", type=Path, help="PNG (default: experts.png in the run folder)")
    words = parser.parse_args(argv)
    if words.kind == "experts":
        out = words.out or words.run / "experts.png"
        write(draw_experts(words.run, words.step), out)
        print(out)
        return
    out = (words.out or words.runs[0] / "loss.png") if words.kind == "loss" else words.out
    if words.kind == "loss":
        draw_losses({folder.name: read_records(folder) for folder in words.runs}, out)
    else:
        draw_learning_rate(words.run, words.words, out)
    print(out)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise RunError(
            f"run={folder}: no metrics.jsonl there; give the folder that a run wrote into (out/name)"
        )
    lines, num_dropped = read_lines(path)
    found = [{key: value for key, value in line.record.items() if is_number(value)} for line in lines]
    if not any("loss" in record for record in found):
        raise RunError(f"{path}: no record with a loss ({num_dropped} lines are none): nothing to draw")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw_experts(folder: Path, step: int | None) -> Any:
    """The heat map of one step of a run with experts."""
    path = folder / "expert_loads.jsonl"
    if not path.exists():
        raise RunError(
            f"run={folder}: no expert_loads.jsonl there; only runs of models with experts write it"
        )
    lines = [line.record for line in read_lines(path)[0] if is_map(line.record)]
    if not lines:
        raise RunError(f"{path}: no map of loads in it: nothing to draw")
    known = [line for line in lines if step is None or line["step"] <= step]
    if not known:
        raise RunError(
            f"--step={step}: the first map is of step {lines[0]['step']}; see monitor.experts_every"
        )
    last = known[-1]
    return heat_map(LoadMap(tuple(last["layers"]), tuple(map(tuple, last["loads"]))), last["step"])


def is_map(record: dict[str, Any]) -> bool:
    """Layers, and for each a row of numbers."""
    layers, loads = record.get("layers"), record.get("loads")
    if not (isinstance(layers, list) and isinstance(loads, list) and 0 < len(layers) == len(loads)):
        return False
    are_rows = all(isinstance(row, list) and row and all(map(is_number, row)) for row in loads)
    return are_rows and len(set(map(len, loads))) == 1


def draw_losses(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Thin line: every step; thick line: smoothed; dots: validation sets."""
    figure, axes = new_axes("optimizer step", "loss (nats per token)")
    for (name, records), colour in zip(runs.items(), ACCENTS * len(runs), strict=False):
        steps, losses = zip(*[(r["step"], r["loss"]) for r in records if "loss" in r], strict=True)
        axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        label = "training" if len(runs) == 1 else name
        axes.plot(steps, smoothed(losses), color=colour, linewidth=2.0, label=f"{label} (smoothed)")
        for key in sorted({key for record in records for key in record if key.startswith("eval/")}):
            points = [(record["step"], record[key]) for record in records if key in record]
            title = (
                f"{label}, {key.removeprefix('eval/')}"
                if len(runs) > 1
                else f"validation ({key.removeprefix('eval/')})"
            )
            ink = INK if len(runs) == 1 else colour
            axes.plot(*zip(*points, strict=True), "o--", color=ink, markersize=5, linewidth=1.0, label=title)
            axes.annotate(
                f"{points[-1][1]:.2f}",
                points[-1],
                textcoords="offset points",
                xytext=(6, 0),
                va="center",
                color=ink,
            )
    axes.margins(x=0.07)
    axes.legend(frameon=False)
    write(figure, out)


def draw_learning_rate(run_file: Path, words: Sequence[str], out: Path) -> None:
    run = load_run(run_file, words, world_size=1)
    schedule, total = run.config.schedule, run.config.train.steps
    if schedule is None:
        raise RunError(
            f"{run_file}: the DeepSpeed JSON's own scheduler rules this run's learning rate; set schedule to "
            "draw one"
        )
    figure, axes = new_axes("optimizer step", "learning rate")
    rates = [run.config.optimizer.lr * learning_rate_factor(schedule, step, total) for step in range(total)]
    axes.plot(range(1, total + 1), rates, color=ACCENTS[0], linewidth=2.0, label=schedule.kind)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.legend(frameon=False)
    write(figure, out)


def new_axes(x: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=MUTED, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, as many before it as behind it, at the ends those that there are."""
    reach = round(SMOOTHED_SHARE * len(values) / 2)
    sums = [0.0, *itertools.accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def write(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
