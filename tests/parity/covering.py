"""A covering array of parity cells: every pair of features that a run may have is in at least one cell.

    python -m tests.parity.covering        # writes covering.json again, after a feature was added here

Most failures of combined features need only two of them (Kuhn, Wallace, Gallo 2004, IEEE TSE 30(6)), so `make test`
trains these cells, and `make test-all` the full tables in the other files of this folder.  The rules of a run decide
which pairs exist: a pair that is in no cell is one that they refuse, whatever else the run has.
"""

import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from pretrain.config_io import make_run
from pretrain.errors import RunError
from tests.parity.models import (
    BERT,
    DEEPSEEK,
    ELECTRA,
    FIM,
    GPT2,
    MOE,
    PREFIX_LM,
    ROBERTA,
    T5,
    T5_UL2,
    UNTIED,
    WINDOW,
    Changes,
)
from tests.runs import make_corpus, tiny

FILE = Path(__file__).with_name("covering.json")
MAX_RANKS = 4
SEED, TRIES = 1, 12
Cell = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

MODELS: dict[str, Changes] = {
    "gpt": {},
    "gpt2": GPT2,
    "window": WINDOW | UNTIED,
    "mtp": {"model__mtp": {"depth": 2}},
    "experts": {"model__moe": MOE},
    "deepseek": DEEPSEEK,
    "bert": BERT,
    "roberta": {**ROBERTA, "model__bert__norm": "pre"},
    "electra": ELECTRA,
    "t5": T5,
    "t5-ul2": T5_UL2,
    "fim": FIM,
    "prefix-lm": {"model__vocab_size": None, **PREFIX_LM},
}
PIPELINES: dict[str, Changes] = {
    "pp1": {},
    "1f1b": {"layout__pp": 2},
    "interleaved": {"layout__pp": 2, "layout__schedule": "interleaved", "layout__chunks": 2},
    "zb-h1": {"layout__pp": 2, "layout__schedule": "zb-h1"},
    "zb-v": {"layout__pp": 2, "layout__schedule": "zb-v", "layout__chunks": 2},
}
TENSOR: dict[str, Changes] = {
    "tp1": {},
    "tp2": {"layout__tp": 2},
    "tp2+sp": {"layout__tp": 2, "layout__sequence_parallel": True},
}
EXPERTS: dict[str, Changes] = {
    "ep1": {},
    "ep2": {"layout__ep": 2, "layout__etp": 1},
    "ep2-etp2": {"layout__ep": 2, "layout__etp": 2},
    "ep2-allgather": {"layout__ep": 2, "layout__etp": 1, "layout__dispatcher": "allgather"},
}
ZERO: dict[str, Changes] = {
    "zero0": {"deepspeed": "zero0.json"},
    "zero1": {"deepspeed": "zero1.json"},
    "zero2": {"deepspeed": "zero2.json"},
    "zero3": {"deepspeed": "zero3.json"},
    "zero3-offload": {"deepspeed": "zero3_cpu_offload.json"},
}
# What selective recompute forgets, of the layers that a model has.
PARTS = {
    "experts": ["core_attn", "layernorm", "moe"],
    "bert": ["core_attn", "mlp"],
    "t5": ["layernorm", "mlp"],
}
RECOMPUTE: dict[str, Changes] = {
    "kept": {},
    "selective": {"recompute": {"mode": "selective", "modules": ["core_attn", "layernorm", "mlp"]}},
    "full-every-2": {"recompute": {"mode": "full", "every": 2}},
    "on-host": {"recompute": {"mode": "none", "offload": True, "offload_above_bytes": 0}},
}
DOCUMENTS: dict[str, Changes] = {
    "joined": {},
    "reset-masked": {"data__documents": "reset", "data__mask_boundary_loss": True},
}
OPTIMIZERS: dict[str, Changes] = {
    "AdamW": {},
    "Lion": {"optimizer__type": "Lion", "optimizer__lr": 1e-4},
    "AdamW8bit": {"optimizer__type": "AdamW8bit"},
    "Adafactor": {"optimizer__type": "Adafactor", "optimizer__lr": 1e-3},
}
FEATURES: dict[str, dict[str, Changes]] = {  # the first value of each is the plainest
    "model": MODELS,
    "pipeline": PIPELINES,
    "zero": ZERO,
    "recompute": RECOMPUTE,
    "optimizer": OPTIMIZERS,
    "experts": EXPERTS,
    "tensor": TENSOR,
    "documents": DOCUMENTS,
    "replicas": {"dp1": {}, "dp2": {}},
    "precision": {"fp32": {}, "bf16": {"precision": "bf16"}},
    "loss": {"logits": {}, "chunks": {"loss__chunk_tokens": 24}},
    "dropout": {"no-dropout": {}, "dropout": {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}},
}
# From these cells, with a pair's two values and one further change, a run with that pair is looked for.
BASES: tuple[Cell, ...] = (
    {},
    {"zero": "zero1"},
    {"model": "window"},
    {"model": "experts", "experts": "ep2", "zero": "zero1", "replicas": "dp2"},
    {"model": "experts", "experts": "ep2", "zero": "zero1", "tensor": "tp2+sp"},
    {"model": "experts", "experts": "ep2-etp2", "zero": "zero1", "tensor": "tp2+sp", "replicas": "dp2"},
)
WHAT_IS_COMPUTED = ("model", "optimizer", "documents", "dropout", "precision")  # all else is how
# In bf16 every token takes every expert, or roundings would send it elsewhere.
EVERY_EXPERT: dict[str, Changes] = {
    "experts": {"model__moe__top_k": 4},
    "deepseek": {"model__moe__top_k": 8, "model__moe__num_groups": None, "model__moe__group_top_k": None},
}


