"""What doctor looks at on one host: each check is a small function from facts to ok, warning or broken, with the fix.

A check says nothing (None) where its subject is not there, and never breaks over what the run does not need: a laptop
without InfiniBand is not broken.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "warning", "broken"]
MIB, GIB = 1 << 20, 1 << 30
MEMLOCK_BYTES = GIB  # what an adapter registers of one rank's buffers soon exceeds anything less
OPEN_FILES = 4096  # sockets of a rank grow with the world; corpora are open besides
SHARED_BYTES_PER_RANK = 128 * MIB  # of the order of NCCL's rings between the GPUs of a host
FOREIGN_MIB = 1024.0  # a driver alone holds some hundred
SLOW_DISK_MB_PER_S, SLOW_NVME_MB_PER_S = 100.0, 1000.0
SKEW_S = 1.0


class Verdict(NamedTuple):
    level: Level
    said: str
    fix: str = ""


class Finding(NamedTuple):
    """A verdict, and about what and whom."""

    subject: str
    title: str
    host: str
    level: Level
    said: str
    fix: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the user wants to do on these hosts."""

    num_hosts: int = 1
    ranks_per_host: int = 1
    checkpoint_bytes: int = 0  # of all that are kept at a time
    checkpoint_folder: str = "."
    nvme_folder: str | None = None
    swaps_to_nvme: bool = False
    needs_te: bool = False
    fp8_recipe: str | None = None  # that Transformer Engine may be asked for
    port: int | None = None


@dataclass(frozen=True)
class Seen:
    """One host: what probe.py and examination.py found there."""

    probe: Mapping[str, Any]
    exam: Mapping[str, Any]
    wanted: Wanted = field(default_factory=Wanted)
    skew_s: float = 0.0

    @property
    def has_gpus(self) -> bool:
        return bool(self.probe["gpus"])

    @property
    def active_ports(self) -> list[Mapping[str, Any]]:
        return [port for port in self.exam["infiniband"] if port["state"] == "ACTIVE"]


def ok(said: str) -> Verdict:
    return Verdict("ok", said)


def warning(said: str, fix: str) -> Verdict:
    return Verdict("warning", said, fix)


def broken(said: str, fix: str) -> Verdict:
    return Verdict("broken", said, fix)


def size(num_bytes: float) -> str:
    for unit, word in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {word}"
    return f"{num_bytes / 1024:.4g} KiB"


# ---- the machine


def processors(seen: Seen) -> Verdict:
    cores, total = seen.probe["cores"], seen.exam["memory"]["total_bytes"]
    said = f"{cores} cores, {size(total or 0)} of memory"
    if seen.wanted.ranks_per_host > cores:
        return warning(
            f"{said}, for {seen.wanted.ranks_per_host} ranks",
            "fewer ranks on this host: each keeps a core busy",
        )
    return ok(said)


def clock(seen: Seen) -> Verdict:
    if abs(seen.skew_s) > SKEW_S:
        return warning(
            f"off by {seen.skew_s:+.1f} s from this machine's",
            "let an NTP service set it: timedatectl set-ntp true",
        )
    return ok("agrees with this machine's")


def locked_memory(seen: Seen) -> Verdict:
    limit = seen.exam["limits"]["memlock_bytes"]
    if limit is None or limit >= MEMLOCK_BYTES:
        return ok("unlimited" if limit is None else size(limit))
    if seen.active_ports:
        return broken(
            f"{size(limit)}, and InfiniBand must lock its buffers",
            "`* soft memlock unlimited` and `* hard memlock unlimited` into /etc/security/limits.conf, log in anew "
            "(in a container: --ulimit memlock=-1)",
        )
    return ok(f"{size(limit)}: enough without InfiniBand")


def open_files(seen: Seen) -> Verdict:
    limit = seen.exam["limits"]["open_files"]
    if limit is not None and limit < OPEN_FILES:
        return warning(
            f"{limit:,} at most",
            f"`* soft nofile 65536` into /etc/security/limits.conf (now: ulimit -n {OPEN_FILES})",
        )
    return ok("unlimited" if limit is None else f"{limit:,} at most")


def shared_memory(seen: Seen) -> Verdict | None:
    space = seen.exam["shared_memory"]
    fix = "a larger /dev/shm: mount -o remount,size=16G /dev/shm (in a container: --shm-size=16g, or --ipc=host)"
    if "fault" in space:
        return broken(f"/dev/shm: {space['fault']}", fix)
    needed = SHARED_BYTES_PER_RANK * seen.wanted.ranks_per_host
    said = f"{size(space['free_bytes'])} free of {size(space['total_bytes'])}"
    if space["free_bytes"] < needed:
        return broken(f"{said}; {seen.wanted.ranks_per_host} ranks take up to {size(needed)}", fix)
    return ok(said)


