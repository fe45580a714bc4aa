"""A closed-loop streaming client in a process of its own: `python bench/load.py URL CONCURRENCY REQUESTS TOKENS`.

Prints one JSON line. It parses as little as it can (it shares two cores with what it measures): each SSE event is one
token, because the servers send one event per token.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time

import aiohttp
import uvloop


async def one(session: aiohttp.ClientSession, url: str, tokens: int, gaps: list[float], firsts: list[float]) -> int:
    body = {
        "model": "demo",
        "prompt": "Python is",
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started = last = time.monotonic()
    count = 0
    async with session.post(f"{url}/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.monotonic()
            if count == 0:
                firsts.append(now - started)
            else:
                gaps.append(now - last)
            last, count = now, count + 1
    return count


async def run(url: str, concurrency: int, requests: int, tokens: int) -> dict[str, float]:
    gaps: list[float] = []
    firsts: list[float] = []
    left = iter(range(requests))

    async def worker(session: aiohttp.ClientSession) -> int:
        return sum([await one(session, url, tokens, gaps, firsts) for _ in left])

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        started = time.monotonic()
        counts = await asyncio.gather(*[worker(session) for _ in range(concurrency)])
        elapsed = time.monotonic() - started
    total = sum(counts)
    if total < requests * tokens * 0.99:
        raise RuntimeError(f"only {total} of {requests * tokens} tokens came")
    return {
        "tokens": total,
        "seconds": elapsed,
        "tokens_per_s": total / elapsed,
        "tpot_ms": statistics.median(gaps) * 1e3,
        "tpot_p99_ms": statistics.quantiles(gaps, n=100)[98] * 1e3,
        "ttft_ms": statistics.median(firsts) * 1e3,
    }


if __name__ == "__main__":
    target, concurrency, requests, tokens = sys.argv[1], *map(int, sys.argv[2:5])
    print(json.dumps(uvloop.run(run(target, concurrency, requests, tokens))))
