"""Where the hub's name does not resolve, its client is not left to try for half a minute."""

import os
import socket
from typing import Any

import pytest

from data_tools import hub_access


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No name resolves, no proxy is set, and nobody asked to stay offline."""

    def refuse(*args: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub_access.urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return monkeypatch


def test_out_of_reach_means_offline(nowhere: pytest.MonkeyPatch) -> None:
    obstacle = hub_access.stay_offline_if_out_of_reach()
    assert obstacle == "huggingface.co cannot be reached: Name or service not known"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_users_own_word_stands(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setenv("HF_HUB_OFFLINE", "1")
    assert hub_access.stay_offline_if_out_of_reach() == "HF_HUB_OFFLINE is set"


def test_behind_a_proxy_and_where_the_name_resolves_the_hub_is_asked(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setattr(hub_access.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub_access.stay_offline_if_out_of_reach() is None
    nowhere.setattr(hub_access.urllib.request, "getproxies", dict)
    nowhere.setattr(socket, "getaddrinfo", lambda host, port: [host])
    assert hub_access.stay_offline_if_out_of_reach() is None
    assert os.environ["HF_HUB_OFFLINE"] == "0"
