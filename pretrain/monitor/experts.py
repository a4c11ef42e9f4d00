"""What goes on inside a model with experts or layers that look ahead, told beside the loss.

A load of 1 is an expert's fair share of the tokens.  Numbers are means since the last look, over all ranks.
"""

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from model_providers.router import LOSS_NAMES, RouterLoad
from pretrain.engine.base import Engine
from pretrain.engine.experts import routers
from pretrain.monitor.heat_map import LoadMap

log = logging.getLogger(__name__)

LOSSES = (*LOSS_NAMES.values(), "z_loss")


def drop_notes(engine: Engine) -> None:
    """What routers and looking ahead noted since they were last told of, a step that will be tried again included."""
    for layer in engine.layers:
        for router in routers(layer.module):
            router.take_load()
    getattr(engine.plan.loss, "take_ahead", lambda: None)()


@dataclass(frozen=True)
class Look:
    """What was seen; on rank 0 only, empty elsewhere."""

    values: dict[str, float] = field(default_factory=dict)
    map: LoadMap | None = None


@dataclass
class ExpertWatch:
    """Looks into the model when it is asked to, and warns of experts that starve."""

    engine: Engine
    num_experts: int
    top_k: int
    starving_below: float  # of the fair share
    starving_steps: int
    last_step: int
    _hungry_since: dict[tuple[str, int], int] = field(default_factory=dict)
    _told: set[tuple[str, int]] = field(default_factory=set)

    def look(self, step: int) -> Look:
        """After optimizer step ``step``; every rank must call it."""
        seen = self._collect()
        steps, self.last_step = step - self.last_step, step
        if seen is None or not seen.rows:
            return Look({} if seen is None else seen.ahead_values(steps))
        values: dict[str, float] = {}
        for name, row in seen.rows.items():
            values |= {f"moe/{name}/{key}": value for key, value in self._facts(row).items()}
        told = {name: self._facts(row) for name, row in seen.rows.items()}
        for key, together in (("load_max", max), ("load_min", min), ("dropped", _mean), ("entropy", _mean)):
            values[f"moe/{key}"] = together([facts[key] for facts in told.values()])
        for loss in LOSSES:
            found = [facts[loss] for facts in told.values() if loss in facts]
            if found:
                values[f"moe/{loss}"] = _mean(found)
        loads = LoadMap(tuple(seen.rows), tuple(tuple(self._loads(row)) for row in seen.rows.values()))
        self._warn(loads, step)
        return Look(values | seen.ahead_values(steps), loads)

    def _facts(self, row: "Row") -> dict[str, float]:
        loads = self._loads(row)
        return {
            "load_max": max(loads),
            "load_min": min(loads),
            "dropped": max(0.0, 1 - sum(row.taken) / (row.tokens * self.top_k)),
            "entropy": row.entropy / row.tokens / math.log(self.num_experts),  # 1: all experts are as likely
            **row.losses,
        }

    def _loads(self, row: "Row") -> list[float]:
        fair = row.tokens * self.top_k / self.num_experts
        return [taken / fair for taken in row.taken]

    def _warn(self, loads: LoadMap, step: int) -> None:
        for layer, row in zip(loads.layers, loads.loads, strict=True):
            for expert, load in enumerate(row):
                key = (layer, expert)
                if load >= self.starving_below:
                    self._hungry_since.pop(key, None)
                    self._told.discard(key)
                    continue
                since = self._hungry_since.setdefault(key, step)
                if step - since >= self.starving_steps and key not in self._told:
                    self._told.add(key)
                    log.warning(
                        "%s: expert %d has had less than %.0f%% of its fair share of tokens since step %d; raise "
                        "model.moe.aux_loss (or another balance), or use bias_update_rate with sigmoid scores",
                        *(layer, expert, 100 * self.starving_below, since),
                    )

    def _collect(self) -> "Seen | None":
        """All stages' routers on rank 0; the others get None."""
        engine, groups = self.engine, self.engine.groups
        mine: dict[str, Row] = {}
        here = [
            (layer.plan.name, router.take_load())
            for layer in engine.layers
            for router in routers(layer.module)
        ]
        here = [(name, load) for name, load in here if load.passes]
        if here:
            rows = torch.stack([_packed(load, self.num_experts) for _, load in here]).to(groups.device)
            dist.all_reduce(rows, group=groups.experts.stage)
            mine = {
                name: _unpacked(row, groups.layout.tp, self.num_experts)
                for (name, _), row in zip(here, rows.tolist(), strict=True)
            }
        taken = getattr(engine.plan.loss, "take_ahead", lambda: None)()
        ahead = 0.0 if taken is None else float(taken)
        ahead = groups.mean_over_dp(ahead)
        if groups.place.tp or groups.place.dp:
            return None
        told: list[Any] | None = [None] * groups.layout.pp if groups.place.pp == 0 else None
        dist.gather_object(
            (mine, ahead), told, dst=dist.get_process_group_ranks(groups.pp)[0], group=groups.pp
        )
        if told is None:
            return None
        order = [layer.name for layer in engine.plan.layers]
        rows_by_name = {name: row for rows, _ in told for name, row in rows.items()}
        return Seen(
            dict(sorted(rows_by_name.items(), key=lambda item: order.index(item[0]))),
            sum(loss for _, loss in told),
            num_micro_batches=self._num_micro_batches(),
        )

    def _num_micro_batches(self) -> int:
        return int(self.engine.deepspeed.gradient_accumulation_steps())


@dataclass(frozen=True)
class Row:
    """One layer's router, summed over ranks and micro-batches."""

    tokens: float
    entropy: float
    taken: list[float]
    losses: dict[str, float]  # means over micro-batches


@dataclass(frozen=True)
class Seen:
    rows: dict[str, Row]  # by layer, in the plan's order
    ahead: float  # losses of layers that look ahead, summed over micro-batches
    num_micro_batches: int

    def ahead_values(self, steps: int) -> dict[str, float]:
        return {"mtp_loss": self.ahead / (self.num_micro_batches * max(1, steps))} if self.ahead else {}


def _packed(load: RouterLoad, num_experts: int) -> torch.Tensor:
    """[passes, tokens, entropy, losses, experts]"""
    assert load.taken is not None and load.entropy is not None
    losses = defaultdict(lambda: torch.zeros(()), load.losses)
    head = [
        float(load.passes),
        float(load.tokens),
        float(load.entropy),
        *(float(losses[name]) for name in LOSSES),
    ]
    return torch.cat((torch.tensor(head, dtype=torch.float64), load.taken.double().cpu()))


def _unpacked(row: list[float], tp: int, num_experts: int) -> Row:
    """Tensor ranks have a part of each loss, so only replicas and micro-batches are averaged over."""
    passes, tokens, entropy, *rest = row
    losses, taken = rest[: len(LOSSES)], rest[len(LOSSES) :]
    assert len(taken) == num_experts
    means = {name: loss * tp / passes for name, loss in zip(LOSSES, losses, strict=True) if loss}
    return Row(tokens, entropy, taken, means)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
