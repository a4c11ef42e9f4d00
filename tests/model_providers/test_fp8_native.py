"""Scales in the order of CUDA's kernels, and kernels that are used only where they run and agree."""

import logging
from typing import Any

import pytest
import torch

from model_providers.fp8 import native
from model_providers.fp8.formats import E4M3
from model_providers.fp8.native import (
    FINE,
    MICRO,
    SQUARE,
    Shape,
    in_tiles,
    is_trusted,
    laid_out,
    multiply_blocks,
)
from model_providers.fp8.quantised import quantise_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tried_anew() -> None:
    is_trusted.cache_clear()


def test_rows_of_fine_scales_lie_next_to_each_other() -> None:
    """ScaledBlas.cpp: [m k/128], strides (1, m)."""
    scales = laid_out(quantise_blocks(torch.randn(48, 384), E4M3, FINE))
    assert scales.shape == (48, 3) and scales.stride() == (1, 48)


def test_square_scales_are_rounded_up_to_four_along_k() -> None:
    """ScaledBlas.cpp: [round_up(k/128, 4) n/128], strides (1, round_up(k/128, 4))."""
    made = quantise_blocks(torch.randn(256, 384), E4M3, SQUARE)
    scales = laid_out(made)
    assert scales.shape == (4, 2) and scales.stride() == (1, 4)
    assert torch.equal(scales[:3].t(), made.wide_scales)


@pytest.mark.parametrize("rows, columns", [(128, 4), (256, 8), (130, 5)])
def test_tiles_are_those_of_cublas(rows: int, columns: int) -> None:
    """cuBLAS 13, 1D block scaling factors: offset of (r, c) in its tile is (r % 32) * 16 + (r / 32) * 4 + c."""
    scales = torch.exp2(torch.arange(rows * columns).remainder(97).float() - 40).view(rows, columns)
    flat = in_tiles(scales.to(torch.float8_e8m0fnu)).float()
    tiles_across = -(-columns // 4)
    assert flat.numel() == -(-rows // 128) * 128 * tiles_across * 4
    for row in range(0, rows, 7):
        for column in range(columns):
            tile = row // 128 * tiles_across + column // 4
            inside = row % 128 % 32 * 16 + row % 128 // 32 * 4 + column % 4
            assert flat[tile * 512 + inside] == scales[row, column]


def test_a_kernel_that_does_not_run_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.fp8.native"):
        assert not is_trusted(CPU, FINE, SQUARE, torch.bfloat16)
        assert not is_trusted(CPU, FINE, SQUARE, torch.bfloat16)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("fp8 products of 1x128 and 128x128 blocks are emulated on cpu: ")


@pytest.mark.parametrize("pair", sorted(native.PAIRS))
@pytest.mark.parametrize("is_right", [True, False])
def test_a_kernel_is_used_only_if_it_agrees(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pair: Any, is_right: bool
) -> None:
    """A wrong order of scales is what a trial is for: here rows get their neighbours'."""

    def product(a: Any, b: Any, dtype: torch.dtype) -> torch.Tensor:
        if not is_right:
            a = a._replace(scales=a.scales.roll(1, 0))
        return (a.values(torch.float32) @ b.values(torch.float32).t()).to(dtype)

    monkeypatch.setattr(native, "scaled_product", product)
    with caplog.at_level(logging.INFO, logger="model_providers.fp8.native"):
        assert is_trusted(CPU, *pair, torch.bfloat16) == is_right
    assert is_right or "its product is off by" in caplog.text


@pytest.mark.parametrize(
    "shape, block, fits",
    [
        (Shape(64, 256, 32), FINE, True),
        (Shape(64, 200, 32), FINE, False),
        (Shape(60, 256, 32), FINE, False),
        (Shape(64, 256, 40), FINE, False),
        (Shape(64, 96, 32), MICRO, True),
        (Shape(64, 80, 32), MICRO, False),
    ],
)
def test_shapes_with_parts_of_blocks_are_emulated(shape: Shape, block: tuple[int, int], fits: bool) -> None:
    assert shape.fits(block) == fits


def test_a_cpu_is_never_asked() -> None:
    a, b = (quantise_blocks(torch.randn(128, 128), E4M3, block) for block in (FINE, SQUARE))
    assert multiply_blocks(a, b, torch.float32) is None
