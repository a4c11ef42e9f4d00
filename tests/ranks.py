"""Gloo ranks on the CPU for tests: fresh processes for every task, forked from one that has imported everything.

Importing torch, DeepSpeed and megatron-core costs about six seconds a process, more than most tests.  So one process
imports them once, for all tests of a pytest run, and every task's ranks are forked from it (`ranks_image`): a tenth of
a second each, with nothing of earlier tasks in them.  A task that fails or hangs costs its own ranks, never a hang of
the test run.

    def task(scale: float) -> float: ...            # at module level: it travels by name
    losses = ranks.run(task, 2, 0.5)                # one result per rank, in rank order
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests import costs
from tests.patience import patient_s

SIZE = 4
STACKS_SIGNAL = signal.SIGUSR2
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CPU_ONLY_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "DEEPSPEED_LOG_LEVEL": "error",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's Muon compiles its iteration: half a minute on every rank
}


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the text holds the first failing rank's traceback."""


class RankPool:
    """Runs tasks as ranks 0..n-1 of a gloo world, n up to ``size``."""

    def __init__(self, size: int = SIZE):
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.ranks_image"])

    def run(self, task: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100) -> list[Any]:
        """Call ``task(*args)`` on ``world_size`` ranks and return their results in rank order.

        ``timeout_s``: on the reference machine (`tests/patience.py`).
        """
        assert 1 <= world_size <= self.size, f"world_size={world_size}: the pool has {self.size} ranks"
        ranks: list[tuple[Any, Connection]] = []
        with tempfile.TemporaryDirectory(prefix="megaloom-ranks-") as folder:
            store = os.path.join(folder, "store")
            try:
                for rank in range(world_size):
                    ranks.append(self._start(task, args, rank, world_size, store))
                return _collect(ranks, patient_s(timeout_s))
            finally:
                _end(ranks)

    def _start(self, *work: Any) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_rank, args=(theirs, os.getpid(), *work), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _collect(ranks: list[tuple[Any, Connection]], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    for pipe in pipes:  # the image of all ranks starts first, which takes as long as it takes
        try:
            pipe.recv()
        except EOFError:
            raise RankError("what ranks are forked from did not start (see its output above)") from None
    deadline_s = time.monotonic() + timeout_s
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            silent = sorted(pipes.values())
            for rank in silent:  # their stacks go to stderr, which pytest shows
                os.kill(ranks[rank][0].pid, STACKS_SIGNAL)
            time.sleep(1)
            raise RankError(f"ranks {silent} did not answer in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, f"the process of rank {rank} died (see its output above)"
            if not ok:
                raise RankError(f"rank {rank} of {len(ranks)} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _end(ranks: list[tuple[Any, Connection]]) -> None:
    """The processes that this task started, and no others."""
    for process, pipe in ranks:
        costs.add_rank(process.pid)
        pipe.close()
        with contextlib.suppress(ProcessLookupError):  # a rank leads a group with what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    for process, _ in ranks:
        process.join()


def _rank(
    pipe: Connection,
    test_run: int,
    task: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    store: str,
) -> None:
    """``test_run``: the process of pytest, whose pools must not meet in shared memory with those beside it."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.register(STACKS_SIGNAL, all_threads=False)
    pipe.send("here")
    try:
        assert "tests.ranks_image" in sys.modules, (
            "run pytest in the repository's folder: ranks lack what they start from"
        )
        _join_world(rank, world_size, store, test_run)
        value = task(*args)
        import torch

        torch.distributed.barrier()
        answer = (True, value)
    except BaseException:  # the whole point is to carry any failure to the test that asked
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    signal.pause()  # the others may still talk to this rank: all are ended together


def _join_world(rank: int, world_size: int, store: str, test_run: int) -> None:
    import torch

    # DeepSpeed names its shared memory by address and port.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(test_run))
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
