"""On one machine ranks meet where nobody else can come to."""

import json
import os
import subprocess
import sys

import pytest

from launch.backends import free_port
from launch.env import keeper_environment
from pretrain.engine.rendezvous import meets_on_loopback
from tests.patience import patient_s

RANK = """
import json, psutil, torch, torch.distributed as dist
from pretrain.engine.rendezvous import init_process_group
init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
group = dist.new_group([0, 1])
dist.barrier(group)
links = psutil.Process().net_connections("inet")
print(json.dumps([total.item(), sorted({link.laddr.ip for link in links if link.status == "LISTEN"})]))
dist.barrier()
"""


@pytest.mark.ranks
def test_nothing_listens_beyond_loopback_on_one_machine() -> None:
    port = str(free_port())
    base = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "MASTER_"))}
    ranks = []
    for rank in range(2):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_PORT": port,
        }
        environment = keeper_environment({**base, **place, "OMP_NUM_THREADS": "1"})
        ranks.append(
            subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=subprocess.PIPE, text=True)
        )
    told = [json.loads(rank.communicate(timeout=patient_s(60))[0]) for rank in ranks]
    assert told == [[2.0, ["127.0.0.1"]]] * 2


@pytest.mark.parametrize(
    ("environment", "is_here"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "::1"}, True),
        ({"MASTER_ADDR": "node7"}, False),
        ({"MASTER_ADDR": "10.0.0.1"}, False),
        ({}, False),
        ({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
    ],
)
def test_where_ranks_meet_on_loopback(environment: dict[str, str], is_here: bool) -> None:
    assert meets_on_loopback(environment) == is_here
