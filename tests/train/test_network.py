"""The interface of gloo: towards rank 0, never the loopback device between nodes, and never another than the user's."""

import os
import socket

import psutil
import pytest

from rwkvlm.train import network


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    yield lambda address, nodes: network.choose_interface(address, nodes) or os.environ.pop("GLOO_SOCKET_IFNAME", None)


def test_this_machine_is_reached_by_its_loopback_device():
    assert network.interface_towards("127.0.0.1") == network.interface_towards("localhost") == "lo"
    assert network.interface_towards("no.such.host.invalid") is None


def test_each_interface_is_found_by_its_own_address():
    own = {one.address: name for name, found in psutil.net_if_addrs().items() for one in found if one.family == socket.AF_INET}
    assert own["127.0.0.1"] == "lo"
    for address, name in own.items():
        assert network.interface_towards(address) == name, "from which packets to it come"


@pytest.mark.parametrize(
    "address, nodes, known, expected",
    [
        ("10.0.0.1", 1, {"127.0.0.1": "lo", "10.0.0.1": "eth0"}, "lo"),
        ("10.0.0.1", 2, {"127.0.0.1": "lo", "10.0.0.1": "ib0", network.OUTSIDE: "eth0"}, "ib0"),
        ("node0", 2, {"node0": "lo", network.OUTSIDE: "eth0"}, "eth0"),  # on node0 itself: 127.0.1.1 node0
        ("node0", 2, {"node0": "lo"}, None),
        ("node0", 2, {}, None),
        ("127.0.0.1", 2, {"127.0.0.1": "lo", network.OUTSIDE: "eth0"}, "lo"),
        ("localhost", 2, {"localhost": "lo", network.OUTSIDE: "eth0"}, "lo"),
    ],
)
def test_which_interface(chosen, monkeypatch, address, nodes, known, expected):
    monkeypatch.setattr(network, "interface_towards", known.get)
    assert chosen(address, nodes) == expected


def test_the_users_choice_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib1")
    network.choose_interface("127.0.0.1", 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib1"
