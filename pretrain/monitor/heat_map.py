"""The loads of all experts as a picture: a row for each layer, a column for each expert."""

from dataclasses import dataclass
from typing import Any

INK = "#1f2430"
MOST_NUMBERS = 16  # columns up to which each cell has room for its number
MOST = 2.0  # times the fair share, where the scale ends


@dataclass(frozen=True)
class LoadMap:
    """Every expert's load, layer by layer; 1 is a fair share."""

    layers: tuple[str, ...]
    loads: tuple[tuple[float, ...], ...]


def heat_map(loads: LoadMap, step: int) -> Any:
    """A matplotlib figure; blue: less than a fair share, red: more, white: fair."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files; no screen is needed
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    rows, columns = len(loads.layers), len(loads.loads[0])
    size = (min(14.0, 3.2 + 0.45 * min(columns, 24)), min(12.0, 1.6 + 0.32 * rows))
    figure, axes = plt.subplots(figsize=size, dpi=130, layout="constrained")
    image = axes.imshow(
        loads.loads, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, MOST), aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(rows), loads.layers)
    axes.set_xlabel("expert")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns <= MOST_NUMBERS:
        axes.set_xticks(range(columns))
        for row, values in enumerate(loads.loads):
            for column, value in enumerate(values):
                far = abs(value - 1.0) > 0.65
                axes.text(
                    *(column, row, f"{value:.2f}"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if far else INK,
                )
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.9)
    bar.set_label("load (1: fair share)")
    bar.outline.set_visible(False)
    figure.suptitle(f"experts' loads, step {step}", x=0.01, ha="left", fontsize=10, color=INK)
    return figure
