"""How every process of sllm starts and stops: readiness to its supervisor (systemd's protocol), stop on a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

log = logging.getLogger(__name__)


def notify(**fields: str) -> None:
    """Tell the supervisor, if there is one, e.g. `notify(READY="1", X_ADDRESS="127.0.0.1:7700")` (sd_notify(3)).

    `sllm dev` supervises by the same protocol as systemd. Fields that begin with `X_` are ours; systemd ignores them.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # A leading @ stands for the abstract namespace.
        address = "\0" + path[1:] if path.startswith("@") else path
        try:
            sock.sendto(message.encode(), address)
        except OSError as error:  # the supervisor is gone: what we do does not depend on it
            log.warning("cannot notify the supervisor at %s: %s", path, error.strerror)


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets. Call it in the running loop of the main thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


# Where torch, vLLM and what they use write files of their own accord.
_SCRATCH_VARIABLES = ("TMPDIR", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR")


def scratch_environment(folder: Path) -> dict[str, str]:
    """Make a folder for such files and return the environment that keeps them in it: a process of ours leaves nothing
    outside its state folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return dict.fromkeys(_SCRATCH_VARIABLES, str(folder))
