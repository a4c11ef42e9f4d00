"""Where records go: JSON lines, TensorBoard (DeepSpeed's monitors), the console. Sinks are dumb.

A resumed run must not show a step twice, so opening a sink at step n drops what an earlier life of the run
wrote beyond n.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pretrain.checkpoint.store import write_whole
from pretrain.disks import no_space
from pretrain.monitor.heat_map import heat_map
from pretrain.monitor.metrics import Record
from pretrain.monitor.records import read_lines

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0  # on a console that is no terminal


class Sink(Protocol):
    """Takes records; only rank 0 has sinks."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line in ``metrics.jsonl``."""

    def __init__(self, path: Path, *, resumed_step: int):
        write_whole(path, "".join(f"{line}\n" for line in _kept_lines(path, resumed_step)))
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: list[str] = []  # lines that a full disk has not taken yet

    def write(self, record: Record) -> None:
        self.put(record.as_dict())

    def put(self, line: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(line) + "\n")
        is_first = len(self._waiting) == 1
        fault = self._flush()
        if fault is not None and is_first:
            log.warning(
                "%s; its lines wait in memory", no_space(fault, self._path) or f"{self._path}: {fault}"
            )

    def close(self) -> None:
        if self._waiting and self._flush() is not None:
            log.warning("%s: its last %d lines were not written", self._path, len(self._waiting))
        self._file.close()

    def _flush(self) -> OSError | None:
        """Whole lines or none."""
        text = "".join(self._waiting).encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError as fault:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            return fault
        self._waiting.clear()
        return None


class ExpertLoadLines:
    """Every expert's load now and then, in ``expert_loads.jsonl``, for `megaloom plot experts`."""

    def __init__(self, path: Path, *, resumed_step: int):
        self._path, self._resumed_step = path, resumed_step
        self._lines: JsonLines | None = None

    def write(self, record: Record) -> None:
        loads = record.expert_loads
        if loads is None:
            return
        if self._lines is None:
            self._lines = JsonLines(self._path, resumed_step=self._resumed_step)
        rounded = [[round(load, 4) for load in row] for row in loads.loads]
        self._lines.put({"step": record.step, "layers": loads.layers, "loads": rounded})

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


class DeepSpeedMonitors:
    """TensorBoard, and whatever other monitor the DeepSpeed JSON switches on, by step."""

    def __init__(self, monitor: Any, *, resumed_step: int, texts: dict[str, str]):
        self._monitor, self._has_failed = monitor, False
        writer = self._writer()
        if writer is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # 0.2 s, for rank 0 alone

            # Tells TensorBoard to forget what earlier files hold from here on.
            first = resumed_step + 1 if resumed_step else 0
            writer.file_writer.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
            for title, text in texts.items():
                writer.add_text(title, f"```\n{text}\n```", resumed_step)

    def write(self, record: Record) -> None:
        try:
            self._write(record)
        except OSError as fault:  # a monitor must not end a run
            if not self._has_failed:
                log.warning("a monitor cannot write: %s", no_space(fault) or fault)
            self._has_failed = True

    def _write(self, record: Record) -> None:
        names = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
        events = []
        for key, value in record.as_dict().items():
            if key != "step" and math.isfinite(value):
                name = names.get(key) or (key if "/" in key else f"run/{key}")
                events.append((name, value, record.step))
        self._monitor.write_events(events)
        writer = self._writer()
        if writer is not None and record.expert_loads is not None:
            writer.add_figure("moe/loads", heat_map(record.expert_loads, record.step), record.step)

    def close(self) -> None:
        writer = self._writer()
        if writer is not None:
            with contextlib.suppress(OSError):  # told when it was met
                writer.close()

    def _writer(self) -> Any:
        board = self._monitor.tb_monitor
        return None if board is None else board.summary_writer


class ConsoleSink:
    """One live line on a terminal; elsewhere a line every few seconds and at every evaluation."""

    def __init__(self, console: Console, *, num_steps: int, first_step: int):
        self._console, self._num_steps, self._first_step = console, num_steps, first_step
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        )
        self._started_s = self._last_line_s = time.monotonic()
        self._steps_since_start = 0
        self._counted: tuple[float, float] | None = None  # tokens and seconds of training up to the last line
        if self._live:
            self._live.start()

    def write(self, record: Record) -> None:
        self._steps_since_start = record.step - self._first_step
        line = self._line(record)
        now_s = time.monotonic()
        is_last = record.step == self._num_steps
        if self._live:
            self._live.update(Text(line))
        if record.losses_by_set or is_last or (not self._live and now_s - self._last_line_s >= LINE_EVERY_S):
            self._console.print(line, highlight=False, soft_wrap=True)
            self._last_line_s = now_s
            if record.values:
                self._counted = (record.values["tokens"], record.trained_s)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _line(self, record: Record) -> str:
        values = record.values
        parts = [f"step {record.step}/{self._num_steps}"]
        if values:
            parts += [
                f"loss {values['loss']:.4f}",
                f"lr {values['learning_rate']:.2e}",
                f"norm {values['grad_norm']:.2f}",
                *experts(values),
                f"{short(self._tokens_per_s(record))} tokens/s",
                speed(values),
                f"ETA {self._eta(record.step)}",
            ]
        parts += [f"{name} loss {loss:.4f}" for name, loss in record.losses_by_set.items()]
        parts += [
            f"{name} loss {loss:.4f}" if name == "test" else f"test loss of {name} {loss:.4f}"
            for name, loss in record.test_losses.items()
        ]
        return "  ".join(parts)

    def _tokens_per_s(self, record: Record) -> float:
        """Over all steps since the last line, or since this start."""
        values = record.values
        if self._counted is None:
            step_s = values["step_s"]
            self._counted = (values["tokens"] - values["tokens_per_s"] * step_s, record.trained_s - step_s)
        tokens, trained_s = self._counted
        return (values["tokens"] - tokens) / max(record.trained_s - trained_s, 1e-9)

    def _eta(self, step: int) -> str:
        per_step_s = (time.monotonic() - self._started_s) / max(1, self._steps_since_start)
        return duration((self._num_steps - step) * per_step_s)


def experts(values: dict[str, float]) -> list[str]:
    """The least and the most loaded expert of all layers, where there are experts."""
    if "moe/load_max" not in values:
        return []
    return [f"experts {values['moe/load_min']:.2f}..{values['moe/load_max']:.2f}"]


def speed(values: dict[str, float]) -> str:
    """MFU where the device's peak is known, else the rate itself."""
    if "mfu" in values:
        return f"MFU {values['mfu']:.1%}"
    number = short(values["tflops_per_s_per_device"] * 1e12)
    digits = number.rstrip("kMGTP")
    return f"{digits} {number.removeprefix(digits)}FLOP/s per rank"


def short(value: float) -> str:
    """12345.6 -> '12.3k'."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def counted(number: int, thing: str) -> str:
    """1, 'layer' -> '1 layer'; 2 -> '2 layers'."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _kept_lines(path: Path, resumed_step: int) -> Sequence[str]:
    """Records up to the step that a run goes on from."""
    if not resumed_step:
        return []
    lines, num_dropped = read_lines(path)
    if num_dropped:
        log.warning("%s: %s dropped that are no records", path, counted(num_dropped, "line"))
    return [line.text for line in lines if line.record["step"] <= resumed_step]
