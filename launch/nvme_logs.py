"""What DeepSpeed's NVMe tuner wrote: one log for each setting and direction, whose name is the setting.

``read_block_overlap_ftd1_d32_bs1M_p2.txt`` (deepspeed/nvme/perf_run_sweep.py, get_log_file): submit many requests at
once or single ones; overlap submission with completion or in sequence; devices; queue depth; block size; threads.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import RunError

GIB = 1 << 30  # the tuner's "GB/sec", deepspeed/nvme/test_ds_aio_utils.py
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1}
NAME = re.compile(
    r"(?P<way>read|write)_(?P<submit>single|block)_(?P<events>sequential|overlap)_ftd\d+"
    r"_d(?P<depth>\d+)_bs(?P<block>\d+)(?P<unit>[KMG]?)_p(?P<threads>\d+)\.txt"
)
SPEED = re.compile(r"^E2E (?:Read|Write) Speed = (\S+) GB/sec", re.MULTILINE)


class Setting(NamedTuple):
    """How requests go to the disk."""

    block_size: int  # bytes
    queue_depth: int
    threads: int  # that share one request
    single_submit: bool
    overlap_events: bool


class Speed(NamedTuple):
    read_bytes_per_s: float
    write_bytes_per_s: float

    @property
    def together(self) -> float:
        """By which DeepSpeed's tuner chooses too (deepspeed/nvme/perf_generate_param.py)."""
        return self.read_bytes_per_s + self.write_bytes_per_s


def read_logs(folder: Path) -> dict[Setting, Speed]:
    """Settings of which both directions were measured."""
    found: dict[Setting, dict[str, float]] = defaultdict(dict)
    for path in sorted(folder.glob("*_logs/*.txt")):
        name = NAME.fullmatch(path.name)
        speed = SPEED.search(path.read_text("utf-8", errors="replace"))
        if name is not None and speed is not None:
            found[_setting(name)][name["way"]] = float(speed[1]) * GIB
    whole = {setting: Speed(ways["read"], ways["write"]) for setting, ways in found.items() if len(ways) == 2}
    if not whole:
        raise RunError("DeepSpeed's tuner measured nothing: no setting was both read and written")
    return whole


def best(speeds: dict[Setting, Speed]) -> Setting:
    """The fastest in both directions together; of equals the one that asks for least."""
    return min(speeds, key=lambda setting: (-speeds[setting].together, setting))


def _setting(name: re.Match[str]) -> Setting:
    return Setting(
        block_size=int(name["block"]) * UNITS[name["unit"]],
        queue_depth=int(name["depth"]),
        threads=int(name["threads"]),
        single_submit=name["submit"] == "single",
        overlap_events=name["events"] == "overlap",
    )
