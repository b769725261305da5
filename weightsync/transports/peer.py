"""Pulling ranges over TCP from the learner, or from any agent that holds the version.

Chunk after chunk over one connection; what was verified stays, so a pull goes on where it broke off, also
from another holder.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import urlsplit

from weightsync.errors import SourceError
from weightsync.protocol import Source
from weightsync.staging import Staging


class Peer:
    """HTTP range requests to a `weightsync.holder.Holder`."""

    kind = "peer"

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` bounds the time without a byte from the holder."""
        self._timeout_s = timeout_s

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """Everywhere; a holder that cannot be reached is found out by asking it."""
        return True

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the holder."""
        with connected(source, self._timeout_s) as connection:
            return ask(connection, source, f"/{version}/manifest")

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Every missing chunk as a range of the holder's image."""
        with connected(source, self._timeout_s) as connection:
            for number in staging.missing():
                chunk = staging.manifest.chunks[number]
                wanted = {"Range": f"bytes={chunk.offset}-{chunk.offset + chunk.size - 1}"}
                with staging.room(number) as room:
                    _read(connection, source, f"/{version}/data", wanted, room)
                staging.keep(number)


@contextmanager
def connected(source: Source, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to a holder; everything that goes wrong with it is a `SourceError`."""
    parts = urlsplit(source.address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        yield connection
    except (OSError, http.client.HTTPException) as error:
        told = str(error) or type(error).__name__
        raise SourceError(f"{source.kind}: {source.address}: {told}; its holder is gone or slow") from error
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, source: Source, path: str) -> bytes:
    """The answer to one request. Raises `SourceError` for a refusal."""
    return _answer(connection, source, path, {}, HTTPStatus.OK).read()


def _answer(
    connection: http.client.HTTPConnection,
    source: Source,
    path: str,
    headers: dict[str, str],
    expected: HTTPStatus,
) -> http.client.HTTPResponse:
    connection.request("GET", path, headers={"Authorization": f"Bearer {source.token}", **headers})
    response = connection.getresponse()
    if response.status != expected:
        raise SourceError(
            f"{source.kind}: {source.address}{path}: got status {response.status}, expected "
            f"{expected.value}; it does not hold that version any more"
        )
    return response


def _read(
    connection: http.client.HTTPConnection,
    source: Source,
    path: str,
    headers: dict[str, str],
    room: memoryview,
) -> None:
    """Reads exactly what there is room for."""
    response = _answer(connection, source, path, headers, HTTPStatus.PARTIAL_CONTENT)
    filled = 0
    while filled < len(room):
        count = response.readinto(room[filled:])
        if not count:
            raise SourceError(f"peer: {source.address}: broke off after {filled} of {len(room)} bytes")
        filled += count
    response.read()
