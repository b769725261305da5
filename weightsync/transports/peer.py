"""Pulling ranges over TCP from the learner, or from any agent that holds the version.

By several connections where there are cores for them: each has a part of what is missing, and one request for
what is missing there in a row. What was verified stays, so a pull goes on where it broke off, also from
another holder.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from itertools import groupby
from struct import pack
from typing import Any
from urllib.parse import urlsplit

from weightsync.errors import SourceError
from weightsync.image import PIECE_BYTES
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.threads import HALF, shares, side_by_side


class Peer:
    """HTTP range requests to a `weightsync.holder.Holder`."""

    kind = "peer"

    def __init__(self, timeout_s: float, connections: int = HALF) -> None:
        """`timeout_s` bounds the time without a byte from the holder; a pull has so many `connections`."""
        self._timeout_s, self._connections = timeout_s, connections

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """Everywhere; a holder that cannot be reached is found out by asking it."""
        return True

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the holder."""
        with connected(source, self._timeout_s) as connection:
            return ask(connection, source, f"/{version}/manifest")

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """The missing chunks as ranges of the holder's image."""
        rows = shares(staging.missing(), self._connections)
        side_by_side(partial(self._pull, source, version, staging), rows, self._connections)

    def _pull(self, source: Source, version: str, staging: Staging, numbers: Sequence[int]) -> None:
        """By one connection."""
        room = memoryview(bytearray(PIECE_BYTES))
        with connected(source, self._timeout_s) as connection:
            connection.response_class = _Unbuffered
            for run in _runs(numbers):
                first, last = staging.manifest.chunks[run[0]], staging.manifest.chunks[run[-1]]
                wanted = {"Range": f"bytes={first.offset}-{last.offset + last.size - 1}"}
                path = f"/{version}/data"
                response = _answer(connection, source, path, wanted, HTTPStatus.PARTIAL_CONTENT)
                with _in_bulk(connection, self._timeout_s):
                    for number in run:
                        size = staging.manifest.chunks[number].size
                        staging.keep(number, _parts(connection, response, source, size, room))
                response.read()


class _Unbuffered(http.client.HTTPResponse):
    """Reads no further than it is asked to: a buffer would wait for bytes that do not come."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = sock.makefile("rb", buffering=0)  # type: ignore[assignment]


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


def answers(connection: http.client.HTTPConnection, source: Source, paths: Iterable[str]) -> Iterator[bytes]:
    """The answers to requests, in order; while one is used, the next is on its way."""
    left = iter(paths)
    path = next(left, None)
    if path is not None:
        _request(connection, source, path)
    while path is not None:
        answer, path = _response(connection, source, path, HTTPStatus.OK).read(), next(left, None)
        if path is not None:
            _request(connection, source, path)
        yield answer


def _answer(
    connection: http.client.HTTPConnection,
    source: Source,
    path: str,
    headers: dict[str, str],
    expected: HTTPStatus,
) -> http.client.HTTPResponse:
    _request(connection, source, path, **headers)
    return _response(connection, source, path, expected)


def _request(connection: http.client.HTTPConnection, source: Source, path: str, **headers: str) -> None:
    connection.request("GET", path, headers={"Authorization": f"Bearer {source.token}", **headers})


def _response(
    connection: http.client.HTTPConnection, source: Source, path: str, expected: HTTPStatus
) -> http.client.HTTPResponse:
    response = connection.getresponse()
    if response.status != expected:
        raise SourceError(
            f"{source.kind}: {source.address}{path}: got status {response.status}, expected "
            f"{expected.value}; it does not hold that version any more"
        )
    return response


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers in order, those in a row together.

    >>> _runs([0, 1, 2, 5, 7, 8])
    [[0, 1, 2], [5], [7, 8]]
    """
    rows = groupby(enumerate(numbers), lambda place: place[1] - place[0])
    return [[number for _, number in row] for _, row in rows]


@contextmanager
def _in_bulk(connection: http.client.HTTPConnection, timeout_s: float) -> Iterator[None]:
    """Has the kernel wait, not Python, and wake who reads once all of a part is there."""
    seconds, rest = divmod(timeout_s, 1)
    bound = pack("ll", int(seconds), int(rest * 1e6))
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
    connection.sock.settimeout(None)
    yield
    connection.sock.settimeout(timeout_s)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _parts(
    connection: http.client.HTTPConnection,
    response: http.client.HTTPResponse,
    source: Source,
    size: int,
    room: memoryview,
) -> Iterator[memoryview]:
    """The next `size` bytes of an answer, part after part in the same room."""
    left = size
    while left:
        part = room[:left]
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(part))  # more would not come
        count = response.readinto(part)
        if not count:  # at the end, or after too long a wait
            raise SourceError(
                f"peer: {source.address}: broke off after {size - left} of {size} bytes; "
                "its holder is gone or slow"
            )
        yield part[:count]
        left -= count
