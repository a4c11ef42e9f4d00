"""`megaloom schedule` draws what was simulated."""

from pathlib import Path

import pytest

from launch.schedule import main
from pretrain.errors import RunError


def test_it_draws_lines_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--pp", "4", "--chunks", "2", "--micro-batches", "8", "--schedule", "interleaved"])
    lines = capsys.readouterr().out.splitlines()
    ranks = [line for line in lines if line.startswith("rank ")]
    assert len(ranks) == 4
    assert ranks[0].startswith("rank 0 F0F1F2F3") and ranks[3].startswith("rank 3 ······")
    assert any(line.startswith("step") and "28.5" in line for line in lines)
    assert any(line.startswith("bubble") and "15.8%" in line for line in lines)
    assert any("5.5, 4.5, 3.5, 2.5 micro-batches" in line for line in lines)


def test_transfers_show_what_waiting_messages_cost(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--transfer", "0.2"])
    told = capsys.readouterr().out
    assert "pair" in told and "batch" in told and "blocking" in told


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_it_draws_pictures(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"schedule.{suffix}"
    main(["--schedule", "zb-v", "--chunks", "2", "--out", str(out)])
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forward", "0"], "--forward=0: must be above 0"),
        (["--transfer", "-1"], "--transfer=-1: must be 0 or more"),
        (["--out", "x.nonsense"], "--out=x.nonsense: Format 'nonsense' is not supported"),
        (["--out", "no/folder/x.png"], "no folder no/folder; make it first"),
        (["--schedule", "zbv"], "did you mean zb-v?"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(RunError) as refused:
        main(words)
    assert message in str(refused.value)
