"""`sllm status`."""

from __future__ import annotations

from sllm.cli import rows, tables
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit
from sllm.cli.session import ask

EXAMPLE = """
sllm status
sllm status -o json
"""


def status(
    output: OutputOption = Format.TABLE, context: ContextOption = None, controller: ControllerOption = None
) -> None:
    from sllm.rpc.control import Empty

    where = Where(output=output, context=context, controller=controller)
    found = ask(where, lambda client: client.get_status(Empty()))
    names = [
        *(f"deployment/{row.deployment.spec.name}" for row in found.deployments),
        *(f"replica/{row.status.spec.id}" for row in found.replicas),
        *(f"node/{node.report.name}" for node in found.nodes),
    ]
    shown = [tables.deployments(found.deployments), tables.replicas(found.replicas), tables.residency(found.nodes)]
    note = tables.estimator_note(found.estimator)
    emit(output, tables=shown, data=rows.status_object(found), names=names, note=note)
