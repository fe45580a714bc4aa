"""The store process: owns the node's DRAM pool and reads checkpoints into it.

    python -P -m sllm.agent.store.main --listen-fd N --size-bytes N [--adopt POOL_FD TABLE_FD] ...

It outlives its agent, so that the next one finds the pool as it was; without any agent for `--grace-s` seconds it ends.
It imports neither torch nor grpc, and what it does beside reading (fill the pool, verify what was inherited) is outside
of the interpreter: a busy Python thread would hold up every chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import threading
import time

from sllm import log as logs
from sllm.agent.store.protocol import Malformed, table_from
from sllm.agent.store.server import Server
from sllm.loader.memory.shared import SharedPool
from sllm.loader.memory.table import Table

log = logging.getLogger(__name__)


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the agent
    logs.setup(level="info", json_lines=False)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # each user of a load has a descriptor here
    asyncio.run(_run(options))
    # Neither a reading thread nor one that fills the pool is waited for.
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sllm.agent.store.main")
    parser.add_argument("--listen-fd", type=int, required=True, help="a Unix socket that listens (SOCK_SEQPACKET)")
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="that read")
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--hugepages", action="store_true", help="use them if enough are reserved")
    parser.add_argument("--prefault", action="store_true")
    parser.add_argument("--lock", action="store_true")
    parser.add_argument("--adopt", type=int, nargs=2, metavar=("POOL_FD", "TABLE_FD"), help="what a dead one had")
    return parser


async def _run(options: argparse.Namespace) -> None:
    pool, table = _pool(options)
    server = Server(pool, table, threads=options.threads, grace_s=options.grace_s)
    server.listen(socket.socket(fileno=options.listen_fd))
    stopped = threading.Event()
    if options.prefault:
        fill = threading.Thread(
            target=pool.prefault, kwargs={"lock": options.lock, "stopped": stopped}, name="prefault", daemon=True
        )
        fill.start()
    kind = "huge pages" if pool.huge else "4 KiB pages"
    log.info("store process %d has a pool of %d bytes of %s", os.getpid(), pool.size_bytes, kind)
    work = asyncio.create_task(server.run())
    ending = asyncio.create_task(server.quit.wait())
    try:
        await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()  # a defect: the agent starts another process
    finally:
        stopped.set()
        server.close()
    if not server.keeps:
        pool.give_up()


def _pool(options: argparse.Namespace) -> tuple[SharedPool, Table]:
    generation = time.time_ns() // 1000  # larger than any that was given before
    if options.adopt is None:
        pool = SharedPool.create(options.size_bytes, hugepages=options.hugepages)
        return pool, Table(pool.size_bytes, generation)
    pool_fd, table_fd = options.adopt
    os.set_inheritable(pool_fd, False)
    pool = SharedPool.adopt(pool_fd)
    try:
        entries = table_from(os.pread(table_fd, os.fstat(table_fd).st_size, 0))
        return pool, Table.adopt(pool.size_bytes, generation, entries, pool.leased)
    except (Malformed, ValueError) as error:  # what is leased is safe even so
        log.error("the table of the process before cannot be used, the pool begins empty: %s", error)
        return pool, Table.adopt(pool.size_bytes, generation, (), pool.leased)
    finally:
        os.close(table_fd)


if __name__ == "__main__":
    main()
