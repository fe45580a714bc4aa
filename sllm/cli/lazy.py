"""Command groups whose commands are imported when they are called, not when they are listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command before it is imported: `function` of `module`, whose EXAMPLE ends the command's help.

    `commands` makes it a group instead. `details` follows the summary in the command's own help.
    """

    summary: str
    module: str = ""
    function: str = ""
    details: str = ""
    commands: Mapping[str, Entry] | None = None


def group(name: str, summary: str, entries: Mapping[str, Entry]) -> TyperGroup:
    """Return the group of `entries`."""
    return _LazyGroup(
        name=name,
        commands=_Commands(entries),  # type: ignore[arg-type]  # any mapping serves, the annotation says dict
        help=summary,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
    )


def _load(name: str, entry: Entry) -> Any:
    if entry.commands is not None:
        return group(name, entry.summary, entry.commands)
    module = import_module(entry.module)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    # \b keeps the example's lines as they are.
    app.command(
        name,
        help=f"{entry.summary}\n\n{entry.details}".rstrip(),
        epilog="Example:\n\n\b\n" + "\n".join(f"  {line}" for line in module.EXAMPLE.strip().splitlines()),
    )(getattr(module, entry.function))
    return typer.main.get_command(app)


class _Commands(MutableMapping[str, Any]):
    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name, self.entries[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _LazyGroup(TyperGroup):
    """Lists its commands from their entries."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        assert isinstance(self.commands, _Commands)
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in self.commands.entries.items()])