def port(seen: Seen) -> Verdict | None:
    number = seen.wanted.port
    if number is None or seen.probe["ports"].get(str(number), True):
        return None if number is None else ok(f"{number} is free")
    return broken(f"{number} is taken", "leave --master_port out, and a free one is used")


# ---- GPUs


def gpus(seen: Seen) -> Verdict | None:
    found = seen.probe["gpus"]
    if not found:
        return ok("none: ranks use the CPU")
    names = sorted({gpu["name"] for gpu in found})
    said = f"{len(found)} x {' and '.join(names)}, driver {found[0]['driver']}"
    if len(names) > 1:
        return warning(f"{said}: the slowest sets the pace", "leave the odd ones out (--include HOST:0,1)")
    return ok(said)


def ecc(seen: Seen) -> Verdict | None:
    bad = [gpu for gpu in seen.exam["gpus"] if _number(gpu["ecc_errors"]) > 0]
    if bad:
        which = ", ".join(f"GPU {gpu['index']} has {gpu['ecc_errors']} uncorrected errors" for gpu in bad)
        return broken(
            which,
            "leave it out (--exclude), reset or replace it; nvidia-smi -q -d ECC,ROW_REMAPPER tells more",
        )
    off = [gpu["index"] for gpu in seen.exam["gpus"] if gpu["ecc_mode"] == "Disabled"]
    if off:
        return warning(
            f"off on GPU {', '.join(off)}: a flipped bit goes unseen", "nvidia-smi -e 1, and reboot"
        )
    return ok("no uncorrected error") if seen.has_gpus else None


def gpu_memory(seen: Seen) -> Verdict | None:
    used = [gpu for gpu in seen.exam["gpus"] if _number(gpu["memory_used_mib"]) > FOREIGN_MIB]
    if used:
        which = ", ".join(f"GPU {gpu['index']} ({_number(gpu['memory_used_mib']):,.0f} MiB)" for gpu in used)
        return warning(
            f"taken already: {which}", "nvidia-smi shows whose processes; end what was left behind"
        )
    return ok("free") if seen.has_gpus else None


def nvlink(seen: Seen) -> Verdict | None:
    pairs = seen.exam["topology"]
    if not pairs:
        return None
    joined = [pair for pair in pairs if pair[2].startswith("NV")]
    if joined and len(joined) < len(pairs):
        first, second, word = next(pair for pair in pairs if not pair[2].startswith("NV"))
        return warning(
            f"{len(joined)} of {len(pairs)} pairs of GPUs; {first} and {second} talk over {word}",
            "nvidia-smi nvlink --status shows links that are down; keep tp ranks on joined GPUs",
        )
    widths = {pair[2] for pair in joined}
    if len(widths) > 1:
        return warning(
            f"of different width: {', '.join(sorted(widths))}", "nvidia-smi nvlink --status: a link is down"
        )
    return ok(f"every pair, {widths.pop()}" if joined else "none: GPUs talk over PCIe")


# ---- the network


def infiniband(seen: Seen) -> Verdict | None:
    ports, active = seen.exam["infiniband"], seen.active_ports
    if not ports:
        return ok("none: ranks talk over TCP") if seen.wanted.num_hosts > 1 or seen.has_gpus else None
    down = [port for port in ports if port not in active]
    rates = sorted({port["rate_gbit_per_s"] for port in active if port["rate_gbit_per_s"]})
    if down:
        told = ", ".join(f"{port['port']} is {port['state']}" for port in down)
        return broken(
            f"{told}; {len(active)} of {len(ports)} ports are ACTIVE",
            "look at its cable, its switch port and the subnet manager (ibstat); or keep it out with NCCL_IB_HCA",
        )
    if len(rates) > 1:
        slow = ", ".join(port["port"] for port in active if port["rate_gbit_per_s"] == rates[0])
        return warning(
            f"{slow} at {rates[0]} Gbit/s, others at {rates[-1]}",
            "a damaged cable falls back to a lower rate: reseat or replace it",
        )
    return ok(f"{len(active)} ports ACTIVE at {rates[0] if rates else '?'} Gbit/s, {active[0]['link']}")


def gpudirect(seen: Seen) -> Verdict | None:
    if not seen.has_gpus or not seen.active_ports:
        return None
    loaded = [name for name in seen.exam["modules"] if name != "gdrdrv"]
    if loaded:
        return ok(f"{loaded[0]} is loaded")
    return warning(
        "nvidia_peermem is not loaded: every message goes through the host's memory",
        "modprobe nvidia_peermem (and a line in /etc/modules-load.d); NCCL finds dma-buf by itself on newer kernels",
    )


