"""The versions of vLLM that both adapters (engine and gateway) were tested with.

Both touch names that vLLM does not promise to keep, and refuse a version that is not here.
"""

from __future__ import annotations

TESTED_VERSIONS = ("0.32.0",)
