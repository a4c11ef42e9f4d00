"""`megaloom doctor`: every check in what it calls ok, a warning and broken; and the whole of it on this machine."""

import io
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import bandwidth, checks, doctor, doctor_page
from launch.__main__ import main
from launch.bandwidth import Rates
from launch.checks import GIB, MIB, Finding, Seen, Wanted
from launch.hostfile import Host
from launch.remote import Answer
from pretrain.bandwidth import parties, rounds
from pretrain.nested import put

GPU = {"name": "H100", "driver": "570.1", "memory_mib": "81559", "ecc_errors": "0"}
SMI = {"index": "0", "name": "H100", "memory_used_mib": "4", "ecc_mode": "Enabled", "ecc_errors": "0"}
PORT = {"port": "mlx5_0:1", "state": "ACTIVE", "rate_gbit_per_s": 400, "link": "InfiniBand"}
WORKS = {"code": 0, "said": "loads"}


def seen(*, wanted: Wanted | None = None, skew_s: float = 0.0, **changes: Any) -> Seen:
    """A healthy host with two GPUs and InfiniBand, and dotted ``probe__...`` or ``exam__...`` changes."""
    facts: dict[str, Any] = {
        "probe": {"cores": 16, "gpus": [GPU, GPU], "ports": {"29500": True}},
        "exam": {
            "limits": {"memlock_bytes": None, "open_files": 65536},
            "memory": {"total_bytes": 64 * GIB, "available_bytes": 60 * GIB},
            "shared_memory": {"total_bytes": 32 * GIB, "free_bytes": 32 * GIB},
            "infiniband": [PORT, {**PORT, "port": "mlx5_1:1"}],
            "modules": ["nvidia_peermem"],
            "interfaces": ["eth0", "ib0", "lo"],
            "variables": {},
            "gpus": [SMI, {**SMI, "index": "1"}],
            "topology": [[0, 1, "NV18"]],
            "disks": {
                ".": {
                    "total_bytes": 900 * GIB,
                    "free_bytes": 800 * GIB,
                    "write_mb_per_s": 2000.0,
                    "folder": "/w",
                }
            },
            "builds": {
                "torch": {"code": 0, "said": "2.13.0 13.0 2 2.28.3"},
                "deepspeed": {"code": 0, "said": "0.19.8"},
                "megatron-core": {"code": 0, "said": "0.16.1"},
                "transformer engine": WORKS,
                "apex": {"code": 0, "said": "absent"},
                "compiler": {"code": 0, "said": "g++ 12"},
                "ninja": {"code": 0, "said": "1.13"},
                "nvcc": {"code": 0, "said": "13.0"},
                "libaio": {"code": 0, "said": ""},
            },
        },
    }
    for key, value in changes.items():
        put(facts, key.replace("__", "."), deepcopy(value))
    return Seen(facts["probe"], facts["exam"], wanted or Wanted(num_hosts=2, ranks_per_host=2), skew_s)


def test_a_healthy_host_has_nothing_to_mend() -> None:
    found = checks.findings("a", seen())
    assert [finding for finding in found if finding.level != "ok"] == []
    assert {finding.title for finding in found} >= {"GPUs", "NVLink", "InfiniBand", "GPUDirect", "torch"}


CRASH = {"code": -11, "said": ""}
MISSING = {"code": 127, "said": "not installed"}
DISK = {"total_bytes": GIB, "free_bytes": GIB, "write_mb_per_s": 2000.0, "folder": "/w"}
ONE = Wanted(num_hosts=2, ranks_per_host=2)
RECIPES = {
    "code": 0,
    "said": json.dumps({"delayed": None, "current": None, "blockwise": "needs 12.9", "mxfp8": "needs 10.0"}),
}

