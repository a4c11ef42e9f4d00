"""What one run is: the facts that a run file states, frozen.

Model facts live in `model_providers.config`, data facts in `data_tools.config`; this file adds what concerns
time steps, ranks and gradients.  Keys of the DeepSpeed JSON are not spelled here: `ds_config.py` translates.
Defaults are those of a careful user: clipping on, fp32 accumulation, a stop on NaN.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from data_tools.config import DataConfig
from data_tools.objectives import SpanCorruption
from data_tools.span_corruption import lengths
from model_providers.config import Facts, ModelConfig
from model_providers.fp8.config import Fp8Config
from model_providers.loss_chunks import ChunkTokens

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"]
Dtype = Literal["fp32", "bf16", "fp16"]


class LayoutConfig(Facts):
    """How ranks share the model. Data parallelism is what is left of the world: dp = world / (tp x pp)."""

    tp: int = Field(1, ge=1, description="tensor-parallel ranks: each weight matrix is split over these")
    pp: int = Field(1, ge=1, description="pipeline stages: each rank holds a run of layers")
    sequence_parallel: bool = Field(
        False, description="split activations outside the matrices over the tp ranks too"
    )
    ep: int = Field(1, ge=1, description="ranks of a stage that share out the experts")
    etp: int | None = Field(
        None, ge=1, description="ranks that share each expert's matrices; as tp if not given"
    )
    dispatcher: Literal["alltoall", "allgather", "hierarchical"] = Field(
        "alltoall", description="how tokens come to their experts; hierarchical: inside the node first"
    )
    partition: Literal["parameters", "cost", "uniform"] | tuple[int, ...] = Field(
        "cost", description="how layers go to stages; a list gives each stage's first layer and the end"
    )
    chunks: int = Field(1, ge=1, description="runs of layers on each pipeline rank (virtual stages)")
    schedule: str = Field("1f1b", description="of the pipeline; `megaloom schedule --help` has the names")
    messages: Literal["pair", "batch", "channel"] = Field(
        "pair", description="what of a rank's messages waits for what, on NCCL; gloo's never wait"
    )


class BatchConfig(Facts):
    """Samples per optimizer step. Any two of the three follow the third: global = micro x accumulation x dp."""

    global_size: int | None = Field(None, ge=1, description="samples per optimizer step over all ranks")
    micro_size: int | None = Field(None, ge=1, description="samples per forward pass of one rank")
    accumulation_steps: int | None = Field(None, ge=1, description="micro-batches per optimizer step")


class OptimizerConfig(Facts):
    """The optimizer, in DeepSpeed's names; what is here fills the JSON's "auto" values."""

    type: str = Field(
        "AdamW", description="AdamW, Adam, Lion, Muon, Adagrad, Lamb, or a class of torch.optim"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(
        True, description="norms and biases are never decayed; embeddings only if true"
    )
    gradient_clipping: float = Field(
        1.0, ge=0, description="largest global gradient norm; 0 means no clipping"
    )
    params: dict[str, Any] = Field(
        {}, description="further parameters of this optimizer, passed on as they are"
    )


class _Warmup(Facts):
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak")


class ConstantSchedule(_Warmup):
    """Warm-up, then the peak for ever."""

    kind: Literal["constant"] = "constant"


class _Decay(_Warmup):
    total_steps: int | None = Field(None, ge=1, description="where the decay ends; train.steps if not given")
    min_factor: float = Field(0.1, ge=0, le=1, description="the last learning rate over the peak")


class CosineSchedule(_Decay):
    """Half a cosine from the peak to the end (Loshchilov & Hutter 2017, without restarts)."""

    kind: Literal["cosine"] = "cosine"


class LinearSchedule(_Decay):
    """A straight line from the peak to the end."""

    kind: Literal["linear"] = "linear"


class WSDSchedule(_Decay):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): the peak is held, then let down quickly."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: int = Field(ge=1, description="steps of the final decay")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(
        "sqrt", description="sqrt is 1 - sqrt(progress), Hägele et al. 2024, section 4"
    )
    min_factor: float = Field(0.0, ge=0, le=1)


class InverseSquareRootSchedule(_Warmup):
    """peak x sqrt(warmup / step) (Vaswani et al. 2017, section 5.3; Raffel et al. 2020, section 3.1.2)."""

    kind: Literal["inverse_square_root"] = "inverse_square_root"
    warmup_steps: int = Field(ge=1)


class PowerSchedule(_Warmup):
    """peak x (step / warmup) ** exponent (Shen et al. 2024, "Power Scheduler"); never above the peak."""

    kind: Literal["power"] = "power"
    warmup_steps: int = Field(ge=1)
    exponent: float = Field(-0.51, lt=0, description="-0.51 is that paper's fit")
    decay_steps: int = Field(0, ge=0, description="steps of a final linear decay to zero")
    total_steps: int | None = Field(None, ge=1)


AnySchedule = (
    ConstantSchedule
    | CosineSchedule
    | LinearSchedule
    | WSDSchedule
    | InverseSquareRootSchedule
    | PowerSchedule
)
SCHEDULE_KINDS = tuple(str(kind.model_fields["kind"].default) for kind in get_args(AnySchedule))
Schedule = Annotated[AnySchedule, Field(discriminator="kind")]


class PrecisionConfig(Facts):
    """Number formats. Master weights and optimizer states are fp32 in any case."""

    dtype: Dtype = Field("fp32", description="weights and activations")
    accumulate: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="sum of gradients over micro-batches"
    )


class RecomputeConfig(Facts):
    """Activations that are dropped in the forward pass and computed again in the backward pass, or wait elsewhere."""

    mode: Literal["none", "selective", "full"] = Field(
        "none", description="selective drops what recompute.modules names, full whole layers"
    )
    modules: tuple[RecomputeModule, ...] | None = Field(
        None, description="selective: parts of each layer; core_attn if not given"
    )
    every: int = Field(1, ge=1, description="full: layers between two kept activations")
    offload: bool = Field(False, description="what the layers keep all the same waits in the CPU's memory")
    offload_above_bytes: int = Field(
        1 << 20, ge=0, description="smaller tensors stay, since a copy costs more than they take"
    )

    @property
    def forgotten(self) -> tuple[str, ...]:
        """What selective recompute drops."""
        return ("core_attn",) if self.modules is None else self.modules


class LossConfig(Facts):
    """How the head's product and the loss on its logits are computed."""

    chunk_tokens: ChunkTokens = Field(
        "auto",
        description="tokens whose logits are there at once; all; auto: 2048 where a micro-batch's take over 2 GiB",
    )


