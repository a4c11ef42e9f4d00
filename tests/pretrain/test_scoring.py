"""What `megaloom evaluate` says is what the run's own evaluation said; accuracy and bytes are counted right."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.errors import DataError
from data_tools.tokenizer_training import train_tokenizer
from data_tools.training_data import open_data
from launch.evaluate import main as evaluate
from pretrain.errors import RunError
from pretrain.fill import fill_spans, fill_text
from pretrain.generate import load_generator, load_trained
from pretrain.scoring import held_out_sets, score
from tests.data_tools.making import make_corpus, make_index, words
from tests.pretrain.test_resume import eight, train
from tests.ranks import RankPool

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": {
        "model": {"preset": "tiny-bert", "vocab_size": None},
        "data__objective": {"kind": "mlm", "second_task": "sentence_order"},
    },
    "electra": {
        "model": {"preset": "tiny-electra", "vocab_size": None},
        "data__objective": {"kind": "mlm", "replaced": True},
    },
    "t5": {
        "model": {"preset": "tiny-t5", "vocab_size": None},
        "data__objective": {"kind": "span_corruption"},
    },
}


@pytest.fixture(scope="module")
def runs(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of each family."""
    out = tmp_path_factory.mktemp("runs")
    for family, changes in FAMILIES.items():
        raw = eight(corpus, out, name=family, **changes)
        ranks.run(train, 2, raw, 2)
    return {family: out / family for family in FAMILIES}


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_add_up(runs: dict[str, Path], family: str) -> None:
    trained = load_trained(runs[family], torch.device("cpu"))
    source = held_out_sets(trained, None)["valid"]
    found = score(trained, source, num_samples=6, micro_size=4)
    one_by_one = score(trained, source, num_samples=6, micro_size=1)
    assert found.loss == pytest.approx(one_by_one.loss, rel=1e-5) and found.tokens == one_by_one.tokens
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert 0 <= found.accuracy <= 1 and (found.sentence_accuracy is not None) == (family == "bert")
    if family == "gpt":  # bytes: every token is one, but for the ends of documents
        batch = open_data(trained.config.data).validation["valid"].batch(list(range(6)))
        num_bytes = int((batch.labels < 256).sum())
        assert found.bits_per_byte == pytest.approx(
            found.loss * found.tokens / math.log(2) / num_bytes, rel=1e-6
        )


@pytest.mark.ranks
def test_a_corpus_may_be_named_and_json_asked_for(
    runs: dict[str, Path], corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate([str(runs["gpt"]), "--data", corpus, "--samples", "3", "--json"])
    (facts,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert facts["samples"] == 3 and facts["tokens"] == 3 * 32


@pytest.mark.ranks
def test_a_corpus_of_another_tokenizer_is_refused_before_anything_is_computed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.scoring.score", None)
    make_bpe_corpus(tmp_path / "bpe")
    with pytest.raises(RunError, match=r"^--data=.*bpe: prepared with tokenizer .*json \(300 ids\), .*257"):
        evaluate([str(runs["gpt"]), "--data", str(tmp_path / "bpe")])
    # One that does not say which made it is read with the checkpoint's, if that has all its ids.
    bare = make_index(tmp_path / "bare", [[7] * 500, [8] * 70 + [300] * 70])
    with pytest.raises(DataError, match="token 70 of document 1 is id 300, beyond the vocabulary of 257 ids"):
        evaluate([str(runs["gpt"]), "--data", bare])
    trained = load_trained(runs["gpt"], torch.device("cpu"))
    (source,) = held_out_sets(trained, make_index(tmp_path / "bare", [[7] * 500])).values()
    assert source.dataset.num_distinct_samples() > 0


def make_bpe_corpus(prefix: Path) -> None:
    tokenizer = str(prefix.with_name("bpe.json"))
    train_tokenizer((words(number) for number in range(50)), vocab_size=300).save(tokenizer)
    make_corpus(prefix, [words(number) for number in range(9)], tokenizer=tokenizer)


@pytest.mark.ranks
def test_masks_are_filled(runs: dict[str, Path]) -> None:
    bert = load_trained(runs["bert"], torch.device("cpu"))
    found = fill_text(bert, "the [MASK]oom w[MASK]s", top=4)
    assert len(found.guesses) == 2 and all(len(guesses) == 4 for guesses in found.guesses)
    assert all(guesses[0].probability >= guesses[1].probability for guesses in found.guesses)
    t5 = load_trained(runs["t5"], torch.device("cpu"))
    filled = fill_spans(t5, "the [MASK]oom w[MASK]s", most=5)
    assert filled.startswith("the ") and "oom w" in filled
    with pytest.raises(RunError, match=r"nothing to fill in; write \[MASK\]"):
        fill_text(bert, "the loom", top=1)
    with pytest.raises(RunError, match="there may be 1 to 100"):
        fill_spans(t5, "the loom", most=1)
    with pytest.raises(RunError, match="a BERT, which fills in masked words: megaloom fill"):
        load_generator(runs["bert"], torch.device("cpu"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "other"], "--set=other: unknown; the run has valid"),
        (["--samples", "0"], "--samples=0: must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(runs: dict[str, Path], words: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        evaluate([str(runs["gpt"]), *words])
