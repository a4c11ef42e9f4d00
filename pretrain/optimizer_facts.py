"""What is known of optimizers by name, for whoever judges, translates, builds and estimates a run; no torch.

"Light" ones keep less than AdamW's 8 bytes a parameter.  A name of DeepSpeed's is read in any case, as DeepSpeed does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pretrain.engine.row_slices import Shape

DEEPSPEED_OPTIMIZERS = ("Adam", "AdamW", "Lion", "Muon", "Adagrad", "Lamb")
TORCH_OPTIMIZERS = ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
OTHER_OPTIMIZERS = ("AdamW8bit", "GaLore")  # of bitsandbytes; of engine/galore.py
OPTIMIZERS = (*DEEPSPEED_OPTIMIZERS, *OTHER_OPTIMIZERS, *TORCH_OPTIMIZERS)
CPU_OFFLOADABLE = ("Adam", "AdamW", "Lion", "Adagrad")
# deepspeed/runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS.
TRIED_BY_DEEPSPEED = {"adam", "adamw", "lion", "muon", "adagrad"}
# By us, in tests/parity: those that change each number by itself, and those that engine/ has taught to see rows.
TRIED_HERE = {"lion", "adamw8bit", "sgd", "radam", "adafactor", "galore"}
BY_ROWS = {"adafactor", "galore"}  # sees partitions as rows under ZeRO 1 and 2

LIGHT_PACKAGE = "bitsandbytes"
LIGHT_EXTRA = "pip install 'megaloom[light]'"
BLOCK_ELEMENTS = 256  # of one scale, bitsandbytes/optim/optimizer.py, Optimizer2State.init_state
SMALLEST_IN_8_BIT = 4096  # elements of a tensor; smaller ones stay in fp32, min_8bit_size there
MAP_ELEMENTS = 256  # of the table of 8-bit numbers, in fp32, one for each moment


class GaLoreDefaults(NamedTuple):
    """Of jiaweizzhao/GaLore, README (Zhao et al. 2024, arXiv:2403.03507)."""

    rank: int = 128
    update_gap: int = 200
    scale: float = 0.25
    embeddings: bool = False  # project embeddings and heads too


def canonical(kind: str) -> str:
    """The name as it is written here; DeepSpeed's in any case, others as they are."""
    return next((name for name in OPTIMIZERS if name.lower() == kind.lower()), kind)


def galore_params(params: dict[str, Any]) -> GaLoreDefaults:
    """Those that a run file states, over the defaults."""
    return GaLoreDefaults(**{key: params[key] for key in GaLoreDefaults._fields if key in params})


def galore_shape(shape: Sequence[int], rank: int, *, is_hidden: bool) -> Shape:
    """A matrix that is projected, by rows; anything else as elements that have nothing to do with each other."""
    if is_hidden and len(shape) == 2 and min(shape) > rank:
        return Shape(shape[0], shape[1])
    elements = 1
    for length in shape:
        elements *= length
    return Shape(elements, 1)


def _count(value: Any) -> str | None:
    return (
        None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1
        else "a whole number above 0"
    )


def _above_0(value: Any) -> str | None:
    return None if isinstance(value, int | float) and value > 0 else "a number above 0"


def _at_most_0(value: Any) -> str | None:
    return None if isinstance(value, int | float) and value <= 0 else "a number of 0 or less"


def _at_least_1(value: Any) -> str | None:
    return None if isinstance(value, int | float) and value >= 1 else "a number of 1 or more"


def _yes_or_no(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _two_small_ones(value: Any) -> str | None:
    """torch.optim.Adafactor's eps."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if is_pair and (value[0] is None or _above_0(value[0]) is None) and _above_0(value[1]) is None:
        return None
    return "two numbers above 0, the first of them perhaps null"


# Of optimizer.params, beside lr, betas, eps and weight_decay: what is wrong with a value, or None.
LIGHT_PARAMETERS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "AdamW8bit": {"min_8bit_size": _count},
    "GaLore": {"rank": _count, "update_gap": _count, "scale": _above_0, "embeddings": _yes_or_no},
    "Adafactor": {"beta2_decay": _at_most_0, "eps": _two_small_ones, "d": _at_least_1},
}


class OptimizerChoice(NamedTuple):
    """What decides about the bytes of an optimizer's states."""

    kind: str = "adamw"  # in small letters
    decays: bool = True  # matrices apart from vectors, in two groups
    decays_embeddings: bool = True
    has_momentum: bool = False  # of those for which that is a choice
    rank: int = 128
    projects_embeddings: bool = False
    min_8bit_size: int = SMALLEST_IN_8_BIT


ADAMW = OptimizerChoice()


def choice_of(
    kind: str, params: dict[str, Any], *, weight_decay: float, decay_embeddings: bool
) -> OptimizerChoice:
    """As a run file states it."""
    return OptimizerChoice(
        canonical(kind).lower(),
        weight_decay > 0,
        decay_embeddings,
        bool(params.get("momentum")),
        galore_params(params).rank,
        galore_params(params).embeddings,
        params.get("min_8bit_size", SMALLEST_IN_8_BIT),
    )
