"""`sllm explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from sllm.cli import explanations
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask

EXAMPLE = """
sllm explain my-model
sllm explain rep-0a1b2c3d4e5f
sllm explain req-0a1b2c3d4e5f6071 -o json
"""


def explain(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A deployment, or the id of a replica or a request.", show_default=False),
    ],
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.rpc.control import ExplainRequest

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.explain(ExplainRequest(target=target)))
    emit(
        output,
        tables=explanations.tables(found),
        data=explanations.explanation_object(found),
        names=[decision.replica for decision in found.decisions],
    )
