"""Kernels compiled at first use: no dead lock is waited for, and a failure says what the compiler said."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock

from pretrain.config_io import make_run
from pretrain.engine import native_builds, preflight
from pretrain.engine.groups import join
from pretrain.engine.native_builds import build_obstacle, building_alone, first_error
from pretrain.parity import Trace
from tests.parity.record import record_raw
from tests.ranks import CPU_ONLY_ENVIRONMENT, RankError, RankPool
from tests.runs import checked, tiny

WAIT_S = 60.0


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def lock_in(folder: Path, *, age_s: float) -> Path:
    folder.mkdir()
    lock = folder / "lock"
    lock.touch()
    then_s = time.time() - age_s
    os.utime(lock, (then_s, then_s))
    return lock


def test_a_lock_of_a_killed_build_is_removed(extensions: Path) -> None:
    lock = lock_in(extensions / "cpu_adam", age_s=60)
    with building_alone("cpu_adam"):
        assert not lock.exists()


def test_a_lock_of_what_a_kernel_loads_first_is_removed_too(extensions: Path) -> None:
    """async_io loads pin_memory, whose dead lock it would wait for for ever."""
    lock = lock_in(extensions / "pin_memory", age_s=60)
    with building_alone("async_io"):
        assert not lock.exists()


def test_a_young_lock_is_given_time(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_builds, "YOUNG_S", 0.5)
    lock = lock_in(extensions / "cpu_adam", age_s=0)
    started_s = time.monotonic()
    with building_alone("cpu_adam"):
        assert not lock.exists() and time.monotonic() - started_s > 0.3


def test_another_kernels_build_is_not_waited_for(extensions: Path) -> None:
    other = lock_in(extensions / "async_io", age_s=0)
    with FileLock(extensions / ".megaloom-async_io.lock"), building_alone("cpu_adam"):
        assert other.exists()


def test_compilers_that_outlive_their_builder_are_waited_for(extensions: Path) -> None:
    """torch itself would wait for the dead builder's lock for ever."""
    lock = lock_in(extensions / "cpu_adam", age_s=60)
    compiler = psutil.Popen([sys.executable, "-c", "import time; time.sleep(2)"], cwd=lock.parent)
    threading.Thread(target=compiler.wait).start()
    with building_alone("cpu_adam"):
        assert not compiler.is_running() and not lock.exists()


def test_ninja_is_the_one_beside_this_python_without_activation(
    extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with building_alone("cpu_adam"):
        assert shutil.which("ninja") == str(Path(sys.executable).with_name("ninja"))
    assert os.environ["PATH"] == "/usr/bin:/bin"


def test_another_environment_builds_into_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    ours = native_builds.extensions_root()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert native_builds.extensions_root() != ours
    assert native_builds.extensions_root().parent == ours.parent


def test_a_killed_builder_blocks_nobody(extensions: Path) -> None:
    code = (
        "import time; from pretrain.engine.native_builds import building_alone\n"
        "with building_alone('cpu_adam'): print('in', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, **CPU_ONLY_ENVIRONMENT}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    holder.kill()
    holder.communicate()
    with building_alone("cpu_adam"):
        pass


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "[1/2] c++ -c x.cpp\nx.cpp:1:10: fatal error: libaio.h: No such file\nninja: stopped",
            "fatal error",
        ),
        (
            "Error building extension 'x': [1/2] c++ -c error.cpp -o x.o\nFAILED: x.o\nc++ -c error.cpp\n"
            "/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed.",
            "/bin/sh: 1: c++: not found",
        ),
        ("Ninja is required to load C++ extensions", "Ninja is required"),
        ("something else\nlast words", "last words"),
        ("", "no output"),
    ],
)
def test_the_first_error_of_a_build_is_told(output: str, line: str) -> None:
    assert line in first_error(output)


def test_a_build_that_fails_in_any_way_is_one_line(extensions: Path) -> None:
    class Broken:
        name = "broken"

        def cxx_args(self) -> list[str]:
            return ["-O3", "-g", "-march=native"]

        def load(self, verbose: bool) -> None:
            raise AttributeError(f"ds_opt_adam of {self.cxx_args()}")

    builder: Any = Broken()
    assert build_obstacle(builder) == "ds_opt_adam of ['-O3', '-march=native']", "without debug symbols"


def without_compiler(raw: dict[str, Any], steps: int, folder: str) -> Trace | None:
    """Train where no C++ compiler works and nothing is compiled yet."""
    before = dict(os.environ)
    loaded = OpBuilder._loaded_ops.pop("cpu_adam", None)
    os.environ |= {"TORCH_EXTENSIONS_DIR": folder, "CXX": "/no/such/compiler"}
    try:
        return record_raw(raw, steps)
    finally:
        os.environ.clear()
        os.environ.update(before)
        if loaded is not None:
            OpBuilder._loaded_ops["cpu_adam"] = loaded


def joined_without_compiler(raw: dict[str, Any], steps: int, folder: str) -> Trace | None:
    """With the collectives loaded: the pool may have begun anew since the last task."""
    join(make_run(raw, world_size=dist.get_world_size()).layout)
    return without_compiler(raw, steps, folder)


@pytest.mark.ranks
def test_where_nothing_compiles_torchs_adam_steps_in(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path
) -> None:
    from pretrain.parity import compare

    raw = tiny(corpus, out, deepspeed="zero2_cpu_offload.json")
    plain = ranks.run(record_raw, 2, tiny(corpus, out, deepspeed="zero2.json"), 3)[0]
    fallen_back = ranks.run(joined_without_compiler, 2, raw, 3, str(tmp_path / "empty"), timeout_s=WAIT_S)[0]
    assert compare(fallen_back, plain).weights < 1e-5


@pytest.mark.ranks
def test_where_collectives_do_not_compile_the_package_is_named(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path
) -> None:
    raw = tiny(corpus, out)
    with pytest.raises(RankError, match=r"do not compile here.*apt-get install g\+\+"):
        ranks.run(first_join_without_compiler, 1, raw, str(tmp_path / "empty"), timeout_s=WAIT_S)


def first_join_without_compiler(raw: dict[str, Any], folder: str) -> None:
    loaded = OpBuilder._loaded_ops.pop("deepspeed_shm_comm", None)
    try:
        without_compiler(raw, 1, folder)
    finally:
        if loaded is not None:
            OpBuilder._loaded_ops["deepspeed_shm_comm"] = loaded


def test_offload_to_nvme_without_libaio_names_the_package(
    corpus: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "libaio_is_there", lambda: False)
    run = checked(tiny(corpus, out, deepspeed="zero3_nvme_offload.json", nvme_path=str(tmp_path)), 1)
    (fault,) = preflight.faults(run)
    assert "apt-get install libaio-dev" in fault and "device=cpu" in fault
