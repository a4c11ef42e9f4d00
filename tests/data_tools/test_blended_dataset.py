from pathlib import Path

import pytest

from data_tools.blended_dataset import BlendedDataset
from tests.data_tools.test_gpt_dataset import dataset, numbered


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    return [numbered(tmp_path / "a", [9] * 5), numbered(tmp_path / "b", [9] * 20)]


def blend(parts: list[str], weights: list[float], **options: int) -> BlendedDataset:
    return BlendedDataset([dataset(prefix, **options) for prefix in parts], weights)


def test_samples_come_from_their_corpora_in_proportion_and_in_order(parts: list[str]) -> None:
    blended = blend(parts, [1, 3])
    alone = [dataset(prefix) for prefix in parts]
    assert blended.consumed_by_corpus(40) == {parts[0]: 10, parts[1]: 30}
    for number in range(40):
        which, within = blended.blend.locate(number)
        assert blended.sample(number).tokens.tolist() == alone[which].sample(within).tokens.tolist()


def test_distinct_samples_end_where_the_first_corpus_repeats(parts: list[str]) -> None:
    blended = blend(parts, [1, 1])
    count = blended.num_distinct_samples()
    sizes = [part.samples_per_epoch for part in blended.datasets]
    assert sizes == [11, 44]
    assert blended.blend.counts(count)[0] <= 11 < blended.blend.counts(count + 1)[0]
    assert blended.num_epochs(count) == [1, 1]
    assert blended.num_epochs(50) == [3, 1]
    assert blend(parts[:1], [1]).num_distinct_samples() == 11


def test_the_fingerprint_follows_everything_that_determines_the_order(parts: list[str]) -> None:
    same = blend(parts, [1, 3]).fingerprint()
    assert blend(parts, [0.25, 0.75]).fingerprint() == same
    others = [
        blend(parts, [1, 2]),
        blend(parts[::-1], [1, 3]),
        blend(parts, [1, 3], seed=2),
        blend(parts, [1, 3], s=5),
        blend(parts, [1, 3], last=4),
        blend(parts[:1], [1]),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_the_hash_of_samples_follows_their_tokens(parts: list[str]) -> None:
    blended = blend(parts, [1, 3])
    assert blended.samples_hash(5, 3) == blend(parts, [1, 3]).samples_hash(5, 3)
    assert blended.samples_hash(5, 3) != blended.samples_hash(6, 3)
