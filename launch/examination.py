"""What a host can do, as JSON: limits, fabric, disks, builds.  Slower than `probe.py`, and asked by doctor alone.

Like that, it is read by `python -` from ssh: standard library only, and nothing newer than Python 3.6.  Whatever may
crash, such as a library that was built against another one, is tried in a process of its own.  The one argument is a
JSON object of questions; see `examine` in doctor.py.  Roots of /sys and /proc can be others, so that tests can show it
broken machines.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

GPU_FIELDS = ("index", "name", "memory_used_mib", "ecc_mode", "ecc_errors")
GPU_QUERY = "index,name,memory.used,ecc.mode.current,ecc.errors.uncorrected.volatile.total"
PIECE_BYTES = 4 << 20
WRITE_AT_MOST_S = 5.0
TRIED_S = 120
SHARED_MEMORY = "/dev/shm"
LIBAIO = "#include <libaio.h>\nint main(void) { io_context_t c = 0; return io_setup(1, &c); }\n"


def first_line(path):
    try:
        with open(path) as file:
            return file.readline().strip()
    except (OSError, ValueError):
        return None


def listed(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def output_of(words, timeout_s=30):
    """What a program prints; None if it is not there or fails."""
    try:
        return subprocess.check_output(
            words, stderr=subprocess.DEVNULL, universal_newlines=True, timeout=timeout_s
        )
    except (OSError, subprocess.SubprocessError):
        return None


def limits():
    """Soft limits of this session; None means unlimited."""
    wanted = {"memlock_bytes": resource.RLIMIT_MEMLOCK, "open_files": resource.RLIMIT_NOFILE}
    found = {name: resource.getrlimit(number) for name, number in wanted.items()}
    return {name: None if soft == resource.RLIM_INFINITY else soft for name, (soft, _) in found.items()}


def memory(proc):
    """Bytes in all and available."""
    found = {}
    try:
        with open(os.path.join(proc, "meminfo")) as file:
            for line in file:
                name, _, rest = line.partition(":")
                found[name] = int(rest.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return {"total_bytes": found.get("MemTotal"), "available_bytes": found.get("MemAvailable")}


def space(path):
    """Bytes of a file system, and those that are free to this user."""
    try:
        seen = os.statvfs(path)
    except OSError as fault:
        return {"fault": fault.strerror}
    return {"total_bytes": seen.f_blocks * seen.f_frsize, "free_bytes": seen.f_bavail * seen.f_frsize}


def infiniband(sys_root):
    """Every port of every adapter: its state, its rate, and whether it speaks InfiniBand or Ethernet."""
    root = os.path.join(sys_root, "class", "infiniband")
    ports = []
    for device in listed(root):
        for number in listed(os.path.join(root, device, "ports")):
            folder = os.path.join(root, device, "ports", number)
            state = first_line(os.path.join(folder, "state")) or "?"
            rate = re.match(r"\d+", first_line(os.path.join(folder, "rate")) or "")
            ports.append(
                {
                    "port": device + ":" + number,
                    "state": state.split(":")[-1].strip(),
                    "rate_gbit_per_s": int(rate.group()) if rate else None,
                    "link": first_line(os.path.join(folder, "link_layer")) or "InfiniBand",
                }
            )
    return ports


def modules(sys_root):
    """Kernel modules by which adapters reach the memory of GPUs."""
    root = os.path.join(sys_root, "module")
    return [
        name
        for name in ("nvidia_peermem", "nv_peer_mem", "gdrdrv")
        if os.path.isdir(os.path.join(root, name))
    ]


def interfaces(sys_root):
    return listed(os.path.join(sys_root, "class", "net"))


def gpus():
    text = output_of(["nvidia-smi", "--query-gpu=" + GPU_QUERY, "--format=csv,noheader,nounits"])
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines() if line.strip()]
    return [dict(zip(GPU_FIELDS, row)) for row in rows]


def topology():
    """How each pair of GPUs is joined: (first, second, word), in nvidia-smi's words, NV4 being four NVLinks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", output_of(["nvidia-smi", "topo", "-m"]) or "")
    num_gpus = len(re.findall(r"^GPU\d+", text, re.MULTILINE))
    pairs = []
    for line in text.splitlines():
        words = line.split()
        if words and re.match(r"GPU\d+$", words[0]):
            first = int(words[0][3:])
            for second, word in enumerate(words[1 : 1 + num_gpus]):  # adapters have columns after them
                if second > first and re.match(r"(NV\d+|SYS|NODE|PHB|PXB|PIX)$", word):
                    pairs.append([first, second, word])
    return pairs


