"""What doctor found, for a person: grouped by subject, hosts that are alike in one line, each fix under its fault."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.bandwidth import Rates
from launch.checks import GIB, Finding

STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}
SUBJECTS = ("hosts", "machine", "GPUs", "network", "disks", "data and files", "software", "bandwidth")
# Weights, gradients and two moments of Adam in fp32; as much again is kept for activations and the system.
TRAINING_BYTES_PER_PARAMETER = 2 * 16
SHOWN_HOSTS = 4


def show(
    hosts: Sequence[str],
    findings: Sequence[Finding],
    rates: Rates | None,
    enough: Sequence[str],
    console: Console | None = None,
) -> None:
    """Print the page."""
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    several = len(hosts) > 1
    for subject in sorted({finding.subject for finding in findings}, key=SUBJECTS.index):
        console.print(Text(subject, style="bold"))
        console.print(_table([finding for finding in findings if finding.subject == subject], hosts, several))
    if rates is not None:
        console.print(Text(rates.as_text()), soft_wrap=True)
    for line in enough:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(summary(hosts, findings)))


def _table(findings: Sequence[Finding], hosts: Sequence[str], several: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(width=9)
    table.add_column(width=18, no_wrap=True)
    table.add_column(overflow="fold")
    alike: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        key = (finding.title, finding.level, finding.said, finding.fix)
        alike.setdefault(key, []).append(finding.host)
    shown, left_out = Counter[str](), Counter[str]()
    for (title, level, said, fix), names in alike.items():
        shown[title] += level == "ok"
        if level == "ok" and shown[title] > SHOWN_HOSTS:
            left_out[title] += len(names)
            continue
        where = f"{listed(names, hosts)}: " if several and len(set(names)) < len(hosts) else ""
        table.add_row(Text(f"  {level}", style=STYLES[level]), title, Text(f"{where}{said}"))
        if fix:
            table.add_row("", "", Text(f"fix: {fix}", style="dim" if level == "ok" else ""))
    for title, num in left_out.items():
        table.add_row(Text("  ok", style=STYLES["ok"]), title, f"and likewise on {num} more hosts")
    return table


def listed(names: Sequence[str], hosts: Sequence[str]) -> str:
    """Some of all hosts, in few words."""
    if len(names) > SHOWN_HOSTS:
        return f"{', '.join(names[:SHOWN_HOSTS])} and {len(names) - SHOWN_HOSTS} of {len(hosts)} more"
    return ", ".join(names)


def summary(hosts: Sequence[str], findings: Sequence[Finding]) -> str:
    broken = [finding for finding in findings if finding.level == "broken"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    where = "this machine" if len(hosts) == 1 else f"{len(hosts)} hosts"
    if not broken and not warnings:
        return f"{where}: nothing to mend"
    told = [f"{len(broken)} broken"] if broken else []
    told += [f"{len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'}"] if warnings else []
    bad = sorted({finding.host for finding in broken})
    named = f" ({listed(bad, hosts)})" if bad and len(hosts) > 1 else ""
    return f"{where}: {', '.join(told)}{named}"


def enough_for(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What a machine without GPUs can do."""
    cores, memory = facts["probe"]["cores"], facts["examination"]["memory"]
    available = memory["available_bytes"] or memory["total_bytes"] or 0
    if not available:
        return ()
    millions = available / TRAINING_BYTES_PER_PARAMETER / 1e6
    ranks = "1 rank" if cores == 1 else f"up to {cores} ranks"
    return (
        f"Enough for training on the CPU, on {ranks}: a model of up to about {millions:,.0f} million",
        f"parameters ({available / GIB:.0f} GiB are free, {TRAINING_BYTES_PER_PARAMETER} bytes for each).",
        f"A try: megaloom run pretrain/runs/demo.yaml --ranks {min(cores, 2)}",
        "CUDA, Transformer Engine, Apex, NVLink and InfiniBand are for machines with GPUs.",
        "",
    )
