"""Where a step's time goes: seconds per phase, on CPU by the clock, on CUDA by events.

Events are read once a step, so measuring does not make the host wait in the middle of one.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.monitor.heartbeat import Heartbeat


class PhaseTimers:
    """Adds up the seconds spent in named phases until they are taken; the heartbeat tells each as it begins."""

    def __init__(self, device: torch.device):
        self.heartbeat = Heartbeat()
        self._on_cuda = device.type == "cuda"
        self._elapsed_s: dict[str, float] = defaultdict(float)
        self._open_events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards ``name``."""
        self.heartbeat.doing(name)
        if self._on_cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._open_events.append((name, start, stop))
        else:
            started_s = time.perf_counter()
            yield
            self._elapsed_s[name] += time.perf_counter() - started_s

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        for name, start, stop in self._open_events:
            stop.synchronize()
            self._elapsed_s[name] += start.elapsed_time(stop) / 1000
        self._open_events = []
        elapsed_s, self._elapsed_s = dict(self._elapsed_s), defaultdict(float)
        return elapsed_s


def due(done: int, every: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) happens now."""
    return every > 0 and done % every == 0
