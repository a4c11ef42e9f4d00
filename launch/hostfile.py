"""A hostfile in DeepSpeed's words: one host a line, ``worker-1 slots=8``; ours may end in the word ``spare``.

DeepSpeed trains on this machine alone, with a warning, when the file is not there, and stops at the first bad line.
Here a file that was named must exist, and every bad line is told.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import RunError

LINE = re.compile(r"^(?P<name>\S+)\s+slots=(?P<slots>\d+)(?P<spare>\s+spare)?$")


# What ssh, pdsh, srun and a shell take for a name and for nothing else; an IPv6 address may be in brackets.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*|\[[0-9A-Fa-f:.]+\]")


class Host(NamedTuple):
    """A machine, and the devices of it that a run may use."""

    name: str
    slots: tuple[int, ...]
    is_spare: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({len(self.slots)} {'slot' if len(self.slots) == 1 else 'slots'})"


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """All hosts of a file, spares included, in its order.

    Raises:
        RunError: the file is not there, or has bad lines: all of them, with what is wrong in each.
    """
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise RunError(
            f"--hostfile {path}: no such file; write one line a host, such as `worker-1 slots=8`, or leave "
            "--hostfile out to train on this machine alone"
        ) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise RunError(f"--hostfile {path}: cannot be read ({fault})") from None
    hosts: dict[str, Host] = {}
    seen_at: dict[str, int] = {}
    faults = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        host = _parsed(line)
        if isinstance(host, str):
            faults.append(f"line {number}, `{raw.strip()}`: {host}")
        elif host.name in hosts:
            first = seen_at[host.name]
            faults.append(
                f"line {number}, `{raw.strip()}`: {host.name} is in line {first} too; give each host one line, "
                "with all its slots"
            )
        else:
            hosts[host.name], seen_at[host.name] = host, number
    if not faults and not any(not host.is_spare for host in hosts.values()):
        faults.append("no host that is not a spare; write one line a host, such as `worker-1 slots=8`")
    if faults:
        raise RunError("\n".join(f"--hostfile {path}: {fault}" for fault in faults))
    return tuple(hosts.values())


def name_fault(name: str) -> str | None:
    """Why a text is no name or address of a host; None if it is one."""
    if NAME.fullmatch(name):
        return None
    if "@" in name:
        return f"{name!r}: a user is no part of a host's name; write `User` for this host into ~/.ssh/config"
    return f"{name!r}: not a host's name; letters, digits, . - _ and : make one, and it does not begin with - . or :"


def _parsed(line: str) -> Host | str:
    """The host of a line, or what is wrong with it."""
    match = LINE.match(line)
    if match is not None:
        slots = int(match["slots"])
        if slots == 0:
            return "slots=0: a host without slots runs nothing; give it 1 or more, or take the line out"
        wrong = name_fault(match["name"])
        if wrong is not None:
            return wrong
        return Host(match["name"].strip("[]"), tuple(range(slots)), match["spare"] is not None)
    words = line.split()
    if len(words) == 1:
        return f"slots= is missing; write `{words[0]} slots=N`, N being its devices"
    if words[1].startswith("slots="):
        value = words[1].removeprefix("slots=")
        if not value.isdigit():
            return f"slots={value}: must be a whole number, 1 or more"
        return f"`{' '.join(words[2:])}` is not understood; a line is `HOST slots=N`, and `spare` after it if it is one"
    if any(word.startswith("slots=") for word in words):
        return "the host comes first and slots= right after it: `HOST slots=N`"
    return f"`{words[1]}` is not understood; write `{words[0]} slots=N`, N being its devices"


def chosen(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts and slots that DeepSpeed's ``--include`` and ``--exclude`` leave: ``a@b:0,2`` is all of a, two of b."""
    if include and exclude:
        raise RunError("--include and --exclude: give one of the two")
    if not include and not exclude:
        return tuple(hosts)
    flag, named = (
        ("--include", _named(include, "--include", hosts))
        if include
        else (
            "--exclude",
            _named(exclude, "--exclude", hosts),
        )
    )
    left = []
    for host in hosts:
        slots = named.get(host.name)
        if include and slots is not None:
            left.append(host._replace(slots=slots))
        elif exclude:
            kept = tuple(slot for slot in host.slots if slots is None or slot not in slots)
            left += [host._replace(slots=kept)] if kept else []
    if not any(not host.is_spare for host in left):
        raise RunError(f"{flag} {include or exclude}: no host is left to train on")
    return tuple(left)


def _named(words: str, flag: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    known = {host.name: host for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    for word in words.split("@"):
        name, colon, listed = word.partition(":")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise RunError(f"{flag} {word}: the hostfile has no host {name}; {hint}")
        slots = known[name].slots
        if colon:
            texts = listed.split(",")
            if not all(text.isdigit() and int(text) in slots for text in texts):
                raise RunError(
                    f"{flag} {word}: {name} has slots 0 to {len(slots) - 1}; list some of them, such as {name}:0,1"
                )
            slots = tuple(sorted({int(text) for text in texts} | set(named.get(name, ()))))
        named[name] = slots
    return named


def num_slots(hosts: Sequence[Host]) -> int:
    return sum(len(host.slots) for host in hosts)


def as_hostfile(hosts: Sequence[Host]) -> str:
    """The same hosts in DeepSpeed's words, which count slots from 0."""
    return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in hosts)


def as_filter(hosts: Sequence[Host]) -> str:
    """`--include` for hosts that lend only some of their slots; empty if all lend all."""
    if all(host.slots == tuple(range(len(host.slots))) for host in hosts):
        return ""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)
