"""What a host is and has, as JSON: read by `python -` from ssh, so it needs nothing of ours there.

Standard library only, and nothing newer than Python 3.6, so that it can say which Python it found.
The one argument is a JSON object of questions; see `Questions` in preflight.py.
"""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time

HASHED_BYTES = 1 << 20
QUERY = "name,driver_version,memory.total,ecc.errors.uncorrected.volatile.total"


def packages(names):
    """Installed versions, without importing anything: that takes seconds and may crash."""
    try:
        from importlib import metadata
    except ImportError:
        return {}
    found = {}  # type: dict
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def code(rooms):
    """A hash of the sources that `python -m` would run here, and the folder they are in."""
    import importlib.util

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    digest, folder = hashlib.sha256(), None
    for room in sorted(rooms):
        spec = importlib.util.find_spec(room)
        if spec is None or not spec.submodule_search_locations:
            return {"hash": None, "folder": folder, "missing": room}
        root = list(spec.submodule_search_locations)[0]
        folder = os.path.dirname(root)
        for where, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                if name.endswith((".py", ".yaml", ".json")):
                    path = os.path.join(where, name)
                    digest.update(os.path.relpath(path, folder).encode())
                    with open(path, "rb") as file:
                        digest.update(file.read())
    return {"hash": digest.hexdigest()[:16], "folder": folder}


def file_mark(path):
    """Size, and a hash of the first and the last megabyte; None if it is not there."""
    try:
        size = os.path.getsize(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read(HASHED_BYTES))
        return [size, digest.hexdigest()[:16]]
    except OSError as fault:
        return [None, str(fault)]


def gpus():
    """Name, driver, memory in MiB and uncorrected ECC errors of each; [] without NVIDIA's tools."""
    try:
        text = subprocess.check_output(
            ["nvidia-smi", "--query-gpu=" + QUERY, "--format=csv,noheader,nounits"],
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "driver", "memory_mib", "ecc_errors")
    return [dict(zip(keys, (part.strip() for part in line.split(",")))) for line in text.splitlines() if line]


def address_of(name):
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None


def machine():
    """The same for two names of one host; None where it cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + " " + os.readlink("/proc/self/ns/net")
    except OSError:
        return None


def free_port():
    probe = socket.socket()
    try:
        probe.bind(("", 0))
        return probe.getsockname()[1]
    finally:
        probe.close()


def port_is_free(port):
    probe = socket.socket()
    try:
        probe.bind(("", port))
        return True
    except OSError:
        return False
    finally:
        probe.close()


def main():
    asked = json.loads(sys.argv[1])
    facts = {
        "clock_s": time.time(),
        "hostname": socket.gethostname(),
        "machine": machine(),
        "python": platform.python_version(),
        "packages": packages(asked.get("packages", [])),
        "code": code(asked.get("rooms", [])),
        "files": {path: file_mark(path) for path in asked.get("files", [])},
        "gpus": gpus(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "addresses": {name: address_of(name) for name in asked.get("names", [])},
        "free_port": free_port(),
        "ports": {str(port): port_is_free(port) for port in asked.get("ports", [])},
    }
    print("\n" + json.dumps(facts))


if __name__ == "__main__":
    main()
