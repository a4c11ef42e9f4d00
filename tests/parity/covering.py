"""A covering array of parity cells: every pair of features that a run may have stands in at least one cell.

    python -m tests.parity.covering        # writes covering.json anew, after a feature was added here

Faults of a product of features are nearly always faults of two of them (Kuhn, Wallace, Gallo 2004, IEEE TSE 30(6)), so
`make test` trains these cells, and `make test-all` the full tables beside this file.  Which pairs exist is asked of the
rules of a run, not written down here: a pair that no run may have is one that the rules refuse.
"""

import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.config_io import make_run
from pretrain.errors import RunError
from tests.runs import make_corpus, tiny

FILE = Path(__file__).with_name("covering.json")
MAX_RANKS = 4
SEED, TRIES = 1, 12
MASKED_WORDS = {"kind": "mlm", "second_task": "next_sentence", "unit": "word"}
Cell = dict[str, str]
Changes = dict[str, Any]

MODELS: dict[str, Changes] = {
    "gpt": {},
    "gpt2": {
        "model__normalization": "layernorm",
        "model__activation": "gelu",
        "model__linear_bias": True,
        "model__position_embedding": "learned",
        "model__num_kv_heads": 4,
        "model__qk_norm": False,
    },
    "window": {
        "model__sliding_window": 8,
        "model__activation": "squared_relu",
        "model__position_embedding": "none",
        "model__tie_embeddings": False,
    },
    "mtp": {"model__mtp": {"depth": 2}},
    "experts": {
        "model__moe": {
            "num_experts": 4,
            "top_k": 2,
            "ffn_hidden_size": 32,
            "shared_ffn_hidden_size": 32,
            "aux_loss": 0.01,
            "z_loss": 0.001,
        },
    },
    "deepseek": {
        "model__preset": "tiny-deepseek",
        "model__num_layers": 3,
        "model__qk_norm": False,
        "model__tie_embeddings": True,
    },
    "bert": {
        "model": {"preset": "tiny-bert", "num_layers": 4, "vocab_size": None, "init_std": 0.1},
        "data__objective": MASKED_WORDS,
    },
    "roberta": {
        "model": {"preset": "tiny-bert", "num_layers": 4, "vocab_size": None, "init_std": 0.1},
        "model__bert": {"norm": "pre", "token_types": 0, "sentence_head": False},
        "model__tie_embeddings": False,
        "data__objective": {"kind": "mlm", "unit": "span"},
    },
    "electra": {
        "model": {"preset": "tiny-electra", "num_layers": 3, "vocab_size": None, "init_std": 0.1},
        "data__objective": {"kind": "mlm", "replaced": True},
    },
    "t5": {
        "model": {"preset": "tiny-t5", "num_layers": 3, "vocab_size": None, "init_std": 0.1},
        "data__objective": {"kind": "span_corruption"},
    },
    "t5-ul2": {
        "model": {"preset": "tiny-t5", "num_layers": 3, "vocab_size": None, "init_std": 0.1},
        "model__activation": "geglu_tanh",
        "model__tie_embeddings": False,
        "model__position_embedding": "rotary",
        "data__objective": {"kind": "span_corruption", "mixture": "ul2", "target_length": 24},
    },
    "fim": {"model__vocab_size": None, "data__objective": "fim"},
    "prefix-lm": {
        "model__vocab_size": None,
        "model__attention": "prefix",
        "data__objective": "prefix_lm",
    },
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
    "Adafactor": {"optimizer__type": "Adafactor", "optimizer__lr": 1e-2},
}
FEATURES: dict[str, dict[str, Changes]] = {  # of each the first value goes with all others
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
WHAT_IS_COMPUTED = ("model", "optimizer", "documents", "dropout", "precision")  # all else is how
# In bf16 every token takes every expert, or roundings would send it elsewhere.
EVERY_EXPERT: dict[str, Changes] = {
    "experts": {"model__moe__top_k": 4},
    "deepseek": {"model__moe__top_k": 8, "model__moe__num_groups": None, "model__moe__group_top_k": None},
}
Pair = tuple[tuple[str, str], tuple[str, str]]


def completed(cell: Mapping[str, str]) -> Cell:
    """With the plainest value of each feature that the cell does not name."""
    found = {feature: cell.get(feature, next(iter(values))) for feature, values in FEATURES.items()}
    if found["experts"] != "ep1":  # what experts are shared out over, unless the cell says otherwise
        found["model"] = cell.get("model", "experts")
        found["replicas"] = cell.get("replicas", "dp2")
        if found["experts"] == "ep2-etp2":
            found["tensor"] = cell.get("tensor", "tp2+sp")
    if found["zero"] == "zero0" and ("zero" not in cell and found["experts"] != "ep1"):
        found["zero"] = "zero1"
    if found["precision"] == "bf16" and "zero" not in cell:
        found["zero"] = "zero1"
    if found["model"] in ("experts", "deepseek") and found["tensor"] == "tp2" and "tensor" not in cell:
        found["tensor"] = "tp2+sp"
    return found


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


def raw_run(cell: Cell, corpus: str, out: Path) -> dict[str, Any]:
    return tiny(corpus, out, **changes(cell))


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
        make_run(raw_run(cell, corpus, out), world_size=num_ranks(cell))
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


def generate(corpus: str, out: Path, *, seed: int = SEED, tries: int = TRIES) -> list[Cell]:
    """Greedy, after AETG (Cohen et al. 1997, IEEE TSE 23(7)): a pair that no cell has yet, with what adds most pairs.

    allpairspy 2.5.1 leaves out one pair in seven that a run may have, since rules need whole runs to be asked.
    """
    chance = random.Random(seed)

    @cache
    def is_allowed(values: tuple[str, ...]) -> bool:
        return refusal(dict(zip(FEATURES, values, strict=True)), corpus, out) is None

    def cell_around(pair: Pair, missing: set[Pair]) -> Cell:
        cell, fixed = completed(dict(pair)), {feature for feature, _ in pair}
        for feature in chance.sample(sorted(FEATURES.keys() - fixed), len(FEATURES) - len(fixed)):
            changed = [{**cell, feature: value} for value in FEATURES[feature]]
            chance.shuffle(changed)
            changed.sort(key=lambda other: -len(pairs_of(other) & missing))
            cell = next((other for other in changed if is_allowed(tuple(other.values()))), cell)
        return cell

    missing = {pair for pair in pairs() if is_allowed(tuple(completed(dict(pair)).values()))}
    found: list[Cell] = []
    while missing:
        around = chance.sample(sorted(missing), min(tries, len(missing)))
        cells = [cell_around(pair, missing) for pair in around]
        found.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing) / num_ranks(cell) ** 0.5))
        missing -= pairs_of(found[-1])
    return found


def read() -> list[Cell]:
    return [dict(zip(FEATURES, words.split(), strict=True)) for words in json.loads(FILE.read_text())]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = generate(make_corpus(Path(folder)), Path(folder) / "out")
    FILE.write_text(json.dumps([" ".join(cell.values()) for cell in cells], indent=0) + "\n")
    print(f"{len(cells)} cells")


if __name__ == "__main__":
    main()
