"""One life of a local cluster: prepare its folder, bring it up, say how to use it, wait, stop it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime

from sllm.cli.context import Context, config_path
from sllm.cli.local import machine as this_machine
from sllm.cli.local.cluster import LAUNCHER, Addresses, LocalCluster, check_settings, unless
from sllm.cli.local.dev_context import NAME, dev_context
from sllm.cli.local.identities import write_identities
from sllm.cli.local.layout import Wish, check_machine
from sllm.cli.local.lock import locked
from sllm.cli.output import Format, emit_line
from sllm.cli.private_files import make_private_dir
from sllm.lifecycle import stop_on_signals


def run(wish: Wish, form: Format, launcher: tuple[str, ...] = LAUNCHER) -> None:
    """Run the cluster until a signal comes. `launcher` starts one of its processes."""
    machine = this_machine.look()
    check_machine(wish, machine)
    check_settings(wish, machine)
    make_private_dir(wish.state)
    with locked(wish.state):
        this_machine.check_port(wish.gateway_port, "--gateway-port")
        this_machine.check_port(wish.controller_port, "--controller-port")
        write_identities(wish.state / "pki", wish.node_names, now=datetime.now(UTC))
        asyncio.run(_live(wish, form, lambda: LocalCluster(wish, machine, _say, launcher)))


async def _live(wish: Wish, form: Format, make: Callable[[], LocalCluster]) -> None:
    stop = stop_on_signals()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, stop.set)  # the terminal is gone
    cluster = make()
    try:
        with ExitStack() as context:
            addresses = await unless(stop, _brought_up(cluster))
            if addresses is not None:
                current = context.enter_context(dev_context(config_path(), _context(wish, addresses)))
                _announce(wish, addresses, form, current=current)
                await stop.wait()
    finally:
        # Whoever asks a second time does not want to wait.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, cluster.kill)
        _say("stopping; once more to stop at once")
        await cluster.stop()


async def _brought_up(cluster: LocalCluster) -> Addresses:
    _say("starting controller, gateway and nodes")
    try:
        return await cluster.bring_up()
    except ExceptionGroup as group:
        raise _first(group) from None


def _first(error: Exception) -> Exception:
    """Unwrap what a task group raised: the others failed because the first one did."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _context(wish: Wish, addresses: Addresses) -> Context:
    pki = wish.state / "pki"
    return Context(
        controller=addresses.controller,
        gateway=addresses.gateway,
        ca=str(pki / "ca.pem"),
        certificate=str(pki / "operator.pem"),
        key=str(pki / "operator.key"),
    )


def _announce(wish: Wish, addresses: Addresses, form: Format, *, current: bool) -> None:
    base_url = f"http://{addresses.gateway}/v1"
    data = {
        "base_url": base_url,
        "controller": addresses.controller,
        "context": NAME,
        "current": current,
        "nodes": list(wish.node_names),
        "state": str(wish.state),
    }
    emit_line(form, line=_welcome(wish, base_url, current=current), data=data, name=base_url)


def _welcome(wish: Wish, base_url: str, *, current: bool) -> str:
    flag = "" if current else f" --context {NAME}"
    devices = "device" if wish.devices_per_node == 1 else "devices"
    return f"""\
Ready: {wish.nodes} nodes with {wish.devices_per_node} {devices} each.

  OpenAI base URL   {base_url}   (any API key)
  State and logs    {wish.state}
  Context           {NAME}{" (current)" if current else ""}

Try, in another terminal:
  sllm checkpoint add demo examples/demo-model{flag}
  sllm deploy demo --checkpoint demo{flag}
  curl {base_url}/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "demo", "prompt": "Once upon a time", "max_tokens": 50, "stream": true}}'
  sllm status{flag}

Ctrl-C stops it all."""


def _say(text: str) -> None:
    print(f"sllm dev: {text}", file=sys.stderr, flush=True)
