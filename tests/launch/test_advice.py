"""Laws of training give the numbers that their papers do."""

import pytest

from launch.advice import (
    BESIROGLU,
    HOFFMANN,
    LossFit,
    advise,
    nearest_preset,
    step_law_batch_tokens,
    step_law_lr,
)
from model_providers.presets import get_preset
from pretrain.errors import RunError


def test_chinchilla_deserves_about_twenty_tokens_a_parameter_by_the_corrected_fit() -> None:
    assert 15 < BESIROGLU.tokens_for(70e9) / 70e9 < 30  # Besiroglu et al. 2024, figure 5: about 20
    assert HOFFMANN.tokens_for(70e9) / 70e9 > 40  # which the uncorrected one does not give


@pytest.mark.parametrize("fit", [BESIROGLU, HOFFMANN])
def test_the_optimum_is_one(fit: LossFit) -> None:
    size = fit.parameters_for(300e9)
    assert fit.tokens_for(size) == pytest.approx(300e9)
    best = fit.loss(size, 300e9)
    for factor in (0.8, 1.25):  # other sizes for the same 6 N D
        assert fit.loss(size * factor, 300e9 / factor) > best


def test_step_law_is_as_printed() -> None:
    assert step_law_lr(1e9, 1e11) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert 1e-3 < step_law_lr(1e9, 1e11) < 3e-3
    assert 1e6 < step_law_batch_tokens(1e11) < 1.5e6


def test_advice_names_a_size_and_says_where_it_extrapolates() -> None:
    given = advise(300e9)
    assert given.nearest_preset == nearest_preset(given.optimal_parameters[BESIROGLU.name])
    assert any("Step Law was fitted up to 1B" in caution for caution in given.cautions)
    assert not advise(20e9, get_preset("gpt3-350m")).cautions
    assert any("less than half" in caution for caution in advise(20e9, get_preset("llama3-70b")).cautions)


@pytest.mark.parametrize("tokens", [0, -1, 1e20, float("nan")])
def test_no_law_knows_so_many(tokens: float) -> None:
    with pytest.raises(RunError, match="--tokens="):
        advise(tokens)
