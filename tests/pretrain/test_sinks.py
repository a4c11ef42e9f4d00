"""Records reach JSON lines, TensorBoard and the console, and a resumed run shows no step twice."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.monitor.csv_monitor import csvMonitor
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pretrain.errors import RunError
from pretrain.monitor.metrics import Record
from pretrain.monitor.sinks import ConsoleSink, DeepSpeedMonitors, JsonLines, duration, short
from pretrain.monitor.trackers import cut_csv_files
from pretrain.plot import draw_losses, main, read_records


def record(step: int, **losses_by_set: float) -> Record:
    values = {
        "loss": 5.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 1000.0 * step,
        "tokens_per_s": 1000.0 / step,
        "step_s": float(step),
        "tflops_per_s_per_device": 0.07,
        "time/forward_s": 0.1,
    }
    return Record(step, values, losses_by_set, trained_s=step * (step + 1) / 2)


def write_life(path: Path, *, resumed_step: int, last: int) -> None:
    sink = JsonLines(path, resumed_step=resumed_step)
    for step in range(resumed_step + 1, last + 1):
        sink.write(record(step))
    sink.close()


def test_a_resumed_run_replaces_the_lines_beyond_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_life(path, resumed_step=0, last=5)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the crash
    write_life(path, resumed_step=3, last=6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    write_life(path, resumed_step=0, last=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


class Monitor:
    """DeepSpeed's MonitorMaster, as far as a sink needs it."""

    def __init__(self, folder: Path):
        self.tb_monitor = SimpleNamespace(summary_writer=SummaryWriter(log_dir=str(folder)))

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        for event in events:
            self.tb_monitor.summary_writer.add_scalar(*event)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    for resumed_step, last in ((0, 5), (3, 6)):
        sink = DeepSpeedMonitors(Monitor(tmp_path), resumed_step=resumed_step, texts={"run": "name: tiny"})
        for step in range(resumed_step + 1, last + 1):
            sink.write(record(step, valid=4.0))
        sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert {
        "train/learning_rate",
        "train/grad_norm",
        "run/tokens_per_s",
        "time/forward_s",
        "eval/valid",
    } <= set(events.Tags()["scalars"])
    assert "run/text_summary" in events.Tags()["tensors"]


def test_a_console_that_is_no_terminal_gets_a_line_per_evaluation_and_at_the_end() -> None:
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=200), num_steps=4, first_step=0)
    sink.write(Record(0, {}, {"valid": 8.3}))
    for step in (1, 2, 3):
        sink.write(record(step))
    sink.write(record(4, valid=1.5))
    sink.close()
    assert out.getvalue().splitlines() == [
        "step 0/4  valid loss 8.3000",
        "step 4/4  loss 1.2500  lr 1.00e-03  norm 0.50  400 tokens/s  70 GFLOP/s per rank  ETA 0s  valid loss 1.5000",
    ]


def test_tokens_per_s_are_those_of_the_interval() -> None:
    """Steps take 1, 2, 3... seconds: the last one's rate is not that of all since the line before."""
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=200), num_steps=9, first_step=0)
    for step in (1, 2, 3):
        sink.write(record(step, **({"valid": 1.0} if step == 2 else {})))
    sink.write(record(4, valid=1.0))
    assert [line.split(" tokens/s")[0].split()[-1] for line in out.getvalue().splitlines()] == ["667", "286"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (65, "1m05s"), (3725, "1h02m"), (200000, "2d07h"), (59.6, "1m00s")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999.0, "999"), (12345.0, "12.3k"), (1.5e9, "1.5G"), (2e15, "2P")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_the_loss_curve_is_drawn(tmp_path: Path, capsys: Any) -> None:
    write_life(tmp_path / "metrics.jsonl", resumed_step=0, last=30)
    main(["loss", str(tmp_path)])
    image = tmp_path / "loss.png"
    assert capsys.readouterr().out.strip() == str(image)
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 10_000
    draw_losses({"a": read_records(tmp_path), "b": read_records(tmp_path)}, tmp_path / "two.png")


def test_a_folder_that_no_run_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no metrics\.jsonl there"):
        main(["loss", str(tmp_path)])


def write_csv_life(folder: Path, *, resumed_step: int, last: int) -> None:
    """As DeepSpeed's monitor writes, which keeps the names of files that have their heading."""
    monitor = csvMonitor.__new__(csvMonitor)
    monitor.enabled, monitor.log_dir = True, str(folder)
    monitor.filenames = cut_csv_files(folder, resumed_step)
    for step in range(resumed_step + 1, last + 1):
        monitor.write_events([("train/loss", 5.0 / step, step)])


def test_csv_files_show_each_step_and_their_heading_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    path = tmp_path / "train_loss.csv"
    write_csv_life(tmp_path, resumed_step=0, last=5)
    with path.open("a") as file:
        file.write("6,0.")  # the crash
    write_csv_life(tmp_path, resumed_step=3, last=6)
    assert [line.split(",")[0] for line in path.read_text().split()] == ["step", *"123456"]


def test_csv_files_of_another_run_are_kept_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "train_loss.csv").write_text("step,loss\n1,5.0\n")
    (tmp_path / "notes.csv").write_text("a,b,c\n")
    assert cut_csv_files(tmp_path, 0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.csv", "train_loss.csv.earlier"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null\n",
        b"[1, 2]\n",
        b'{"step": 1}\n',
        b'{"step": "x", "loss": 2}\n',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_a_file_without_records_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "expert_loads.jsonl").write_bytes(content)
    for kind in ("loss", "experts"):
        with pytest.raises(RunError, match="nothing to draw"):
            main([kind, str(tmp_path)])


def test_a_damaged_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_life(path, resumed_step=0, last=6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\xff{broken\n", *lines[3:5], lines[5][:9]]))
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 4, 5]
    write_life(path, resumed_step=4, last=5)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 4, 5]
