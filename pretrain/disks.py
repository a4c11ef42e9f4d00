"""A disk that is full, in one line that names it, whichever library met it."""

import errno
import re
import shutil
from pathlib import Path

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
# torch's zip writer and safetensors tell it in text.
IN_WORDS = re.compile(
    r"No space left|Disk quota|iostream error|PytorchStreamWriter failed writing|unexpected pos \d+",
    re.IGNORECASE,
)
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def no_space(fault: BaseException, folder: Path | None = None) -> str | None:
    """The line for a fault that is a full disk, else None; ``folder``: where the writing went on, if that is known."""
    is_full = isinstance(fault, OSError) and fault.errno in NO_SPACE
    if not is_full and not (isinstance(fault, Exception) and IN_WORDS.search(str(fault))):
        return None
    named = getattr(fault, "filename", None)
    place = Path(str(named)) if named else folder
    if place is None:
        return "no space left on a disk that is written to; free some, or choose another folder"
    return f"no space left for {place}{_free(place)}; free some, or choose a folder on another disk"


def _free(place: Path) -> str:
    there = next((path for path in (place, *place.absolute().parents) if path.exists()), None)
    if there is None:
        return ""
    try:
        return f" ({size_told(shutil.disk_usage(there).free)} free)"
    except OSError:
        return ""


def size_told(number: float) -> str:
    """1234567 -> '1.23 MB': never 0 for what is not."""
    for limit, unit in UNITS:
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f} bytes"
