"""`megaloom plan`: the fastest legal layout of a model on a cluster, why it won, and files to start it with.

Context parallelism is not planned, since this engine has none: long sequences are split over tp alone.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console

from launch import advice, plan_files
from launch.estimate import usual_objective
from launch.examined_cluster import described
from launch.hardware import CLUSTERS, Cluster
from launch.plan_tables import Asked, document, told
from launch.planner import Task, search
from launch.run import positive
from model_providers.fp8.config import RECIPES
from model_providers.presets import get_preset
from pretrain.config import Dtype, RunConfig, spelled_out
from pretrain.errors import RunError
from pretrain.run_file import plain, read_yaml

PIPED_WIDTH = 160
USUAL_BATCH_TOKENS = 4e6  # Touvron et al. 2023 (arXiv:2307.09288), section 2.2, for models of 7B to 70B


def main(argv: list[str]) -> None:
    words = parser().parse_args(argv)
    asked = read(words)
    found = search(asked.task, top=words.top)
    command = None
    if words.out is not None:
        command = plan_files.write(
            words.out, asked.task, found.candidates[0], stated=asked.stated, steps=asked.steps, lr=asked.lr
        )
    if words.json:
        print(
            json.dumps(document(asked, found, top=words.top, tokens=words.tokens, command=command), indent=2)
        )
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    for part in told(asked, found, top=words.top, tokens=words.tokens):
        console.print(part)
    if command is not None:
        console.print(
            f"written to {words.out}: {', '.join(sorted(each.name for each in words.out.iterdir()))}"
        )
        print(command)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom plan", description=__doc__, allow_abbrev=False)
    own.add_argument(
        "--model", metavar="NAME", help="a preset or a run file; without it, --tokens proposes one"
    )
    own.add_argument("--gpus", type=positive, help="devices in all")
    own.add_argument("--nodes", type=positive, help="instead of --gpus: nodes of --gpus-per-node devices")
    own.add_argument("--gpus-per-node", type=positive, help="devices of a node (default: the preset's)")
    own.add_argument(
        "--device", default="h100", metavar="NAME",
        help=f"{', '.join(CLUSTERS)}, a .yaml or .json of a cluster, or of doctor --json (default: h100)",
    )  # fmt: skip
    own.add_argument("--tokens", type=float, help="to train on: gives days, learning rate and batch")
    own.add_argument("--sequence-length", type=positive, help="tokens of a sample (default: the model's)")
    batch = own.add_mutually_exclusive_group()
    batch.add_argument("--global-size", type=positive, help="samples of an optimizer step")
    batch.add_argument(
        "--global-batch-tokens", type=float, help="the same in tokens, rounded to what divides"
    )
    own.add_argument(
        "--precision", choices=get_args(Dtype), help="default: the run file's, bf16 for a preset"
    )
    own.add_argument(
        "--fp8", choices=RECIPES, metavar="RECIPE", help=f"of the run file's fp8: {', '.join(RECIPES)}"
    )
    own.add_argument("--corpus", default="data/corpus", metavar="PREFIX", help="for the run file")
    own.add_argument("--top", type=positive, default=10, help="layouts to show (default: 10)")
    own.add_argument(
        "--out", type=Path, metavar="DIR", help="write the run file, the DeepSpeed JSON and the command"
    )
    own.add_argument("--json", action="store_true", help="print a document instead of tables")
    return own


def read(words: argparse.Namespace) -> Asked:
    """The task that the words describe."""
    cluster = described(words.device, devices_per_node=words.gpus_per_node)
    num_devices = _num_devices(words, cluster)
    if words.tokens is not None:
        advice.check_tokens(words.tokens)
    if words.model is None and words.tokens is None:
        raise RunError("--model: give a preset or a run file, or --tokens=300e9 to have one proposed")
    name = words.model or advice.advise(words.tokens).nearest_preset
    raw, stated = _document_of(name, words)
    config = _config(raw)
    given = advice.advise(words.tokens, config.model) if words.tokens is not None else None
    global_size = _global_size(words, config, num_devices, given)
    steps = config.train.steps
    if words.tokens is not None:
        steps = max(1, math.ceil(words.tokens / (global_size * config.data.sequence_length)))
    lr = config.optimizer.lr if given is None or _is_run_file(name) else float(f"{given.lr:.3g}")
    return Asked(Task(config, cluster, num_devices, global_size), stated, steps, lr, given)


def _num_devices(words: argparse.Namespace, cluster: Cluster) -> int:
    if (words.gpus is None) == (words.nodes is None):
        raise RunError("--gpus: give the number of devices, or --nodes, one of them")
    num_devices: int = words.gpus or words.nodes * cluster.devices_per_node
    per_node = cluster.devices_per_node
    if num_devices > per_node and num_devices % per_node:
        near = sorted({num_devices // per_node * per_node, -(-num_devices // per_node) * per_node})
        raise RunError(
            f"--gpus={num_devices}: nodes have {per_node} devices each; use {' or '.join(map(str, near))}, or "
            "--gpus-per-node"
        )
    return num_devices


def _is_run_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _document_of(name: str, words: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run file's values, its model spelled out; and the same as a file should state them."""
    if _is_run_file(name):
        raw = spelled_out(read_yaml(Path(name)))
        stated = dict(raw.get("model") or {})
        preset = stated.pop("preset", None)
        base = {} if preset is None else get_preset(str(preset)).model_dump()
        raw["model"] = {**base, **{key: value for key, value in stated.items() if value is not None}}
        shown = {**raw, "model": {"preset": preset, **stated} if preset is not None else stated}
    else:
        known = get_preset(name)
        length = words.sequence_length or known.max_sequence_length
        raw = {
            "name": name,
            "model": known.model_dump(),
            "data": {"train": words.corpus, "sequence_length": length},
            "precision": {"dtype": "bf16"},
            "train": {"steps": 1},
        }
        objective = usual_objective(known)
        if objective is not None:
            raw["data"]["objective"] = objective
        shown = {"model": {"preset": name}}
    if words.sequence_length is not None:
        raw["data"] = {**raw.get("data", {}), "sequence_length": words.sequence_length}
    if words.precision is not None:
        raw["precision"] = {**raw.get("precision", {}), "dtype": words.precision}
    if words.fp8 is not None:
        stated_fp8 = raw.get("fp8") or {}
        if isinstance(stated_fp8, dict):  # else what is there is told to be wrong
            raw["fp8"] = shown["fp8"] = {**stated_fp8, "recipe": words.fp8}
    raw.pop("deepspeed", None)
    return raw, shown


