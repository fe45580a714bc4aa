"""A local cluster of real processes, driven as its users drive it: through `sllm` and through the OpenAI API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil

ROOT = Path(__file__).resolve().parents[2]
SLLM = str(Path(sys.executable).with_name("sllm"))
DEMO_MODEL = ROOT / "examples" / "demo-model"
START_TIMEOUT_S = 240
GRACE_S = 5.0  # of `sllm dev`


class Cluster:
    """`sllm dev` in a folder of its own. Its processes are found by the SLLM_HOME that they all inherit."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: str,
        nodes: int,
        environment: Mapping[str, str] | None = None,
        settings: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        self.state = folder / "state"
        self.environment = {**os.environ, "SLLM_HOME": str(self.home), "PYTHONUNBUFFERED": "1", **(environment or {})}
        command = [SLLM, "dev", "--engine", engine, "--nodes", str(nodes), "--gateway-port", "0"]
        command += ["--controller-port", "0", "--state", str(self.state)]
        command += [word for setting in settings for word in ("--set", setting)]
        self.stderr = folder / "dev.stderr"
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )
        self.base_url = self._base_url()

    def _base_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"https?://\S+/v1\b", line):
                return found.group()
        raise AssertionError(f"sllm dev ended before it was ready:\n{self.stderr.read_text()}")

    # --- as an operator ---

    def cli(self, *arguments: str, expect: int = 0, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SLLM, *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == expect, f"sllm {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "-o", "json").stdout)

    def deployment(self, name: str) -> dict[str, Any]:
        return next(d for d in self.json("status")["deployments"] if d["name"] == name)

    def replicas(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        rows = [r for r in self.json("status")["replicas"] if r["deployment"] == deployment]
        return [r for r in rows if not states or r["state"] in states]

    def until(self, true: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
        """Watch from outside, as a user would, until something holds."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with suppress(AssertionError):  # a command may fail while what it asks is being restarted
                if found := true():
                    return found
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s} s: {what}\n{self.cli('status').stdout}")

    # --- as a user ---

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key="any", **{"max_retries": 0, "timeout": 120, **options})

    # --- as a fault ---

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.home)

    def role(self, name: str) -> psutil.Process:
        """The child of `sllm dev` for `controller`, `gateway`, or an agent by its node's name."""
        found = self.roles(name)
        assert len(found) == 1, f"{name}: {found}"
        return found[0]

    def roles(self, name: str) -> list[psutil.Process]:
        """The same, where none may be there: it is being restarted."""
        return [p for p in psutil.Process(self.process.pid).children() if _role_of(p) == name]

    def restarted(self, name: str, before: psutil.Process) -> bool:
        return any(p.pid != before.pid for p in self.roles(name))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.ended()

    def kill(self) -> None:
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(60)


def _role_of(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    config = next((Path(a) for a in command if a.endswith(".toml")), None)
    return config.stem if config else ""


def processes_of(home: Path) -> list[psutil.Process]:
    """Every living process that was started, at whatever distance, with this SLLM_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLLM_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(home: Path, timeout_s: float) -> list[psutil.Process]:
    """Wait for the processes of a home to end; return those that did not."""
    _, alive = psutil.wait_procs(processes_of(home), timeout=timeout_s)
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def running(
    folder: Path,
    *,
    engine: str,
    nodes: int = 2,
    environment: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
) -> Iterator[Cluster]:
    cluster = Cluster(folder, engine=engine, nodes=nodes, environment=environment, settings=settings)
    try:
        yield cluster
    finally:
        cluster.stop()
        left = gone(cluster.home, GRACE_S + 5)
        for process in left:
            process.kill()
    assert not left, f"left behind: {left}"
