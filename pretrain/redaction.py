"""Which keys and variables hold secrets, and copies of documents without them: the one list of such names.

The DeepSpeed JSON may hold a key of Comet's.  It reaches Comet's client (`monitor/trackers.py`) and nothing that is
written: run folder, logs, TensorBoard, checkpoints and printed configurations get a redacted copy.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pretrain.nested import leaves

REDACTED = "***"
SECRET = re.compile(
    r"((api|access|secret|private)_?key|token|passwd|passphrase|authorization)$|password|secret|credential",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"_?KEY$")  # in addition, of environment variables: comet.experiment_key names a run


def is_secret(key: str) -> bool:
    """Whether a key of a JSON or a run file holds a secret; ``key`` may be dotted."""
    return SECRET.search(key.rpartition(".")[2]) is not None


def is_secret_variable(name: str) -> bool:
    """The same of an environment variable, such as WANDB_API_KEY or HF_TOKEN."""
    return is_secret(name) or VARIABLE.search(name) is not None


def redacted(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose secrets are `REDACTED`, at any depth; what is null or empty stays."""
    return {key: _redacted(value, hides=is_secret(str(key))) for key, value in document.items()}


def _redacted(value: Any, *, hides: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(inner, hides=hides or is_secret(str(key))) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, hides=hides) for inner in value]
    return REDACTED if hides and value not in (None, "", True, False) else value


def redacted_args(args: Iterable[str]) -> list[str]:
    """A command line whose ``key=value`` words show no secret."""
    shown = []
    for arg in args:
        key, equals, _ = arg.partition("=")
        shown.append(f"{key}={REDACTED}" if equals and is_secret(key) else arg)
    return shown


def secret_keys(document: dict[str, Any]) -> list[str]:
    """Dotted keys that hold a secret."""
    return [key for key, value in leaves(document) if is_secret(key) and value not in (None, "")]
