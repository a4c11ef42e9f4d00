"""How long a pipeline's busiest rank waits: simulated for one estimate, in closed form for a search."""

from collections.abc import Sequence

from launch.hardware import Cluster
from launch.links import message_s
from launch.phases import LayerTime
from launch.product_time import BYTES
from launch.scenario import Scenario
from launch.software import Software
from pretrain.engine.schedules.catalogue import make_schedule
from pretrain.engine.schedules.simulate import Times, simulate

MOST_SIMULATED_OPS = 60_000  # of a schedule; above that the closed form


def waiting_s(
    scenario: Scenario,
    cluster: Cluster,
    times: Sequence[LayerTime],
    by_rank: Sequence[LayerTime],
    software: Software,
    simulated: bool,
) -> tuple[float, float]:
    """Waiting of the busiest rank, and messages that nothing hides."""
    layout, m = scenario.layout, scenario.num_micro_batches
    if layout.pp == 1:
        return 0.0, 0.0
    busy_s = m * max(time.total_s for time in by_rank)
    one_s = message_s(cluster, message_bytes(scenario, software), world_size=layout.world_size)
    hidden_s = one_s if software.hides_transfers else 0.0
    exposed_s = 0.0 if software.hides_transfers else 2 * layout.chunks * m * one_s
    num_ops = 3 * m * layout.virtual_stages
    if simulated and num_ops <= MOST_SIMULATED_OPS:
        schedule = make_schedule(
            scenario.schedule, stages=layout.pp, chunks=layout.chunks, num_micro_batches=m
        )
        with_messages = simulate(schedule, _times(times, hidden_s)).makespan
        alone = simulate(schedule, _times(times, 0.0)).makespan if hidden_s else with_messages
        return alone - busy_s, with_messages - alone + exposed_s
    return bubble_s(scenario, by_rank), _waiting_for_messages(scenario, hidden_s) + exposed_s


def _times(times: Sequence[LayerTime], transfer_s: float) -> Times:
    return Times(
        tuple(time.forward.total_s for time in times),
        tuple(time.recompute.total_s + time.input_gradient.total_s for time in times),
        tuple(time.weight_gradient.total_s for time in times),
        transfer_s,
    )


def bubble_s(scenario: Scenario, by_rank: Sequence[LayerTime]) -> float:
    """Closed forms: the busiest rank waits while the others' shares of one micro-batch pass.

    1F1B and interleaved: Narayanan et al. 2021, section 2.2; ZB-H1 and ZB-V: Qi et al. 2024 (arXiv:2401.10241,
    arXiv:2405.15362), where the halves of backward passes are alike; the last, by the simulator, fills all but the
    forward passes.  All for as many micro-batches as keep every rank busy, twice the stages.
    """
    busiest = max(range(len(by_rank)), key=lambda rank: by_rank[rank].total_s)
    others = [time for rank, time in enumerate(by_rank) if rank != busiest]
    forward = sum(time.forward.total_s for time in others)
    inputs = sum(time.recompute.total_s + time.input_gradient.total_s for time in others)
    weights = sum(time.weight_gradient.total_s for time in others)
    chunks = scenario.layout.chunks
    if scenario.schedule == "zb-h1":
        return max(0.0, forward + inputs - weights)
    if scenario.schedule == "zb-v":
        pp, m = scenario.layout.pp, scenario.num_micro_batches
        missing = max(0.0, 2 * pp - m) / pp  # micro-batches, over the stages
        return max(0.0, forward + inputs - weights) / 2 * (1 + missing)
    if scenario.schedule == "interleaved-zb":
        return forward / chunks
    return (forward + inputs + weights) / chunks


def _waiting_for_messages(scenario: Scenario, message_s: float) -> float:
    """1F1B holds as many micro-batches as there are stages ahead, so it waits for a message each way, less a share of
    1/pp; the others wait where they fill and drain.
    """
    pp, chunks = scenario.layout.pp, scenario.layout.chunks
    if scenario.schedule == "1f1b":
        return 2 * message_s * (pp - 1) * (1 + scenario.num_micro_batches / pp)
    legs = 4 if scenario.schedule == "zb-h1" else 2
    return legs * (pp * chunks - 1) * message_s


def message_bytes(scenario: Scenario, software: Software) -> float:
    layout = scenario.layout
    whole = (
        scenario.micro_size * scenario.sequence_length * scenario.model.hidden_size * BYTES[scenario.dtype]
    )
    return whole / layout.tp if layout.shards_sequence or software.scatters_transfers else float(whole)


def sent_bytes(scenario: Scenario, software: Software) -> float:
    if scenario.layout.pp == 1:
        return 0.0
    times = 2 * scenario.layout.chunks * scenario.num_micro_batches
    return times * message_bytes(scenario, software)
