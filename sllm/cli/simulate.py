"""`sllm simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllm.cli.failures import reported
from sllm.cli.options import OutputOption
from sllm.cli.output import Format, emit
from sllm.cli.progress import Progress, open_progress
from sllm.errors import EXIT_INTERRUPTED, InvalidArgument

if TYPE_CHECKING:
    from sllm.sim.result import Result
    from sllm.sim.scenario import Scenario

EXAMPLE = """
sllm simulate examples/scenarios/paper-opt-6.7b.toml
sllm simulate examples/scenarios/scarce-copies.toml --policy ours --policy random --seeds 5 -o json
"""

_INSTANTS = 500  # between two looks at how far a run is


def simulate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="What to simulate.", show_default=False)],
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Replay these requests instead of the scenario's arrivals."),
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
) -> None:
    from sllm.cli import simulated
    from sllm.sim import plotting
    from sllm.sim.scenario import read_scenario

    with reported(output):
        names = _policies(policy or [])
        if seeds < 1:
            raise InvalidArgument(f"--seeds {seeds}: at least one run is needed")
        if plot is not None:
            plotting.check(plot)
        read = read_scenario(scenario, trace=trace)
        results: list[Result] = []
        with _interruptible() as interrupted, open_progress(f"simulate {scenario.stem}") as progress:
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


def _policies(asked: list[str]) -> list[str]:
    from sllm.sim.policies import POLICIES

    for name in asked:
        if name not in POLICIES:
            raise InvalidArgument(f"there is no policy {name!r}", hint=f"there are {', '.join(POLICIES)}")
    return list(dict.fromkeys(asked)) or list(POLICIES)


def _runs(scenario: Scenario, policies: list[str], seeds: int, progress: Progress) -> Iterator[Result]:
    """Run each policy on the same requests, seed by seed."""
    from sllm.sim.policies import POLICIES
    from sllm.sim.result import result_of
    from sllm.sim.simulation import Simulation
    from sllm.sim.workload import generate

    for seed in range(1, seeds + 1):
        arrivals = generate(scenario.workload, seed)
        for policy in policies:
            simulation = Simulation(scenario.cluster, arrivals, POLICIES[policy], seed=seed)
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
