"""Results of a long bench as they come: one line a piece, appended to a file, found again by the next run.

A piece is kept under the code that made it (the tree of `sllm/`, and whether it was changed since): what other code has
made is not mixed in.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from common import ROOT


class Pieces:
    def __init__(self, path: Path, settings: str) -> None:
        """`settings`: what else a result depends on, and is the same for all pieces."""
        self._path = path
        self._made_by = f"{code()} {settings}"
        self._found: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if row["made_by"] == self._made_by:
                    self._found[row["piece"]] = row["result"]

    def get(self, piece: str) -> Any | None:
        return self._found.get(piece)

    def put(self, piece: str, result: Any) -> None:
        self._found[piece] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"made_by": self._made_by, "piece": piece, "result": result}) + "\n")


def code() -> str:
    """Name the code that is measured: that of the working tree, committed or not."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "sllm"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    digest = hashlib.sha256()
    for name in sorted(files.stdout.split()):
        path = ROOT / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
