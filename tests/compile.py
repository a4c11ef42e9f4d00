"""DeepSpeed's kernels that the tests use, compiled ahead of them; a minute or two each on a fresh machine."""

from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from pretrain.engine.native_builds import build_obstacle
from pretrain.engine.preflight import libaio_is_there


def kernels() -> None:
    build(CPUAdamBuilder())


def asynchronous_io() -> None:
    if libaio_is_there():
        build(AsyncIOBuilder())


def build(builder: OpBuilder) -> None:
    obstacle = build_obstacle(builder)
    assert obstacle is None, obstacle