def _config(raw: dict[str, Any]) -> RunConfig:
    try:
        config = RunConfig(**raw)
    except ValidationError as fault:
        raise RunError("; ".join(plain(fault))) from None
    if config.model.vocab_size is None:
        raise RunError(
            "model.vocab_size=null: a plan needs the number; state it, or choose a preset that has it"
        )
    return config


def _global_size(
    words: argparse.Namespace, config: RunConfig, num_devices: int, given: advice.Advice | None
) -> int:
    """As asked; else the run file's; else Step Law's or the usual one, rounded to what layouts divide."""
    length = config.data.sequence_length
    if words.global_size is not None:
        return int(words.global_size)
    if words.global_batch_tokens is not None:
        if not length <= words.global_batch_tokens <= 1e10:
            raise RunError(
                f"--global-batch-tokens={words.global_batch_tokens:g}: give at least one sample of {length} tokens, "
                "and at most 1e10"
            )
        return rounded(words.global_batch_tokens / length, num_devices)
    if config.batch.global_size is not None:
        return config.batch.global_size
    wanted = USUAL_BATCH_TOKENS if given is None else given.batch_tokens
    return rounded(wanted / length, num_devices)


def rounded(samples: float, num_devices: int) -> int:
    """The nearest odd part of ``num_devices`` times a power of 2, so that most numbers of copies divide it."""
    odd = num_devices
    while odd % 2 == 0:
        odd //= 2
    return int(odd * 2 ** max(0, round(math.log2(max(1.0, samples / odd)))))
