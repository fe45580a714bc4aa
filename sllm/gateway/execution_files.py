"""Execution files (configuration, tokenizer, chat template) of a checkpoint: fetched from an agent, kept by digest.

What an agent sends is not trusted to name paths: a file lands below its checkpoint's folder or not at all. A folder
appears and goes whole, by a rename; what a crash leaves has a temporary name and is removed at start.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Protocol, cast

from sllm.core.checkpoint import ExecutionFile
from sllm.errors import CapacityExceeded, InvalidCheckpoint, InvalidConfiguration, SllmError, Unavailable
from sllm.rpc.agents import GetExecutionFilesRequest

log = logging.getLogger(__name__)

MAX_FILES = 1000
MAX_TOTAL_BYTES = 512 << 20
_MAX_PATH_LENGTH = 512
_TEMPORARY = ".tmp-"


class Source(Protocol):
    """An agent, as far as it is needed here."""

    def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]: ...
    async def close(self) -> None: ...


def safe_parts(path: str) -> tuple[str, ...]:
    """Return the parts of a relative path of plain names. Raises InvalidCheckpoint for any other."""
    parts = tuple(path.split("/"))
    plain = all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)
    if not plain or len(path) > _MAX_PATH_LENGTH:
        raise InvalidCheckpoint(f"an execution file is named {path[:_MAX_PATH_LENGTH]!r}, which is not a plain name")
    return parts


def make_folder(folder: Path) -> None:
    """Make a folder of this process' state. Raises InvalidConfiguration if it cannot be used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise InvalidConfiguration(
            f"state_dir: cannot write to the folder {folder}: {error.strerror}",
            hint="let state_dir name a folder that this user may write to",
        ) from error


class ExecutionFiles:
    """The cache. `dial` opens a client to the agent at an address."""

    def __init__(self, folder: Path, dial: Callable[[str], Source]) -> None:
        self._folder = folder
        self._dial = dial
        self._kept: frozenset[str] | None = None
        make_folder(folder)
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    async def folder_of(self, digest: str, sources: Sequence[str]) -> Path:
        """Return the folder with a checkpoint's files, fetching them if need be from the first source that answers."""
        final = self._folder.joinpath(*safe_parts(_name(digest)))
        if final.exists():
            return final
        error: SllmError = Unavailable("no node that holds the checkpoint can be reached", retry_after_s=1.0)
        for address in sources:
            try:
                await self._fetch(digest, address, final)
            except InvalidCheckpoint:
                raise
            except SllmError as failed:
                log.warning("execution files from %s: %s", address, failed.message)
                error = failed
            else:
                return final
        raise error

    def prune(self, digests: Collection[str]) -> None:
        """Remove the files of all other checkpoints; they are fetched again when they are needed again."""
        keep = frozenset(_name(digest) for digest in digests)
        if keep == self._kept:
            return
        self._kept = keep
        for folder in list(self._folder.iterdir()):
            if folder.name not in keep and not folder.name.startswith(_TEMPORARY):
                # It is gone at once: who asks for it while it is being removed gets a new one.
                gone = folder.rename(self._temporary())
                asyncio.get_running_loop().run_in_executor(None, functools.partial(_remove, gone))

    def _temporary(self) -> Path:
        return self._folder / f"{_TEMPORARY}{os.urandom(6).hex()}"

    async def _fetch(self, digest: str, address: str, final: Path) -> None:
        temporary = self._temporary()
        temporary.mkdir(mode=0o700)
        source = self._dial(address)
        try:
            await self._receive(source, digest, temporary)
            temporary.rename(final)
        finally:
            await source.close()
            shutil.rmtree(temporary, ignore_errors=True)

    async def _receive(self, source: Source, digest: str, folder: Path) -> None:
        files = source.get_execution_files(GetExecutionFilesRequest(digest=digest))
        count = total_bytes = 0
        previous = ""
        async with aclosing(cast(AsyncGenerator[ExecutionFile, None], files)):
            async for file in files:
                count, total_bytes = count + 1, total_bytes + len(file.content)
                if count > MAX_FILES or total_bytes > MAX_TOTAL_BYTES:
                    raise CapacityExceeded(f"the execution files of {digest} are too many or too large")
                target = folder.joinpath(*safe_parts(file.path))
                # A file that does not fit in one message comes in several, one after the other.
                await asyncio.to_thread(_write, target, file.content, again=file.path == previous)
                previous = file.path
        if count == 0:
            raise InvalidCheckpoint(f"checkpoint {digest} has no execution files")


def _name(digest: str) -> str:
    return digest.replace(":", "-")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write(target: Path, content: bytes, *, again: bool) -> None:
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with target.open("ab" if again else "xb") as file:
            file.write(content)
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            raise InvalidCheckpoint(f"the execution file {target.name!r} is named twice") from error
        raise CapacityExceeded(f"cannot write the execution file {target.name!r}: {error.strerror}") from error
