"""The choice of kernels: what is missing is named, and auto says in one line what it took."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_providers import kernels
from model_providers.errors import ModelError
from model_providers.kernels import apex_obstacle, choose_kernels, torch_kernels, transformer_engine_obstacle
from model_providers.portable import Norm


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages can be imported, for this test only."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in imported_packages():
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in imported_packages():
        del sys.modules[name]


def imported_packages() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine")]


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ModelError, match="kernels=triton: unknown; choose auto, te or torch"):
        choose_kernels("triton", "cpu")


def test_transformer_engine_on_the_cpu_is_refused() -> None:
    with pytest.raises(
        ModelError,
        match="kernels=te: Transformer Engine runs on CUDA and the device is cpu; use kernels=torch",
    ):
        choose_kernels("te", "cpu")


@pytest.mark.skipif(
    kernels.importlib.util.find_spec("transformer_engine") is not None, reason="it is installed here"
)
def test_missing_transformer_engine_is_refused_on_cuda() -> None:
    with pytest.raises(ModelError, match="kernels=te: Transformer Engine is not installed"):
        choose_kernels("te", "cuda")


def test_auto_falls_back_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.kernels"):
        chosen = choose_kernels("auto", "cpu")
    assert chosen.name == "torch" and not chosen.fuse
    assert [record.getMessage() for record in caplog.records] == [
        "kernels=auto: torch, because Transformer Engine runs on CUDA and the device is cpu"
    ]


def test_a_broken_transformer_engine_is_told_not_raised(packages: Path) -> None:
    broken = "raise OSError('libcudart.so.12: cannot open shared object file\\nsecond line')"
    write_package(packages, {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": broken})
    obstacle = transformer_engine_obstacle("cuda")
    assert obstacle == (
        "Transformer Engine is installed but does not load (OSError: libcudart.so.12: cannot open shared object file)"
    )
    with pytest.raises(ModelError, match="use kernels=torch, or auto"):
        choose_kernels("te", "cuda")


def test_transformer_engine_that_megatron_core_missed_is_not_used(packages: Path) -> None:
    write_package(packages, {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""})
    assert (
        transformer_engine_obstacle("cuda")
        == "megatron-core did not find Transformer Engine when it was imported"
    )


def test_apex_of_pypi_is_recognised(packages: Path) -> None:
    write_package(packages, {"apex/__init__.py": "import pyramid"})
    assert (
        apex_obstacle() == "the installed apex is PyPI's package for the Pyramid web framework, not NVIDIA's"
    )


def test_apex_without_norms_and_apex_with_norms(packages: Path) -> None:
    write_package(packages, {"apex/__init__.py": ""})
    obstacle = apex_obstacle()
    assert obstacle is not None and obstacle.startswith(
        "the installed apex has no fused norms (ModuleNotFoundError)"
    )
    write_package(
        packages, {"apex/normalization/__init__.py": "", "apex/normalization/fused_layer_norm.py": ""}
    )
    kernels.importlib.invalidate_caches()
    assert apex_obstacle() is None
    assert torch_kernels("cuda").name == "torch with apex norms"


def test_no_apex_no_fuss() -> None:
    assert torch_kernels("cuda").norm is Norm or apex_obstacle() is None