def completed(cell: Mapping[str, str]) -> Cell:
    """With the plainest value of each feature that the cell does not name."""
    return {feature: cell.get(feature, next(iter(values))) for feature, values in FEATURES.items()}


def name(cell: Cell) -> str:
    return "-".join(cell.values())


def num_ranks(cell: Cell) -> int:
    """tp x pp x dp."""
    sizes = (cell["tensor"] != "tp1", cell["pipeline"] != "pp1", cell["replicas"] == "dp2")
    return 2 ** sum(sizes)


def changes(cell: Cell) -> Changes:
    """What the cell changes in the tests' tiny run."""
    found: Changes = {}
    for feature, value in cell.items():
        found |= FEATURES[feature][value]
    if "recompute" in found and cell["recompute"] == "selective" and cell["model"] in PARTS:
        found["recompute"] = {**found["recompute"], "modules": PARTS[cell["model"]]}
    if cell["precision"] == "bf16" and cell["model"] in EVERY_EXPERT:
        found |= EVERY_EXPERT[cell["model"]]
    return found


def reference(cell: Cell) -> Cell:
    """The cell that computes the same in the plainest way: in one process, unless tensor ranks draw for themselves."""
    plain = {feature: cell[feature] for feature in WHAT_IS_COMPUTED}
    if cell["precision"] == "bf16":
        plain |= {"zero": "zero1"}  # without ZeRO, gradients would be summed in bf16
    if cell["dropout"] == "dropout":  # tensor ranks hold other heads or tokens, and draw for themselves
        plain |= {"tensor": cell["tensor"]}
    return completed(plain)


def refusal(cell: Cell, corpus: str, out: Path) -> str | None:
    """Why no run may have these features together."""
    if num_ranks(cell) > MAX_RANKS:
        return "more ranks than a test has"
    try:
        make_run(tiny(corpus, out, **changes(cell)), world_size=num_ranks(cell))
    except RunError as error:
        return str(error)
    return None


def pairs() -> Iterator[Pair]:
    """All pairs of values of two features."""
    for (one, ones), (other, others) in itertools.combinations(FEATURES.items(), 2):
        for value, another in itertools.product(ones, others):
            yield (one, value), (other, another)


def pairs_of(cell: Cell) -> set[Pair]:
    return set(itertools.combinations(cell.items(), 2))


def around(pair: Pair) -> Iterator[Cell]:
    """Cells with this pair: the bases, then the bases with another value of one further feature."""
    bases = [completed({**base, **dict(pair)}) for base in BASES]
    yield from bases
    for base, (feature, values) in itertools.product(bases, FEATURES.items()):
        if feature not in dict(pair):
            yield from ({**base, feature: value} for value in values)


def generate(corpus: str, out: Path, *, seed: int = SEED, tries: int = TRIES) -> list[Cell]:
    """Greedy, after AETG (Cohen et al. 1997, IEEE TSE 23(7)): a pair that no cell has yet, with what adds most pairs.

    A cell is another computation than its reference, or it would test nothing.  allpairspy 2.5.1 leaves out one pair
    in seven that a run may have, since rules need whole runs to be asked.
    """
    chance = random.Random(seed)

    @cache
    def is_allowed_named(values: tuple[str, ...]) -> bool:
        cell = dict(zip(FEATURES, values, strict=True))
        return cell != reference(cell) and refusal(cell, corpus, out) is None

    def is_allowed(cell: Cell) -> bool:
        return is_allowed_named(tuple(cell.values()))

    def grown(cell: Cell, pair: Pair, missing: set[Pair]) -> Cell:
        """Feature by feature, the allowed value that adds most pairs."""
        others = sorted(FEATURES.keys() - dict(pair).keys())
        for feature in chance.sample(others, len(others)):
            changed = [{**cell, feature: value} for value in FEATURES[feature]]
            chance.shuffle(changed)
            changed.sort(key=lambda other: -len(pairs_of(other) & missing))
            cell = next(filter(is_allowed, changed), cell)
        return cell

    begun = {pair: next(filter(is_allowed, around(pair)), None) for pair in pairs()}
    missing = {pair for pair, cell in begun.items() if cell is not None}
    found: list[Cell] = []
    while missing:
        cells = [
            grown(begun[pair], pair, missing)  # type: ignore[arg-type]
            for pair in chance.sample(sorted(missing), min(tries, len(missing)))
        ]
        found.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing) / num_ranks(cell) ** 0.5))
        missing -= pairs_of(found[-1])
    return found


def read() -> list[Cell]:
    return [dict(zip(FEATURES, words.split(), strict=True)) for words in json.loads(FILE.read_text())]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = generate(make_corpus(Path(folder)), Path(folder) / "out")
    FILE.write_text(json.dumps([" ".join(cell.values()) for cell in cells], indent=0) + "\n")
    print(f"{len(cells)} cells of {len(set().union(*map(pairs_of, cells)))} pairs")


if __name__ == "__main__":
    main()
