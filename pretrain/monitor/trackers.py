"""DeepSpeed's monitors (TensorBoard, wandb, comet, CSV files), opened by rank 0 from the run's own JSON.

DeepSpeed's engine would open them itself, from a JSON that it also writes into every checkpoint; it gets one without
secrets and without monitors (`engine_document`).  CSV files of an earlier start are cut to the step that a run resumes
from, and keep their one heading.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.checkpoint.store import write_whole
from pretrain.redaction import REDACTED, is_secret, redacted

# Section of the JSON -> the module that DeepSpeed's monitor imports, and the package that has it.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "comet_ml"),
}
SECTIONS = (*PACKAGES, "csv_monitor")
EARLIER = ".earlier"  # of a CSV file that another run, or an earlier start from step 0, has left


def tracker_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Monitors that are switched on and cannot be opened, one sentence each."""
    for section in SECTIONS:
        stated = document.get(section) or {}
        if not stated.get("enabled"):
            continue
        module, package = PACKAGES.get(section, ("csv", ""))
        if find_spec(module) is None:
            yield (
                f"{section}.enabled=true: the package {package} is not installed here; pip install {package}, or "
                f"set {section}.enabled=false in the DeepSpeed JSON"
            )
        for key, value in stated.items():
            if is_secret(key) and value == REDACTED:
                yield (
                    f"{section}.{key}={REDACTED}: a run folder's deepspeed.json holds no secrets; write the value "
                    f"into a JSON of your own, or leave the key out and set {section.upper()}_{key.upper()}"
                )


def engine_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's engine is given, and writes into its files: no secrets, and no monitors of its own."""
    off = {key: {**document[key], "enabled": False} for key in SECTIONS if document.get(key)}
    return redacted({**document, **off})


def open_trackers(document: Mapping[str, Any], *, resumed_step: int) -> Any:
    """DeepSpeed's `MonitorMaster` for the whole JSON; rank 0 only."""
    from deepspeed.monitor.config import get_monitor_config  # with DeepSpeed, on ranks only
    from deepspeed.monitor.monitor import MonitorMaster

    master = MonitorMaster(get_monitor_config(dict(document)))
    if master.csv_monitor is not None:
        # Names of files that have their heading already (deepspeed/monitor/csv_monitor.py, write_events).
        master.csv_monitor.filenames += cut_csv_files(Path(master.csv_monitor.log_dir), resumed_step)
    return master


def cut_csv_files(folder: Path, resumed_step: int) -> list[str]:
    """Drop rows beyond the step; returns the files that are kept, by their names without suffix.

    At step 0 files that have rows already are another run's, or an earlier start's: they get the suffix `EARLIER`.
    """
    kept = []
    for path in sorted(folder.glob("*.csv")):
        heading, *rows = list(csv.reader(io.StringIO(path.read_text("utf-8")))) or [[]]
        if len(heading) != 2 or heading[0] != "step":
            continue
        if not resumed_step:
            path.replace(path.with_name(path.name + EARLIER))
            continue
        by_step = {
            int(row[0]): row
            for row in rows
            if len(row) == 2 and row[0].isdigit() and int(row[0]) <= resumed_step
        }
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([heading, *by_step.values()])
        write_whole(path, text.getvalue())
        kept.append(path.stem)
    return kept
