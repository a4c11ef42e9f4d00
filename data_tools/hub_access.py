"""Whether the Hugging Face hub is within reach: its client would try for half a minute, a line for each try."""

import os
import socket
import urllib.request
from urllib.parse import urlparse

ENDPOINT, DEFAULT_ENDPOINT = "HF_ENDPOINT", "https://huggingface.co"
OFFLINE = "HF_HUB_OFFLINE"  # the client's own variable; it is read when `huggingface_hub` is first imported


def stay_offline_if_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None.

    Where its name does not resolve, the client is told to look into its cache only.  Call it before anything imports
    ``huggingface_hub``.
    """
    if os.environ.get(OFFLINE, "0").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{OFFLINE} is set"
    if urllib.request.getproxies():
        return None  # the proxy resolves names
    host = urlparse(os.environ.get(ENDPOINT, DEFAULT_ENDPOINT)).hostname or ""
    try:
        socket.getaddrinfo(host, None)
    except OSError as fault:
        os.environ[OFFLINE] = "1"
        return f"{host} cannot be reached: {fault.strerror or fault}"
    return None
