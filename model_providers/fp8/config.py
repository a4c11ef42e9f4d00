"""Which products run in eight bits, by which recipe: facts, without torch.

Recipes have the names that Transformer Engine and megatron-core use where they have one.
"""

from typing import Literal

from pydantic import Field

from model_providers.moe_config import Facts

Recipe = Literal["delayed", "current", "blockwise", "mxfp8", "nvfp4"]
RECIPES: tuple[Recipe, ...] = ("delayed", "current", "blockwise", "mxfp8", "nvfp4")
BACKENDS = ("auto", "te", "torch")
# What blocks of numbers share a scale: rows of inputs and gradients, squares of weights, in elements.
BLOCKS = {"blockwise": 128, "mxfp8": 32, "nvfp4": 16}


class GuardConfig(Facts):
    """When a linear, or the whole run, goes back to the run's own format, for good."""

    overflow: float = Field(0.01, ge=0, le=1, description="share of an operand's numbers that may be clipped")
    underflow: float = Field(
        0.5, ge=0, le=1, description="share of an operand's numbers that may become zero"
    )
    strikes: int = Field(3, ge=1, description="watched steps in a row on which a linear may be beyond these")
    gap: float = Field(
        0.05, gt=0, description="shadow: relative difference of losses at which the run goes back"
    )
    retry: bool = Field(
        True, description="a step that is not finite is tried again without FP8, before all ends"
    )


class Fp8Config(Facts):
    """Linear layers of blocks in FP8, experts' too; norms, attention's core, routers, embeddings and heads are not."""

    recipe: Recipe = Field(
        description="delayed: scales from past steps; current: from the tensor itself; blockwise: 1x128 and 128x128; "
        "mxfp8: 1x32; nvfp4: four bits, an experiment"
    )
    backend: Literal["auto", "te", "torch"] = Field(
        "auto",
        description="te: Transformer Engine's layers; torch: ours, on any device; auto: te where it can",
    )
    bf16_first: int = Field(1, ge=0, description="blocks at the bottom that stay in the run's own format")
    bf16_last: int = Field(1, ge=0, description="blocks at the top that stay in the run's own format")
    experts: bool | None = Field(
        None, description="routed experts too; null: where the backend can, which torch does"
    )
    start_step: int = Field(0, ge=0, description="optimizer steps before the first one in FP8")
    amax_history: int = Field(1024, ge=1, description="delayed: steps whose largest value counts")
    margin: int = Field(0, ge=0, description="delayed, current: powers of two that are left free above it")
    watch_every: int = Field(50, ge=0, description="steps between looks at what eight bits lose; 0: never")
    shadow_every: int = Field(
        0, ge=0, description="steps between looks at the same batch's loss without FP8; 0: never"
    )
    guard: GuardConfig | None = Field(
        GuardConfig(), description="takes linears, or all of them, out of FP8; null: nobody does"
    )
    experiment: bool = Field(False, description="nvfp4 is asked for knowing that no hardware here runs it")

    @property
    def may_take_experts(self) -> bool:
        """Whether routed experts follow the recipe where torch's products are taken."""
        return self.experts is not False and self.backend != "te"

    @property
    def takes_experts(self) -> bool:
        """The same once a backend is settled: where it is still open, CUDA's layers are Transformer Engine's, which
        leave experts out.
        """
        return self.experts is not False and self.backend == "torch"

    @property
    def bytes_per_number(self) -> float:
        """Of an operand with its scales, as the torch backend keeps them (four bits lie in eight)."""
        return 1.0 + (1.0 / BLOCKS[self.recipe] if self.recipe in BLOCKS else 0.0)

    def is_fp8_block(self, index: int, num_blocks: int) -> bool:
        """Whether block ``index`` of a stack of ``num_blocks`` runs in FP8."""
        return self.bf16_first <= index < num_blocks - self.bf16_last
