"""Seconds of a layer's passes on one rank, by kind; they add up over layers, and are told apart to the end."""

from typing import NamedTuple


class Phase(NamedTuple):
    """Seconds of one pass, by kind."""

    gemm_s: float = 0.0
    attention_s: float = 0.0
    memory_s: float = 0.0  # norms, activations, dropouts, sums: bound by memory
    tensor_s: float = 0.0  # collectives of the tensor group
    expert_s: float = 0.0  # all-to-alls, and collectives of the experts' tensor group

    @property
    def total_s(self) -> float:
        return sum(self)

    def plus(self, other: "Phase", times: float = 1.0) -> "Phase":
        # Written out: a search does this a million times.
        return Phase(
            self.gemm_s + times * other.gemm_s,
            self.attention_s + times * other.attention_s,
            self.memory_s + times * other.memory_s,
            self.tensor_s + times * other.tensor_s,
            self.expert_s + times * other.expert_s,
        )

    def times(self, factor: float) -> "Phase":
        return Phase().plus(self, factor)


class LayerTime(NamedTuple):
    """Of one layer, one micro-batch, one rank."""

    forward: Phase = Phase()
    input_gradient: Phase = Phase()
    weight_gradient: Phase = Phase()
    recompute: Phase = Phase()  # before the gradients of inputs
    tensor_bytes: float = 0.0  # that the rank sends to its tensor group, all passes together
    expert_bytes: float = 0.0

    def plus(self, other: "LayerTime", times: int = 1) -> "LayerTime":
        return LayerTime(
            self.forward.plus(other.forward, times),
            self.input_gradient.plus(other.input_gradient, times),
            self.weight_gradient.plus(other.weight_gradient, times),
            self.recompute.plus(other.recompute, times),
            self.tensor_bytes + times * other.tensor_bytes,
            self.expert_bytes + times * other.expert_bytes,
        )

    def with_tensor_share(self, share: float) -> "LayerTime":
        """With so much of the tensor group's collectives not hidden."""

        def exposed(phase: Phase) -> Phase:
            return phase._replace(tensor_s=share * phase.tensor_s)

        return self._replace(
            forward=exposed(self.forward),
            input_gradient=exposed(self.input_gradient),
            recompute=exposed(self.recompute),
        )

    @property
    def backward_s(self) -> float:
        return self.recompute.total_s + self.input_gradient.total_s + self.weight_gradient.total_s

    @property
    def total_s(self) -> float:
        return self.forward.total_s + self.backward_s
