"""DeepSpeed's kernels that are compiled at first use: once per user, by one process, and never behind a dead lock.

Finished kernels are kept in a folder whose name is a hash of what decides the binary: versions, compiler, instruction
set (`what_decides_a_binary`).  Clones and virtual environments share it.  torch asks ninja whether a kernel is up to
date, and ninja compiles again wherever the paths of headers differ, as they do from environment to environment; so a
build that finished leaves a marker, written last, and is loaded without ninja.

torch serialises builds by a file named `lock`.  A process that is killed while it compiles leaves it there, and every
later run would wait for it forever.  Ours build under a lock that the system releases with its holder, so a lock file
that is found then, with no process at work in its folder, is a left-over.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import deepspeed
import psutil
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock
from torch.utils import cpp_extension

from pretrain.checkpoint.store import write_whole
from pretrain.engine.quiet import without_stdout
from pretrain.monitor.heartbeat import COMPILES

EXTENSIONS = "TORCH_EXTENSIONS_DIR"  # torch's own variable
COMPILERS_WORDS = re.compile(r"\berror: |: not found|No such file|cannot find|is required")
LOADED_FIRST = {"async_io": ("pin_memory",)}  # deepspeed/ops/op_builder/async_io.py, load
FINISHED = "megaloom-finished.json"  # in a kernel's folder: the library's name, and what decided its binary
BEAT_S = 1.0
LINE_S = 10.0  # between two lines on the console while a kernel is compiled
YOUNG_S = 5.0  # another program may have taken its lock just now, and not started its compiler yet


def build_obstacle(builder: OpBuilder, doing: Callable[[str], None] = lambda what: None) -> str | None:
    """Compile a kernel if it is not there yet, and load it: None, or the compiler's first error.

    While it is compiled the console shows for how long, and ``doing`` is called every second (a rank's heartbeat).
    """
    try:
        progress = contextlib.nullcontext() if is_built(builder) else reporting(builder.name, doing)
        with progress, building_alone(builder.name), finished_kernels_first():
            if is_built(builder):  # also by the process that held the lock
                _ask_no_compiler(builder)
            else:
                _leave_symbols_out(builder)
            with without_stdout():
                builder.load(verbose=False)
    except Exception as failure:  # a build fails in any way it likes: compiler, ninja, header, linker
        return first_error(f"{failure}")
    return None


@contextlib.contextmanager
def reporting(kernel: str, doing: Callable[[str], None]) -> Iterator[None]:
    """Report from another thread for how long the kernel has been compiled: a wait is not a hang."""
    line, started_s, done = (
        f"compiling DeepSpeed's {kernel} (once for this machine)",
        time.monotonic(),
        threading.Event(),
    )

    def report() -> None:
        next_line_s = LINE_S
        while not done.wait(BEAT_S):
            elapsed_s = time.monotonic() - started_s
            doing(f"{COMPILES} DeepSpeed's {kernel}")
            if elapsed_s >= next_line_s:
                print(f"{line}: {elapsed_s:.0f} s so far", file=sys.stderr, flush=True)
                next_line_s += LINE_S

    print(line, file=sys.stderr, flush=True)
    doing(f"{COMPILES} DeepSpeed's {kernel}")
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(
        f"compiled DeepSpeed's {kernel} in {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True
    )


@contextlib.contextmanager
def finished_kernels_first() -> Iterator[None]:
    """DeepSpeed's builders load a kernel whose build finished as it is; others are compiled, and marked then."""
    compile_and_load = cpp_extension.load

    def load(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        library = finished_library(name)
        if library is not None:
            with contextlib.suppress(ImportError):  # a library that is not there any more: compile again
                return _import(name, library)
        folder = extensions_root() / name
        shutil.rmtree(folder, ignore_errors=True)  # what a killed build, or other software, left
        folder.mkdir(parents=True)
        module: ModuleType = compile_and_load(name, *args, **kwargs)
        mark_finished(name, Path(f"{module.__file__}").name)
        return module

    with patch.object(cpp_extension, "load", load):
        yield


def finished_library(kernel: str) -> Path | None:
    """The library of a kernel whose build was finished, for what decides a binary here."""
    folder = extensions_root() / kernel
    try:
        marker = json.loads((folder / FINISHED).read_text("utf-8"))
        library = folder / marker["library"]
        is_ours = marker["decided_by"] == what_decides_a_binary() and library.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return library if is_ours else None


def mark_finished(kernel: str, library: str) -> None:
    marker = {"library": library, "decided_by": what_decides_a_binary()}
    write_whole(extensions_root() / kernel / FINISHED, json.dumps(marker, indent=2) + "\n")


def _import(name: str, library: Path) -> ModuleType:
    """As torch does it (torch/utils/cpp_extension.py, _import_module_from_library)."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None, library
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def building_alone(kernel: str) -> Iterator[None]:
    """No other process of ours compiles ``kernel`` meanwhile, and no left-over lock is in the way."""
    extensions_root().mkdir(parents=True, exist_ok=True)
    with FileLock(extensions_root() / f".megaloom-{kernel}.lock"), own_environment():
        for name in (kernel, *LOADED_FIRST.get(kernel, ())):
            clear_stale_build_locks(name)
        yield


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Ninja from beside this Python, and the folder of kernels for this machine's software and processor.

    Two versions of ninja hash commands differently: with another one, everything is compiled again.
    """
    before = {name: os.environ.get(name) for name in ("PATH", EXTENSIONS)}
    ours = {"PATH": _path(), EXTENSIONS: str(extensions_root())}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH') or os.defpath}"


def clear_stale_build_locks(kernel: str) -> None:
    """Wait for torch's lock of a build that still goes on, and remove one that nobody works on."""
    for lock in extensions_root().glob(f"**/{kernel}/lock"):
        while lock.exists():
            if _age_s(lock) > YOUNG_S and not _is_worked_in(lock.parent):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(0.1)


def extensions_root() -> Path:
    """Where kernels are kept: TORCH_EXTENSIONS_DIR, or a folder of this user's next to torch's own."""
    stated = os.environ.get(EXTENSIONS)
    if stated:
        return Path(stated)
    key = hashlib.sha256(json.dumps(what_decides_a_binary()).encode()).hexdigest()[:12]
    return Path(cpp_extension.get_default_build_root()) / f"megaloom-{key}"


def what_decides_a_binary() -> dict[str, str]:
    """Whatever makes a kernel that was compiled elsewhere wrong here; neither the clone nor the environment does.

    The kernels are compiled with -march=native, so on a home that machines share the instruction set counts.
    """
    return {
        "torch": f"{torch.__version__} cxx11abi={torch.compiled_with_cxx11_abi()}",
        "cuda": f"{torch.version.cuda} {torch.version.hip} {os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
        "deepspeed": f"{deepspeed.__version__} {deepspeed.__git_hash__}",
        "python": f"{sysconfig.get_config_var('SOABI')} {' '.join(platform.libc_ver())}",
        "compiler": _compiler(cpp_extension.get_cxx_compiler(), _path()),
        "processor": _processor(),
    }


@cache
def _compiler(name: str, path: str) -> str:
    """Its real path and its version."""
    program = shutil.which(name, path=path)
    if program is None:
        return f"{name}: not found"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{Path(program).resolve()} {version.splitlines()[0] if version else ''}"


@cache
def _processor() -> str:
    """The architecture and the instructions that the processor has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {' '.join(sorted(next(named, [])))}"


def is_built(builder: OpBuilder) -> bool:
    """Whether the kernel, and what it loads first, can be loaded without a compiler."""
    names = (builder.name, *LOADED_FIRST.get(builder.name, ()))
    return all(finished_library(name) is not None for name in names)


def _leave_symbols_out(builder: OpBuilder) -> None:
    """Debug symbols take a third of the compiler's time and most of the room."""
    all_words = builder.cxx_args
    builder.cxx_args = lambda: [word for word in all_words() if word != "-g"]


def _ask_no_compiler(builder: OpBuilder) -> None:
    """Loading a finished kernel needs no flags, which DeepSpeed finds by asking what the processor is (seconds)."""
    builder.cxx_args = list
    builder.is_compatible = lambda verbose=False: True


def first_error(output: str) -> str:
    """The first line of a build's output that tells of an error in a compiler's words, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if COMPILERS_WORDS.search(line)]
    return (told or lines[-1:] or ["no output"])[0]


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return 0.0


def _is_worked_in(folder: Path) -> bool:
    """ninja and the compilers run in the build's folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                return True
        except (psutil.Error, OSError):
            continue
    return False
