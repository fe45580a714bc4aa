"""Options that many commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from sllm.cli.output import Format
from sllm.cli.units import duration_s

OutputOption = Annotated[Format, typer.Option("-o", "--output", help="Form of the answer.")]
ContextOption = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Context to use.", show_default="the current one")
]
ControllerOption = Annotated[
    str | None, typer.Option("--controller", metavar="HOST:PORT", help="Controller to ask, over the context's.")
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the work is done.")]
TimeoutOption = Annotated[
    str | None, typer.Option("--timeout", metavar="DURATION", help="Stop waiting after this; the work goes on.")
]
NodesOption = Annotated[
    list[str] | None, typer.Option("--node", metavar="NODE", help="Only this node; may be repeated.")
]

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why; change nothing.")]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.", show_default=False)]
PlaceArgument = Annotated[
    str, typer.Argument(metavar="NODE[/DEVICE]", help="A node, or one device of it.", show_default=False)
]
CheckpointArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the checkpoint.", show_default=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which controller to talk to, as given on the command line, and how to print what it says."""

    output: Format
    context: str | None
    controller: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Whether to wait for an operation, and how long; None: until it is over."""

    wait: bool
    timeout: str | None

    @property
    def timeout_s(self) -> float | None:
        return None if self.timeout is None else duration_s(self.timeout)
