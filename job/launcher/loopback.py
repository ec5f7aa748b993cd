"""Communication between the processes of one node, over the loopback interface only.

By default torch's key-value store listens on every interface and has no password. It accepts an open socket instead, so
this module gives it one that listens on the loopback interface. Every part of torch that opens a store at the same port
in this process then uses this store.
"""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import TCPStore

from job.launcher import interface

ADDRESS = "127.0.0.1"
_INTERFACES = ("lo", "lo0")
"""Name of the loopback interface on Linux, and on macOS and BSD."""
_TIMEOUT = timedelta(minutes=5)


def open_store() -> tuple[TCPStore, int]:
    """Open a store on a free port of the loopback interface.

    Returns:
        The store, which closes when the caller drops it, and its port.
    """
    listening = socket.create_server((ADDRESS, 0))
    port: int = listening.getsockname()[1]
    store = TCPStore(
        ADDRESS,
        port,
        None,
        True,
        _TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )
    return store, port


def interface_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return variables that make Gloo and NCCL use the loopback interface, without those that the user has set."""
    existing = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in _INTERFACES if name in existing), None)
    if loopback is None:
        return {}
    return interface.variables(interface.Interface(loopback, ADDRESS), environment)
