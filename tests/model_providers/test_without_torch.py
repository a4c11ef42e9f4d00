"""A login node has no torch: what plans and prices a model imports without it."""

import subprocess
import sys

from tests.patience import patient_s

TORCH_FREE = (
    "config",
    "presets",
    "layout",
    "cost",
    "activation_memory",
    "partition",
    "errors",
    "moe_config",
    "model_rules",
    "hugging_face.architectures",
)


def test_planning_modules_import_without_torch() -> None:
    imports = ", ".join(f"model_providers.{name}" for name in TORCH_FREE)
    program = f"import sys; sys.modules['torch'] = sys.modules['megatron'] = None; import {imports}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=patient_s(60))
