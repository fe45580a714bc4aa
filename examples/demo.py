"""The main job of sllm, end to end, on this machine: what `make demo` runs.

Starts a local cluster (`sllm dev`: one controller, one gateway, two nodes), adds the bundled checkpoint, deploys it,
asks it through the official OpenAI client, scales to zero, asks again. Exits with 0 only if all of it worked and
nothing was left behind. Everything it writes is in `.demo/`, which each run begins anew.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"
SLLM = Path(sys.executable).with_name("sllm")
MODEL = "demo"
QUESTION = "Explain serverless computing in one sentence."
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60

console = Console(highlight=False)


class DemoFailed(Exception):
    """A step did not do what it should; the message says which."""


@dataclass
class Step:
    what: str
    seconds: float
    remark: str = ""


@dataclass
class Answer:
    text: str
    first_token_s: float
    total_s: float
    tokens: int


def environment() -> dict[str, str]:
    # The demo's own home: a context that the user has set elsewhere is neither used nor changed.
    return {**os.environ, "SLLM_HOME": str(HOME), "PYTHONUNBUFFERED": "1"}


def run(*command: str) -> str:
    """Run a `sllm` command as a user would, showing it, and return its standard output."""
    console.print(f"[bold]$ sllm {' '.join(command)}[/bold]")
    done = subprocess.run([SLLM, *command], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise DemoFailed(f"sllm {command[0]} exited with {done.returncode}")
    return done.stdout


@contextmanager
def cluster() -> Iterator[str]:
    """Run `sllm dev`; yield the OpenAI base URL; stop it with SIGINT, as Ctrl-C does."""
    console.print("[bold]$ sllm dev --nodes 2[/bold]")
    command = [SLLM, "dev", "--nodes", "2", "--gateway-port", "0", "--controller-port", "0", "--state", HOME / "state"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield base_url(process)
        process.send_signal(signal.SIGINT)
        if code := process.wait(STOP_TIMEOUT_S):
            raise DemoFailed(f"sllm dev exited with {code}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def base_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"https?://\S+/v1\b", line):
            return found.group()
    raise DemoFailed(f"sllm dev ended before it was ready, with {process.wait()}")


def ask(client: openai.OpenAI, question: str) -> Answer:
    """Ask with streaming and print the answer as it comes."""
    console.print(f"[bold]> {question}[/bold]")
    started = time.monotonic()
    first: float | None = None
    text, tokens, finish = "", 0, None
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=120,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.monotonic()
                text += choice.delta.content
                print(choice.delta.content, end="", flush=True)
            finish = choice.finish_reason or finish
    print(flush=True)
    if first is None or finish is None:
        raise DemoFailed(f"the answer was {text!r} and ended with {finish!r}")
    return Answer(text=text, first_token_s=first - started, total_s=time.monotonic() - started, tokens=tokens)


def timed(steps: list[Step], what: str, *command: str) -> None:
    started = time.monotonic()
    run(*command)
    steps.append(Step(what, time.monotonic() - started))


def asked(steps: list[Step], what: str, client: openai.OpenAI) -> Answer:
    answer = ask(client, QUESTION)
    steps.append(Step(what, answer.first_token_s, f"{answer.tokens} tokens in {answer.total_s:.2f} s"))
    return answer


def main_job(steps: list[Step], url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    timed(steps, "add the checkpoint to both nodes", "checkpoint", "add", MODEL, "examples/demo-model", "--all")
    timed(steps, "deploy (at zero replicas)", "deploy", MODEL, "--checkpoint", MODEL, "--engine-arg", "dtype=float32")
    cold = asked(steps, "first token, from zero and SSD", client)
    awake = asked(steps, "first token, awake", client)
    run("status")
    timed(steps, "scale to zero", "scale", MODEL, "--replicas", "0")
    again = asked(steps, "first token, from zero and DRAM", client)
    if not cold.text == awake.text == again.text:
        raise DemoFailed("greedy answers differ between a cold, a warm and a restarted replica")


def left_behind() -> list[str]:
    """Return the processes of this demo's cluster that still run."""
    ours = []
    for process in psutil.process_iter(["pid", "name"]):
        try:
            mine = process.environ().get("SLLM_HOME") == str(HOME) and process.pid != os.getpid()
        except psutil.Error:
            continue
        if mine:
            ours.append(f"{process.info['name']} ({process.pid})")
    return ours


def show(steps: list[Step]) -> None:
    table = Table("step", "seconds", "", title="what each step took")
    for step in steps:
        table.add_row(step.what, f"{step.seconds:.2f}", step.remark)
    console.print(table)


def main() -> int:
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(mode=0o700)
    steps: list[Step] = []
    started = time.monotonic()
    try:
        with cluster() as url:
            steps.append(Step("start the cluster (two nodes with a warm process each)", time.monotonic() - started))
            main_job(steps, url)
            stopping = time.monotonic()
        steps.append(Step("stop the cluster", time.monotonic() - stopping))
        if processes := left_behind():
            raise DemoFailed(f"processes left behind: {', '.join(processes)}")
    except (DemoFailed, openai.OpenAIError, subprocess.TimeoutExpired) as error:
        console.print(f"[red]demo failed:[/red] {error}\nlogs: {HOME}/state/log", soft_wrap=True)
        return 1
    show(steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
