"""`megaloom doctor`: what is broken on this machine, or on the hosts of a hostfile, and the fix of each.

With a run file it looks at what that run needs: its corpora, its disks, room for its checkpoints.  All hosts are asked
at once; what may crash there is tried in processes of its own.  Exit code 1 if anything is broken, 0 otherwise.
"""

import argparse
import json
import os
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.training_data import check_data
from launch import bandwidth, checks, doctor_page
from launch.checks import Finding, Seen, Wanted
from launch.devices import num_gpus
from launch.hostfile import Host, num_slots
from launch.preflight import (
    Questions,
    ask_probe,
    differences,
    facts_in,
    missing,
    probe_command,
    source_of,
    too_few_devices,
)
from launch.remote import Answer, ask, ask_here, in_folder, last_line
from launch.run import add_host_words, corpus_files, here_faults, hosts_of, launcher_of, positive
from pretrain.config_io import Run, find_deepspeed_json, load_run
from pretrain.ds_offload import offload_place
from pretrain.errors import RunError

EXAMINED_S = 240.0
WRITE_BYTES = 128 << 20
VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE")
# A checkpoint holds fp32 weights and two moments of Adam (12), weights for any layout (4), and little more.
CHECKPOINT_BYTES_PER_PARAMETER = 16
ABSENT = "import importlib.util as u; print('absent' if u.find_spec('{name}') is None else {then} or 'loads')"
KERNELS = "__import__('model_providers.kernels', fromlist=['x'])"
# Tried in processes of their own on each host: a library that was built for another torch may end them.
PROGRAMS = {
    "torch": "import torch as t; g = t.cuda.is_available(); print(t.__version__, t.version.cuda, "
    "g and t.cuda.device_count(), '.'.join(map(str, t.cuda.nccl.version())) if g else '-')",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "megatron-core": "import megatron.core as m; print(m.__version__)",
    "transformer engine": ABSENT.format(
        name="transformer_engine", then=f"{KERNELS}.transformer_engine_obstacle('cuda')"
    ),
    "fp8 recipes": (
        "import json; from model_providers.fp8.choice import recipe_obstacles as o; print(json.dumps(o('cuda')))"
    ),
    "apex": ABSENT.format(name="apex", then=f"{KERNELS}.apex_obstacle()"),
}


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    hosts: tuple[str, ...]
    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    rates: bandwidth.Rates | None = None
    enough: tuple[str, ...] = ()  # what a machine without GPUs is enough for

    @property
    def is_broken(self) -> bool:
        return any(finding.level == "broken" for finding in self.findings)

    def as_json(self) -> str:
        document = {
            "broken": self.is_broken,
            "hosts": self.hosts,
            "findings": [finding._asdict() for finding in self.findings],
            "bandwidth": None if self.rates is None else self.rates.as_dict(),
            "facts": self.facts,
        }
        return json.dumps(document, indent=2)


def main(argv: list[str]) -> None:
    words = parser().parse_intermixed_args(argv)
    hosts = hosts_of(words)
    wanted = [host for host in hosts if not host.is_spare]
    num_ranks = num_slots(wanted) if hosts else words.ranks or max(1, num_gpus())
    if words.run is not None and "=" in words.run and not Path(words.run).exists():
        raise RunError(
            f"{words.run}: overrides a run file, and none is given; megaloom doctor RUN.yaml {words.run}"
        )
    run = None
    if words.run is not None:
        run = load_run(words.run, words.words, world_size=num_ranks, deepspeed_config=words.deepspeed_config)
    launcher = launcher_of(words, hosts) if words.bandwidth else ""
    diagnosis = diagnose(words, run, hosts, num_ranks, launcher)
    if words.json:
        print(diagnosis.as_json())
    else:
        doctor_page.show(diagnosis.hosts, diagnosis.findings, diagnosis.rates, diagnosis.enough)
    sys.exit(1 if diagnosis.is_broken else 0)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom doctor", description=__doc__, allow_abbrev=False)
    own.add_argument("run", nargs="?", help="run file (YAML) whose needs are looked at")
    own.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run file")
    own.add_argument(
        "--ranks", type=positive, help="processes on this machine (default: one per GPU, or one)"
    )
    own.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON of the run")
    own.add_argument("--json", action="store_true", help="findings and facts, for programs")
    own.add_argument(
        "--quick",
        action="store_true",
        help="leave out what takes long: trying libraries and writing to disks",
    )
    own.add_argument(
        "--bandwidth",
        action="store_true",
        help="start ranks, and measure messages between hosts and all-reduce",
    )
    own.add_argument(
        "--folder",
        metavar="FOLDER",
        help="where checkpoints will be (default: the run's folder, or this one)",
    )
    own.add_argument("--nvme", metavar="FOLDER", help="for offload (default: the run's nvme_path)")
    add_host_words(own)
    return own


