"""megatron-core's router on CPU and CUDA alike, with the statistics that a monitor asks for.

What it changes of the parent's: the product with the gate needs no Transformer Engine; jitter is for training only, and
drawn from the layer's stream; the global balance loss has the same strength whatever the number of replicas (upstream's
is divided by it); counts are never rounded to the weights' number format; and nothing goes into a process-wide tracker.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TINY = 1e-20


@dataclass
class RouterLoad:
    """What a layer's router did since it was last asked, on this rank: sums over tokens."""

    passes: int = 0  # micro-batches
    tokens: int = 0
    taken: torch.Tensor | None = (
        None  # [experts], tokens that each expert took: those over its capacity are dropped
    )
    entropy: torch.Tensor | None = None  # [], nats, of the scores over all experts
    losses: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # [] each, before their coefficients; over passes


class GateProduct(torch.autograd.Function):
    """[s b h] x [e h] -> [s b e] in ``dtype``; what is kept stays in the model's own format."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(ctx.dtype)).to(x.dtype)
        grad_weight = (grad.flatten(0, 1).t() @ x.to(ctx.dtype).flatten(0, 1)).to(weight.dtype)
        return grad_x, grad_weight, None


class Router(TopKRouter):
    """Scores, choice, capacity and balance are the parent's."""

    def __init__(self, config: Any, pg_collection: Any = None):
        # The parent would allocate its counters on CUDA.
        plain = copy.copy(config)
        plain.moe_router_enable_expert_bias, plain.moe_router_load_balancing_type = False, "none"
        super().__init__(plain, pg_collection)
        self.config = config
        self.routing_type = config.moe_router_load_balancing_type
        self.enable_expert_bias = config.moe_router_enable_expert_bias
        if self.enable_expert_bias:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts))
        self.load = RouterLoad()
        self._begin_step()

    def _begin_step(self) -> None:
        """Counters are no buffers: DeepSpeed would make them 16-bit with the weights."""
        self.local_tokens_per_expert: torch.Tensor | None = None
        self.global_tokens_per_expert: torch.Tensor | None = None
        self.ga_steps = 0

    def end_step(self, group: Any, *, applied: bool) -> None:
        """After an optimizer step; ``group``: all ranks that route this layer's tokens, tp x dp.

        Experts that got less than their share become more likely, by the sign alone (Wang et al. 2024,
        arXiv:2408.15664, algorithm 1).
        """
        counts = self.local_tokens_per_expert
        if self.enable_expert_bias and applied and counts is not None:
            if group.size() > 1:
                torch.distributed.all_reduce(counts, group=group)
            with torch.no_grad():
                self.expert_bias += self.config.moe_router_bias_update_rate * torch.sign(
                    counts.mean() - counts
                )
        self._begin_step()

    def take_load(self) -> RouterLoad:
        """What was noted since the last call."""
        load, self.load = self.load, RouterLoad()
        return load

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return GateProduct.apply(input, self.weight, dtype)

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        eps = self.config.moe_input_jitter_eps
        if not eps or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1 - eps, 1 + eps)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        probs, chosen = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():  # not in an evaluation, nor in a pass that is run again
            is_padded = self.config.moe_pad_expert_input_to_capacity
            taken = chosen & (probs.detach() > 0) if is_padded else chosen
            self._note(logits.detach().flatten(0, 1).float(), taken)
        return probs, chosen

    @torch.no_grad()
    def _note(self, logits: torch.Tensor, taken: torch.Tensor) -> None:
        if self.score_function == "sigmoid":
            scores = torch.sigmoid(logits)
            scores = scores / (scores.sum(dim=-1, keepdim=True) + TINY)
        else:
            scores = torch.softmax(logits, dim=-1)
        load = self.load
        load.passes, load.tokens = load.passes + 1, load.tokens + logits.size(0)
        load.taken = _plus(load.taken, taken.sum(dim=0, dtype=torch.float32))
        load.entropy = _plus(load.entropy, -torch.xlogy(scores, scores).sum())

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Counts for the bias; the parent's is compiled, and its count a buffer."""
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():
            count = routing_map.detach().sum(dim=0, dtype=torch.float32)
            self.local_tokens_per_expert = _plus(self.local_tokens_per_expert, count)

    def _apply_global_aux_loss(
        self, probs: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, with_padding_mask: bool = False
    ) -> torch.Tensor:
        """Frequencies over the replicas and the step's micro-batches so far (Qiu et al. 2025, section 3).

        The loss of one rank's tokens is averaged over replicas like any other, so it is their whole number times larger
        than the rank's share of the sum.
        """
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        counts = chosen.sum(dim=0, dtype=torch.float32)
        if self.tp_dp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_dp_cp_group)
        self.global_tokens_per_expert = _plus(self.global_tokens_per_expert, counts)
        self.ga_steps += 1
        local = chosen.size(0)
        total = local * self.tp_dp_cp_group.size()
        frequency = self.global_tokens_per_expert / (self.ga_steps * total * self.topk)
        share = scores.sum(dim=0) / (local * self.tp_cp_group.size())
        loss = self.num_experts * (frequency * share).sum()
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, coefficient * loss, "global_load_balancing_loss", self.tp_dp_cp_group
        )

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        loss = z_loss_func(logits, coefficient / self.tp_cp_group.size(), padding_mask=padding_mask)
        self._note_loss("z_loss", loss / coefficient)
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        reduce_group_has_dp: bool = False,
        valid_token_count: Any = None,
    ) -> torch.Tensor:
        self._note_loss(LOSS_NAMES[aux_loss_name], aux_loss / aux_loss_coeff)
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)

    def _note_loss(self, name: str, loss: torch.Tensor) -> None:
        self.load.losses[name] = _plus(self.load.losses.get(name), loss.detach())


def _plus(before: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if before is None else before + more


LOSS_NAMES = {
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "sequence_aux_loss",
    "global_load_balancing_loss": "global_aux_loss",
}


def set_loss_scale(scale: float, device: torch.device) -> None:
    """What one micro-batch's losses count in a step: auxiliary losses do not see the engine's scaling of the loss."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, device=device))
