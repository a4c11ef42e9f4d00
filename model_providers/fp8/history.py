"""Delayed scaling: a scale from the largest values of past steps, so that no tensor is read before it is quantised.

As Transformer Engine's DelayedScaling (transformer_engine/common/recipe/__init__.py) with the most recent window's
maximum, but for one thing: a window counts optimizer steps, not micro-batches, and its values are those of all ranks
that hold the layer.  So scales do not depend on how a batch is divided, and a recomputed forward pass meets the scale
of the first one.
"""

import torch

INPUT, GRADIENT = 0, 1  # columns


class AmaxHistory:
    """Of one linear: the largest input and the largest gradient of its output, by optimizer step.

    Of routed experts each has its own, on every rank those of all experts of the layer.
    """

    def __init__(self, length: int, num_experts: int = 1):
        self.largest = torch.zeros(length, num_experts, 2)  # fp32, by step modulo length
        self.num_steps = 0  # that are in it
        self.seen = torch.zeros(num_experts, 2)  # in the step at hand
        self._past: torch.Tensor | None = (
            None  # [experts 2]: the largest of all steps, looked for once a step
        )

    def note(self, which: int, magnitude: torch.Tensor, expert: int = 0) -> None:
        """A value of this step: counts from the next step on."""
        if self.seen.device != magnitude.device:
            self.seen = self.seen.to(magnitude.device)
        self.seen[expert, which] = torch.maximum(self.seen[expert, which], magnitude)

    def magnitude(self, which: int, expert: int = 0) -> torch.Tensor | None:
        """The largest of the past steps, fp32 []; None before the first step has ended.

        Of an expert that has had no tokens in them, what its neighbours had.
        """
        if not self.num_steps:
            return None
        if self._past is None:
            own = self.largest.amax(dim=0)
            self._past = torch.where(own > 0, own, own.amax(dim=0))
        return self._past[expert, which]

    def roll(self, seen: torch.Tensor | None) -> None:
        """The step has ended, with ``seen`` [experts 2] over all ranks; None: it was not applied and does not count."""
        if seen is not None:
            if self.largest.device != seen.device:
                self.largest = self.largest.to(seen.device)
            self.largest[self.num_steps % len(self.largest)] = seen
            self.num_steps, self._past = self.num_steps + 1, None
        self.seen = torch.zeros_like(self.seen)

    def state(self) -> dict[str, object]:
        return {"largest": self.largest.cpu(), "num_steps": self.num_steps}

    def restore(self, state: dict[str, object], device: torch.device) -> None:
        """Of a run whose window may have had another length: then the newest values are taken over."""
        largest, num_steps = state["largest"], state["num_steps"]
        assert isinstance(largest, torch.Tensor) and isinstance(num_steps, int)
        largest = largest.view(len(largest), -1, 2)
        if len(largest) != len(self.largest):
            order = [step % len(largest) for step in range(max(0, num_steps - len(largest)), num_steps)]
            newest = largest[order][-len(self.largest) :]
            num_steps = len(newest)
            largest = torch.zeros_like(self.largest, device=largest.device)
            largest[:num_steps] = newest
        self.largest, self.num_steps, self._past = largest.to(device), num_steps, None
