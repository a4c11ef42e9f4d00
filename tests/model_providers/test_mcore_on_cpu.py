"""Every row of the replacement table is needed, says what it replaces, and stops at another megatron-core."""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from model_providers import mcore_on_cpu
from model_providers.errors import ModelError
from model_providers.layer_plan import Recompute
from model_providers.mcore_on_cpu import TABLE, Replacement, install, source_sha256
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import (
    LLAMA_LIKE,
    batch,
    build,
    llama_like,
    loss_and_gradients,
    tensor_groups,
    tensor_parallel_run,
)

install("cpu")


def stock(row: Replacement) -> Any:
    """What megatron-core itself has there, from a second, private copy of the module."""
    module = row.owner if isinstance(row.owner, types.ModuleType) else sys.modules[row.owner.__module__]
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return getattr(copy if module is row.owner else getattr(copy, row.owner.__name__), row.name)


def row_for(name: str) -> Replacement:
    (row,) = [row for row in TABLE if row.target.endswith(name)]
    return row


def put_back(name: str, patch: pytest.MonkeyPatch) -> None:
    """Undo one row, and keep build_plan from putting it in place again."""
    row = row_for(name)
    patch.setattr(mcore_on_cpu, "install", lambda device: None)
    original = stock(row)
    is_static = row.name in ("forward", "backward")  # of autograd functions
    patch.setattr(row.owner, row.name, staticmethod(original) if is_static else original)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


def one_recomputed_step() -> None:
    model = llama_like(attention_dropout=0.1)
    built = build(model, recompute=Recompute("selective"))
    seed_streams(1)
    loss_and_gradients(built, *batch(model))


def test_without_get_rng_state_recompute_asks_for_cuda(patch: pytest.MonkeyPatch) -> None:
    one_recomputed_step()
    put_back("_get_cuda_rng_state", patch)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        one_recomputed_step()


def test_without_set_rng_state_every_recompute_leaks_a_closure(patch: pytest.MonkeyPatch) -> None:
    queued = torch.cuda._queued_calls  # type: ignore[attr-defined]
    before = len(queued)
    one_recomputed_step()
    assert len(queued) == before
    put_back("_set_cuda_rng_state", patch)
    one_recomputed_step()
    assert len(queued) > before
    del queued[before:]


def test_without_its_mend_output_discarding_recompute_needs_transformer_engine(
    patch: pytest.MonkeyPatch,
) -> None:
    def forget_and_recompute() -> torch.Tensor:
        seed_streams(1)
        x = torch.ones(4, requires_grad=True)
        checkpointed = CheckpointWithoutOutput()
        doubled = checkpointed.checkpoint(lambda x: x * 2, x)
        output = doubled * 3
        checkpointed.discard_output_and_register_recompute(output)
        output.sum().backward()
        assert x.grad is not None
        return x.grad

    assert forget_and_recompute().tolist() == [6.0] * 4
    put_back("CheckpointWithoutOutput.__init__", patch)
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        forget_and_recompute()


def sequence_parallel_step_without(name: str) -> str:
    """The error on a rank when one row is missing; empty when nothing went wrong."""
    with pytest.MonkeyPatch.context() as patch:
        put_back(name, patch)
        try:
            tensor_parallel_run(LLAMA_LIKE, 2, True)
        except Exception as error:  # the tests look at what it says
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    [
        "_gather_along_first_dim",
        "_reduce_scatter_along_first_dim",
    ],
)
def test_without_the_row_sequence_parallelism_asks_for_cuda(ranks: Any, name: str) -> None:
    for error in ranks.run(sequence_parallel_step_without, 2, name):
        assert "CUDA" in error or "NVIDIA" in error, error


