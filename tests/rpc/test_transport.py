"""Transport: errors keep their meaning over a real connection, silence is noticed, strangers are kept out."""

import asyncio
import datetime
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sllm.core.ids import DeploymentName, RequestId
from sllm.core.route import RouteTable
from sllm.errors import Conflict, DeadlineExceeded, InvalidArgument, NotFound, QueueFull, SllmError, Unavailable
from sllm.rpc import routes
from sllm.rpc.control import Empty
from sllm.rpc.routes import AcquireRequest, AcquireUpdate, ReportLoadRequest, RouteClient, WatchRoutesRequest
from sllm.rpc.transport import TLS_SERVER_NAME, Tls, serve

REPORT = ReportLoadRequest(gateway="g")


class Routes:
    """A RouteService whose answers the test sets."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.silent = False
        self.watchers = 0
        self.watcher_left = asyncio.Event()

    async def watch_routes(self, request: WatchRoutesRequest) -> AsyncIterator[RouteTable]:
        self.watchers += 1
        try:
            yield RouteTable(epoch=1, revision=1)
            await asyncio.Event().wait()
        finally:
            self.watchers -= 1
            self.watcher_left.set()

    async def acquire(self, request: AcquireRequest) -> AsyncIterator[AcquireUpdate]:
        yield AcquireUpdate(phase="loading", progress=0.5)
        if self.error:
            raise self.error

    async def report_load(self, request: ReportLoadRequest) -> Empty:
        if self.silent:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return Empty()


@pytest.fixture
async def service() -> AsyncIterator[tuple[Routes, RouteClient]]:
    implementation = Routes()
    server, port = await serve([routes.handlers(implementation)], "127.0.0.1:0", None)
    client = RouteClient(f"127.0.0.1:{port}", None, peer="the controller")
    yield implementation, client
    await client.close()
    await server.stop(None)


async def test_an_error_of_ours_arrives_with_class_hint_and_retry(service: tuple[Routes, RouteClient]) -> None:
    implementation, client = service
    implementation.error = QueueFull("the queue of 'chat' is full", hint="wait", retry_after_s=2.0)
    with pytest.raises(QueueFull) as caught:
        await client.report_load(REPORT)
    assert caught.value.message == "the queue of 'chat' is full"
    assert (caught.value.hint, caught.value.retry_after_s) == ("wait", 2.0)


async def test_an_error_in_a_stream_arrives_after_what_came_before_it(service: tuple[Routes, RouteClient]) -> None:
    implementation, client = service
    implementation.error = NotFound("gone")
    request = AcquireRequest(gateway="g", request_id=RequestId("req-1"), deployment=DeploymentName("d"), timeout_s=1)
    updates = []
    with pytest.raises(NotFound):
        async for update in client.acquire(request):
            updates.append(update)  # noqa: PERF401
    assert updates == [AcquireUpdate(phase="loading", progress=0.5)]


async def test_the_text_of_a_foreign_exception_never_leaves_the_server(service: tuple[Routes, RouteClient]) -> None:
    implementation, client = service
    implementation.error = RuntimeError("the password is hunter2")
    with pytest.raises(SllmError) as caught:
        await client.report_load(REPORT)
    assert "hunter2" not in caught.value.message
    assert caught.value.hint


async def test_what_cannot_be_sent_is_refused_here_and_not_sent_as_nothing(service: tuple[Routes, RouteClient]) -> None:
    _, client = service
    with pytest.raises(InvalidArgument, match="cannot be sent"):
        await client.report_load(ReportLoadRequest(gateway="\udcff"))


async def test_a_consumer_that_leaves_a_stream_ends_it_at_the_server(service: tuple[Routes, RouteClient]) -> None:
    implementation, client = service
    stream = client.watch_routes(WatchRoutesRequest(gateway="g"))
    assert (await anext(stream)).revision == 1
    assert implementation.watchers == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(implementation.watcher_left.wait(), 5)


async def test_an_unreachable_peer_is_named() -> None:
    client = RouteClient("127.0.0.1:1", None, peer="the controller")
    with pytest.raises(Unavailable, match="the controller at 127.0.0.1:1") as caught:
        await client.report_load(REPORT)
    assert caught.value.hint
    await client.close()


async def test_a_silent_peer_costs_no_more_than_the_deadline(service: tuple[Routes, RouteClient]) -> None:
    implementation, client = service
    implementation.silent = True
    with pytest.raises(DeadlineExceeded, match="the controller"):
        await client._unary(routes.REPORT_LOAD, REPORT, timeout_s=0.2)


async def test_a_taken_port_is_refused(service: tuple[Routes, RouteClient]) -> None:
    _, client = service
    with pytest.raises(Conflict, match="port is taken"):
        await serve([], client.address, None)


SERVER_PROGRAM = """
import asyncio
from sllm.core.route import RouteTable
from sllm.rpc import routes
from sllm.rpc.transport import serve
class Routes:
    async def watch_routes(self, request):
        yield RouteTable(epoch=1, revision=1)
        await asyncio.Event().wait()
    async def acquire(self, request): yield
    async def report_load(self, request): pass
async def main():
    server, port = await serve([routes.handlers(Routes())], "127.0.0.1:0", None)
    print(port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.e2e
async def test_a_stopped_peer_is_noticed_within_ten_seconds() -> None:
    """Its kernel goes on acknowledging: only the ping timeout notices."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER_PROGRAM, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        client = RouteClient(f"127.0.0.1:{port}", None, peer="the controller")
        stream = client.watch_routes(WatchRoutesRequest(gateway="g"))
        await anext(stream)
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable):
                await anext(stream)
        await client.close()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.e2e
async def test_a_stream_that_is_quiet_for_long_is_not_taken_for_an_attack(service: tuple[Routes, RouteClient]) -> None:
    """A server that does not expect pings ends the connection after the fourth: keepalive pings come every 5 s."""
    _, client = service
    stream = client.watch_routes(WatchRoutesRequest(gateway="g"))
    await anext(stream)
    quiet = asyncio.ensure_future(anext(stream))
    done, _ = await asyncio.wait({quiet}, timeout=23)
    assert not done
    quiet.cancel()


def identity(
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
) -> tuple[Tls, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate signed by `issuer`, or a CA of its own where there is none."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test" if issuer else "ca")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer[0].subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    ca = issuer[0].public_bytes(serialization.Encoding.PEM) if issuer else pem
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Tls(ca=ca, certificate=pem, key=secret), certificate, key


async def test_only_holders_of_the_clusters_certificates_get_in() -> None:
    _, ca, ca_key = identity(None)
    _, other_ca, other_key = identity(None)
    ours = identity((ca, ca_key))[0]
    server, port = await serve([routes.handlers(Routes())], "127.0.0.1:0", ours)
    address = f"127.0.0.1:{port}"
    strangers = {"no certificate": None, "another CA": identity((other_ca, other_key))[0]}
    friend = RouteClient(address, identity((ca, ca_key))[0], peer="the controller")
    try:
        assert await friend.report_load(REPORT) == Empty()
        for who, tls in strangers.items():
            stranger = RouteClient(address, tls, peer="the controller")
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await stranger._unary(routes.REPORT_LOAD, REPORT, timeout_s=5)
            await stranger.close()
            assert who
    finally:
        await friend.close()
        await server.stop(None)


def test_a_key_never_shows_in_a_repr() -> None:
    assert "BEGIN" not in repr(identity(None)[0])