def diagnose(
    words: argparse.Namespace, run: Run | None, hosts: Sequence[Host], num_ranks: int, launcher: str
) -> Diagnosis:
    wanted = wanted_of(words, run, hosts, num_ranks)
    names = tuple(host.name for host in hosts) or (socket.gethostname(),)
    probed, found = probe(names, hosts, questions_of(words, run, names))
    exams, more = examine(list(probed), wanted, is_here=not hosts, is_quick=words.quick)
    found += more
    for host, exam in exams.items():
        answer, facts = probed[host]
        seen = Seen(facts, exam, wanted, skew_s(answer, facts["clock_s"]))
        found += checks.findings(host, seen)
    found += agreement({host: facts for host, (_, facts) in probed.items()}, hosts)
    if run is not None:
        found += of_the_run(run, num_ranks, list(probed), hosts)
    rates = None
    if words.bandwidth:
        bad = {
            finding.host for finding in found if finding.level == "broken" and finding.subject in ("hosts",)
        }
        fit = [host for host in hosts if host.name not in bad]
        rates, more = bandwidth.measure(
            fit, launcher, words, num_ranks=max(2, num_ranks), can_start=bool(fit or not hosts)
        )
        found += more
    facts = {host: {"probe": probed[host][1], "examination": exam} for host, exam in exams.items()}
    has_gpus = any(facts[host]["probe"]["gpus"] for host in facts)
    enough = () if hosts or has_gpus or not facts else doctor_page.enough_for(facts[names[0]])
    return Diagnosis(names, found, facts, rates, enough)


def wanted_of(words: argparse.Namespace, run: Run | None, hosts: Sequence[Host], num_ranks: int) -> Wanted:
    own: dict[str, Any] = {"num_hosts": max(1, len(hosts)), "port": words.master_port}
    own["ranks_per_host"] = max((len(host.slots) for host in hosts), default=num_ranks)
    own["checkpoint_folder"], own["nvme_folder"] = words.folder or ".", words.nvme
    if run is not None:
        config = run.config
        own["checkpoint_folder"] = words.folder or str(run.folder)
        own["nvme_folder"] = words.nvme or config.nvme_path
        one = run.parameters * CHECKPOINT_BYTES_PER_PARAMETER
        own["checkpoint_bytes"] = one * (
            config.checkpoint.keep_last + 1
        )  # the next is written before one goes
        places = (
            offload_place(run.deepspeed, "offload_optimizer"),
            offload_place(run.deepspeed, "offload_param"),
        )
        own["swaps_to_nvme"] = "nvme" in places
        fp8 = config.fp8
        own["needs_te"] = config.kernels == "te" or (fp8 is not None and fp8.backend == "te")
        own["fp8_recipe"] = None if fp8 is None or fp8.backend == "torch" else fp8.recipe
    return Wanted(**own)


def questions_of(words: argparse.Namespace, run: Run | None, names: Sequence[str]) -> Questions:
    files: tuple[str, ...] = ()
    if run is not None:
        json_path = find_deepspeed_json(words.deepspeed_config or run.config.deepspeed)
        indices = corpus_files(run)
        data = tuple(path.removesuffix(".idx") + ".bin" for path in indices)
        files = (words.run, str(json_path), *indices, *data)
    ports = () if words.master_port is None else (words.master_port,)
    return Questions(os.getcwd(), files=files, names=tuple(names), ports=ports)


def probe(
    names: Sequence[str], hosts: Sequence[Host], questions: Questions
) -> tuple[dict[str, tuple[Answer, Mapping[str, Any]]], list[Finding]]:
    """What each host is, as far as it answers, and whether it does."""
    answers = ask_probe(names, questions, how=ask if hosts else ask_here)
    probed: dict[str, tuple[Answer, Mapping[str, Any]]] = {}
    found = []
    for name, answer in answers.items():
        facts = facts_in(answer, questions)
        if isinstance(facts, str):
            said, _, fix = facts.removeprefix(f"{name}: ").rpartition("; ")
            found.append(Finding("hosts", "answers", name, "broken", said or fix, fix if said else ""))
            continue
        probed[name] = (answer, facts)
        if hosts:
            found.append(Finding("hosts", "answers", name, "ok", "over ssh"))
    return probed, found


