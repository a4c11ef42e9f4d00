"""Becomes DeepSpeed's NVMe tuner (`ds_nvme_tune`), in the environment in which our kernels are compiled.

Started by `megaloom tune-nvme` as a process: ``python -m pretrain.engine.nvme_tuner SCRIPTS WORDS...``.  It starts
`ds_io` from the folder of its own script, for every measurement; both are written into SCRIPTS, so that this Python
runs them and not whichever made the environment, and `ds_io` loads the kernel as ours do: by itself it would compile
it anew wherever the kernel came from another environment.
"""

import os
import sys
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder

from pretrain.engine.native_builds import build_obstacle, own_environment
from pretrain.engine.preflight import libaio_is_there

NO_LIBAIO = "asynchronous I/O needs libaio and its headers: apt-get install libaio-dev (Debian, Ubuntu)"

# DeepSpeed's scripts of these names (bin/ds_nvme_tune, bin/ds_io), without what the tuner prints at its end.
TUNE = "from deepspeed.nvme import parse_sweep_arguments, sweep_main\nsweep_main(parse_sweep_arguments())\n"
MEASURE = """from deepspeed.nvme import ds_io_main
from pretrain.engine.nvme_tuner import load_kernel

load_kernel()  # also in the processes that ds_io spawns
if __name__ == "__main__":
    ds_io_main()
"""


def main() -> None:
    if not libaio_is_there():
        sys.exit(f"error: {NO_LIBAIO}")
    load_kernel()
    scripts = Path(sys.argv[1])
    tuner = write_script(scripts / "ds_nvme_tune", TUNE)
    write_script(scripts / "ds_io", MEASURE)
    with own_environment():
        os.execv(sys.executable, [sys.executable, str(tuner), *sys.argv[2:]])


def load_kernel() -> None:
    """Compiled if need be; DeepSpeed's builders return what this process has loaded."""
    obstacle = build_obstacle(AsyncIOBuilder())
    if obstacle is not None:
        sys.exit(f"error: DeepSpeed's async_io does not build here: {obstacle}")


def write_script(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}", "utf-8")
    path.chmod(0o700)
    return path


if __name__ == "__main__":
    main()
