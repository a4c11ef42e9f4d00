"""What is wrong with data while a run trains ends it, with one line from a rank that met it."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.background_check import BackgroundCheck
from data_tools.errors import DataError
from pretrain.batches import Feed
from pretrain.program import exit_code
from tests.opened import opened
from tests.ranks import RankPool
from tests.runs import tiny


def test_a_fault_that_only_some_ranks_meet_is_printed_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise DataError("corpus=c: damaged")

    monkeypatch.setenv("RANK", "3")
    assert exit_code("gpt", work) == 2
    assert capsys.readouterr().err == "gpt: corpus=c: damaged\n"


def ways_to_end(raw: dict[str, Any]) -> list[str]:
    """What the next step raises when the background finds a fault, and when the loader does."""
    told = []
    with opened(raw) as here:
        feed: Feed = here.feed
        feed.next_step()
        feed._check.fault = "corpus=c: block 3 of .bin"
        told.append(fault_of(feed))
        feed._check = BackgroundCheck(())
        for dataset in here.data.train.dataset.datasets:
            dataset.vocab_size = 0
        told.append(max(fault_of(feed) for _ in range(3)))  # one or two steps were read before
    return told


def fault_of(feed: Feed) -> str:
    try:
        feed.next_step()
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_every_rank_that_reads_damage_ends(ranks: RankPool, corpus: str, tmp_path: Path) -> None:
    first, second = ranks.run(ways_to_end, 2, tiny(corpus, tmp_path, layout={"tp": 2}))
    for told in (first, second):
        assert told[0] == "corpus=c: block 3 of .bin"
        assert told[1].startswith("corpus=") and "beyond the vocabulary of 0 ids" in told[1]