WRONG: list[tuple[str, str, str, dict[str, Any]]] = [
    ("processors", "warning", "for 32 ranks", {"wanted": Wanted(ranks_per_host=32)}),
    ("clock", "warning", "off by +61.0 s", {"skew_s": 61.0}),
    ("locked memory", "broken", "64 KiB, and InfiniBand", {"exam__limits__memlock_bytes": 65536}),
    ("open files", "warning", "1,024 at most", {"exam__limits__open_files": 1024}),
    (
        "shared memory",
        "broken",
        "64 MiB free",
        {"exam__shared_memory": {"total_bytes": 64 * MIB, "free_bytes": 64 * MIB}},
    ),
    ("shared memory", "broken", "/dev/shm: gone", {"exam__shared_memory": {"fault": "gone"}}),
    ("GPUs", "warning", "A100 and H100", {"probe__gpus": [GPU, {**GPU, "name": "A100"}]}),
    ("ECC", "broken", "GPU 0 has 3 uncorrected", {"exam__gpus": [{**SMI, "ecc_errors": "3"}]}),
    ("ECC", "warning", "off on GPU 0", {"exam__gpus": [{**SMI, "ecc_mode": "Disabled"}]}),
    ("GPU memory", "warning", "GPU 0 (9,000 MiB)", {"exam__gpus": [{**SMI, "memory_used_mib": "9000"}]}),
    ("NVLink", "warning", "1 of 2 pairs", {"exam__topology": [[0, 1, "NV18"], [0, 2, "SYS"]]}),
    ("NVLink", "warning", "different width", {"exam__topology": [[0, 1, "NV18"], [0, 2, "NV17"]]}),
    ("InfiniBand", "broken", "mlx5_0:1 is DOWN", {"exam__infiniband": [{**PORT, "state": "DOWN"}, PORT]}),
    (
        "InfiniBand",
        "warning",
        "at 200 Gbit/s",
        {"exam__infiniband": [PORT, {**PORT, "rate_gbit_per_s": 200}]},
    ),
    ("GPUDirect", "warning", "not loaded", {"exam__modules": []}),
    ("variables", "broken", "no interface eno1", {"exam__variables": {"NCCL_SOCKET_IFNAME": "eno1"}}),
    ("variables", "broken", "no interface eth", {"exam__variables": {"GLOO_SOCKET_IFNAME": "eth"}}),
    ("variables", "warning", "InfiniBand is there", {"exam__variables": {"NCCL_IB_DISABLE": "1"}}),
    ("port", "broken", "29500 is taken", {"wanted": Wanted(port=29500), "probe__ports": {"29500": False}}),
    (
        "checkpoints",
        "broken",
        "checkpoints take 2 GiB",
        {"wanted": Wanted(checkpoint_bytes=2 * GIB), "exam__disks": {".": DISK}},
    ),
    (
        "checkpoints",
        "broken",
        "Permission denied",
        {"exam__disks": {".": {"fault": "Permission denied", "folder": "/w"}}},
    ),
    ("checkpoints", "warning", "slow", {"exam__disks": {".": {**DISK, "write_mb_per_s": 20.0}}}),
    (
        "NVMe",
        "warning",
        "slow for offload",
        {"wanted": Wanted(nvme_folder="/n"), "exam__disks": {"/n": {**DISK, "write_mb_per_s": 300.0}}},
    ),
    ("torch", "broken", "killed by signal 11", {"exam__builds__torch": CRASH}),
    (
        "torch",
        "broken",
        "without CUDA",
        {"exam__builds__torch": {"code": 0, "said": "2.13.0+cpu None False -"}},
    ),
    ("torch", "broken", "sees no GPU", {"exam__builds__torch": {"code": 0, "said": "2.13.0 13.0 False -"}}),
    (
        "DeepSpeed",
        "broken",
        "No module",
        {"exam__builds__deepspeed": {"code": 1, "said": "No module named 'deepspeed'"}},
    ),
    (
        "megatron-core",
        "broken",
        "no answer",
        {"exam__builds__megatron-core": {"code": None, "said": "no answer within 120 s"}},
    ),
    (
        "Transformer Engine",
        "warning",
        "not installed",
        {"exam__builds__transformer engine": {"code": 0, "said": "absent"}},
    ),
    (
        "Transformer Engine",
        "broken",
        "killed by signal 11, as by a build",
        {"wanted": Wanted(needs_te=True), "exam__builds__transformer engine": CRASH},
    ),
    (
        "FP8",
        "broken",
        "fp8.recipe=mxfp8: needs 10.0",
        {"wanted": Wanted(needs_te=True, fp8_recipe="mxfp8"), "exam__builds__fp8 recipes": RECIPES},
    ),
    (
        "Apex",
        "warning",
        "Pyramid",
        {"exam__builds__apex": {"code": 0, "said": "PyPI's package for the Pyramid web framework"}},
    ),
    ("C++ compiler", "warning", "g++: not installed", {"exam__builds__compiler": MISSING}),
    ("C++ compiler", "warning", "ninja: not installed", {"exam__builds__ninja": MISSING}),
    ("CUDA compiler", "warning", "nvcc: not installed", {"exam__builds__nvcc": MISSING}),
    (
        "libaio",
        "broken",
        "offloads to nvme",
        {
            "wanted": Wanted(swaps_to_nvme=True),
            "exam__builds__libaio": {"code": 1, "said": "error: no libaio.h"},
        },
    ),
]


@pytest.mark.parametrize(("title", "level", "said", "changes"), WRONG)
def test_a_check_finds_its_fault_and_says_the_fix(
    title: str, level: str, said: str, changes: dict[str, Any]
) -> None:
    found = [finding for finding in checks.findings("a", seen(**changes)) if finding.title == title]
    assert [finding.level for finding in found] == [level]
    assert said in found[0].said and found[0].fix


