"""A slow and lossy wire between two interfaces, for kernels without netem: ``python slow_wire.py A B DELAY_S LOSS``.

It copies frames by packet sockets, each held back for a while, some never passed on.  What drivers put off until a
frame leaves the machine (checksums, cutting long ones) must be off on all interfaces that send through it: with one
interface as its argument that is what this program does.
"""

import array
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

ALL_PROTOCOLS, LONGEST_FRAME = 3, 1 << 17  # linux/if_ether.h
SIOCETHTOOL, OFF = 0x8946, 0
# linux/ethtool.h: checksums on sending, scatter-gather, segmentation by the card, and in general, merging on receipt
PUT_OFF = {"txcsum": 0x17, "sg": 0x19, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


def do_it_all_here(interface: str) -> None:
    """Have frames leave complete, and no longer than the wire takes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in PUT_OFF.values():
            value = array.array("B", struct.pack("II", command, OFF))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            try:
                fcntl.ioctl(control, SIOCETHTOOL, request)
            except OSError:
                continue  # this interface never puts it off


def connect(first: str, second: str, delay_s: float, loss: float) -> None:
    """Copy between the two until killed."""
    sockets = [
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS)) for _ in range(2)
    ]
    for end, interface in zip(sockets, (first, second), strict=True):
        end.bind((interface, ALL_PROTOCOLS))
    chance, waiting, count = random.Random(1), list[tuple[float, int, int, bytes]](), 0
    while True:
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, target, frame = heapq.heappop(waiting)
            try:
                sockets[target].send(frame)
            except OSError as fault:
                print(f"lost a frame of {len(frame)} bytes: {fault}", file=sys.stderr)
        patience_s = waiting[0][0] - now_s if waiting else 1.0
        for end in select.select(sockets, [], [], max(0.0, patience_s))[0]:
            frame, address = end.recvfrom(LONGEST_FRAME)
            if address[2] == socket.PACKET_OUTGOING or chance.random() < loss:
                continue
            count += 1
            heapq.heappush(waiting, (time.monotonic() + delay_s, count, 1 - sockets.index(end), frame))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        do_it_all_here(sys.argv[1])
    else:
        connect(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
