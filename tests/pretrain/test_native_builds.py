"""Kernels compiled at first use: no dead lock is waited for, and a failure says what the compiler said."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock
from torch.utils import cpp_extension

from launch import watch
from launch.reports import Beat, encode
from pretrain.config_io import make_run
from pretrain.engine import native_builds, preflight
from pretrain.engine.groups import join
from pretrain.engine.native_builds import build_obstacle, building_alone, first_error
from pretrain.monitor import heartbeat
from pretrain.parity import Trace
from tests.parity.record import record_raw
from tests.ranks import CPU_ONLY_ENVIRONMENT, RankPool
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


def test_clones_and_environments_share_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    ours = native_builds.extensions_root()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    monkeypatch.chdir("/")
    assert native_builds.extensions_root() == ours


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (native_builds.torch, "__version__", "2.99.0"),
        (native_builds.torch, "compiled_with_cxx11_abi", lambda: "another"),
        (native_builds.deepspeed, "__version__", "0.99.0"),
        (native_builds, "_compiler", lambda *words: "/usr/bin/another 99.0"),
        (native_builds, "_processor", lambda: "x86_64 avx avx2"),
        (native_builds.platform, "libc_ver", lambda: ("glibc", "9.99")),
    ],
)
def test_whatever_decides_a_binary_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any
) -> None:
    """A home that machines share must not give an AVX-512 binary to a processor without it."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    ours = native_builds.extensions_root()
    monkeypatch.setattr(module, name, value)
    assert native_builds.extensions_root() != ours
    assert native_builds.extensions_root().parent == ours.parent


class Kernel(OpBuilder):
    """Built by torch's `load`, as all of DeepSpeed's are; see ``compiled``."""

    def __init__(self) -> None:
        super().__init__(name="tiny_kernel")

    def absolute_name(self) -> str:
        return self.name

    def sources(self) -> list[str]:
        return []

    def load(self, verbose: bool = False) -> ModuleType:
        return cpp_extension.load(name=self.name, sources=[], verbose=verbose)


@pytest.fixture
def compiled(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, by a stand-in for torch's `load` that makes a real library of a few lines."""
    made: list[str] = []

    def load(name: str, **options: Any) -> ModuleType:
        made.append(name)
        folder = extensions / name
        (folder / "source.c").write_text(
            "#include <Python.h>\n"
            f'static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", NULL, -1, NULL}};\n'
            f"PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&module); }}\n"
        )
        library = folder / f"{name}.so"
        include = sysconfig.get_paths()["include"]
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-I{include}", "-o", library, folder / "source.c"], check=True
        )
        return native_builds._import(name, library)

    monkeypatch.setattr(cpp_extension, "load", load)
    return made


def test_a_finished_kernel_is_loaded_without_compiling_in_another_environment(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build_obstacle(Kernel()) is None and compiled == ["tiny_kernel"]
    assert "compiling DeepSpeed's tiny_kernel (once for this machine)" in capfd.readouterr().err
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert build_obstacle(Kernel()) is None and compiled == ["tiny_kernel"]
    assert "compil" not in capfd.readouterr().err


def test_a_build_that_was_killed_is_not_loaded(compiled: list[str], extensions: Path) -> None:
    assert build_obstacle(Kernel()) is None
    library = extensions / "tiny_kernel" / "tiny_kernel.so"
    for file in (library, library.with_name(native_builds.FINISHED)):
        file.unlink()
    library.write_bytes(b"half of a library")
    assert build_obstacle(Kernel()) is None and len(compiled) == 2


def test_a_kernel_for_another_processor_is_compiled_again(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build_obstacle(Kernel()) is None
    monkeypatch.setattr(native_builds, "_processor", lambda: "x86_64 avx")
    assert build_obstacle(Kernel()) is None and len(compiled) == 2


def test_a_library_that_does_not_load_is_compiled_again(compiled: list[str], extensions: Path) -> None:
    assert build_obstacle(Kernel()) is None
    (extensions / "tiny_kernel" / "damaged.so").write_bytes(b"of another machine, or from a damaged disk")
    native_builds.mark_finished("tiny_kernel", "damaged.so")
    assert build_obstacle(Kernel()) is None and len(compiled) == 2


def test_builders_at_the_same_time_compile_once(compiled: list[str]) -> None:
    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(lambda _: build_obstacle(Kernel()), range(3))) == {None}
    assert compiled == ["tiny_kernel"]


def test_a_compilation_is_no_stall_however_long_it_takes(
    extensions: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the rank writes, through the launcher's watch with limits that are far shorter than the compilation."""

    class Slow:
        name = "slow_kernel"

        def cxx_args(self) -> list[str]:
            return []

        def load(self, verbose: bool) -> None:
            time.sleep(2.0)

    monkeypatch.setattr(watch, "STARTING_S", 0.02)  # x 20 while it compiles
    monkeypatch.setattr(native_builds, "BEAT_S", 0.05)
    monkeypatch.setattr(native_builds, "LINE_S", 0.5)
    launcher = watch.Watch(1, {}, stall_factor=1.0, stall_floor_s=0.01)
    with tempfile.TemporaryFile() as file:
        rank = heartbeat.Heartbeat(file.fileno())
        builder: Any = Slow()
        thread = threading.Thread(target=build_obstacle, args=(builder, rank.doing))
        thread.start()
        last, since_s, stalls = None, time.monotonic(), []
        while thread.is_alive():  # as the keeper reads it
            told = heartbeat.read(file.fileno())
            if told != last:
                last, since_s = told, time.monotonic()
            if told is not None:
                beat = Beat(0, "here", 1, 0, 0.0, told.doing, time.monotonic() - since_s, "S")
                launcher.hear(encode(beat).decode())
                stalls.append(launcher.stall())
            time.sleep(0.02)
        assert len(stalls) > 10 and set(stalls) == {None}
        rank.doing("builds the model")
        launcher.hear(encode(Beat(0, "here", 1, 0, 0.0, "builds the model", 0.0, "S")).decode())
        time.sleep(0.5)
        assert launcher.stall() is not None, "what is no compilation is a stall, as before"
    assert "slow_kernel (once for this machine): 1 s so far" in capfd.readouterr().err


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
def test_a_run_that_needs_no_kernel_compiles_none(
    ranks: RankPool, corpus: str, out: Path, tmp_path: Path
) -> None:
    """DeepSpeed would compile collectives that training does not call, and stop where they do not compile."""
    empty = tmp_path / "empty"
    (trace,) = ranks.run(without_compiler, 1, tiny(corpus, out), 1, str(empty), timeout_s=WAIT_S)
    assert trace is not None and not list(tmp_path.glob("empty/*"))


def test_offload_to_nvme_without_libaio_names_the_package(
    corpus: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "libaio_is_there", lambda: False)
    run = checked(tiny(corpus, out, deepspeed="zero3_nvme_offload.json", nvme_path=str(tmp_path)), 1)
    (fault,) = preflight.faults(run)
    assert "apt-get install libaio-dev" in fault and "device=cpu" in fault
