"""Before ranks start on many hosts: does each answer, and has each the same Python, packages, code and files?

All hosts are asked at once by ssh, as the launcher is going to reach them; whatever differs is told with the host and
the way out, and the majority is taken to be right.
"""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from operator import itemgetter
from typing import Any, NamedTuple

from launch.hostfile import Host
from launch.remote import Answer, ask, last_line

ROOMS = ("launch", "pretrain", "model_providers", "data_tools", "ds_configs")
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "transformer-engine", "triton", "bitsandbytes")
PROBE_S = 90.0
COMMAND_NOT_FOUND = 127


@dataclass(frozen=True)
class Questions:
    """What every host is asked, in the folder where the run starts."""

    folder: str
    python: str = sys.executable
    files: tuple[str, ...] = ()  # that must be the same everywhere
    names: tuple[str, ...] = ()  # whose addresses are wanted, as seen from each host
    ports: tuple[int, ...] = ()  # that should be free

    def as_json(self) -> str:
        lists = {"files": self.files, "names": self.names, "ports": self.ports}
        return json.dumps({"packages": PACKAGES, "rooms": ROOMS, **lists})


Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Preflight:
    """What the hosts said: facts of those that answered, and what speaks against each of the others."""

    facts: Mapping[str, Facts]
    faults: Mapping[str, tuple[str, ...]]  # by host; hosts without faults are not in it

    @property
    def told(self) -> list[str]:
        return [fault for faults in self.faults.values() for fault in faults]


Asker = Callable[..., dict[str, Answer]]  # `ask` of remote.py, or `ask_here`


class Difference(NamedTuple):
    """What a host has, where most have something else."""

    host: str
    name: str
    value: str
    most: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.host}: {self.name} is {self.value}, and {self.most} on the other hosts; {self.way_out}"


def preflight(hosts: Sequence[Host], questions: Questions) -> Preflight:
    """Ask all hosts, and compare their answers."""
    answers = ask_probe([host.name for host in hosts], questions)
    facts: dict[str, Facts] = {}
    faults: dict[str, list[str]] = {}
    for host in hosts:
        found = facts_in(answers[host.name], questions)
        if isinstance(found, str):
            faults[host.name] = [found]
        else:
            facts[host.name] = found
    for host in hosts:
        if host.name in facts:
            faults.setdefault(host.name, []).extend(too_few_devices(host, facts[host.name]))
    for difference in differences(facts):
        faults.setdefault(difference.host, []).append(f"{difference}")
    for name, fault in [*missing(facts), *twice(facts)]:
        faults.setdefault(name, []).append(fault)
    return Preflight(facts, {name: tuple(told) for name, told in faults.items() if told})


def ask_probe(hosts: Sequence[str], questions: Questions, *, how: Asker = ask) -> dict[str, Answer]:
    """Run the probe on all hosts at once."""
    return how(hosts, probe_command(questions), stdin=source_of("probe.py"), timeout_s=PROBE_S)


def source_of(name: str) -> str:
    """The text of a file beside this one, for a Python elsewhere."""
    return resources.files("launch").joinpath(name).read_text("utf-8")


def probe_command(questions: Questions, asked: str | None = None) -> str:
    """For a host's shell, which gets a probe's source on its standard input; ``asked``: another probe's questions."""
    where = shlex.quote(questions.folder)
    words = shlex.join([questions.python, "-", questions.as_json() if asked is None else asked])
    return f"cd {where} || exit 120; test -x {shlex.quote(questions.python)} || exit {COMMAND_NOT_FOUND}; exec {words}"


NO_FOLDER = 120


def facts_in(answer: Answer, questions: Questions) -> Facts | str:
    """The facts of an answer, or why there are none."""
    host = answer.host
    if answer.obstacle is not None:
        return answer.obstacle
    if answer.code == NO_FOLDER:
        return (
            f"{host}: has no folder {questions.folder}, from which the run starts; put the code and the run file on "
            "a disk that all hosts share, or at the same path on each"
        )
    if answer.code == COMMAND_NOT_FOUND:
        return (
            f"{host}: has no {questions.python}, the Python of this environment; install the same environment "
            "there, at the same path"
        )
    try:
        return json.loads(last_line(answer.out))
    except ValueError:
        return f"{host}: {questions.python} does not run there ({last_line(answer.err) or f'exit code {answer.code}'})"


def too_few_devices(host: Host, facts: Facts) -> list[str]:
    gpus = len(facts["gpus"])
    if gpus and max(host.slots) >= gpus:
        return [
            f"{host.name}: the hostfile gives it slots={max(host.slots) + 1}, and it has {gpus} GPUs; correct it"
        ]
    return []


def differences(facts: Mapping[str, Facts]) -> list[Difference]:
    """Whatever is not the same on all hosts, of those that differ from most."""
    same = "install the same environment on all hosts"
    looks: list[tuple[str, Callable[[Facts], Any], str]] = [
        ("Python", itemgetter("python"), same),
        ("code", _code, "bring the same sources to all hosts"),
        ("GPU", _gpu, "leave it out (--exclude), or give the run hosts of one kind"),
        ("driver", _driver, "install the same NVIDIA driver on all hosts"),
    ]
    looks += [(package, partial(_version, package), same) for package in PACKAGES]
    paths = {path for seen in facts.values() for path in seen["files"]}
    shared = "put it on a disk that all hosts share, or copy it"
    looks += [(path, partial(_file, path), shared) for path in sorted(paths)]
    return [
        Difference(host, name, value, most, way_out)
        for name, look, way_out in looks
        for host, value, most in _odd_ones({host: look(seen) for host, seen in facts.items()})
    ]


def missing(facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """What no host has is missing, not different."""
    return [
        (host, f"{host}: {path} cannot be read there ({mark[1]})")
        for path in sorted({path for seen in facts.values() for path in seen["files"]})
        if all(seen["files"][path][0] is None for seen in facts.values())
        for host, seen in facts.items()
        for mark in [seen["files"][path]]
    ]


def twice(facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """Hosts that are one machine under two names: their ranks would share its devices without knowing."""
    first: dict[str, str] = {}
    found = []
    for host, seen in facts.items():
        other = first.setdefault(seen["machine"] or host, host)
        if other != host:
            found.append((host, f"{host}: is the same machine as {other}; name it once, with all its slots"))
    return found


def _odd_ones(values: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Hosts whose value is not that of most; of equally many the first host's counts."""
    if len(set(values.values())) <= 1:
        return []
    most = Counter(values.values()).most_common(1)[0][0]
    return [(host, value, most) for host, value in values.items() if value != most]


def _code(facts: Facts) -> str:
    code = facts["code"]
    if code["hash"] is None:
        return f"not there (no package `{code['missing']}` in the folder or the environment)"
    return str(code["hash"])


def _gpu(facts: Facts) -> str:
    return ", ".join(sorted({gpu["name"] for gpu in facts["gpus"]})) or "none"


def _driver(facts: Facts) -> str:
    return facts["gpus"][0]["driver"] if facts["gpus"] else "none"


def _version(package: str, facts: Facts) -> str:
    return facts["packages"].get(package) or "none"


def _file(path: str, facts: Facts) -> str:
    size, mark = facts["files"][path]
    return "not there" if size is None else f"{size:,} bytes, hash {mark}"
