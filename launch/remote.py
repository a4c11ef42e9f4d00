"""Ask many hosts something over ssh at once, and say in plain words why one does not answer."""

import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

AT_ONCE = 64
CONNECT_S = 10
# A host that is switched off does not say so: without questions, ssh waits for it for ever.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": CONNECT_S,
    "ServerAliveInterval": 10,
    "ServerAliveCountMax": 3,
}
SSH_FAILED = 255  # ssh's own exit code; others are the command's
ADVICE = (
    (
        r"Permission denied|Too many authentication failures",
        "ssh refuses the key of this user",
        "ssh-copy-id {host}",
    ),
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION",
        "its host key is not the one in known_hosts, or not there",
        "ssh {host} once by hand, or ssh-keygen -R {host} if it was installed anew",
    ),
    (
        r"Connection refused",
        "no ssh server listens there",
        "start sshd on it, or give its port in ~/.ssh/config",
    ),
    (
        r"timed out|No route to host|Network is unreachable|Host is down",
        "it cannot be reached",
        "look whether it is up and whether the network and a firewall let ssh through",
    ),
    (
        r"Could not resolve hostname|Name or service not known",
        "its name is not known here",
        "correct the hostfile, or add the name to DNS or /etc/hosts",
    ),
    (
        r"Connection closed|Connection reset|kex_exchange",
        "it hangs up",
        "look into its sshd's log (MaxStartups?)",
    ),
)


class Answer(NamedTuple):
    """What a command on a host gave; ``code`` is None if it was still at work when time was up."""

    host: str
    code: int | None
    out: str
    err: str
    asked_s: float = 0.0  # by the clock here
    answered_s: float = 0.0

    @property
    def obstacle(self) -> str | None:
        """Why ssh did not bring the command to the host: what is wrong, and the way out; None if it did."""
        if self.code is None:
            return f"{self.host} took ssh in, and then did not answer in time; look at its load and its disks"
        return ssh_obstacle(self.host, self.err) if self.code == SSH_FAILED else None


def ssh_obstacle(host: str, words: str) -> str:
    """What ssh's own words mean."""
    for pattern, what, way_out in ADVICE:
        if re.search(pattern, words):
            return f"{host}: {what} ({last_line(words)}); {way_out.format(host=host)}"
    return f"{host}: ssh gave up ({last_line(words) or 'without a word'}); try: ssh {host} hostname"


def last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def ssh_words(host: str, command: str) -> list[str]:
    """The ssh command line that runs ``command`` in the host's shell."""
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", *options, "--", host, command]  # what follows is no option, whatever it begins with


def in_folder(folder: str, words: Sequence[str]) -> str:
    """A shell's command: ``words`` run in ``folder``."""
    return f"cd {shlex.quote(folder)} && {shlex.join(words)}"


def ask(hosts: Sequence[str], command: str, *, stdin: str = "", timeout_s: float = 60.0) -> dict[str, Answer]:
    """Run ``command`` on all hosts at once; what each answers, in the order given."""

    def one(host: str) -> Answer:
        asked_s = time.time()
        try:
            done = subprocess.run(
                ssh_words(host, command),
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(host, None, "", "")
        except FileNotFoundError:
            return Answer(host, SSH_FAILED, "", "ssh is not installed here (apt-get install openssh-client)")
        return Answer(host, done.returncode, done.stdout, done.stderr, asked_s, time.time())

    with ThreadPoolExecutor(min(AT_ONCE, max(1, len(hosts)))) as pool:
        return {answer.host: answer for answer in pool.map(one, hosts)}


def ask_here(
    hosts: Sequence[str], command: str, *, stdin: str = "", timeout_s: float = 60.0
) -> dict[str, Answer]:
    """The same of this machine alone, without ssh; ``hosts`` is the one name that it goes by."""
    (host,) = hosts
    asked_s = time.time()
    try:
        done = subprocess.run(
            ["sh", "-c", command], input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {host: Answer(host, None, "", "")}
    return {host: Answer(host, done.returncode, done.stdout, done.stderr, asked_s, time.time())}
