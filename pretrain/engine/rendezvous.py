"""Where ranks meet: torch's store, which on one machine listens to that machine alone.

Left alone, torch's TCPStore listens on all interfaces, and takes keys from any host that connects.  Where the address
to meet at is a loopback one, rank 0 binds the socket itself and hands it over.
"""

import datetime
import ipaddress
import os
import socket
from collections.abc import Mapping

import torch.distributed as dist


def init_process_group(backend: str, *, timeout: datetime.timedelta | None = None) -> None:
    """Join the world that the launcher's environment describes, unless that is done already."""
    if dist.is_initialized():
        return
    if not meets_on_loopback(os.environ):
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = loopback_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def meets_on_loopback(environment: Mapping[str, str]) -> bool:
    """Whether all ranks are here, and the store is theirs: torchrun's agent brings one of its own."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return False
    address = environment.get("MASTER_ADDR", "")
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def loopback_store(address: str, port: int, rank: int, world_size: int) -> dist.TCPStore:
    """Rank 0's, which listens on ``address`` only; the others connect to it."""
    if rank != 0:
        return dist.TCPStore(address, port, world_size, is_master=False)
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(place)
    listener.listen(world_size)
    return dist.TCPStore(address, port, world_size, is_master=True, master_listen_fd=listener.detach())
