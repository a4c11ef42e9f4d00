"""A cluster on one machine: a namespace for each host, joined by a bridge, with sshd, name and address of its own.

Everything hangs on names that hold this process's number, so two test runs do not meet.  The machine's own network is
not touched: the bridge is in a namespace too, that of the login node.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.patience import patient_s

NEEDED = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}
LOGIN = "login"
SUBNET = "10.77.0"
SLOW_WIRE = Path(__file__).with_name("slow_wire.py")
BY_ROOT = "/usr/sbin:/sbin"


def obstacle() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    path = f"{os.environ['PATH']}:{BY_ROOT}"
    missing = sorted(package for word, package in NEEDED.items() if shutil.which(word, path=path) is None)
    if missing:
        return f"not installed: apt-get install {' '.join(missing)}"
    name = f"ml{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.stderr.strip() or None


def made(folder: Path, num_nodes: int) -> "Network":
    """A network; where this system's kernel or policy has none to give, the test is skipped with what it said."""
    try:
        return Network(folder, num_nodes)
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"no network of namespaces here: {refused.stderr or refused}")


class Network:
    """Hosts node1 to nodeN, and a login node from which they are reached."""

    def __init__(self, folder: Path, num_nodes: int):
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._tag = f"ml{os.getpid()}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._wires: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write_keys()
        self._write_files()
        self._make_links()
        for name in self.names:
            self.start_sshd(name)
        for name in self.names:
            self._wait_for(name)

    # ---- what tests do with it

    def start(self, words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A command on the login node, in a session of its own."""
        script = f'mount --bind {self.folder}/hosts /etc/hosts; hostname {LOGIN}; exec "$@"'
        command = [*self._inside(LOGIN), "unshare", "--mount", "--uts", "sh", "-c", script, "sh", *words]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, env=self.environment(), start_new_session=True, **options)

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}:{BY_ROOT}"
        return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def hostfile(self, *lines: str) -> str:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return str(path)

    def processes(self, name: str) -> list[int]:
        """All processes of a node but its sshd."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True, check=True
        )
        daemon = self._daemons.get(name)
        return [int(pid) for pid in listed.stdout.split() if daemon is None or int(pid) != daemon.pid]

    def kill_node(self, name: str) -> None:
        """As if its power were cut: every process of it, and its network."""
        self.cut(name)
        for pid in [*self.processes(name), self._daemons.pop(name).pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, name: str) -> None:
        _ip("-n", self._namespace(LOGIN), "link", "set", self._link(name), "down")

    def join(self, name: str) -> None:
        _ip("-n", self._namespace(LOGIN), "link", "set", self._link(name), "up")

    def slow_down(self, name: str, *, delay_s: float, loss: float) -> str:
        """Delay and lose packets on a node's link until it is closed: by netem, or by a program where there is none."""
        words = [*self._inside(name), "tc", "qdisc", "replace", "dev", "eth0", "root", "netem"]
        words += ["delay", f"{1000 * delay_s:g}ms", "loss", f"{100 * loss:g}%"]
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return "netem"
        hub, link = self._namespace(LOGIN), self._link(name)
        senders = [(self._inside(other), "eth0") for other in self.names] + [(self._inside(LOGIN), "bridge0")]
        for inside, interface in senders:
            subprocess.run([*inside, sys.executable, "-S", str(SLOW_WIRE), interface], check=True)
        _ip("-n", hub, "link", "set", link, "nomaster")
        _ip("-n", hub, "link", "add", f"slow-{name}", "type", "veth", "peer", "name", f"wire-{name}")
        _ip("-n", hub, "link", "set", f"slow-{name}", "master", "bridge0", "up")
        _ip("-n", hub, "link", "set", f"wire-{name}", "up")
        ends = (f"wire-{name}", link, str(delay_s), str(loss))
        self._wires[name] = subprocess.Popen(
            [*self._inside(LOGIN), sys.executable, "-S", str(SLOW_WIRE), *ends]
        )
        return "a relay"

    def speed_up(self, name: str) -> None:
        words = [*self._inside(name), "tc", "qdisc", "del", "dev", "eth0", "root"]
        subprocess.run(words, capture_output=True, check=False)
        wire = self._wires.pop(name, None)
        if wire is not None:
            wire.kill()
            wire.wait()
            hub = self._namespace(LOGIN)
            _ip("-n", hub, "link", "del", f"slow-{name}")
            _ip("-n", hub, "link", "set", self._link(name), "master", "bridge0")

    def limit(self, name: str, rate: str) -> str | None:
        """At most so much leaves a node, such as 200mbit; why it cannot be limited, if it cannot."""
        words = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "64kb",
            "latency",
            "50ms",
        ]
        done = subprocess.run([*self._inside(name), *words], capture_output=True, text=True, check=False)
        return done.stderr.strip() or None

    def stop_sshd(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def start_sshd(
        self, name: str, *, hide: Mapping[str, Path] | None = None, authorized: str = "authorized"
    ) -> None:
        """``hide``: files that this node sees others in the place of; ``authorized``: the file of keys it takes."""
        hidden = {"/etc/hosts": self.folder / "hosts", **(hide or {})}
        mounts = "".join(f"mount --bind {seen} {path}; " for path, seen in hidden.items())
        own = {
            "HostKey": self.folder / f"{name}.key",
            "AuthorizedKeysFile": self.folder / authorized,
            "PidFile": self.folder / f"{name}.pid",
        }
        fixed = {
            "Port": 22,
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
            "MaxStartups": 100,
        }
        options = " ".join(f"-o {key}={value}" for key, value in {**own, **fixed}.items())
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:{BY_ROOT}")
        script = f"{mounts} hostname {name}; exec {sshd} -D -e -f /dev/null {options}"
        with (self.folder / f"{name}.sshd.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*self._inside(name), "unshare", "--mount", "--uts", "sh", "-c", script],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def restart_sshd(self, name: str, **options: Any) -> None:
        self.stop_sshd(name)
        self.start_sshd(name, **options)
        self._wait_for(name)

    def close(self) -> None:
        for name in list(self._wires):
            self.speed_up(name)
        for name in (*self.names, LOGIN):
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.kill()
                daemon.wait()
            _ip("netns", "del", self._namespace(name))

    # ---- how it is made

    def address(self, name: str) -> str:
        return f"{SUBNET}.{100 if name == LOGIN else self.names.index(name) + 1}"

    def _namespace(self, name: str) -> str:
        return f"{self._tag}{name}"

    def _link(self, name: str) -> str:
        return f"to-{name}"

    def _inside(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._namespace(name)]

    def _write_keys(self) -> None:
        for name in (*self.names, "user", "stranger"):
            key = self.folder / (name if name in ("user", "stranger") else f"{name}.key")
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")

    def _write_files(self) -> None:
        rows = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in (*self.names, LOGIN))]
        (self.folder / "hosts").write_text("\n".join(rows) + "\n", "utf-8")
        facts = {
            "IdentityFile": self.folder / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.folder / "known",
            "StrictHostKeyChecking": "accept-new",
            "LogLevel": "ERROR",
        }
        lines = ["Host *", *(f"  {key} {value}" for key, value in facts.items())]
        (self.folder / "ssh_config").write_text("\n".join(lines) + "\n", "utf-8")
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        ssh = shutil.which("ssh")
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {self.folder}/ssh_config "$@"\n', "utf-8")
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)

    def _make_links(self) -> None:
        for name in (LOGIN, *self.names):
            _ip("netns", "add", self._namespace(name))
            _ip("-n", self._namespace(name), "link", "set", "lo", "up")
        hub = self._namespace(LOGIN)
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{self.address(LOGIN)}/24", "dev", "bridge0")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        for name in self.names:
            space = self._namespace(name)
            _ip(
                "-n",
                hub,
                "link",
                "add",
                self._link(name),
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            _ip("-n", hub, "link", "set", self._link(name), "master", "bridge0", "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _wait_for(self, name: str) -> None:
        deadline_s = time.monotonic() + patient_s(20)
        probe = "import socket,sys; socket.create_connection((sys.argv[1], 22), 1).close()"
        while time.monotonic() < deadline_s:
            words = [*self._inside(LOGIN), sys.executable, "-S", "-c", probe, self.address(name)]
            if subprocess.run(words, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)
        log = (self.folder / f"{name}.sshd.log").read_text(errors="replace")
        raise AssertionError(f"sshd of {name} on {socket.gethostname()} does not answer:\n{log}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