def existing(path):
    """The folder itself, or the nearest above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def disk(path, num_bytes):
    """Room in a folder, and how fast a file that is flushed is written there; the file is removed."""
    folder = existing(path)
    found = dict(space(folder), folder=folder)
    if "fault" in found:
        return found
    piece = os.urandom(min(PIECE_BYTES, num_bytes))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started_s, written = time.time(), 0
            while written < num_bytes and time.time() - started_s < WRITE_AT_MOST_S:
                written += file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            found["write_mb_per_s"] = round(written / 1e6 / max(1e-6, time.time() - started_s), 1)
    except (OSError, ValueError) as fault:
        found["fault"] = getattr(fault, "strerror", None) or str(fault)
    return found


def tried(words, stdin="", line=-1):
    """What a process says that may crash: its exit code, and one line of its output, or of its errors."""
    try:
        started = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
    except OSError as fault:
        return {"code": 127, "said": fault.strerror}
    try:
        out, err = started.communicate(stdin, timeout=TRIED_S)
    except subprocess.TimeoutExpired:
        started.kill()
        started.communicate()
        return {"code": None, "said": "no answer within %d s" % TRIED_S}
    lines = [
        line.strip() for line in (out if started.returncode == 0 else err or out).splitlines() if line.strip()
    ]
    errors = [line for line in lines if re.search(r"error\b|No such file", line)]
    said = lines[line] if lines else ""
    return {"code": started.returncode, "said": errors[0] if started.returncode and errors else said}


def compiled(source, words):
    """Whether a C program compiles and links."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "cc"
    with tempfile.TemporaryDirectory() as folder:
        return tried([compiler, "-x", "c", "-", "-o", os.path.join(folder, "a.out")] + words, source)


def version(program):
    path = shutil.which(
        program, path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    )
    return (
        tried([path, "--version"], line=-1 if program == "nvcc" else 0)
        if path
        else {"code": 127, "said": "not installed"}
    )


def builds(programs):
    """All tries at once; ``programs`` are Python sources by name."""
    todo = {}  # type: dict
    for name, source in programs.items():
        todo[name] = (tried, ([sys.executable, "-c", source],))
    todo["compiler"] = (version, ("g++",))
    todo["ninja"] = (version, ("ninja",))
    todo["nvcc"] = (version, ("nvcc",))
    todo["libaio"] = (compiled, (LIBAIO, ["-laio"]))
    found = {}

    def one(name, function, arguments):
        found[name] = function(*arguments)

    threads = [threading.Thread(target=one, args=(name,) + todo[name]) for name in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main():
    asked = json.loads(sys.argv[1])
    sys_root, proc = asked.get("sys_root", "/sys"), asked.get("proc_root", "/proc")
    facts = {
        "limits": limits(),
        "memory": memory(proc),
        "shared_memory": space(SHARED_MEMORY),
        "infiniband": infiniband(sys_root),
        "modules": modules(sys_root),
        "interfaces": interfaces(sys_root),
        "variables": {name: os.environ[name] for name in asked.get("variables", []) if name in os.environ},
        "gpus": gpus(),
        "topology": topology(),
        "disks": {path: disk(path, asked.get("write_bytes", 1 << 20)) for path in asked.get("disks", [])},
        "builds": builds(asked["programs"]) if "programs" in asked else {},
    }
    print("\n" + json.dumps(facts))


if __name__ == "__main__":
    main()
