"""Dropout streams: equal where activations are equal, different where they differ, the same after a restart."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from model_providers.random_streams import begin_layer, begin_micro_batch, derive_seed, seed_streams


def draws(micro_batch: int = 0, layer: str = "layers.0", **place: int) -> tuple[list[float], list[float]]:
    """From the default stream and from the model-parallel one."""
    seed_streams(7, **place)
    begin_micro_batch(micro_batch)
    begin_layer(layer)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4).tolist()
    return torch.rand(4).tolist(), own


def test_the_same_place_draws_the_same() -> None:
    assert draws(step=3, tp_rank=1) == draws(step=3, tp_rank=1)


def test_tensor_ranks_share_the_default_stream_only() -> None:
    (first, first_own), (second, second_own) = draws(tp_rank=0), draws(tp_rank=1)
    assert first == second and first_own != second_own


@pytest.mark.parametrize("place", [{"step": 1}, {"micro_batch": 1}, {"layer": "layers.1"}], ids=str)
def test_steps_micro_batches_and_layers_draw_differently(place: dict[str, Any]) -> None:
    (first, first_own), (second, second_own) = draws(), draws(**place)
    assert first != second and first_own != second_own


def test_what_was_drawn_before_changes_no_layers_draws() -> None:
    wanted = draws(micro_batch=2)
    begin_layer("layers.5")
    torch.rand(3)
    begin_layer("layers.0")
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4).tolist()
    assert (torch.rand(4).tolist(), own) == wanted


def test_a_fork_leaves_the_outer_stream_where_it_was() -> None:
    seed_streams(7)
    undisturbed = torch.rand(2).tolist()
    seed_streams(7)
    with get_cuda_rng_tracker().fork():
        torch.rand(5)
    assert torch.rand(2).tolist() == undisturbed


def test_a_fork_goes_on_where_the_last_one_stopped_even_inside_itself() -> None:
    tracker = get_cuda_rng_tracker()
    seed_streams(7)
    with tracker.fork():
        straight = torch.rand(3).tolist()
    seed_streams(7)
    with tracker.fork():
        pieces = torch.rand(1).tolist()
        with tracker.fork():
            pieces += torch.rand(1).tolist()
        pieces += torch.rand(1).tolist()
    assert pieces == straight


def test_an_error_inside_a_fork_winds_it_back() -> None:
    seed_streams(7)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), get_cuda_rng_tracker().fork():
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unseeded_stream_is_named() -> None:
    seed_streams(7)
    with (
        pytest.raises(AssertionError, match="stream expert is not seeded"),
        get_cuda_rng_tracker().fork("expert"),
    ):
        pass


def test_derived_seeds_are_unrelated() -> None:
    seeds: list[Any] = [derive_seed(kind, number) for kind in ("a", "b") for number in range(100)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
