"""DeepSpeed's checkpoint files are read as tensors and plain data: a file from elsewhere cannot run its code.

DeepSpeed 0.19.8 unpickles whatever a file holds (`torch.load(weights_only=False)`) in its checkpoint engine and beside
it: runtime/base_optimizer.py:337, runtime/zero/stage3.py:3660 and 3770, checkpoint/universal_checkpoint.py:251.  Here
torch's own restricted unpickler reads them all, whatever the caller asks for, and takes the few classes that DeepSpeed
writes: they hold numbers, and building them calls nothing.
"""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pretrain.errors import RunError

CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def plain_data_only(folder: Path) -> Iterator[None]:
    """Within it, `torch.load` takes nothing else.

    Raises:
        RunError: a file of the checkpoint ``folder`` holds something else, or is none of torch's.
    """
    load = torch.load

    def plain(*arguments: Any, **named: Any) -> Any:
        return load(*arguments, **{**named, "weights_only": True})

    try:
        with patch.object(torch, "load", plain), torch.serialization.safe_globals(CLASSES):
            yield
    except pickle.UnpicklingError as fault:
        raise RunError(refusal(folder, _named(fault))) from None


def first_stranger(paths: Iterable[Path]) -> str | None:
    """What is not plain data in files that torch wrote, and where; tensors are mapped and not read."""
    with torch.serialization.safe_globals(CLASSES):
        for path in paths:
            try:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as fault:
                return f"{path.name}: {_named(fault)}"
            except (RuntimeError, OSError, EOFError, ValueError) as fault:
                return f"{path.name}: {str(fault).splitlines()[0]}"
    return None


def refusal(folder: Path, what: str) -> str:
    return (
        f"checkpoint {folder}: holds more than tensors and numbers ({what}), and could run code of its author; "
        "it is not loaded"
    )


def _named(fault: pickle.UnpicklingError) -> str:
    """The class or function that torch refuses, from its page of advice."""
    lines = [line.strip() for line in str(fault).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])[:200]
