"""What eight bits did to one linear's operands: how many numbers were clipped, how many vanished, how far all moved.

Clipped are numbers beyond the largest of the format by more than its last rounding: those would have gone to a larger
one.  Vanished are numbers that were not zero and are.  Counts stay on the device until they are packed, and one packed
row for each linear adds up over micro-batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model_providers.fp8.formats import E4M3, E5M2, largest_magnitude
from model_providers.fp8.quantised import Quantised, spread
from model_providers.fp8.scaling import Operand, Scaling

OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient")
SUMS = (
    6  # numbers, those that are not zero, clipped, vanished; squares of what they are and of what they lost
)
PEAKS = 2  # largest magnitude, largest scale
# Where rounding to nearest would leave the format: half a step above its largest number (arXiv:2209.05433, table 1; for
# E2M1, whose payload lies in E4M3, OCP Microscaling Formats 1.0, section 5.3.3).
EDGES = {E4M3.dtype: 464.0, E5M2.dtype: 61440.0}
EDGE_OF_FOUR_BITS = 7.0


class Facts(NamedTuple):
    """Of one operand of one linear, or of several together; shares lie in 0..1."""

    amax: float
    scale: float  # what 1 stands for in eight bits; of blocks the largest
    overflow: float  # share of numbers that were clipped
    underflow: float  # share of numbers other than zero that became zero
    error: float  # norm of what rounding took, over the norm of the operand


@dataclass
class Tally:
    """The operands of one linear since it was made; `Scaling.look` may be this."""

    scaling: Scaling
    device: torch.device

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(OPERANDS), SUMS, dtype=torch.float64, device=self.device)
        self.peaks = torch.zeros(len(OPERANDS), PEAKS, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def __call__(self, operand: Operand, x: torch.Tensor, rows: Quantised) -> None:
        """``x`` [m k] became ``rows``."""
        row, copies = OPERANDS.index(operand), self.scaling.num_copies(operand)
        self.sums[row] += counts(x, rows, edge_of(self.scaling, rows)) / copies
        units = rows.unit if rows.scales is None else rows.unit * rows.wide_scales.max()
        seen = torch.stack((largest_magnitude(x), units))
        self.peaks[row] = torch.maximum(
            self.peaks[row], torch.nan_to_num(seen, nan=torch.inf, posinf=torch.inf)
        )


def edge_of(scaling: Scaling, rows: Quantised) -> float:
    return EDGE_OF_FOUR_BITS if scaling.facts.recipe == "nvfp4" else EDGES[rows.payload.dtype]


def counts(x: torch.Tensor, rows: Quantised, edge: float) -> torch.Tensor:
    """[m k] -> [6], fp64 in the order of ``SUMS``; a number that is not finite counts as clipped."""
    wide = x.float()
    numbers, there = torch.full((), x.numel(), device=x.device), torch.count_nonzero(wide)
    left = torch.count_nonzero(rows.payload.view(torch.uint8) & 0x7F)
    inside = torch.count_nonzero(wide.abs() <= limits(rows, edge, x.shape))
    lost = rows.values(torch.float32).mul_(rows.unit).sub_(wide)
    found = (numbers, there, numbers - inside, (there - left).clamp(min=0), square(wide), square(lost))
    return torch.stack([part.double() for part in found])


def limits(rows: Quantised, edge: float, shape: torch.Size) -> torch.Tensor:
    """[] or [m k]: what is larger was clipped; a block whose scale is zero has lost all, and clipped none."""
    if rows.scales is None:
        return rows.unit * edge
    units = rows.unit * rows.wide_scales
    return spread(torch.where(units == 0, torch.inf, units * edge), block(rows), shape)


def square(x: torch.Tensor) -> torch.Tensor:
    """Of the norm, over rows that are summed in fp32."""
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum()


def block(rows: Quantised) -> tuple[int, int]:
    assert rows.block is not None
    return rows.block


def facts_of(sums: Sequence[float], peaks: Sequence[float]) -> Facts | None:
    """One operand's row; None where it was never seen."""
    numbers, there, clipped, vanished, squares, lost = sums
    if not numbers:
        return None
    return Facts(
        amax=peaks[0],
        scale=peaks[1],
        overflow=clipped / numbers,
        underflow=vanished / max(1.0, there),
        error=(lost / squares) ** 0.5 if squares else 0.0,
    )
