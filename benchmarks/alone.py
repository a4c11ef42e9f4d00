"""A world of one process, for benchmarks that need no launcher.  Import it before DeepSpeed, which then says less."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")  # DeepSpeed reads it when it is imported
warnings.filterwarnings("ignore")

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import model_providers.late_compile  # noqa: F401  # before megatron-core
from pretrain.monitor.logs import start

RANK_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@contextmanager
def world_of_one() -> Iterator[None]:
    """What the launcher would have set, and a process group of this process; all of it gone afterwards."""
    ours = {name: value for name, value in RANK_OF_ONE.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        with tempfile.TemporaryDirectory() as folder:
            backend = get_accelerator().communication_backend_name()
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                start(0)
                yield
            finally:
                dist.destroy_process_group()
    finally:
        for name in ours:
            del os.environ[name]
