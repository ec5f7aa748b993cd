"""The store through which the processes of one node find each other, on the loopback interface only.

torch's key-value store has no password and listens on every interface by default. It accepts an open socket instead.
Every part of torch that opens a store at the same port in this process then uses this one.
"""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import TCPStore

from job.launcher import interface

ADDRESS = "127.0.0.1"
_INTERFACES = ("lo", "lo0")
"""The loopback interface's name under Linux, and under macOS and BSD."""
_TIMEOUT = timedelta(minutes=5)


def open_store() -> tuple[TCPStore, int]:
    """Open a store on a free port of the loopback interface; return it, to be kept, and the port."""
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
    """Return the variables that keep gloo and NCCL on the loopback interface, without those that the user has set."""
    present = {name for _, name in socket.if_nameindex()}
    found = next((name for name in _INTERFACES if name in present), None)
    return {} if found is None else interface.variables(interface.Interface(found, ADDRESS), environment)
