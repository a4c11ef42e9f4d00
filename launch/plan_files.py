"""What `megaloom plan --out` writes: a run file, its DeepSpeed JSON, and the line that starts it."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from launch.legality import modules_stated
from launch.planner import Candidate, Task
from launch.scenario import Scenario
from pretrain.config_io import find_deepspeed_json
from pretrain.engine.schedules.catalogue import SPLIT_BACKWARD
from pretrain.errors import RunError
from pretrain.nested import put

RUN_FILE, DEEPSPEED_FILE, COMMAND_FILE = "run.yaml", "deepspeed.json", "command.txt"


CHECKPOINT_S = 3600.0  # between two checkpoints, where the file that is planned for says nothing
WARMUP_SHARE, MOST_WARMUP = (
    0.01,
    2000,
)  # of all steps; steps (Touvron et al. 2023, arXiv:2307.09288, section 2.2)
MARK = "# Planned for "


def write(folder: Path, task: Task, best: Candidate, *, stated: dict[str, Any], steps: int, lr: float) -> str:
    """Three files; returns the command."""
    try:
        before = folder / RUN_FILE
        if before.exists() and not before.read_text("utf-8").startswith(MARK):
            raise RunError(f"--out={folder}: has a {RUN_FILE} that no plan wrote; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        document = run_document(task, best, stated=stated, steps=steps, lr=lr)
        document["deepspeed"] = str(folder / DEEPSPEED_FILE)
        header = f"{MARK}{task.num_devices} x {task.cluster.device.name}: {best.step.total_s:.3g} s a step.\n"
        text = header + yaml.safe_dump(document, sort_keys=False, width=110)
        (folder / RUN_FILE).write_text(text, "utf-8")
        (folder / DEEPSPEED_FILE).write_text(
            json.dumps(deepspeed_document(best.scenario), indent=2) + "\n", "utf-8"
        )
        line = command(task, folder)
        (folder / COMMAND_FILE).write_text(line + "\n", "utf-8")
    except OSError as fault:
        raise RunError(f"--out={folder}: {fault.strerror}; choose another folder") from None
    return line


def run_document(
    task: Task, best: Candidate, *, stated: dict[str, Any], steps: int, lr: float
) -> dict[str, Any]:
    """A run file that states what the plan decided, and all else as the file that it was planned for."""
    scenario = best.scenario
    config, layout = task.config, scenario.layout
    chosen: dict[str, Any] = {"tp": layout.tp, "pp": layout.pp}
    if layout.shards_sequence:
        chosen["sequence_parallel"] = True
    if layout.ep > 1:
        chosen["ep"] = layout.ep
    if layout.etp is not None:
        chosen["etp"] = layout.etp
    if layout.pp > 1:
        chosen |= {"schedule": scenario.schedule, "chunks": layout.chunks}
    document: dict[str, Any] = {
        "name": config.name,
        "out": config.out,
        **usual(best, steps),
        **{key: value for key, value in stated.items() if key not in ("deepspeed", "recompute", "loss")},
        "data": config.data.model_dump(mode="json", exclude_unset=True),
        "layout": chosen,
        "batch": {"global_size": scenario.global_size, "micro_size": scenario.micro_size},
        "precision": config.precision.model_dump(),
        "optimizer": {**config.optimizer.model_dump(mode="json", exclude_unset=True), "lr": lr},
        "train": {**config.train.model_dump(mode="json", exclude_unset=True), "steps": steps},
    }
    if scenario.recompute != "none":
        modules = modules_stated(scenario)
        selective = {"mode": scenario.recompute, "modules": list(modules or ())}
        document["recompute"] = selective if modules else scenario.recompute
    chunk_tokens = scenario.chunk_tokens or config.loss.chunk_tokens
    if chunk_tokens != "auto":
        document["loss"] = {"chunk_tokens": chunk_tokens}
    if "nvme" in (scenario.offload_optimizer, scenario.offload_parameters):
        document["nvme_path"] = config.nvme_path or "/a/folder/on/a/local/disk"
    if scenario.schedule in SPLIT_BACKWARD:
        document["kernels"] = "torch"  # whose weight gradients can wait
    return document


def usual(best: Candidate, steps: int) -> dict[str, Any]:
    """What a long run should not be without, where nothing was said of it."""
    every = max(1, min(steps, round(CHECKPOINT_S / best.step.total_s)))
    warmup = min(MOST_WARMUP, round(WARMUP_SHARE * steps))
    return {"schedule": {"kind": "cosine", "warmup_steps": warmup}, "checkpoint": {"every": every}}


def deepspeed_document(scenario: Scenario) -> dict[str, Any]:
    """The shipped JSON that comes nearest, with this stage and these offloads."""
    stage = scenario.zero_stage
    name = f"zero{stage}"
    if scenario.layout.pp > 1:
        name = "pipeline"
    elif scenario.offload_parameters != "none":
        name = f"zero3_{scenario.offload_parameters}_offload"
    elif scenario.offload_optimizer == "cpu" and stage == 2:
        name = "zero2_cpu_offload"
    document: dict[str, Any] = json.loads(find_deepspeed_json(f"{name}.json").read_text("utf-8"))
    put(document, "zero_optimization.stage", stage)
    if scenario.offload_optimizer == "cpu":
        put(document, "zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True})
    return document


def command(task: Task, folder: Path) -> str:
    """On one machine, or on the hosts of a hostfile."""
    run_file = str(folder / RUN_FILE)
    if task.num_devices <= task.cluster.devices_per_node:
        return shlex.join(["megaloom", "run", run_file, "--ranks", str(task.num_devices)])
    return shlex.join(["megaloom", "run", run_file, "--hostfile", "hosts"])
