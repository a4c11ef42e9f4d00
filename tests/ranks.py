"""A pool of gloo ranks on the CPU, shared by all tests of one pytest run.

Importing torch, DeepSpeed and megatron-core costs about six seconds a process, more than most tests, so the
processes stay: each task gets a fresh process group of the size it asks for, and the libraries' module
globals are put back afterwards.  A task that fails or hangs costs a restart of the pool, never a hang of
the test run.

    def task(scale: float) -> float: ...            # at module level: it travels by name
    losses = ranks.run(task, 2, 0.5)                # one result per rank, in rank order
"""

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZE = 4
MAX_THREADS = 200  # gloo's, of groups that something keeps alive: each wakes a hundred times a second
STACKS_SIGNAL = signal.SIGUSR2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the text holds the first failing rank's traceback."""


class RankPool:
    """``SIZE`` processes that run tasks as ranks 0..n-1 of a gloo world."""

    def __init__(self, size: int = SIZE):
        self.size = size
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, task: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100) -> list[Any]:
        """Call ``task(*args)`` on ``world_size`` ranks and return their results in rank order."""
        assert 1 <= world_size <= self.size, f"world_size={world_size}: the pool has {self.size} ranks"
        if not self.workers:
            self._start()
        with tempfile.TemporaryDirectory(prefix="megaloom-ranks-") as folder:
            store = os.path.join(folder, "store")
            for rank in range(world_size):
                self.workers[rank][1].send((task, args, rank, world_size, store))
            results = self._collect(world_size, time.monotonic() + timeout_s)
        if self._num_threads() > MAX_THREADS:
            self.close()
        return results

    def _num_threads(self) -> int:
        tasks = Path(f"/proc/{self.workers[0][0].pid}/task")
        return len(list(tasks.iterdir())) if tasks.exists() else 0

    def close(self) -> None:
        """End the processes that this pool started, and no others."""
        for process, pipe in self.workers:
            pipe.close()
            with contextlib.suppress(
                ProcessLookupError
            ):  # a rank leads a group with the compilers it started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self.workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(theirs, os.getpid()), name=f"rank{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _collect(self, world_size: int, deadline_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        pipes = {self.workers[rank][1]: rank for rank in range(world_size)}
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                silent = sorted(pipes.values())
                for rank in silent:  # their stacks go to stderr, which pytest shows
                    os.kill(self.workers[rank][0].pid, STACKS_SIGNAL)
                time.sleep(1)
                self.close()
                raise RankError(f"ranks {silent} did not answer in time")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, f"the process of rank {rank} died (see its output above)"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {world_size} failed first:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]


def _worker(pipe: Connection, parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            return
    os.setpgrp()
    faulthandler.register(STACKS_SIGNAL, all_threads=False)
    os.environ.update(CPU_ONLY_ENVIRONMENT)
    # DeepSpeed names shared memory by these: pools that work side by side must not meet in it.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(parent_pid))
    warnings.simplefilter("ignore")  # upstream's, four times over
    import torch

    torch.set_num_threads(1)
    baseline = _Baseline()
    while True:
        try:
            task, args, rank, world_size, store = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            _join_world(rank, world_size, store)
            value = task(*args)
            torch.distributed.barrier()
            answer = (True, value)
        except BaseException:  # the whole point is to carry any failure to the test that asked
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        if not answer[0]:
            return
        baseline.restore()


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


def _join_world(rank: int, world_size: int, store: str) -> None:
    import torch

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )


class _Baseline:
    """The libraries' process-wide state as it was before the first task."""

    def __init__(self) -> None:
        import deepspeed.comm.comm
        import deepspeed.utils.groups
        import megatron.core.parallel_state
        import megatron.core.tensor_parallel.random
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        modules = (
            deepspeed.comm.comm,
            deepspeed.utils.groups,
            megatron.core.parallel_state,
            megatron.core.tensor_parallel.random,
            Init,  # counts parameters in the class: ranks with different earlier tasks would disagree
        )
        self.saved = {module: _plain_globals(module) for module in modules}
        # The same for modules, in a default argument that is a list.
        (self.module_count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ([0],)

    def restore(self) -> None:
        import torch

        end_engines()
        groups = set(torch.distributed.distributed_c10d._world.pg_map)
        torch.distributed.destroy_process_group()
        forget(groups)
        groups.clear()
        gc.collect()
        torch.set_default_dtype(torch.float32)
        self.module_count[0] = 0
        for module, values in self.saved.items():
            for name, value in values.items():
                setattr(module, name, type(value)(value) if isinstance(value, dict | list | set) else value)


def end_engines() -> None:
    """Take DeepSpeed's hooks off autograd's nodes, which would keep every engine and its groups alive."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    for thing in gc.get_objects():
        is_engine = type(thing).__module__ != "builtins" and isinstance(thing, DeepSpeedEngine)
        if is_engine and not vars(thing).get("has_ended"):
            thing.has_ended = True  # it may live on all the same, into a task without DeepSpeed
            with contextlib.suppress(Exception):  # one that never came to its first step
                thing.destroy()


def forget(groups: set[Any]) -> None:
    """Take groups that are no more from every object that has one.

    Hooks on autograd's nodes keep engines and modules alive where Python's collector cannot see, and a group that is
    not collected keeps three threads: after some hundred tasks they would eat the machine.
    """
    for holder in gc.get_referrers(*groups):
        attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        if "__spec__" not in attributes:  # a module's own are put back by name
            for key in [key for key, value in attributes.items() if any(value is group for group in groups)]:
                del attributes[key]


def _plain_globals(module: Any) -> dict[str, Any]:
    return {
        name: type(value)(value) if isinstance(value, dict | list | set) else value
        for name, value in vars(module).items()
        if not name.startswith("__")
        and not callable(value)
        and not hasattr(value, "__spec__")
        and not isinstance(value, staticmethod | classmethod | property)
    }
