"""Certificates of a test's own, and TLS in front of a server that has none.

authority = Authority(tmp_path)                       # ca.pem
certificate = authority.certificate("localhost")      # (localhost.pem, localhost.key), for that name only
with TlsProxy(server_port, certificate) as port: ...
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


class Authority:
    """A certificate authority that only the test knows; skips the test where there is no `openssl`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("openssl") is None:
            pytest.skip("no `openssl` on the PATH to make certificates with")
        self._folder, self.file, self._key = folder, folder / "ca.pem", folder / "ca.key"
        self._openssl(
            "req", "-x509", *_KEY, "-keyout", self._key, "-out", self.file, "-subj", "/CN=authority"
        )

    def certificate(self, host: str) -> tuple[Path, Path]:
        """A certificate for a host name, and its key."""
        request, certificate, key = (self._folder / f"{host}.{end}" for end in ("csr", "pem", "key"))
        extension = self._folder / f"{host}.ext"
        extension.write_text(f"subjectAltName=DNS:{host}\n")
        self._openssl("req", *_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={host}")
        signed_by = ["-CA", self.file, "-CAkey", self._key, "-CAcreateserial"]
        self._openssl("x509", "-req", "-in", request, *signed_by, "-extfile", extension, "-out", certificate)
        return certificate, key

    def _openssl(self, *words: object) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


class TlsProxy:
    """Ends TLS and forwards to a plain server, in an event loop of its own thread."""

    def __init__(self, server_port: int, certificate: tuple[Path, Path]) -> None:
        self._server_port = server_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.present(certificate)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def present(self, certificate: tuple[Path, Path]) -> None:
        """Shows this certificate from the next connection on."""
        self._context.load_cert_chain(*certificate)

    def disconnect(self) -> None:
        """Ends all connections."""
        self._loop.call_soon_threadsafe(lambda: [writer.close() for writer in self._writers])

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)  # a handshake that fails is what the test is about
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._context)
        self.port, self._stopped = server.sockets[0].getsockname()[1], asyncio.Event()
        self._listening.set()
        await self._stopped.wait()
        server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0.05)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(to, writer))
        self._writers -= {writer, back}

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
