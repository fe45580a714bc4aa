"""All commands of `sllm`, and how one command line is run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from sllm.cli import failures
from sllm.cli.lazy import Entry, group
from sllm.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, InvalidArgument, SllmError


def _verb(name: str, summary: str, details: str = "") -> Entry:
    return Entry(summary=summary, module=f"sllm.cli.{name}", function=name, details=details)


def _checkpoint(name: str, summary: str, details: str = "") -> Entry:
    function = f"{name}_" if name == "list" else name  # `list` is Python's
    return Entry(summary=summary, module=f"sllm.cli.checkpoint.{name}", function=function, details=details)


CHECKPOINT = {
    "add": _checkpoint(
        "add",
        "Copy a model's weights to nodes.",
        "SOURCE is a Hugging Face folder of safetensors, as the node sees it. "
        "Without --node and --all, one node with room that can see it takes it.",
    ),
    "list": _checkpoint("list", "List checkpoints and where they are held."),
    "show": _checkpoint(
        "show",
        "Show one checkpoint and its copies.",
        "With --path, the folder of a converted checkpoint on this machine, with its tensors.",
    ),
    "verify": _checkpoint(
        "verify",
        "Read copies of a checkpoint and compare them with their hashes.",
        "A copy that is found damaged is not used any more; adding the checkpoint again replaces it. "
        "With --path, the folder of a converted checkpoint on this machine; no cluster is needed.",
    ),
    "convert": _checkpoint(
        "convert",
        "Convert a folder of safetensors on this machine.",
        "What `sllm.loader.load` reads, and what nodes make by themselves when a checkpoint is added; "
        "no cluster is needed.",
    ),
    "remove": _checkpoint("remove", "Remove a checkpoint from nodes."),
}

COMMANDS = {
    "checkpoint": Entry(summary="Add, list, show, verify, convert and remove checkpoints.", commands=CHECKPOINT),
    "deploy": _verb(
        "deploy",
        "Serve a checkpoint under a model id.",
        "Deploying a name again with other settings replaces its replicas without failing a request; "
        "settings that are not given go back to their defaults.",
    ),
    "delete": _verb("delete", "Stop serving a deployment and forget it."),
    "scale": _verb(
        "scale",
        "Set how many replicas a deployment has.",
        "--replicas has so many now, --min and --max bound what it does by itself from then on. "
        "With --replicas 0 it stops until the next request.",
    ),
    "migrate": _verb(
        "migrate",
        "Move a running request, or all of a replica, to another node.",
        "The client's stream goes on where it was. A replica is started on the node if none there has room.",
    ),
    "drain": _verb(
        "drain",
        "Empty a node: move what runs there away, or let it finish.",
        "The node takes nothing new. What is long moves to other nodes, on which replicas are started where they are "
        "needed; what is expected to finish sooner than it could be moved is waited for. The node stays cordoned "
        "afterwards. What is left at the deadline is named, and goes on.",
    ),
    "cordon": _verb(
        "cordon",
        "Place nothing new on a node, or on one device of it.",
        "What runs there stays, and takes requests as before. `sllm drain` moves it away.",
    ),
    "uncordon": _verb(
        "uncordon", "Take a node, or a device, into use again.", "Of a node that is being drained, this ends that too."
    ),
    "status": _verb("status", "Show deployments, replicas and nodes."),
    "nodes": _verb("nodes", "List nodes with their devices and tiers."),
    "requests": _verb("requests", "List requests that run or wait."),
    "explain": _verb(
        "explain",
        "Say why a replica started where it did, and how long it took.",
        "Of a deployment its last starts, what it waits for, and where a replica would be started now; of a replica "
        "its start; of a request when it was held and granted, and the start of its replica. Numbers that nobody has "
        "measured yet are marked with ~, those measured of something alike with ≈.",
    ),
    "logs": _verb("logs", "Print the last log lines of a replica or a node."),
    "simulate": _verb(
        "simulate",
        "Try a cluster and a workload out on a virtual clock.",
        "The controller's own decisions, and others to compare them with, on simulated nodes. No cluster is needed. "
        "Ctrl-C prints what is done.",
    ),
    "dev": _verb(
        "dev",
        "Run a local cluster in the foreground.",
        "One controller, one gateway and some nodes, on loopback only, with any API key. Ctrl-C stops all of it.",
    ),
    "controller": _verb("controller", "Run the controller in the foreground."),
    "gateway": _verb("gateway", "Run a gateway in the foreground."),
    "agent": _verb("agent", "Run a node's agent in the foreground."),
    "version": _verb("version", "Print the version."),
}

SUMMARY = "sllm: bare-metal GPU servers as one serverless LLM service."


def run(args: Sequence[str]) -> int:
    """Run `args` and return the exit code; errors are printed as one line and a hint."""
    try:
        code = group("sllm", SUMMARY, COMMANDS).main(list(args), prog_name="sllm", standalone_mode=False)
    except typer.TyperException as error:
        return _usage(error)
    except SllmError as error:
        return failures.report(error, as_json=False)
    except OSError as error:
        return failures.report(_of_the_system(error), as_json=False)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else EXIT_OK


def _of_the_system(error: OSError) -> SllmError:
    where = f"{error.filename}: " if error.filename else ""
    return InvalidArgument(f"{where}{error.strerror or error}", hint="is it a place that can be read and written?")


def _usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "sllm"
    failures.print_failure(error.format_message(), f"see `{path} --help`")
    return EXIT_USAGE
