"""Four bits: the nearest numbers, right on average where rounding is random, and rotations that cancel."""

import torch

from model_providers.fp8.formats import largest_magnitude
from model_providers.fp8.nvfp4 import quantise_nvfp4, rotate, rotation, round_e2m1, unit_of_whole

NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_rounding_finds_the_nearest_number_and_the_even_one_on_ties() -> None:
    x = torch.linspace(-7, 7, 2801)
    both = torch.cat((-NUMBERS.flip(0), NUMBERS))
    distance = (x[:, None] - both).abs()
    found = round_e2m1(x)
    assert torch.isin(found, both).all()
    torch.testing.assert_close((found - x).abs(), distance.min(dim=1).values)
    ties = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    assert round_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_random_rounding_is_right_on_average_and_repeats() -> None:
    x = torch.tensor([0.1, 0.7, 1.8, 2.3, 3.9, 5.0, -5.5, -0.2]).repeat(20000, 1)
    rounded = round_e2m1(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded.mean(dim=0), x[0], rtol=0, atol=0.02)
    assert torch.isin(rounded.abs(), NUMBERS).all()
    assert torch.equal(rounded, round_e2m1(x, torch.Generator().manual_seed(0)))


def test_a_matrix_keeps_its_largest_numbers_and_the_scales_of_its_blocks() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 96)
    unit = unit_of_whole(largest_magnitude(x))
    for block in ((1, 16), (16, 16)):
        quantised = quantise_nvfp4(x, unit, block)
        values = quantised.values(torch.float32) * unit
        blocks = x.unfold(0, block[0], block[0]).unfold(1, 16, 16).abs().amax(dim=(2, 3))
        error = (values - x).abs().unfold(0, block[0], block[0]).unfold(1, 16, 16).amax(dim=(2, 3))
        assert (error <= blocks / 6 * 1.07).all(), "half a step at the top, and an E4M3 scale's own rounding"
        assert torch.equal(quantised.values(torch.bfloat16).float(), quantised.values(torch.float32))
    assert not torch.isfinite(unit_of_whole(torch.tensor(torch.inf)))


def test_squares_are_the_same_numbers_in_both_directions() -> None:
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    unit = unit_of_whole(largest_magnitude(x))
    there, back = quantise_nvfp4(x, unit, (16, 16)), quantise_nvfp4(x.t(), unit, (16, 16))
    assert torch.equal(there.values(torch.float32), back.values(torch.float32).t())


def test_the_rotation_cancels_in_a_product_and_spreads_an_outlier() -> None:
    matrix = rotation(torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(16))
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(5, 40, generator=generator), torch.randn(7, 40, generator=generator)
    torch.testing.assert_close(rotate(x) @ rotate(y).t(), x @ y.t())
    lonely = torch.zeros(1, 16)
    lonely[0, 3] = 16.0
    torch.testing.assert_close(rotate(lonely).abs(), torch.full((1, 16), 4.0))