class TrainConfig(Facts):
    """How long, and what is looked at on the way."""

    steps: int = Field(ge=1, description="optimizer steps")
    seed: int = Field(1234, ge=0, description="of initial weights and dropout; the data have their own")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0 means only at the end")
    eval_at_start: bool = Field(False, description="evaluate the initial weights too")
    eval_samples: int = Field(256, ge=1, description="samples of each validation set that are evaluated")
    eval_micro_size: int | None = Field(None, ge=1, description="batch.micro_size if not given")
    tie_check_every: int = Field(
        0, ge=0, description="steps between looks whether tied weights are equal on all stages; 0: never"
    )
    stop_on_nan: bool = Field(
        True, description="stop, naming the first layer and rank, when a number is not finite"
    )


class CheckpointConfig(Facts):
    """When and where a run saves itself, and where it goes on from."""

    every: int = Field(
        0, ge=0, description="steps between checkpoints; 0 means only at the end or at a signal"
    )
    keep_last: int = Field(2, ge=1, description="complete checkpoints that stay on disk")
    resume: Literal["auto", "never"] | str = Field(
        "auto", description="auto: the newest valid one of this run; or a checkpoint's folder"
    )
    weights_from: str | None = Field(None, description="a checkpoint whose weights alone start a new run")
    upcycle: bool = Field(
        False, description="weights_from is dense, and every expert begins as a copy of its MLP"
    )
    allow_changed: tuple[str, ...] = Field(
        (),
        description="facts that may differ from those of weights_from, such as model.rotary_base or tokenizer",
    )


class MonitorConfig(Facts):
    """What is told while it runs; TensorBoard's own keys are in the DeepSpeed JSON."""

    log_every: int = Field(1, ge=1, description="steps between records")
    hang_s: float = Field(
        300.0, ge=0, description="a pipeline rank that waits longer says for what; 0: never"
    )
    experts_every: int = Field(
        50, ge=0, description="steps between heat maps of the experts' loads; 0: only at the end"
    )
    starving_below: float = Field(
        0.1, ge=0, lt=1, description="an expert with less than this of its fair share starves"
    )
    starving_steps: int = Field(100, ge=1, description="steps after which a starving expert is told of")
    tensorboard: bool = True
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device, for MFU; known devices need none"
    )


class RunConfig(Facts):
    """One experiment."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    out: str = Field("runs_out", description="folder; the run writes into out/name")
    family: Literal["gpt", "bert", "t5"] | None = Field(
        None, description="kind of model, the preset's; the program that trains it is pretrain.<family>"
    )
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    layout: LayoutConfig = LayoutConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule | None = Field(
        None, description="none: a cosine, or the JSON's scheduler if it has one"
    )
    precision: PrecisionConfig = PrecisionConfig()
    fp8: Fp8Config | None = Field(None, description="eight bits for the linear layers' products")
    recompute: RecomputeConfig = RecomputeConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    kernels: Literal["auto", "te", "torch"] = "auto"
    nvme_path: str | None = Field(None, description="folder on a local NVMe disk, for offload to nvme")
    deepspeed: str = Field("zero1.json", description="DeepSpeed JSON: a path, or a file of ds_configs/")

    @property
    def target_length(self) -> int | None:
        """Tokens of a decoder beside an encoder; None where there is one stack."""
        objective = self.data.objective
        if not isinstance(objective, SpanCorruption):
            return None
        return lengths(objective, self.data.sequence_length).targets


# `precision: bf16` means `precision: {dtype: bf16}`, and so on.
SHORT_FOR = {
    "model": "preset",
    "precision": "dtype",
    "fp8": "recipe",
    "recompute": "mode",
    "schedule": "kind",
    "loss": "chunk_tokens",
}


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def spelled_out(raw: dict[str, Any]) -> dict[str, Any]:
    """A run file's values with every section as a section."""
    spelled = {
        key: {SHORT_FOR[key]: value} if key in SHORT_FOR and _is_short(value) else value
        for key, value in raw.items()
    }
    if isinstance(spelled.get("schedule"), dict):
        spelled["schedule"] = {"kind": "cosine", **spelled["schedule"]}
    return spelled
