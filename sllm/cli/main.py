"""Entry point of `sllm`. `--version` is answered before anything else is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sllm.version import VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"sllm {VERSION}")
        return 0
    from sllm.cli.app import run

    return run(args or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
