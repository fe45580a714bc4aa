"""The context `dev`: there while a local cluster runs, and as if it had never been afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sllm.cli.context import Context, Contexts, load, save
from sllm.cli.local.lock import was_abandoned

NAME = "dev"


@contextmanager
def dev_context(path: Path, context: Context) -> Iterator[bool]:
    """Add the context and yield whether it is the current one; it is made that only if none is."""
    made_folder = not path.parent.exists()
    before = _without_leftovers(load(path), context)
    current = before.current or NAME
    save(path, Contexts(current=current, contexts={**before.contexts, NAME: context}))
    try:
        yield current == NAME
    finally:
        save(path, _restored(load(path), before))
        if made_folder and path.parent.exists() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _without_leftovers(contexts: Contexts, context: Context) -> Contexts:
    """Drop what a killed cluster left: one on the same state folder, whose lock we hold, or on another."""
    left = contexts.contexts.get(NAME)
    if left is None or left.ca is None:
        return contexts
    if left.ca != context.ca and not was_abandoned(Path(left.ca).parent.parent):
        return contexts
    return _without_dev(contexts)


def _without_dev(contexts: Contexts) -> Contexts:
    others = {name: other for name, other in contexts.contexts.items() if name != NAME}
    return Contexts(current=None if contexts.current == NAME else contexts.current, contexts=others)


def _restored(now: Contexts, before: Contexts) -> Contexts:
    """Put our own entry back as it was; what others changed meanwhile stays."""
    rest = _without_dev(now)
    earlier = {NAME: before.contexts[NAME]} if NAME in before.contexts else {}
    return Contexts(current=rest.current or before.current, contexts={**rest.contexts, **earlier})