def network_variables(seen: Seen) -> Verdict | None:
    variables, known = seen.exam["variables"], seen.exam["interfaces"]
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = [word.strip() for word in variables.get(name, "").lstrip("=").split(",") if word.strip()]
        is_exact = name.startswith("GLOO") or variables.get(name, "").startswith("=")
        for word in wanted:
            if word.startswith("^"):
                break
            if not any(real == word if is_exact else real.startswith(word) for real in known):
                return broken(
                    f"{name}={variables[name]}: there is no interface {word}",
                    f"it has {', '.join(known)}; or unset it",
                )
    if variables.get("NCCL_IB_DISABLE") == "1" and seen.active_ports:
        return warning("NCCL_IB_DISABLE=1, and InfiniBand is there", "unset NCCL_IB_DISABLE")
    return ok(", ".join(f"{name}={value}" for name, value in variables.items())) if variables else None


# ---- disks


def checkpoint_disk(seen: Seen) -> Verdict | None:
    wanted = seen.wanted
    return _disk(seen, wanted.checkpoint_folder, wanted.checkpoint_bytes, SLOW_DISK_MB_PER_S, "checkpoints")


def nvme_disk(seen: Seen) -> Verdict | None:
    folder = seen.wanted.nvme_folder
    return None if folder is None else _disk(seen, folder, 0, SLOW_NVME_MB_PER_S, "offload")


def _disk(seen: Seen, path: str, needed: int, slow_mb_per_s: float, use: str) -> Verdict | None:
    found = seen.exam["disks"].get(path)
    if found is None:
        return None
    if "fault" in found:
        return broken(
            f"{found['folder']}: {found['fault']}",
            "give this user the right to write there, or another folder",
        )
    rate = found["write_mb_per_s"]
    said = f"{size(found['free_bytes'])} free, writes {rate:,.0f} MB/s ({found['folder']})"
    if found["free_bytes"] < needed:
        return broken(f"{said}; {use} take {size(needed)}", "make room, or lower checkpoint.keep_last")
    if rate < slow_mb_per_s:
        return warning(f"{said}: slow for {use}", "a faster disk, or fewer checkpoints (checkpoint.every)")
    return ok(said)


# ---- software


def torch(seen: Seen) -> Verdict | None:
    tried = seen.exam["builds"].get("torch")
    if tried is None:
        return None
    if tried["code"] != 0:
        return broken(f"does not load: {_why(tried)}", "install it anew: pip install --force-reinstall torch")
    version, cuda, devices, nccl = [*tried["said"].split(), "?", "?", "?", "?"][:4]
    if not seen.has_gpus:
        return ok(version)
    if cuda == "None":
        return broken(
            f"{version} was built without CUDA",
            "install the CUDA build for this driver: pytorch.org/get-started",
        )
    if devices in ("False", "0"):
        return broken(
            f"{version} sees no GPU, and there are {len(seen.probe['gpus'])}",
            "the driver is older than CUDA "
            f"{cuda} wants, or CUDA_VISIBLE_DEVICES hides them; update it, or take a torch for an older CUDA",
        )
    return ok(f"{version}, CUDA {cuda}, NCCL {nccl}")


def _library(name: str) -> Callable[[Seen], Verdict | None]:
    def check(seen: Seen) -> Verdict | None:
        tried = seen.exam["builds"].get(name)
        if tried is None:
            return None
        if tried["code"] != 0:
            return broken(
                f"does not load: {_why(tried)}", "pip install --force-reinstall megaloom, in this environment"
            )
        return ok(tried["said"])

    return check


def transformer_engine(seen: Seen) -> Verdict | None:
    tried = seen.exam["builds"].get("transformer engine")
    if tried is None:
        return None
    fix = "pip install --no-build-isolation 'megaloom[te]', against this torch and CUDA; or kernels=torch"
    if tried["code"] == 0 and tried["said"] == "loads":
        return ok("loads")
    said = "not installed" if tried["said"] == "absent" else f"does not load: {_why(tried)}"
    if seen.wanted.needs_te:
        return broken(f"{said}, and the run asks for it", fix)
    if not seen.has_gpus:
        return ok(f"{said}: of no use on a CPU")
    return warning(f"{said}: torch's kernels do its work, slower", fix)


