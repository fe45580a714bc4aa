"""Execution files: fetched once, whole or not at all, and never outside their folder."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sllm.core.checkpoint import ExecutionFile
from sllm.errors import InvalidCheckpoint, InvalidConfiguration, NotFound, SllmError, Unavailable
from sllm.gateway.execution_files import ExecutionFiles, safe_parts
from sllm.rpc.agents import GetExecutionFilesRequest


class Agent:
    def __init__(self, *files: ExecutionFile, error: SllmError | None = None) -> None:
        self.files = files
        self.error = error
        self.asked = 0

    async def get_execution_files(self, request: GetExecutionFilesRequest) -> AsyncIterator[ExecutionFile]:
        self.asked += 1
        for file in self.files:
            yield file
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        return


def file(path: str, content: bytes = b"x") -> ExecutionFile:
    return ExecutionFile(path=path, content=content)


def cache(folder: Path, **agents: Agent) -> ExecutionFiles:
    return ExecutionFiles(folder, lambda address: agents[address])


async def test_fetches_once_and_keeps(tmp_path: Path) -> None:
    agent = Agent(file("config.json", b"{}"), file("sub/a.txt", b"a"))
    files = cache(tmp_path, a=agent)
    folder = await files.folder_of("sha256:1", ["a"])
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "sub" / "a.txt").read_bytes() == b"a"
    assert await files.folder_of("sha256:1", ["a"]) == folder
    assert agent.asked == 1


async def test_what_is_cached_needs_no_agent(tmp_path: Path) -> None:
    folder = await cache(tmp_path, a=Agent(file("config.json"))).folder_of("d", ["a"])
    assert await cache(tmp_path).folder_of("d", []) == folder


async def test_a_large_file_comes_in_pieces(tmp_path: Path) -> None:
    agent = Agent(file("big", b"ab"), file("big", b"cd"), file("small", b"e"))
    folder = await cache(tmp_path, a=agent).folder_of("d", ["a"])
    assert (folder / "big").read_bytes() == b"abcd"


async def test_the_next_source_is_asked_when_one_fails(tmp_path: Path) -> None:
    agents = {"a": Agent(error=Unavailable("away")), "b": Agent(error=NotFound("no")), "c": Agent(file("config.json"))}
    folder = await cache(tmp_path, **agents).folder_of("d", ["a", "b", "c"])
    assert (folder / "config.json").exists()


async def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await cache(tmp_path).folder_of("d", [])


async def test_a_fetch_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await cache(tmp_path, a=Agent(file("config.json"), error=Unavailable("away"))).folder_of("d", ["a"])
    assert list(tmp_path.iterdir()) == []


async def test_what_a_crash_left_is_removed_at_start(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1" / "x").mkdir(parents=True)
    cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_only_the_checkpoints_that_are_still_named_are_kept(tmp_path: Path) -> None:
    agent = Agent(file("config.json"))
    files = cache(tmp_path, a=agent)
    kept, gone = await files.folder_of("sha256:1", ["a"]), await files.folder_of("sha256:2", ["a"])
    files.prune({"sha256:1"})
    assert (kept.exists(), gone.exists()) == (True, False)
    assert await files.folder_of("sha256:2", ["a"]) == gone
    assert agent.asked == 3
    files.prune({"sha256:2"})
    assert (kept.exists(), gone.exists()) == (False, True)


@pytest.mark.parametrize("place", ["a-file", "a-file/below"])
def test_a_state_folder_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(InvalidConfiguration, match="state_dir") as refused:
        cache(tmp_path / place)
    assert "may write to" in refused.value.hint


def test_a_state_folder_that_is_not_ours_is_a_wrong_setting() -> None:
    with pytest.raises(InvalidConfiguration, match="state_dir"):
        cache(Path("/proc/sllm"))


HOSTILE = ["/etc/passwd", "../x", "a/../../x", "..", ".", "", "a//b", "a/", "a\\..\\x", "a\x00b", "a\nb", "x" * 600]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_hostile_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidCheckpoint):
        safe_parts(path)


@pytest.mark.parametrize("path", ["config.json", ".gitattributes", "original/params.json", "a b+c@d.txt", "模型.json"])
def test_a_plain_path_is_fine(path: str) -> None:
    assert "/".join(safe_parts(path)) == path


async def test_a_checkpoint_with_a_hostile_path_is_refused_whole(tmp_path: Path) -> None:
    cached = tmp_path / "cache"
    agents = {"a": Agent(file("config.json"), file("../evil", b"!")), "b": Agent(file("config.json"))}
    with pytest.raises(InvalidCheckpoint):
        await cache(cached, **agents).folder_of("d", ["a", "b"])
    assert list(cached.iterdir()) == []
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("again", ["config.json", "config.json/x"])
async def test_a_path_named_twice_is_refused(tmp_path: Path, again: str) -> None:
    agent = Agent(file("config.json"), file("other"), file(again))
    with pytest.raises(InvalidCheckpoint, match="named twice"):
        await cache(tmp_path, a=agent).folder_of("d", ["a"])
