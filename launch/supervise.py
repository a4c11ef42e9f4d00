"""Keeps a run going: starts it, and when a rank or a host dies, starts it again from its newest checkpoint.

Before every start all hosts are asked whether they are fit; one that is not is left out, and a spare of the hostfile
takes its place.  The number of ranks stays what it was, since a layout and its optimizer state belong together.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from launch import report
from launch.attempt import Attempt, Outcome, new_mark
from launch.backends import Job, deliver_secrets, free_port, rank_hosts, starts
from launch.env import KEEPER_LOGS, KEEPER_SIZE, LAUNCH_ID, exported
from launch.hostfile import Host, num_slots
from launch.leftovers import remove_leftovers, scratch_folder
from launch.preflight import Preflight, Questions, preflight
from launch.watch import Watch
from pretrain.checkpoint import store
from pretrain.errors import RunError
from pretrain.run_lock import JOB_ID

LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True)
class Options:
    """How a run is started and kept going."""

    hosts: tuple[Host, ...] = ()  # of the hostfile, spares included; none: this machine
    num_ranks: int = 1
    launcher: str = "pdsh"
    exports: tuple[str, ...] = ()  # NAME or NAME=VALUE
    address: str | None = None
    port: int | None = None
    restarts: int = 0
    pause_s: float = 10.0  # before the first restart; twice as long before each further one
    stall_factor: float = 10.0
    stall_floor_s: float = 120.0
    files: tuple[str, ...] = ()  # that must be the same on all hosts


@dataclass
class Supervisor:
    """One program, from its first start to its end."""

    program: str
    arguments: Sequence[str]
    options: Options
    logs: Path | None = None  # folder of the ranks' logs
    history: list[report.Started] = field(default_factory=list)
    job: str = field(default_factory=new_mark)  # all starts of this run

    def run(self, on_failure: Callable[[Sequence[report.Started]], None], resume: Sequence[str] = ()) -> int:
        """Start until it is done, asked to stop, or out of restarts; ``resume``: words for all starts but the first."""
        remove_leftovers()
        while True:
            more = resume if self.history else ()
            try:
                outcome = self._start([*self.arguments, *more])
            except (
                RunError
            ) as fault:  # too few hosts are fit for another start: what failed first is still to be told
                if not self.history:
                    raise
                print(f"no further start: {fault}", file=sys.stderr, flush=True)
                on_failure(self.history)
                last = self.history[-1].outcome.failure
                assert last is not None
                return last.code
            failure = outcome.failure
            if failure is None:
                return outcome.code
            if failure.is_the_users:
                if not failure.was_shown:
                    on_failure(self.history)
                return failure.code
            if len(self.history) > self.options.restarts or outcome.was_asked:
                on_failure(self.history)
                return failure.code
            self._pause(failure.what)

    def _pause(self, what: str) -> None:
        number = len(self.history)
        pause_s = min(LONGEST_PAUSE_S, self.options.pause_s * 2 ** (number - 1))
        told = f"{what}; restart {number} of {self.options.restarts} in {pause_s:g} s, from the newest checkpoint"
        print(told, file=sys.stderr, flush=True)
        time.sleep(pause_s)

    def _start(self, arguments: Sequence[str]) -> Outcome:
        at, hosts, found = datetime.now(), self.options.hosts, None
        if hosts:
            hosts, found = fit_hosts(hosts, self.options)
            ranks, where = num_slots(hosts), f"{len(hosts)} {'host' if len(hosts) == 1 else 'hosts'}"
            print(f"starting {ranks} ranks on {where}: the libraries take their time", flush=True)
        mark = new_mark()
        job = self._job(arguments, hosts, found, mark)
        watch = Watch(
            job.num_ranks,
            rank_hosts(hosts),
            stall_factor=self.options.stall_factor,
            stall_floor_s=self.options.stall_floor_s,
        )
        with scratch_folder("launch") as scratch:
            begun = starts(job, self.options.launcher, scratch)
            if hosts:
                deliver_secrets(job, self.options.launcher, mark)
            outcome = Attempt(begun, watch, mark=mark, hosts=hosts).wait()
        self.history.append(report.Started(at, tuple(host.name for host in hosts), outcome))
        return outcome

    def _job(
        self, arguments: Sequence[str], hosts: tuple[Host, ...], found: Preflight | None, mark: str
    ) -> Job:
        named = dict(word.partition("=")[::2] for word in self.options.exports)
        variables = exported(os.environ, tuple(named)) if hosts else {}
        variables |= {
            name: value for name, value in named.items() if f"{name}={value}" in self.options.exports
        }
        variables |= {LAUNCH_ID: mark, JOB_ID: self.job}
        if self.logs is not None:
            variables[KEEPER_LOGS] = str(self.logs.absolute())
        if sys.stdout.isatty():
            size = os.get_terminal_size(sys.stdout.fileno())
            variables[KEEPER_SIZE] = f"{size.columns}x{size.lines}"
        port = self.options.port or (found.facts[hosts[0].name]["free_port"] if found else free_port())
        address = self.options.address or (_address(hosts, found) if found else "127.0.0.1")
        num_ranks = num_slots(hosts) if hosts else self.options.num_ranks
        return Job(self.program, tuple(arguments), variables, hosts, num_ranks, address, port)


def fit_hosts(hosts: Sequence[Host], options: Options) -> tuple[tuple[Host, ...], Preflight]:
    """The hosts to start on, all of them fit, spares in the places of those that are not.

    Raises:
        RunError: too few are fit; why each of the others is not.
    """
    wanted = [host for host in hosts if not host.is_spare]
    questions = Questions(
        os.getcwd(),
        files=options.files,
        names=tuple(host.name for host in hosts),
        ports=_listed(options.port),
    )
    found = preflight(hosts, questions)
    spares = [host for host in hosts if host.is_spare and host.name not in found.faults]
    taken: list[Host] = []
    for host in wanted:
        if host.name not in found.faults:
            taken.append(host)
            continue
        substitute = next((spare for spare in spares if len(spare.slots) >= len(host.slots)), None)
        if substitute is None:
            told = "\n".join(f"  - {fault}" for fault in found.told)
            count = "a fault" if len(found.told) == 1 else f"{len(found.told)} faults"
            raise RunError(
                f"preflight found {count} on the hosts, and no spare is fit to take a place:\n{told}"
            )
        spares.remove(substitute)
        taken.append(substitute._replace(slots=substitute.slots[: len(host.slots)]))
        for fault in found.faults[host.name]:
            print(f"preflight: {fault}", file=sys.stderr)
        print(f"preflight: {substitute.name} takes the place of {host.name}", file=sys.stderr, flush=True)
    if options.port is not None and not found.facts[taken[0].name]["ports"][str(options.port)]:
        raise RunError(
            f"--master_port {options.port}: taken on {taken[0].name}; leave it out, and a free one is used"
        )
    return tuple(taken), found


def _listed(port: int | None) -> tuple[int, ...]:
    return () if port is None else (port,)


def _address(hosts: Sequence[Host], found: Preflight) -> str:
    """The first host's address, as the last one sees it: on itself a name often means 127.0.0.1."""
    first = hosts[0].name
    address = found.facts[hosts[-1].name]["addresses"].get(first)
    if address is None:
        raise RunError(
            f"{first}: its name has no address on {hosts[-1].name}; use addresses in the hostfile, put the name into "
            "DNS or /etc/hosts there, or give --master_addr"
        )
    return address


def newest_checkpoint(root: Path) -> str | None:
    """The name of a run's newest checkpoint, if it has one."""
    found = store.checkpoints(root)
    return found[0].name if found else None