def fp8_recipes(seen: Seen) -> Verdict | None:
    """Which recipes Transformer Engine follows on this hardware: ``{recipe: why not, or null}``."""
    tried = seen.exam["builds"].get("fp8 recipes")
    if tried is None or tried["code"] != 0 or not seen.has_gpus:
        return None  # Transformer Engine's own check tells why
    obstacles = json.loads(tried["said"])
    able = [recipe for recipe, why in obstacles.items() if why is None]
    wanted = seen.wanted.fp8_recipe
    if wanted is not None and obstacles.get(wanted) is not None:
        fix = f"fp8.recipe={able[0]}, or fp8.backend=torch" if able else "fp8.backend=torch"
        level = broken if seen.wanted.needs_te else warning
        return level(f"fp8.recipe={wanted}: {obstacles[wanted]}", fix)
    return ok(f"Transformer Engine does {', '.join(able)}" if able else "Transformer Engine does none")


def apex(seen: Seen) -> Verdict | None:
    tried = seen.exam["builds"].get("apex")
    if tried is None:
        return None
    if tried["code"] == 0 and tried["said"] == "loads":
        return ok("loads")
    if tried["code"] == 0 and tried["said"] == "absent":
        return ok("not installed: not needed")
    fix = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex, and nothing here needs it"
    return warning(_why(tried), fix)


def compiler(seen: Seen) -> Verdict | None:
    """DeepSpeed compiles Adam for offload, and its collectives on a CPU, at first use."""
    tried, ninja = seen.exam["builds"].get("compiler"), seen.exam["builds"].get("ninja")
    if tried is None or ninja is None:
        return None
    if tried["code"] != 0:
        return warning(f"g++: {_why(tried)}: DeepSpeed's fast Adam cannot be compiled", "apt-get install g++")
    if ninja["code"] != 0:
        return warning(f"ninja: {_why(ninja)}: DeepSpeed's fast Adam cannot be compiled", "pip install ninja")
    return ok(tried["said"])


def cuda_compiler(seen: Seen) -> Verdict | None:
    tried = seen.exam["builds"].get("nvcc")
    if tried is None or not seen.has_gpus:
        return None
    if tried["code"] != 0:
        return warning(
            f"nvcc: {_why(tried)}: DeepSpeed's CUDA kernels cannot be compiled",
            "install the CUDA toolkit of torch's version, and put its bin on PATH",
        )
    return ok(tried["said"])


def libaio(seen: Seen) -> Verdict | None:
    tried = seen.exam["builds"].get("libaio")
    if tried is None:
        return None
    if tried["code"] == 0:
        return ok("compiles and links")
    if seen.wanted.swaps_to_nvme:
        return broken(
            f"{_why(tried)}, and the run offloads to nvme", "apt-get install libaio-dev, or device=cpu"
        )
    return ok("not there: only offload to nvme needs it (apt-get install libaio-dev)")


def _why(tried: Mapping[str, Any]) -> str:
    """A process's last words; how it ended, where it was killed."""
    code = tried["code"]
    if code is not None and code < 0:
        return f"its process was killed by signal {-code}, as by a build for another torch or CUDA"
    return str(tried["said"]) or f"exit code {code}"


def _number(text: str) -> float:
    """Of nvidia-smi's words, which are `[N/A]` where there is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


class Check(NamedTuple):
    subject: str
    title: str
    look: Callable[[Seen], Verdict | None]


CHECKS = (
    Check("machine", "processors", processors),
    Check("machine", "clock", clock),
    Check("machine", "locked memory", locked_memory),
    Check("machine", "open files", open_files),
    Check("machine", "shared memory", shared_memory),
    Check("GPUs", "GPUs", gpus),
    Check("GPUs", "ECC", ecc),
    Check("GPUs", "GPU memory", gpu_memory),
    Check("GPUs", "NVLink", nvlink),
    Check("network", "InfiniBand", infiniband),
    Check("network", "GPUDirect", gpudirect),
    Check("network", "variables", network_variables),
    Check("network", "port", port),
    Check("disks", "checkpoints", checkpoint_disk),
    Check("disks", "NVMe", nvme_disk),
    Check("software", "torch", torch),
    Check("software", "DeepSpeed", _library("deepspeed")),
    Check("software", "megatron-core", _library("megatron-core")),
    Check("software", "Transformer Engine", transformer_engine),
    Check("software", "FP8", fp8_recipes),
    Check("software", "Apex", apex),
    Check("software", "C++ compiler", compiler),
    Check("software", "CUDA compiler", cuda_compiler),
    Check("software", "libaio", libaio),
)


def findings(host: str, seen: Seen) -> list[Finding]:
    """What all checks say of a host."""
    told = [(check, check.look(seen)) for check in CHECKS]
    return [
        Finding(check.subject, check.title, host, *verdict) for check, verdict in told if verdict is not None
    ]
