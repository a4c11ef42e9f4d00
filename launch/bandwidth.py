"""How fast ranks talk: starts `pretrain.bandwidth` on all hosts, and names the pairs that fall behind the others.

No figure is right in itself, on a network that nobody described; but on one that was built evenly a pair with much less
than the median has a damaged cable, a wrong route or a busy neighbour.
"""

import argparse
import contextlib
import io
import json
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch import report
from launch.checks import Finding
from launch.hostfile import Host
from launch.remote import last_line
from launch.supervise import Options, Supervisor
from launch.watch import Failure
from pretrain.errors import RunError

PROGRAM = "pretrain.bandwidth"
OUTLIER = 0.7  # of the median
MARK = "bandwidth "  # before each record in the ranks' output


@dataclass(frozen=True)
class Rates:
    """What was measured: GB/s, that is 1e9 bytes."""

    all_reduce: list[dict[str, Any]] = field(default_factory=list)  # {"bytes": ..., "gb_per_s": ...}
    pairs: list[dict[str, Any]] = field(
        default_factory=list
    )  # {"source": ..., "target": ..., "gb_per_s": ...}

    @property
    def median_gb_per_s(self) -> float:
        return statistics.median(pair["gb_per_s"] for pair in self.pairs)

    def as_dict(self) -> dict[str, Any]:
        return {"all_reduce": self.all_reduce, "pairs": self.pairs}

    def as_text(self) -> str:
        sizes = ", ".join(
            f"{each['bytes'] / 2**20:g} MiB: {each['gb_per_s']:.2f}" for each in self.all_reduce
        )
        lines = [f"  all-reduce, bus GB/s  {sizes}"]
        if self.pairs:
            slowest = min(self.pairs, key=lambda pair: pair["gb_per_s"])
            fastest = max(self.pairs, key=lambda pair: pair["gb_per_s"])
            lines.append(
                f"  messages, GB/s        median {self.median_gb_per_s:.2f}; slowest {_shown(slowest)}; "
                f"fastest {_shown(fastest)}"
            )
        return "\n".join([*lines, ""])


def _shown(pair: dict[str, Any]) -> str:
    return f"{pair['source']} to {pair['target']} {pair['gb_per_s']:.2f}"


def measure(
    hosts: Sequence[Host], launcher: str, words: argparse.Namespace, *, num_ranks: int, can_start: bool
) -> tuple[Rates | None, list[Finding]]:
    """Rates, and findings about them."""
    everywhere = socket.gethostname() if not hosts else hosts[0].name
    if not can_start:
        said = "not measured: no host is fit to start on"
        return None, [
            Finding("bandwidth", "bandwidth", everywhere, "warning", said, "mend what is broken first")
        ]
    options = Options(
        hosts=tuple(host._replace(is_spare=False) for host in hosts),
        num_ranks=num_ranks,
        launcher=launcher,
        exports=tuple(words.export),
        address=words.master_addr,
        port=words.master_port,
        stall_floor_s=60.0,
    )
    names = ",".join(host.name for host in hosts for _ in host.slots)
    supervisor = Supervisor(PROGRAM, ["--names", names] if names else [], options)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            supervisor.run(lambda history: None)
    except RunError as fault:
        return None, [
            Finding("bandwidth", "ranks", everywhere, "broken", f"{fault}", "mend that, and try again")
        ]
    failure = supervisor.history[-1].outcome.failure
    rates = read(out.getvalue())
    if failure is not None or not rates.all_reduce:
        return None, [failed(failure, everywhere, last_line(err.getvalue()))]
    return rates, judge(rates)


def failed(failure: Failure | None, everywhere: str, last: str) -> Finding:
    """That ranks could not be started, or did not come to their end."""
    if failure is None:
        said = f"the ranks ended without a figure ({last or 'and without a word'})"
        return Finding("bandwidth", "ranks", everywhere, "broken", said, "try again")
    words = failure.words[-1].strip() if failure.words else last
    said = f"{failure.what} ({words})" if words else failure.what
    return Finding(
        "bandwidth", "ranks", failure.host or everywhere, "broken", said, report.cause_of(failure).change
    )


def read(output: str) -> Rates:
    """The records among what ranks have said."""
    rates = Rates()
    for line in output.splitlines():
        if line.startswith(MARK):
            record = json.loads(line.removeprefix(MARK))
            (rates.pairs if "source" in record else rates.all_reduce).append(record)
    return rates


def judge(rates: Rates) -> list[Finding]:
    """Pairs below the others; a host that is slow towards all others is named alone."""
    subject, title = "bandwidth", "messages"
    if not rates.pairs:
        return []
    median = rates.median_gb_per_s
    slow = [pair for pair in rates.pairs if pair["gb_per_s"] < OUTLIER * median]
    fix = "look at its cable, link speed (ethtool, ibstat) and load; leave it out meanwhile (--exclude)"
    found, told = [], set()
    for name in dict.fromkeys(pair[end] for pair in slow for end in ("source", "target")):
        own = [pair for pair in rates.pairs if name in (pair["source"], pair["target"])]
        for end, way in (("source", "sends to"), ("target", "receives from")):
            ways = [pair for pair in own if pair[end] == name]
            if len(ways) > 1 and all(pair in slow for pair in ways):
                rate = statistics.median(pair["gb_per_s"] for pair in ways)
                said = f"{way} every other at {rate:.2f} GB/s, {rate / median:.0%} of the median {median:.2f}"
                found.append(Finding(subject, title, name, "warning", said, fix))
                told |= {(pair["source"], pair["target"]) for pair in ways}
    for pair in slow:
        if (pair["source"], pair["target"]) not in told:
            rate = pair["gb_per_s"]
            said = f"{_shown(pair)} GB/s, {rate / median:.0%} of the median {median:.2f}"
            found.append(Finding(subject, title, pair["source"], "warning", said, fix))
    if not found:
        said = f"no pair below {OUTLIER:.0%} of the median {median:.2f} GB/s"
        names = dict.fromkeys(pair["source"] for pair in rates.pairs)
        return [Finding(subject, title, name, "ok", said) for name in names]
    return found
