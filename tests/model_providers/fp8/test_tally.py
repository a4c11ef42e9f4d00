"""Shares of clipped and vanished numbers are counted as a reader would count them."""

import pytest
import torch

from model_providers.building import solo_groups
from model_providers.fp8.config import Fp8Config, Recipe
from model_providers.fp8.history import INPUT
from model_providers.fp8.scaling import Scaling
from model_providers.fp8.tally import OPERANDS, Tally, facts_of

CPU = torch.device("cpu")


def scaling_of(recipe: Recipe) -> Scaling:
    return Scaling(Fp8Config(recipe=recipe), solo_groups().tp, cut=frozenset())


def facts(tally: Tally, operand: int = 0):  # type: ignore[no-untyped-def]
    return facts_of(tally.sums[operand].tolist(), tally.peaks[operand].tolist())


def test_a_past_scale_clips_what_has_grown_and_that_is_counted() -> None:
    scaling = scaling_of("delayed")
    assert scaling.history is not None
    scaling.history.roll(torch.tensor([448.0, 0.0]))  # a unit of 1 for inputs
    scaling.look = tally = Tally(scaling, CPU)
    x = torch.tensor([[464.0, 465.0, -900.0, 1.0], [2.0**-11, -(2.0**-11), 0.0, 3.0]])
    scaling.input(x, both=True, is_trained=True)
    seen = facts(tally)
    assert seen.amax == 900.0 and seen.scale == 1.0
    assert seen.overflow == 2 / 8, "464 is rounded, not clipped"
    assert seen.underflow == 2 / 7, "zero was zero before"
    lost = torch.tensor([16.0, 17.0, 452.0, 2.0**-11, 2.0**-11])
    assert seen.error == pytest.approx(float(lost.norm() / x.norm()), rel=1e-6)
    assert float(scaling.history.seen[0, INPUT]) == 900.0


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8", "nvfp4"])
def test_scales_of_the_tensor_itself_clip_nothing(recipe: Recipe) -> None:
    scaling = scaling_of(recipe)
    scaling.look = tally = Tally(scaling, CPU)
    x = torch.randn(96, 160, generator=torch.Generator().manual_seed(1)).exp()
    x[:, 64:] = 0
    scaling.input(x, both=True, is_trained=True)
    scaling.weight(x)
    scaling.gradient(x, both=True)
    for operand in range(len(OPERANDS)):
        seen = facts(tally, operand)
        assert seen.overflow == 0 and 0 < seen.error < 0.3 and seen.amax == float(x.max())
        assert seen.underflow < (0.5 if recipe == "nvfp4" else 1e-3)


def test_only_training_is_looked_at_and_once() -> None:
    scaling = scaling_of("current")
    scaling.look = tally = Tally(scaling, CPU)
    scaling.input(torch.ones(4, 4), both=False, is_trained=False)
    assert facts(tally) is None
    scaling.input(torch.ones(4, 4), both=False, is_trained=True)
    assert tally.sums[0, 0] == 16


def test_an_overflow_of_the_wide_format_is_no_silence() -> None:
    scaling = scaling_of("current")
    scaling.look = tally = Tally(scaling, CPU)
    scaling.input(torch.tensor([[1.0, torch.inf]]), both=False, is_trained=True)
    seen = facts(tally)
    assert seen.amax == torch.inf and seen.scale == torch.inf and seen.overflow == 1.0


def test_what_was_decided_about_another_recipe_does_not_bind() -> None:
    barred = scaling_of("delayed")
    barred.is_barred, barred.strikes = True, 2
    same, other = scaling_of("delayed"), scaling_of("mxfp8")
    same.restore(barred.state(), CPU)
    other.restore(barred.state(), CPU)
    assert (same.is_barred, same.strikes) == (True, 2) and (other.is_barred, other.strikes) == (False, 0)
