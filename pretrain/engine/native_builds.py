"""DeepSpeed's kernels that are compiled at first use: each by one process, and none that waits for a dead one.

torch serialises these builds by a file named `lock`.  A process that is killed while it compiles leaves it there,
and every later run would wait for it for ever, without a word.  Ours build under a lock that the system releases
with its holder, so a file that is found then, with nobody at work beside it, is a left-over.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from pretrain.engine.quiet import without_stdout

EXTENSIONS = "TORCH_EXTENSIONS_DIR"  # torch's own variable
COMPILERS_WORDS = re.compile(r"\berror: |: not found|No such file|cannot find|is required")
LOADED_FIRST = {"async_io": ("pin_memory",)}  # deepspeed/ops/op_builder/async_io.py, load
YOUNG_S = 5.0  # another program may have taken its lock just now, and not started its compiler yet


def build_obstacle(builder: OpBuilder) -> str | None:
    """Compile a kernel if need be, which whoever does it tells, and load it: None, or the compiler's first error."""
    try:
        with building_alone(builder.name):
            if not is_built(builder):
                line = f"compiling DeepSpeed's {builder.name}: once on this machine, it takes a minute or several"
                print(line, file=sys.stderr, flush=True)
            _leave_symbols_out(builder)
            with without_stdout():
                builder.load(verbose=False)
    except Exception as failure:  # a build fails in any way it likes: compiler, ninja, header, linker
        return first_error(f"{failure}")
    return None


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
    """Ninja from beside this Python, and a folder of this environment's own.

    Two versions of ninja hash commands differently, and two environments have different headers: with one folder
    for all, whoever comes next builds everything anew.
    """
    before = {name: os.environ.get(name) for name in ("PATH", EXTENSIONS)}
    path = before["PATH"] or os.defpath
    ours = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}", EXTENSIONS: str(extensions_root())}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def clear_stale_build_locks(kernel: str) -> None:
    """Wait for torch's lock of a build that still goes on, and remove one that nobody works on."""
    for lock in extensions_root().glob(f"**/{kernel}/lock"):
        while lock.exists():
            if _age_s(lock) > YOUNG_S and not _is_worked_in(lock.parent):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(0.1)


def extensions_root() -> Path:
    """Where the kernels of this Python environment are kept: TORCH_EXTENSIONS_DIR, or a folder beside torch's own."""
    stated = os.environ.get(EXTENSIONS)
    if stated:
        return Path(stated)
    environment = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    return Path(get_default_build_root()) / f"megaloom-{environment}"


def is_built(builder: OpBuilder) -> bool:
    """Whether an earlier run left the compiled kernel in torch's folder of extensions."""
    return any(extensions_root().glob(f"**/{builder.name}/*.so"))


def _leave_symbols_out(builder: OpBuilder) -> None:
    """Debug symbols take a third of the compiler's time and most of the room.

    They stay where programs of DeepSpeed's own load the kernel too, and would compile it anew.
    """
    if builder.name in LOADED_FIRST:
        return
    words = builder.cxx_args()
    builder.cxx_args = lambda: [word for word in words if word != "-g"]


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
