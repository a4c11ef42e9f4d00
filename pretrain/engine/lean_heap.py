"""Freed memory goes back to the system at once, for ranks that offload because there is little of it.

glibc serves blocks of up to 32 MiB from its heap once some of that size were freed, and keeps what is freed in between
others (mallopt(3), M_MMAP_THRESHOLD).  A rank of 88M parameters on NVMe kept 0.7 GB so, more than all its tensors.
Every block above the threshold is mapped by itself then, which costs page faults and is not for ordinary runs.
"""

import ctypes

M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED_ABOVE_BYTES = 1 << 20


def return_freed_memory() -> bool:
    """Whether the C library listens; glibc's does."""
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_ABOVE_BYTES))
    except (AttributeError, OSError):  # another C library
        return False