@pytest.mark.parametrize(
    ("wanted", "level", "said"),
    [
        (Wanted(), "ok", "Transformer Engine does delayed, current"),
        (Wanted(fp8_recipe="current"), "ok", "Transformer Engine does delayed, current"),
        (Wanted(fp8_recipe="mxfp8"), "warning", "fp8.recipe=mxfp8: needs 10.0"),
    ],
    ids=str,
)
def test_a_recipe_that_torch_would_follow_instead_is_no_fault(wanted: Wanted, level: str, said: str) -> None:
    facts = seen(wanted=wanted, **{"exam__builds__fp8 recipes": RECIPES})
    found = next(finding for finding in checks.findings("a", facts) if finding.title == "FP8")
    assert (found.level, found.said) == (level, said)


def test_every_check_has_a_failing_test() -> None:
    assert {check.title for check in checks.CHECKS} == {title for title, *_ in WRONG}


def test_a_laptop_lacks_nothing_that_a_cpu_needs() -> None:
    laptop = seen(
        wanted=Wanted(),
        probe__gpus=[],
        exam__gpus=[],
        exam__topology=[],
        exam__infiniband=[],
        exam__modules=[],
        exam__limits__memlock_bytes=65536,
        exam__builds__torch={"code": 0, "said": "2.13.0+cpu None False -"},
        exam__builds__nvcc=MISSING,
        exam__builds__libaio=MISSING,
    )
    laptop.exam["builds"]["transformer engine"] = {"code": 0, "said": "absent"}
    assert {finding.level for finding in checks.findings("a", laptop)} == {"ok"}
    facts = {"probe": laptop.probe, "examination": laptop.exam}
    assert "up to about 2,013 million" in doctor_page.enough_for(facts)[0]


def examined(folder: Path, path: str = "", **questions: Any) -> dict[str, Any]:
    """What the examination finds, sent to a bare Python as ssh would."""
    asked = {"sys_root": str(folder / "sys"), "proc_root": str(folder / "proc"), **questions}
    done = subprocess.run(
        [sys.executable, "-", json.dumps(asked)],
        input=Path("launch/examination.py").read_text(),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{path or os.environ['PATH']}"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def program(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_the_examination_reads_the_fabric(tmp_path: Path) -> None:
    for device, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1: DOWN", "10 Gb/sec (4X)"),
    ):
        port = tmp_path / "sys/class/infiniband" / device / "ports/1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", rate), ("link_layer", "InfiniBand")):
            (port / name).write_text(f"{text}\n")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    (tmp_path / "sys/class/net/ib0").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1024 kB\nMemAvailable:    512 kB\n")
    rows = "0, H100, 4, Enabled, 0\n1, H100, 9000, Enabled, 2"
    topo = "\tGPU0\tGPU1\tNIC0\nGPU0\t X \tNV18\tPIX\t0-15\nGPU1\tNV18\t X \tSYS\t0-15\nNIC0\tPIX\tSYS\t X\n"
    program(tmp_path, "nvidia-smi", f"if [ $1 = topo ]; then printf '{topo}'; else printf '{rows}'; fi")
    found = examined(tmp_path, variables=["HOME"])
    assert found["infiniband"] == [
        {"port": "mlx5_0:1", "state": "ACTIVE", "rate_gbit_per_s": 400, "link": "InfiniBand"},
        {"port": "mlx5_1:1", "state": "DOWN", "rate_gbit_per_s": 10, "link": "InfiniBand"},
    ]
    assert found["modules"] == ["nvidia_peermem"] and found["interfaces"] == ["ib0"]
    assert found["memory"] == {"total_bytes": 1 << 20, "available_bytes": 1 << 19}
    assert [gpu["ecc_errors"] for gpu in found["gpus"]] == ["0", "2"]
    assert found["topology"] == [[0, 1, "NV18"]] and "HOME" in found["variables"]


def test_the_examination_outlives_what_crashes(tmp_path: Path) -> None:
    program(tmp_path, "cc", "echo 'fatal error: libaio.h: No such file' >&2; exit 1")
    programs = {
        "dies": "import os; os.kill(os.getpid(), 11)",
        "fails": "raise ImportError('another ABI')",
        "good": "print(7)",
    }
    builds = examined(tmp_path, programs=programs)["builds"]
    assert builds["dies"]["code"] == -11
    assert builds["fails"] == {"code": 1, "said": "ImportError: another ABI"}
    assert builds["good"] == {"code": 0, "said": "7"}
    assert builds["libaio"] == {"code": 1, "said": "fatal error: libaio.h: No such file"}


