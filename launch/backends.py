"""Command lines that start the keepers of all ranks: the `deepspeed` launcher in each of its ways, and plain ssh.

Plain ssh starts DeepSpeed's own per-node launcher on every host, so ranks find the same environment; it needs neither
pdsh here nor DeepSpeed or torch on the machine that it starts from.  No variable is in a command line of ssh, which
`ps` shows to all; those that hold secrets are in none (`secret_files.py`).  A single machine has nobody to look for, so
the per-node launcher is started at once: `deepspeed` would import itself only to start it.
"""

import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.devices import num_gpus
from launch.env import rank_environment
from launch.hostfile import Host, as_filter, as_hostfile, num_slots
from launch.remote import OPTIONS, ask, in_folder, last_line, ssh_words
from launch.secret_files import IN_ENVIRONMENT, IN_FILE
from launch.words import wrap
from pretrain.errors import RunError
from pretrain.redaction import is_secret_variable

KEEPER = "launch.keeper"
BY_FILE = (
    "pdsh",
    "openmpi",
)  # launchers that carry variables in command lines; Slurm's carries the environment
# What DeepSpeed's runner exports by itself, whatever it is told (deepspeed/launcher/runner.py, EXPORT_ENVS).
EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX")
# Takes variables from standard input, and becomes the Python that its words describe, which may need them (PYTHONPATH).
TAKE_VARIABLES = (
    "import json, os, sys; os.environ.update(json.loads(sys.stdin.readline())); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
LAUNCHERS = {
    "pdsh": "pdsh",
    "ssh": "ssh",
    "openmpi": "mpirun",
    "slurm": "srun",
}  # by the program that each needs here


@dataclass(frozen=True)
class Job:
    """A program that all ranks run, and where."""

    program: str  # a module, such as pretrain.gpt
    arguments: tuple[str, ...]
    variables: Mapping[str, str]  # set on every host
    hosts: tuple[Host, ...] = ()  # none: this machine alone
    num_ranks: int = 1
    address: str = "127.0.0.1"  # of the first host, as all others see it
    port: int = 29500


class Start(NamedTuple):
    """A process of this machine that starts ranks; ``host`` if it is the connection to one host."""

    command: list[str]
    environment: dict[str, str]
    host: str | None = None
    stdin: str = ""  # what it reads, to the end


def free_port() -> int:
    """A TCP port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def best_launcher() -> str:
    """pdsh where it and DeepSpeed are installed here, else plain ssh."""
    has_deepspeed = all(importlib.util.find_spec(name) is not None for name in ("deepspeed", "torch"))
    return "pdsh" if shutil.which("pdsh") and has_deepspeed else "ssh"


def launcher_fault(name: str) -> str | None:
    """What keeps a launcher from being used here."""
    if name not in LAUNCHERS:
        return f"--launcher {name}: unknown; choose auto, {', '.join(LAUNCHERS)}"
    if shutil.which(LAUNCHERS[name]) is None:
        return (
            f"--launcher {name}: {LAUNCHERS[name]} is not installed here; install it, or use --launcher ssh"
        )
    return None


def starts(job: Job, launcher: str, scratch: Path) -> list[Start]:
    """What to start here; files that the launcher reads are put into ``scratch``."""
    if not job.hosts:
        return [_here(job)]
    if launcher == "ssh":
        return [_by_ssh(job, number) for number in range(len(job.hosts))]
    return [_by_deepspeed(job, launcher, scratch)]


def command_shown(job: Job, launcher: str, *, hostfile: str | None = None) -> str:
    """The command lines as a user would type them, one a host with plain ssh; ``hostfile``: the user's own."""
    scratch = Path("FOLDER")
    begun = starts(job, launcher, scratch)
    own = {str(scratch / "hostfile"): hostfile} if hostfile else {}
    return "\n".join(shlex.join(own.get(word) or word for word in start.command) for start in begun)


def _here(job: Job) -> Start:
    environment = {**rank_environment(job.num_ranks), **job.variables}
    devices = list(range(job.num_ranks))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible and num_gpus():  # which the launcher sets anew, for the devices that it is told
        names = [name.strip() for name in visible.split(",")[: job.num_ranks]]
        if not all(name.isdigit() for name in names):
            raise RunError(
                f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher knows devices by number only"
            )
        devices = [int(name) for name in names]
    return Start(_node_launcher(job, {"localhost": devices}, 0, log_level="critical"), environment)


def _by_deepspeed(job: Job, launcher: str, scratch: Path) -> Start:
    hostfile, variables = scratch / "hostfile", scratch / "deepspeed_env"
    secrets = secrets_of(job)
    exported = {name: value for name, value in job.variables.items() if name not in secrets}
    kept = {name: value for name, value in os.environ.items() if name not in secrets and not _leaks(name)}
    environment = {**kept, **exported, "DS_ENV_FILE": str(variables)}
    if secrets and launcher in BY_FILE:
        exported[IN_FILE] = ",".join(secrets)
    elif secrets:
        environment[IN_ENVIRONMENT] = json.dumps(secrets)
    options = " ".join(f"-o {name}={value}" for name, value in OPTIONS.items())
    environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {options}".strip()
    own: list[str] = []
    if launcher != "pdsh":  # their ranks are told their place, but not where to meet
        exported |= {"MASTER_ADDR": job.address, "MASTER_PORT": str(job.port)}
        if launcher == "openmpi" and os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subset = as_filter(job.hosts)
    if subset and launcher == "openmpi":
        raise RunError("--include or --exclude of single slots: mpirun counts slots only; use --launcher ssh")
    if subset:
        own += ["--include", subset]
    if scratch.is_dir():
        hostfile.write_text(as_hostfile(job.hosts), "utf-8")
        lines = (f"{name}={_escaped(value)}\n" for name, value in exported.items())
        variables.write_text("".join(lines), "utf-8")
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"),
        *("--hostfile", str(hostfile), *own, "--force_multi", "--no_ssh_check", "--launcher", launcher),
        *("--master_addr", job.address, "--master_port", str(job.port)),
        *_program(job),
    ]
    return Start(command, environment)


