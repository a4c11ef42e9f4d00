"""A timeline to look at: as text for a terminal, or as the familiar coloured chart."""

from pathlib import Path

from rich.text import Text

from pretrain.engine.schedules.ops import Kind, Op
from pretrain.engine.schedules.simulate import Timeline

# Forwards blue, backwards green, input halves teal, weight halves amber; later chunks are lighter.
COLOURS = {
    Kind.FORWARD: ("#2e6fb7", "#7fb0e6", "#a9cbef", "#cfe2f6"),
    Kind.BACKWARD: ("#3b8f4f", "#86c795", "#abd9b5", "#d0ebd6"),
    Kind.INPUT: ("#1f8a8a", "#6cc4c0", "#9bd8d5", "#c6eae8"),
    Kind.WEIGHT: ("#d98a1c", "#f2bd72", "#f6d19d", "#fae5c9"),
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "gradients of inputs",
    Kind.WEIGHT: "gradients of weights",
}
INK, PAPER = "#1f2430", "#ffffff"


def colour(op: Op) -> str:
    shades = COLOURS[op.kind]
    return shades[min(op.chunk, len(shades) - 1)]


def as_text(timeline: Timeline, *, width: int, is_coloured: bool) -> list[Text]:
    """A line per rank; an operation is a block with its micro-batch's number, where there is room for it.

    Without colours a letter tells what it is, and dots where the rank waits.
    """
    columns = max(20, width - len(f"rank {len(timeline.starts) - 1} "))
    scale = columns / timeline.makespan
    lines = []
    for rank, order in enumerate(timeline.schedule.orders):
        line = Text(f"rank {rank} ", style="bold")
        column = 0
        for op, start, end in zip(order, timeline.starts[rank], timeline.ends[rank], strict=True):
            first, last = round(start * scale), round(end * scale)
            line.append((" " if is_coloured else "·") * (first - column))
            block = _block(op, last - first, is_coloured=is_coloured)
            line.append(block, style=f"{'white' if op.chunk == 0 else 'black'} on {colour(op)}")
            column = last
        lines.append(line)
    return lines


def _block(op: Op, width: int, *, is_coloured: bool) -> str:
    label = str(op.micro_batch)
    if not is_coloured:
        label = f"{op.kind}{label}" if len(label) < width else op.kind.value
    return label.ljust(width) if len(label) <= width else " " * width


def legend(timeline: Timeline) -> Text:
    kinds = sorted({op.kind for order in timeline.schedule.orders for op in order}, key=list(Kind).index)
    text = Text()
    for kind in kinds:
        text.append(f" {kind} ", style=f"white on {COLOURS[kind][0]}").append(f" {NAMES[kind]}   ")
    if timeline.schedule.placement.chunks > 1:
        text.append("lighter: later chunks")
    return text


def as_picture(timeline: Timeline, out: Path) -> None:
    """SVG, PNG or whatever else the suffix names and matplotlib writes."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files; no screen is needed
    from matplotlib import pyplot as plt

    schedule, ranks = timeline.schedule, len(timeline.starts)
    figure, axes = plt.subplots(figsize=(13, 0.9 + 0.55 * ranks), dpi=130, layout="constrained")
    room = 13 / timeline.makespan  # inches per unit of time
    for rank, order in enumerate(schedule.orders):
        for op, start, end in zip(order, timeline.starts[rank], timeline.ends[rank], strict=True):
            axes.broken_barh(
                [(start, end - start)],
                (rank - 0.44, 0.88),
                facecolor=colour(op),
                edgecolor=PAPER,
                linewidth=0.7,
            )
            if (end - start) * room > 0.16:
                axes.text(
                    *((start + end) / 2, rank, str(op.micro_batch)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=PAPER if op.chunk == 0 else INK,
                )
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    present = [kind for kind in Kind if any(op.kind == kind for order in schedule.orders for op in order)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind][0]) for kind in present]
    figure.legend(
        handles,
        [NAMES[kind] for kind in present],
        loc="outside upper right",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(
        f"{schedule.name}: {schedule.placement.stages} stages x {schedule.placement.chunks} chunks, "
        f"{schedule.num_micro_batches} micro-batches, bubble {timeline.bubble:.1%}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=INK,
    )
    figure.savefig(out)
    plt.close(figure)