def multi_query_step_without(name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        put_back(name, patch)
        try:
            tensor_parallel_run(LLAMA_LIKE | {"num_kv_heads": 1}, 2, False)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.ranks
def test_without_gather_along_last_dim_shared_key_heads_ask_for_cuda(ranks: Any) -> None:
    for error in ranks.run(multi_query_step_without, 2, "_gather_along_last_dim"):
        assert "CUDA" in error or "NVIDIA" in error, error


def exchange(name: str | None) -> Any:
    """What an uneven all-to-all brings, or the error where its row is missing."""
    group = tensor_groups(tp=2).tp
    rank, rows = group.rank(), torch.arange(3.0)[:, None] + 10 * dist.get_rank()
    sent = ([1, 2], [0, 3])[rank]
    received = ([1, 0], [2, 3])[rank]
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            put_back(name, patch)
        try:
            return all_to_all(group, rows, received, sent).flatten().tolist()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


@pytest.mark.ranks
def test_without_all_to_all_tokens_ask_for_cuda_on_their_way(ranks: Any) -> None:
    assert ranks.run(exchange, 2, None) == [[0.0], [1.0, 2.0, 10.0, 11.0, 12.0]]
    for error in ranks.run(exchange, 2, "_AllToAll.forward"):
        assert "CUDA" in error or "NVIDIA" in error, error


def uneven(small: int) -> dict[str, Any]:
    """Shares of 1 and 3 rows, gathered; 4 rows summed and dealt out again."""
    group = tensor_groups(tp=2).tp
    sizes, rank = [1, 3], group.rank()
    mine = torch.full((sizes[rank], 2), 1.0 + rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mcore_on_cpu, "SMALL", small)
        whole = mcore_on_cpu.gather_along_first_dim(mine, group, sizes)
        part = mcore_on_cpu.reduce_scatter_along_first_dim(whole, group, sizes)
    return {"whole": whole[:, 0].tolist(), "part": part[:, 0].tolist(), "kept": whole[:, 0].tolist()}


@pytest.mark.ranks
@pytest.mark.parametrize("small", [0, 100], ids=["reduced", "gathered"])
def test_uneven_gathers_and_scatters(ranks: Any, small: int) -> None:
    first, second = ranks.run(uneven, 2, small)
    assert first["whole"] == second["whole"] == first["kept"] == [1.0, 2.0, 2.0, 2.0]
    assert (first["part"], second["part"]) == ([2.0], [4.0, 4.0, 4.0])


def sums_of_a_strided_tensor() -> tuple[list[Any], list[Any]]:
    group = tensor_groups(tp=2).tp
    strided = (torch.arange(6.0).view(2, 3) + group.rank()).t()
    return mcore_on_cpu.reduce(strided, group).tolist(), stock(row_for("_reduce"))(strided, group).tolist()


@pytest.mark.ranks
def test_upstream_loses_the_sum_of_a_strided_tensor(ranks: Any) -> None:
    """The fault is in megatron-core 0.16.1's mappings._reduce, on any device."""
    (ours, lost), _ = ranks.run(sums_of_a_strided_tensor, 2)
    assert ours == [[1.0, 7.0], [3.0, 9.0], [5.0, 11.0]]
    assert lost == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def collectives(small: int) -> dict[str, Any]:
    group = tensor_groups(tp=2).tp
    x = torch.arange(4.0).view(2, 2) + 10 * group.rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mcore_on_cpu, "SMALL", small)
        return {
            "sum": mcore_on_cpu.reduce(x.clone(), group).tolist(),
            "last": mcore_on_cpu.gather_along_last_dim(x, group).tolist(),
            "first": mcore_on_cpu.gather_along_first_dim(x, group).tolist(),
            "scatter": mcore_on_cpu.reduce_scatter_along_first_dim(x, group).tolist(),
        }


@pytest.mark.ranks
@pytest.mark.parametrize("small", [0, 100], ids=["reduced", "gathered"])
def test_the_collectives_do_what_their_names_say(ranks: Any, small: int) -> None:
    first, second = ranks.run(collectives, 2, small)
    assert first["sum"] == second["sum"] == [[10.0, 12.0], [14.0, 16.0]]
    assert first["last"] == second["last"] == [[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]]
    assert first["first"] == second["first"] == [[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]]
    assert (first["scatter"], second["scatter"]) == ([[10.0, 12.0]], [[14.0, 16.0]])


class Upstream:
    """Stands for a megatron-core module."""

    @staticmethod
    def function() -> str:
        return "upstream"


def replacement(
    where: Any, sha256: str | None = None, new: Callable[..., Any] = lambda: "ours"
) -> Replacement:
    sha256 = sha256 or mcore_on_cpu.source_sha256(Upstream.function)
    return Replacement(Upstream, "function", new, sha256, where, "a test")


def test_rows_go_in_by_device_and_only_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Upstream, "function", Upstream.function)
    patch.setattr(mcore_on_cpu, "open_tracker", lambda device: None)  # CUDA's asks for CUDA
    cpu_only, everywhere = replacement("cpu"), replacement("everywhere")
    install("cuda", (cpu_only,))
    assert Upstream.function() == "upstream"
    install("cuda", (everywhere,))
    assert Upstream.function() == "ours"
    install("cpu", (everywhere,))
    assert Upstream.function() == "ours"


@pytest.mark.parametrize("name", ["function", "gone"])
def test_another_megatron_core_is_refused(name: str) -> None:
    row = replacement("everywhere", sha256="0" * 64)._replace(name=name)
    with pytest.raises(ModelError, match=rf"Upstream.{name} is not the function .* tried with 0.16.1"):
        install("cpu", (row,))
    assert Upstream.function() == "upstream"


def test_the_recorded_hashes_are_those_of_this_megatron_core() -> None:
    for row in TABLE:
        assert mcore_on_cpu.source_sha256(stock(row)) == row.source_sha256, row.target
        assert row.why


def test_installing_again_after_the_tracker_was_reset_brings_it_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mcore_random, "_CUDA_RNG_STATE_TRACKER", None)
    install("cpu")
    assert mcore_random._CUDA_RNG_STATE_TRACKER is not None


def test_what_ran_on_the_cpu_leaves_nothing_behind_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_on_cpu, "open_tracker", lambda device: None)
    install("cpu")
    install("cuda")
    try:
        for row in TABLE:
            here = getattr(row.owner, row.name)
            assert (here is row.new) == (row.where == "everywhere"), row.target
            assert row.where == "everywhere" or source_sha256(here) == row.source_sha256, row.target
        assert all(getattr(owner, name) is None for owner, name, _ in mcore_on_cpu.PLACEHOLDERS)
    finally:
        install("cpu")