def _by_ssh(job: Job, number: int) -> Start:
    world = {host.name: list(host.slots) for host in job.hosts}
    words, stdin = _node_launcher(job, world, number, log_level="error"), ""
    if job.variables:
        words, stdin = (
            [words[0], "-S", "-c", TAKE_VARIABLES, *words[1:]],
            json.dumps(dict(job.variables)) + "\n",
        )
    host = job.hosts[number].name
    return Start(ssh_words(host, in_folder(os.getcwd(), words)), dict(os.environ), host, stdin)


def secrets_of(job: Job) -> dict[str, str]:
    return {name: value for name, value in job.variables.items() if is_secret_variable(name)}


def deliver_secrets(job: Job, launcher: str, mark: str) -> None:
    """Bring variables that hold secrets to all hosts, where the launcher would have them in a command line.

    Raises:
        RunError: a host did not take them, and why.
    """
    secrets = secrets_of(job)
    if not secrets or launcher not in BY_FILE:
        return
    hosts = [host.name for host in job.hosts]
    command = in_folder(os.getcwd(), [sys.executable, "-m", "launch.secret_files", mark, "put"])
    answers = ask(hosts, command, stdin=json.dumps(secrets))
    faults = [
        answer.obstacle or f"{answer.host}: {last_line(answer.err)}"
        for answer in answers.values()
        if answer.code != 0
    ]
    if faults:
        ask(hosts, in_folder(os.getcwd(), [sys.executable, "-m", "launch.processes", mark, "end"]))
        told = "".join(f"\n  - {fault}" for fault in faults)
        raise RunError(f"{', '.join(secrets)}: could not be brought to all hosts:{told}")


def _leaks(name: str) -> bool:
    return is_secret_variable(name) and name.startswith(EXPORTED_BY_DEEPSPEED)


def _node_launcher(job: Job, world: Mapping[str, list[int]], number: int, *, log_level: str) -> list[str]:
    """What starts the ranks of one host: ``world`` has the slots of all, in order."""
    return [
        *(sys.executable, "-u", "-m", "launch.node", "deepspeed.launcher.launch", "--log_level", log_level),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={number}",
        *(f"--master_addr={job.address}", f"--master_port={job.port}"),
        *_program(job),
    ]


def _program(job: Job) -> list[str]:
    words: Sequence[str] = job.arguments
    return ["--module", KEEPER, job.program, *(wrap(word) for word in words)]


def _escaped(value: str) -> str:
    """As DeepSpeed will put a value with such letters in double quotes, but not mask what those leave alive."""
    return re.sub(r'(["\\$`])', r"\\\1", value)


def rank_hosts(hosts: Sequence[Host]) -> dict[int, str]:
    """Which host each rank is on: DeepSpeed counts through the slots in the order of the hosts."""
    names = [host.name for host in hosts for _ in host.slots]
    assert len(names) == num_slots(hosts)
    return dict(enumerate(names))