def examine(
    names: Sequence[str], wanted: Wanted, *, is_here: bool, is_quick: bool = False
) -> tuple[dict[str, Mapping[str, Any]], list[Finding]]:
    """What each host can do."""
    if not names:
        return {}, []
    disks = [wanted.checkpoint_folder, *([wanted.nvme_folder] if wanted.nvme_folder else [])]
    asked: dict[str, Any] = {"variables": VARIABLES}
    if not is_quick:
        asked |= {"disks": disks, "write_bytes": WRITE_BYTES, "programs": PROGRAMS}
    command = probe_command(Questions(os.getcwd()), json.dumps(asked))
    how = ask_here if is_here else ask
    answers = how(names, command, stdin=source_of("examination.py"), timeout_s=EXAMINED_S)
    exams, found = {}, []
    for name, answer in answers.items():
        try:
            exams[name] = json.loads(last_line(answer.out))
        except ValueError:
            said = answer.obstacle or last_line(answer.err) or f"exit code {answer.code}"
            found.append(
                Finding(
                    "hosts", "examination", name, "broken", f"did not come to its end ({said})", "try again"
                )
            )
    return exams, found


def skew_s(answer: Answer, clock_s: float) -> float:
    """How far a host's clock is off at least: it was read at some moment between question and answer."""
    if clock_s < answer.asked_s:
        return clock_s - answer.asked_s
    return max(0.0, clock_s - answer.answered_s)


def agreement(facts: Mapping[str, Mapping[str, Any]], hosts: Sequence[Host]) -> list[Finding]:
    """Whether all hosts have the same, and what the hostfile says of them."""
    found = []
    for host in hosts:
        told = too_few_devices(host, facts[host.name]) if host.name in facts else []
        for fault in told:
            said, _, fix = fault.removeprefix(f"{host.name}: ").rpartition("; ")
            found.append(Finding("hosts", "slots", host.name, "broken", said, fix))
    for path_host, fault in missing(facts):
        found.append(
            Finding(
                "data and files",
                "readable",
                path_host,
                "broken",
                fault.removeprefix(f"{path_host}: "),
                "correct its path, or put it there",
            )
        )
    odd = differences(facts)
    for each in odd:
        said = f"{each.name} is {each.value}, and {each.most} on the other hosts"
        found.append(Finding("hosts", "the same", each.host, "broken", said, each.way_out))
    if len(facts) > 1 and not odd:
        said = "Python, packages, code, GPUs and files"
        found += [Finding("hosts", "the same", host, "ok", said) for host in facts]
    return found


def of_the_run(run: Run, num_ranks: int, names: Sequence[str], hosts: Sequence[Host]) -> list[Finding]:
    """What speaks against the run itself, its data, and the disk that its hosts should share."""
    here = socket.gethostname()
    found = []
    if not hosts:
        for fault in here_faults(run, num_ranks):
            found.append(Finding("data and files", "run", here, "broken", fault))
    try:
        check_data(run.config.data)
        found.append(Finding("data and files", "corpora", here, "ok", "open, whole and long enough"))
    except DataError as fault:
        found.append(Finding("data and files", "corpora", here, "broken", f"{fault}"))
    if len(names) > 1:
        found += shared_folder(run.folder, names)
    return found


def shared_folder(folder: Path, names: Sequence[str]) -> list[Finding]:
    """Whether all hosts see what the first one writes where the run will."""
    title, mark = "shared folder", f".doctor-{uuid.uuid4().hex[:12]}"
    path = str(folder / mark)
    on_host = partial(in_folder, os.getcwd())
    made = ask(names[:1], on_host(["sh", "-c", 'mkdir -p "$(dirname "$0")" && touch "$0"', path]))[names[0]]
    if made.code != 0:
        said = f"{folder} cannot be written to ({last_line(made.err)})"
        fix = "give this user the right to write there, or set out= to another folder"
        return [Finding("disks", title, names[0], "broken", said, fix)]
    looked = ask(names[1:], on_host(["test", "-e", path]))
    ask(names[:1], on_host(["sh", "-c", 'rm -f "$0"; rmdir "$(dirname "$0")" 2>/dev/null; :', path]))
    fix = "set out= to a folder on a disk that all hosts share"
    found = [
        Finding("disks", title, host, "broken", f"does not see what {names[0]} writes to {folder}", fix)
        for host, answer in looked.items()
        if answer.code != 0
    ]
    return found or [Finding("disks", title, host, "ok", f"all see {folder}") for host in names]
