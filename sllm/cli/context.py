"""Contexts: which cluster the command line talks to, kept in `$SLLM_HOME/config.toml` (default `~/.sllm`)."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sllm.cli import toml_text
from sllm.cli.private_files import write_private
from sllm.errors import InvalidConfiguration, NotFound

_HINT = "run `sllm dev` for a local cluster, or give --controller HOST:PORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A cluster. `ca`, `certificate` and `key` are paths of PEM files: all of them, or none for a plain connection."""

    controller: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    gateway: str | None = None

    def __post_init__(self) -> None:
        if len({self.ca is None, self.certificate is None, self.key is None}) > 1:
            raise ValueError("ca, certificate and key are needed together")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """All of config.toml."""

    current: str | None = None
    contexts: dict[str, Context] = field(default_factory=dict)


def config_path() -> Path:
    """Return where contexts are kept."""
    home = os.environ.get("SLLM_HOME")
    return (Path(home) if home else Path.home() / ".sllm") / "config.toml"


def load(path: Path) -> Contexts:
    """Read contexts; a file that is not there has none. Raises InvalidConfiguration."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return _parsed(values)
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidConfiguration(f"{path} is not right: {error}", hint="mend it, or remove it") from error


def _parsed(values: dict[str, Any]) -> Contexts:
    unknown = values.keys() - {"current", "contexts"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}")
    contexts = {name: Context(**context) for name, context in values.get("contexts", {}).items()}
    return Contexts(current=values.get("current"), contexts=contexts)


def save(path: Path, contexts: Contexts) -> None:
    """Write contexts, readable by the owner alone; no context left means no file left."""
    if not contexts.contexts and contexts.current is None:
        path.unlink(missing_ok=True)
        return
    entries = {name: asdict(context) for name, context in contexts.contexts.items()}
    write_private(path, toml_text.dumps({"current": contexts.current, "contexts": entries}).encode())


def resolve(contexts: Contexts, *, context: str | None, controller: str | None, env: Mapping[str, str]) -> Context:
    """Choose the cluster: a flag goes before the environment, and that before the current context.

    An address given by itself keeps the identity of the context beside it, if there is one.
    """
    name = context or env.get("SLLM_CONTEXT") or contexts.current
    address = controller or env.get("SLLM_CONTROLLER")
    chosen = contexts.contexts.get(name) if name else None
    if name and chosen is None and (context or not address):
        known = ", ".join(sorted(contexts.contexts)) or "none"
        raise NotFound(f"there is no context {name!r}", hint=f"known contexts: {known}; {_HINT}")
    if address:
        return Context(**{**(asdict(chosen) if chosen else {}), "controller": address})
    if chosen is None:
        raise InvalidConfiguration("no cluster is configured: there is no current context", hint=_HINT)
    return chosen
