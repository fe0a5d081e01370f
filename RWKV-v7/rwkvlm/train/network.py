"""Which network interface gloo uses: the one towards rank 0.

By itself gloo takes the address of the host's own name, which on Debian and Ubuntu is one of the loopback device: two
nodes then never meet. NCCL looks for an interface by itself.
"""

from __future__ import annotations

import socket

from ..config import env

OUTSIDE = "192.0.2.1"  # kept for documentation (RFC 5737), no host has it: the way there is the default route


def choose_interface(main_address: str, num_nodes: int) -> None:
    """For this process and those that it starts, before the process group exists; what the user has set stays.

    main_address: a name or IPv4 address of rank 0.
    """
    here = num_nodes == 1
    name = interface_towards("127.0.0.1" if here else main_address)
    if name == "lo" and not here and main_address != "localhost" and not main_address.startswith("127."):
        name = interface_towards(OUTSIDE)  # rank 0's own node, under whose name it finds itself
    if name:
        env.use_interface(name)


def interface_towards(address: str) -> str | None:
    """The interface by which packets to that address leave, such as "eth0". Sends nothing.

    None where the kernel knows no way, and for IPv6.
    """
    import psutil  # DeepSpeed brings it

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((address, 9))
        except OSError:
            return None
        own = s.getsockname()[0]
    return next((name for name, found in psutil.net_if_addrs().items() if own in (one.address for one in found)), None)
