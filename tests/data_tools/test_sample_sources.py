from pathlib import Path

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from data_tools.config import DataConfig
from data_tools.corpus import Corpus
from data_tools.index_cache import IndexCache
from data_tools.sample_sources import TEST, VALID, SourceMaker
from tests.data_tools.making import make_corpus, words


@pytest.mark.parametrize("split", ["98,2,0", "90,7,3", "90,5,5", "1,1,1", "2,1"])
@pytest.mark.parametrize("num_documents", [37, 150])
def test_a_split_holds_out_the_documents_that_megatron_would(
    tmp_path: Path, split: str, num_documents: int
) -> None:
    make_corpus(tmp_path / "c", [words(number) for number in range(num_documents)])
    config = DataConfig.model_validate({"train": str(tmp_path / "c"), "sequence_length": 8, "split": split})
    corpora = {str(tmp_path / "c"): Corpus(tmp_path / "c")}
    make = SourceMaker(config, corpora, cache=IndexCache(tmp_path / "cache"))
    theirs = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    sources = [make.train(), make.held_out(VALID, {}).get(VALID), make.held_out(TEST, {}).get(TEST)]
    for source, bounds in zip(sources, theirs, strict=True):
        expected = None if bounds is None else tuple(round(bound * float(num_documents)) for bound in bounds)
        if source is None:
            assert expected is None
        else:
            (dataset,) = source.dataset.datasets
            assert (dataset.first, dataset.last) == expected
