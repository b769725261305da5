"""TLS: the stream works through it, and what is wrong with a certificate is said with what to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from buffer.client import AsyncStream, Stream
from buffer.errors import RedisUnavailable, RedisUnsuitable
from buffer.ledger import Snapshot
from buffer.local_server import LocalServer, free_port
from buffer.stream import read_frames
from tests.contract.harness import Run
from tests.contract.servers import RawServer
from tests.contract.tls import Authority, TlsProxy


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that clients are told of."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> tuple[Path, Path]:
    """A certificate of `localhost`, not of 127.0.0.1."""
    return authority.certificate("localhost")


@pytest.fixture(scope="module")
def proxy(redis_server: LocalServer, certificate: tuple[Path, Path]) -> Iterator[TlsProxy]:
    """TLS in front of the session's server."""
    with TlsProxy(urlsplit(redis_server.url).port or 0, certificate) as started:
        yield started


def tls_url(server: LocalServer, port: int, authority: Authority | None, host: str = "localhost") -> str:
    login = urlsplit(server.url).netloc.rpartition("@")[0]
    query = f"?ssl_ca_certs={authority.file}" if authority else ""
    return f"rediss://{login}@{host}:{port}/0{query}"


@pytest.fixture
def url(redis_server: LocalServer, proxy: TlsProxy, authority: Authority) -> str:
    return tls_url(redis_server, proxy.port, authority)


async def _a_run_works(url: str, name: str) -> None:
    stream, actor = Stream.connect(url, name, patience_s=5), AsyncStream.connect(url, name, patience_s=5)
    stream.load_library()
    run = Run(stream).start("a")
    run.queue("a", 1)
    lease = await actor.call(run.next_admit("a"))
    assert (await actor.publish(*run.publish_call(lease, "a"))).status == "ok"
    frames = read_frames(stream, run.assign(0).manifest.groups())
    assert [frame.problem for frame in frames] == [None, None]
    assert await actor.take(actor.key("places"), 1.0) == b"1"
    await actor.close()
    stream.close()


async def test_a_run_works_through_tls(url: str, run_name: str) -> None:
    await _a_run_works(url, run_name)


CLIENTS = [Stream.connect, AsyncStream.connect]


@pytest.mark.parametrize("attempt", CLIENTS)
def test_an_unknown_authority_asks_for_its_file(
    attempt: type, redis_server: LocalServer, proxy: TlsProxy, tmp_path: Path
) -> None:
    for known in (None, Authority(tmp_path)):
        with pytest.raises(
            RedisUnavailable, match=r"certificate verify failed.*\?ssl_ca_certs=FILE"
        ) as caught:
            attempt(tls_url(redis_server, proxy.port, known), "run")
        assert urlsplit(redis_server.url).password not in str(caught.value)


@pytest.mark.parametrize("attempt", CLIENTS)
def test_another_host_name_says_which_to_write(
    attempt: type, redis_server: LocalServer, proxy: TlsProxy, authority: Authority
) -> None:
    with pytest.raises(
        RedisUnavailable, match=r"not valid for '127.0.0.1'.*write the host as its certificate"
    ):
        attempt(tls_url(redis_server, proxy.port, authority, "127.0.0.1"), "run")


@pytest.mark.parametrize("attempt", CLIENTS)
def test_plain_text_to_a_tls_port_asks_for_rediss(
    attempt: type, redis_server: LocalServer, proxy: TlsProxy
) -> None:
    url = tls_url(redis_server, proxy.port, None).replace("rediss:", "redis:")
    with pytest.raises(RedisUnavailable, match="a server that speaks TLS needs rediss://"):
        attempt(url, "run")


@pytest.mark.parametrize("attempt", CLIENTS)
def test_tls_to_a_plain_port_asks_for_redis(
    attempt: type, redis_server: LocalServer, authority: Authority
) -> None:
    # A server that waits for the end of a line says nothing: only the time-out ends it.
    url = tls_url(redis_server, urlsplit(redis_server.url).port or 0, authority) + "&socket_timeout=0.3"
    with pytest.raises(RedisUnavailable, match="does not speak TLS needs redis:"):
        attempt(url, "run")


@pytest.mark.parametrize("attempt", CLIENTS)
def test_a_missing_certificate_file_is_named(attempt: type, url: str) -> None:
    file = url.partition("=")[2]
    with pytest.raises(RedisUnavailable, match=r"/nowhere/ca.pem"):
        attempt(url.replace(file, "/nowhere/ca.pem"), "run")


@pytest.mark.parametrize("attempt", CLIENTS)
def test_a_wrong_password_is_named_through_tls(attempt: type, url: str) -> None:
    with pytest.raises(RedisUnsuitable, match="put user:password of a role"):
        attempt(url.replace(urlsplit(url).password or "", "x"), "run")


async def test_a_certificate_that_changes_ends_a_connection_at_once(
    redis_server: LocalServer,
    authority: Authority,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    run_name: str,
) -> None:
    """Somebody in the middle: the next connection is refused by us, and not tried until patience ends."""
    with TlsProxy(urlsplit(redis_server.url).port or 0, certificate) as proxy:
        url = tls_url(redis_server, proxy.port, authority)
        stream, actor = Stream.connect(url, run_name), AsyncStream.connect(url, run_name)
        stream.load_library()
        run = Run(stream).start()
        assert (await actor.call(Snapshot())).number("version") == 0
        proxy.present(Authority(tmp_path).certificate("localhost"))
        proxy.disconnect()
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match=r"certificate verify failed.*ssl_ca_certs"):
                run.snapshot()
            with pytest.raises(RedisUnavailable, match=r"certificate verify failed.*ssl_ca_certs"):
                await actor.call(Snapshot())
        assert time.monotonic() - began < stream.patience_s / 3
        proxy.present(certificate)
        assert run.snapshot().number("version") == (await actor.call(Snapshot())).number("version") == 0
        await actor.close()
        stream.close()


async def test_a_server_that_speaks_tls_itself(
    authority: Authority, certificate: tuple[Path, Path], tmp_path: Path, run_name: str
) -> None:
    tls_port = free_port()
    settings = {
        "port": free_port(),
        "tls-port": tls_port,
        "tls-cert-file": certificate[0],
        "tls-key-file": certificate[1],
        "tls-ca-cert-file": authority.file,
        "tls-auth-clients": "no",
    }
    try:
        server = RawServer(tmp_path, settings).start()
    except RedisUnavailable as error:
        if "TLS" not in str(error):
            raise
        pytest.skip(f"no TLS in this server program; put a redis-server that has it on the PATH: {error}")
    with contextlib.closing(server):
        await _a_run_works(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={authority.file}", run_name)
        with pytest.raises(RedisUnavailable, match=r"\?ssl_ca_certs=FILE"):
            Stream.connect(f"rediss://localhost:{tls_port}", run_name)
        with pytest.raises(RedisUnavailable, match="write the host as its certificate"):
            Stream.connect(f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={authority.file}", run_name)
        with pytest.raises(RedisUnavailable, match="needs rediss://"):
            Stream.connect(f"redis://localhost:{tls_port}", run_name)
