"""Who holds versions: the newest two as sealed images, and a server from which they can be pulled.

The learner holds what it exported, an agent what it staged; both serve the same requests, so that an
actor may pull from whoever is near or alive.

    GET /<version>:<digest>/manifest
    GET /<version>:<digest>/data               Range: bytes=<first>-<last>     -> 206, those bytes
    GET /<version>:<digest>/delta/<chunk>      what changed of it since the manifest's parent

    holder = Holder("10.0.0.5")
    holder.keep(manifest, image)
    holder.sources("12:9c...")              # -> how others get it
    holder.close()
"""

from __future__ import annotations

import os
import secrets
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO

from weightsync.guard import Place
from weightsync.image import Image, Reserve
from weightsync.manifest import Manifest, encode_manifest
from weightsync.protocol import Source
from weightsync.transports import shm

KEPT = 2
"""Versions a holder keeps: the last, and the one before it, which slower agents may be pulling."""
SEND_TIMEOUT_S = 30.0
"""How long one who pulls may take none of the bytes before it is left alone."""


_LOOK_S = 0.05
"""How often a server looks whether it is to end."""


class Held:
    """One version of a holder's."""

    def __init__(self, manifest: Manifest, staged: Image | Place) -> None:
        self.manifest = manifest
        self.image = staged if isinstance(staged, Image) else None
        """In host memory; what lies on a GPU only is not served to others."""
        self.place = staged if isinstance(staged, Place) else None
        self.encoded = encode_manifest(manifest)
        """The manifest as it travels."""
        self.memory = Image.allocate(len(self.encoded))
        self.memory.write(0, memoryview(self.encoded))
        self.memory.seal()
        self.delta: list[bytes] = []
        """For each chunk what changed since `manifest.parent`; empty if none was made."""

    @property
    def path(self) -> str:
        """Where an engine of this host finds it: the image, or the guard of its slot."""
        if self.image is not None:
            return self.image.path
        assert self.place is not None
        return self.place.guard

    def close(self) -> None:
        """Gives the memory back; others may still have it open."""
        if self.image is not None:
            self.image.close()
        self.memory.close()


class Holder:
    """The newest versions of one process, and their server. Lifecycle: any number of `keep`, then `close`."""

    def __init__(self, address: str) -> None:
        """Serves at a free port of `address`, an address of this host."""
        self.token = secrets.token_hex(16)
        self.reserve = Reserve()
        """Of the next version's image: whoever makes that refills it when done with the one before."""
        self.served_bytes = 0
        """Bytes of versions asked of here so far."""
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._server = _Server((address, 0), self)
        self.url = f"http://{address}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_S,), name="weights-holder", daemon=True
        )
        self._thread.start()

    def keep(self, manifest: Manifest, staged: Image | Place, delta: list[bytes] | None = None) -> Held:
        """Holds a version from now on, and forgets all but the last two."""
        held = Held(manifest, staged)
        held.delta = delta or []
        with self._lock:
            before = self._held.pop(manifest.label, None)
            self._held[manifest.label] = held
            # The last ones kept: after a fork their numbers may be lower than those before.
            gone = [self._held.pop(label) for label in list(self._held)[:-KEPT]]
        for old in [*gone, *([before] if before else [])]:
            old.close()
        return held

    def parent_of(self, manifest: Manifest) -> Image | None:
        """The image that a delta to `manifest` starts from, if it is held in the same layout."""
        with self._lock:
            for held in self._held.values():
                if held.manifest.digest == manifest.parent and held.manifest.layout == manifest.layout:
                    return held.image
        return None

    def labels(self) -> list[str]:
        """What is held, oldest first."""
        with self._lock:
            return list(self._held)

    def held_bytes(self) -> int:
        """Memory of all images held, and of the one in reserve."""
        with self._lock:
            return sum(held.image.size for held in self._held.values() if held.image) + self.reserve.size

    def sources(self, label: str) -> list[Source]:
        """How others get a version that is held, the cheapest first."""
        with self._lock:
            held = self._held[label]
        if held.image is None:
            return []
        pulled = Source("peer", "", self.url, self.token)
        changed = [Source("delta", "", self.url, self.token)] if held.delta else []
        return [shm.source_of(held.image, held.memory), *changed, pulled]

    def answer(self, path: str) -> tuple[bytes | None, int, int] | None:
        """What a path names: bytes, or (None, a descriptor of the caller's own, its size); None: nothing."""
        label, _, what = path.removeprefix("/").partition("/")
        with self._lock:
            held = self._held.get(label)
            if held is None:
                return None
            if what == "manifest":
                return held.encoded, -1, len(held.encoded)
            if what == "data" and held.image is not None:
                # A descriptor of its own: the image may be forgotten while it is being sent.
                return None, os.dup(held.image.descriptor), held.image.size
        number = what.removeprefix("delta/")
        if number.isdecimal() and int(number) < len(held.delta):
            return held.delta[int(number)], -1, len(held.delta[int(number)])
        return None

    def send(self, connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        """Sends `count` bytes of an image to one who pulls."""
        with self._lock:
            self.served_bytes += count
        connection.sendfile(image, first, count)

    def close(self) -> None:
        """Ends the server and forgets everything."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.reserve.close()
        with self._lock:
            held, self._held = list(self._held.values()), {}
        for one in held:
            one.close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    """One that is being sent to must not hold the end of a run up."""

    def __init__(self, address: tuple[str, int], holder: Holder) -> None:
        self.holder = holder
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """One that broke off in mid-transfer asks again, or somebody else: nothing to say here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SEND_TIMEOUT_S
    disable_nagle_algorithm = True
    """Else the last bytes of an answer wait for the other side, which waits 40 ms for more."""
    server: _Server

    def do_GET(self) -> None:
        """Answers one request."""
        holder = self.server.holder
        if not secrets.compare_digest(self.headers.get("Authorization", ""), f"Bearer {holder.token}"):
            return self._send(HTTPStatus.UNAUTHORIZED, b"")
        found = holder.answer(self.path)
        if found is None:
            return self._send(HTTPStatus.NOT_FOUND, b"")
        content, descriptor, size = found
        if content is not None:
            return self._send(HTTPStatus.OK, content)
        with os.fdopen(descriptor, "rb") as image:
            first, count = _range_of(self.headers.get("Range", ""), size)
            if count <= 0:
                return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"")
            self._head(HTTPStatus.PARTIAL_CONTENT, count)
            holder.send(self.connection, image, first, count)
        return None

    def _send(self, status: HTTPStatus, content: bytes) -> None:
        self._head(status, len(content))
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, form: str, *parts: object) -> None:
        """Nothing: who pulls says what went wrong."""


def _range_of(header: str, size: int) -> tuple[int, int]:
    """(first byte, count) of `bytes=<first>-<last>`; count 0 if it is none within `size`.

    >>> _range_of("bytes=2-4", 10), _range_of("bytes=2-12", 10), _range_of("", 10)
    ((2, 3), (0, 0), (0, 0))
    """
    unit, _, rest = header.partition("=")
    first, _, last = rest.partition("-")
    if unit != "bytes" or not first.isdecimal() or not last.isdecimal() or not int(last) < size:
        return 0, 0
    return int(first), max(0, int(last) + 1 - int(first))
