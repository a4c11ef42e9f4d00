"""The house's rules as tests: one direction, no cycles, torch-free modules, one translator per foreign tongue."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from model_providers.families import PLANS
from pretrain.config import RunConfig

ROOMS = {
    "launch": {"launch", "pretrain", "data_tools", "model_providers"},
    "pretrain": {"pretrain", "data_tools", "model_providers"},
    "data_tools": {"data_tools"},
    "model_providers": {"model_providers"},
}
WITHOUT_TORCH = (
    "data_tools.config",
    "data_tools.prepare",
    "data_tools.corpus_commands",
    "data_tools.training_data",
    "model_providers.config",
    "model_providers.presets",
    "model_providers.layout",
    "model_providers.cost",
    "model_providers.loss_chunks",
    "model_providers.partition",
    "pretrain.config",
    "pretrain.config_io",
    "pretrain.config_rules",
    "pretrain.ds_config",
    "pretrain.ds_offload",
    "pretrain.ds_schema",
    "pretrain.optim",
    "pretrain.nested",
    "pretrain.optimizer_rules",
    "pretrain.recompute_rules",
    "pretrain.run_file",
    "pretrain.show_config",
    "pretrain.plot",
    "launch.__main__",
    "launch.run",
    "launch.generate",
    "launch.schedule",
    "pretrain.engine.schedules.catalogue",
    "pretrain.engine.schedules.check",
    "pretrain.engine.schedules.draw",
    "launch.parity",
    "launch.advice",
    "launch.examined_cluster",
    "launch.fitting",
    "launch.fp8_report",
    "launch.hardware",
    "launch.layer_time",
    "launch.legality",
    "launch.links",
    "launch.phases",
    "launch.pipeline_time",
    "launch.plan",
    "launch.plan_files",
    "launch.plan_tables",
    "launch.planner",
    "launch.product_time",
    "launch.scenario",
    "launch.software",
    "launch.stage_time",
    "launch.state_time",
    "launch.step_time",
    "launch.time_tables",
    "launch.scenario",
    "launch.memory",
    "launch.remedies",
    "launch.estimate",
    "model_providers.tensor_shares",
    "launch.doctor",
    "launch.slurm",
    "launch.tune_nvme",
    "launch.nvme_logs",
    "launch.k8s",
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for room in ROOMS
        for path in sorted(Path(room).rglob("*.py"))
    }


@cache
def imports(path: Path, *, at_import_time: bool = True) -> tuple[str, ...]:
    """Names of modules that a file imports; those under `if TYPE_CHECKING` are no imports at run time."""
    return tuple(_imports(path, at_import_time))


def _imports(path: Path, at_import_time: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped and at_import_time:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_in_one_direction() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in imports(path, at_import_time=False)
        if target.split(".")[0] in ROOMS and target.split(".")[0] not in ROOMS[name.split(".")[0]]
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    edges = {name: {t for t in imports(path) if t in known and t != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_rooms_open_with_a_docstring_and_nothing_else() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), f"{name} has no docstring"
        if path.name == "__init__.py":
            assert len(tree.body) == 1, f"{name} does more than say what it is"


def test_a_login_node_needs_no_torch() -> None:
    """Each module after the others in one interpreter: the first that brings torch is named."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    for foreign in ("torch", "deepspeed"):
        if foreign in sys.modules:
            sys.exit(f"{name} imports {foreign}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("room", "foreign"),
    [
        ("data_tools", "torch"),
        ("data_tools", "megatron"),
        ("data_tools", "deepspeed"),
        ("model_providers", "deepspeed"),
        ("launch", "torch"),
        ("launch", "deepspeed"),
    ],
)
def test_a_room_does_not_know(room: str, foreign: str) -> None:
    knowing = [
        name
        for name, path in modules().items()
        if name.split(".")[0] == room
        for target in imports(path)
        if target.split(".")[0] == foreign
    ]
    assert not knowing


@pytest.mark.parametrize(
    ("word", "owner"),
    [
        ("TransformerConfig(", "model_providers/mcore_config.py"),
        ("import transformer_engine", "model_providers/kernels.py"),
        ('"reduce_bucket_size"', "pretrain/ds_config.py"),
        ("environment.setdefault(", "launch/env.py"),
    ],
)
def test_each_foreign_tongue_has_one_translator(word: str, owner: str) -> None:
    speaking = {str(path) for path in modules().values() if word in path.read_text("utf-8")}
    speaking -= {"pretrain/ds_schema.py"}  # the list of DeepSpeed's words, which only the translator reads
    assert speaking <= {owner}


def test_nothing_names_a_file_like_a_standard_module_or_a_bag() -> None:
    stems = {path.stem for path in modules().values()}
    assert not stems & {
        "utils",
        "helpers",
        "common",
        "misc",
        "tokenize",
        "inspect",
        "profile",
        "types",
        "logging",
    }


def test_only_one_module_assigns_into_another_library() -> None:
    """`x.y = ...` on an imported module or class is patching; the replacement table is its one place."""
    patching = {
        str(path)
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
    }
    assert patching <= {"model_providers/mcore_on_cpu.py", "pretrain/engine/layers.py", "pretrain/parity.py"}


def test_every_family_of_a_run_file_has_a_plan_and_a_program() -> None:
    families = get_args(get_args(RunConfig.model_fields["family"].annotation)[0])
    assert set(PLANS) == set(families)
    assert all(hasattr(importlib.import_module(f"pretrain.{family}"), "main") for family in families)


# What importing it costs, in seconds of a CPU: TensorBoard 0.2 (rank 0 takes it where a run writes its logs), torch's
# compiler 3.  torch's DTensor brings sympy (0.3) into every rank: megatron-core imports it in any case.
COSTLY = (
    "tensorboard",
    "absl",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
)
COSTLY += ("datasets", "matplotlib", "pandas", "pyarrow", "scipy", "IPython", "typer")


@pytest.mark.parametrize(
    ("imported", "unneeded"),
    [
        ("pretrain.gpt", COSTLY),
        ("model_providers.late_compile, pretrain.run", COSTLY),
        ("launch.run", (*COSTLY, "torch", "deepspeed", "sympy", "megatron")),
        ("launch.keeper", (*COSTLY, "torch", "deepspeed", "numpy", "yaml", "pydantic")),
        ("launch.leash", (*COSTLY, "torch", "deepspeed", "numpy", "yaml", "pydantic", "psutil")),
        ("launch.node", (*COSTLY, "torch", "deepspeed", "numpy", "yaml", "pydantic")),
    ],
)
def test_what_every_start_imports_is_free_of_what_costs_time(
    imported: str, unneeded: tuple[str, ...]
) -> None:
    code = f"import {imported}, sys; print([name for name in {unneeded} if name in sys.modules])"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_deepspeeds_launcher_starts_ranks_without_torch() -> None:
    code = "import importlib, sys; from launch import node; node.stand_in(node._deepspeed_folder())\n"
    code += "importlib.import_module(node.MODULE); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
