"""What every rank of a test is forked from: all libraries imported, kernels loaded, no thread started.

Importing this is for the server that `multiprocessing` forks ranks from, and for nobody else: it changes the
process-wide environment.
"""

import contextlib
import gc
import importlib
import os
import warnings
from functools import lru_cache

from tests.ranks import CPU_ONLY_ENVIRONMENT

os.environ.update(CPU_ONLY_ENVIRONMENT)  # before the first import of torch
warnings.simplefilter("ignore")  # upstream's, once for each import
OFTEN_USED = (
    "hypothesis",
    "pretrain.run",
    "pretrain.parity",
    "pretrain.generate",
    "launch.memory",
    "tests.opened",
    "tests.parity.record",
    "tests.model_providers.plans",
)
# Which libraries import no sooner than a run needs them.
LATE = (
    "torch._dynamo",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.utils.pin_memory",
    "megatron.core.transformer.moe.experts",
    "rich._emoji_codes",
    "torch.profiler._cupti_monitor",
    "torch._subclasses.schema_check_mode",
    "torch.utils.serialization.config",
    "numpy.ctypeslib",
    "ds_configs",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)

for name in ("torch", "deepspeed", "model_providers.late_compile", *OFTEN_USED):
    importlib.import_module(name)
for name in LATE:
    with contextlib.suppress(ImportError):  # another version has other names
        importlib.import_module(name)

import cpuinfo  # noqa: E402
import deepspeed  # noqa: E402
import torch  # noqa: E402

from tests.compile import kernels  # noqa: E402

_ = deepspeed.ops.__compatible_ops__  # every process would ask the compiler anew

# DeepSpeed's kernels ask it in every process, for two seconds.
cpuinfo.get_cpu_info = lru_cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()  # DeepSpeed's optimizers on the CPU ask it, for two seconds each time
torch.set_num_threads(1)
kernels()
num_threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
assert num_threads == 1, f"{num_threads} threads: a process with more than one cannot be forked soundly"
gc.collect()
gc.freeze()  # what is here stays: no rank looks through it again