def test_the_examination_writes_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    wanted = str(folder / "not/yet/there")
    found = examined(tmp_path, disks=[wanted, "/proc/1"], write_bytes=1 << 20)["disks"]
    assert found[wanted]["folder"] == str(folder) and found[wanted]["write_mb_per_s"] > 0
    assert not list(folder.iterdir()) and "fault" in found["/proc/1"]


def test_a_clock_is_off_only_beyond_the_question_and_its_answer() -> None:
    answer = Answer("a", 0, "", "", asked_s=100.0, answered_s=103.0)
    assert [doctor.skew_s(answer, clock_s) for clock_s in (90.0, 101.0, 110.0)] == [-10.0, 0.0, 7.0]


def probed(**changes: Any) -> dict[str, Any]:
    facts = {
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "code": {"hash": "abc"},
        "gpus": [],
        "files": {},
    }
    return {**facts, **changes}


def test_hosts_that_differ_are_told_with_what_most_have() -> None:
    facts = {"a": probed(), "b": probed(packages={"torch": "2.12.0"}), "c": probed()}
    found = doctor.agreement(facts, [])
    assert [(each.host, each.level) for each in found] == [("b", "broken")]
    assert found[0].said == "torch is 2.12.0, and 2.13.0 on the other hosts"


def test_data_that_no_host_has_and_slots_without_gpus_are_broken() -> None:
    facts = {"a": probed(gpus=[GPU], files={"x.bin": [None, "No such file"]})}
    found = doctor.agreement(facts, [Host("a", (0, 1))])
    assert [(each.title, each.level) for each in found] == [("slots", "broken"), ("readable", "broken")]
    assert "x.bin cannot be read" in found[1].said


def test_everybody_meets_everybody_once_and_nobody_twice_at_a_time() -> None:
    for num in range(2, 10):
        played = list(rounds(num))
        pairs = [pair for each in played for pair in each]
        assert sorted(pairs) == [(a, b) for a in range(num) for b in range(a + 1, num)]
        assert all(len({end for pair in each for end in pair}) == 2 * len(each) for each in played)
    assert parties(["a", "a", "b"]) == {"a": [0, 1], "b": [2]}
    assert parties(["a", "a"]) == {"rank 0": [0], "rank 1": [1]}


def rates(**slow: float) -> Rates:
    pairs = [
        {"source": a, "target": b, "gb_per_s": slow.get(f"{a}{b}", 10.0)}
        for a in "abcd"
        for b in "abcd"
        if a != b
    ]
    return Rates([{"bytes": MIB, "gb_per_s": 1.0}], pairs)


def test_a_slow_pair_is_named_and_a_slow_host_alone() -> None:
    assert {finding.level for finding in bandwidth.judge(rates())} == {"ok"}
    (pair,) = bandwidth.judge(rates(ab=5.0))
    assert pair.said == "a to b 5.00 GB/s, 50% of the median 10.00" and pair.level == "warning"
    (host,) = bandwidth.judge(rates(da=1.0, db=1.0, dc=1.0))
    assert host.host == "d" and host.said.startswith("sends to every other at 1.00 GB/s, 10% of the median")


def test_the_page_puts_hosts_together_and_the_fix_under_its_fault() -> None:
    found = [Finding("machine", "clock", host, "ok", "agrees") for host in "abc"]
    found += [Finding("machine", "open files", "b", "warning", "10 at most", "raise it")]
    found += [Finding("disks", "checkpoints", f"h{number}", "ok", f"{number} GiB") for number in range(9)]
    out = io.StringIO()
    doctor_page.show(["a", "b", "c"], found, None, (), Console(file=out, width=100))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:4] == [
        "machine",
        "  ok       clock               agrees",
        "  warning  open files          b: 10 at most",
        "                               fix: raise it",
    ]
    assert "  ok       checkpoints         and likewise on 5 more hosts" in lines
    assert lines[-1] == "3 hosts: 1 warning"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile", "nowhere"], "--hostfile nowhere: no such file"),
        (["nowhere.yaml"], "nowhere.yaml: no such run file"),
        (["train.steps=3"], "train.steps=3: overrides a run file, and none is given"),
        (["--include", "a"], "--include a: chooses from a hostfile"),
        (["--bandwidth", "--launcher", "teleport"], "--launcher teleport: unknown"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and message in told and "Traceback" not in told


def test_this_machine_is_examined_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--quick", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert left.value.code == 1 and document["broken"]
    assert [each["title"] for each in document["findings"] if each["level"] == "broken"] == ["variables"]
    (facts,) = document["facts"].values()
    assert facts["examination"]["memory"]["total_bytes"] > 0 and facts["probe"]["cores"] >= 1
