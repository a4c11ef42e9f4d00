"""Becomes DeepSpeed's NVMe tuner (`ds_nvme_tune`), in the environment in which our kernels are compiled.

Started by `megaloom tune-nvme` as a process: ``python -m pretrain.engine.nvme_tuner WORDS...``.  The tuner itself
compiles its kernel anew wherever torch's default folder is, once for every measurement that begins before that is done.
"""

import os
import sys
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder

from pretrain.engine.native_builds import build_obstacle, own_environment
from pretrain.engine.preflight import libaio_is_there

NO_LIBAIO = "asynchronous I/O needs libaio and its headers: apt-get install libaio-dev (Debian, Ubuntu)"


def main() -> None:
    if not libaio_is_there():
        sys.exit(f"error: {NO_LIBAIO}")
    obstacle = build_obstacle(AsyncIOBuilder())
    if obstacle is not None:
        sys.exit(f"error: DeepSpeed's async_io does not build here: {obstacle}")
    tuner = Path(sys.executable).parent / "ds_nvme_tune"  # beside it is `ds_io`, which it starts
    if not tuner.is_file():
        sys.exit(f"error: {tuner}: DeepSpeed's tuner is not there; install DeepSpeed into this environment")
    with own_environment():
        os.execv(sys.executable, [sys.executable, str(tuner), *sys.argv[1:]])


if __name__ == "__main__":
    main()
