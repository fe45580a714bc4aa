"""`sllm simulate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.options import ContextOption, ControllerOption, OutputOption, Where
from sllm.cli.output import Format, emit, one_line
from sllm.cli.progress import Progress, open_progress
from sllm.errors import EXIT_INTERRUPTED, InvalidArgument

if TYPE_CHECKING:
    from sllm.cli.what_if import Asked
    from sllm.sim.result import Result
    from sllm.sim.scenario import Scenario
    from sllm.sim.spec import Arrival

EXAMPLE = """
sllm simulate examples/scenarios/paper-opt-6.7b.toml
sllm simulate examples/scenarios/scarce-copies.toml --policy ours --policy random --seeds 5 -o json
sllm simulate --from-cluster --rate 2 --add-node node-1
"""

_INSTANTS = 500  # between two looks at how far a run is


def simulate(
    scenario: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SCENARIO.toml]",
            help="What to simulate; with --from-cluster, what is asked of it.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Replay these requests instead of the scenario's arrivals."),
    ] = None,
    from_cluster: Annotated[
        bool, typer.Option("--from-cluster", help="Begin from the live cluster as it is now; nothing of it is changed.")
    ] = False,
    add_node: Annotated[
        list[str] | None,
        typer.Option("--add-node", metavar="LIKE", help="What if there were one more node like this? May be repeated."),
    ] = None,
    node_down: Annotated[
        list[str] | None,
        typer.Option("--node-down", metavar="NODE", help="What if this node were lost now? May be repeated."),
    ] = None,
    deployment: Annotated[
        list[str] | None,
        typer.Option(
            "--deployment", metavar="NAME", help="Requests are for these; may be repeated.", show_default="all"
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="RPS", help="Requests per second, over all deployments.")
    ] = None,
    cv: Annotated[
        float | None,
        typer.Option("--cv", metavar="N", help="Variation of their gaps; bursts above 1.", show_default="1"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", metavar="N", help="So many requests.", show_default="200")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", metavar="N", help="Of each request.", show_default="100")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output-tokens", metavar="N", help="Of each request.", show_default="100")
    ] = None,
    token_time: Annotated[
        float | None,
        typer.Option("--token-time", metavar="SECONDS", help="Of an output token.", show_default="as running requests"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME", help="May be repeated.", show_default="all"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Runs of each policy, with seeds 1 to N.")] = 1,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the distributions; needs matplotlib.")
    ] = None,
    output: OutputOption = Format.TABLE,
    context: ContextOption = None,
    controller: ControllerOption = None,
) -> None:
    from sllm.cli import simulated
    from sllm.cli.what_if import Asked, check_options
    from sllm.sim import plotting

    with reported(output):
        asked = Asked(
            scenario=scenario,
            trace=trace,
            rate_rps=rate,
            cv=cv,
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            deployments=tuple(deployment or ()),
            added=tuple(add_node or ()),
            down=tuple(node_down or ()),
            token_s=token_time,
        )
        check_options(asked, from_cluster=from_cluster)
        names = _policies(policy or [])
        if seeds < 1:
            raise InvalidArgument(f"--seeds {seeds}: at least one run is needed")
        if plot is not None:
            plotting.check(plot)
    where = Where(output=output, context=context, controller=controller)
    read = _read(asked, where, from_cluster=from_cluster)
    for note in read.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    with reported(output):
        results: list[Result] = []
        with _interruptible() as interrupted, open_progress(f"simulate {read.title}") as progress:
            results.extend(_runs(read, names, seeds, progress))  # what came before an interruption stays
        emit(
            output,
            tables=simulated.tables(results),
            data=[result.row() for result in results],
            names=[f"{result.policy}/{result.seed}" for result in results],
        )
        if plot is not None and results:
            plotting.draw(results, plot)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What is simulated: `begun` puts before the requests that are drawn what is there already."""

    title: str
    scenario: Scenario
    notes: tuple[str, ...] = ()
    begun: Callable[[list[Arrival]], list[Arrival]] = list


def _read(asked: Asked, where: Where, *, from_cluster: bool) -> _Read:
    """The scenario of the file, or that of the live cluster."""
    from sllm.cli.what_if import read_cluster
    from sllm.sim.scenario import read_scenario

    if from_cluster:
        found = read_cluster(where, asked)
        return _Read(title="the cluster", scenario=found.scenario, notes=found.notes, begun=found.begun)
    assert asked.scenario is not None  # as checked
    with reported(where.output):
        return _Read(title=asked.scenario.stem, scenario=read_scenario(asked.scenario, trace=asked.trace))


def _policies(asked: list[str]) -> list[str]:
    from sllm.sim.policies import POLICIES

    for name in asked:
        if name not in POLICIES:
            raise InvalidArgument(f"there is no policy {name!r}", hint=f"there are {', '.join(POLICIES)}")
    return list(dict.fromkeys(asked)) or list(POLICIES)


def _runs(read: _Read, policies: list[str], seeds: int, progress: Progress) -> Iterator[Result]:
    """Run each policy on the same requests, seed by seed."""
    from sllm.sim.policies import POLICIES
    from sllm.sim.result import result_of
    from sllm.sim.simulation import Simulation
    from sllm.sim.workload import generate

    for seed in range(1, seeds + 1):
        arrivals = read.begun(generate(read.scenario.workload, seed))
        for policy in policies:
            simulation = Simulation(read.scenario.cluster, arrivals, POLICIES[policy], seed=seed)
            going = True
            while going:
                progress.update(f"{policy}, seed {seed}", simulation.done)
                for _ in range(_INSTANTS):
                    going = going and simulation.advance()
            yield result_of(simulation, policy=policy, seed=seed)


@contextmanager
def _interruptible() -> Iterator[list[KeyboardInterrupt]]:
    """Ctrl-C ends the body, not the command: the caller is given what has ended it, and prints what is done."""
    found: list[KeyboardInterrupt] = []
    try:
        yield found
    except KeyboardInterrupt as interrupt:
        found.append(interrupt)
