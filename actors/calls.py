"""Calls of an engine's server over HTTP: its keys, its timeouts, and errors that name the path."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from actors.errors import EngineError

LOADS = "/v1/loads?include=core"
"""Where the server says how much it has to do."""
OPEN = ("/generate", "/model_info", LOADS)
"""What the API key suffices for; everything else takes the admin key."""
KEEP_ALIVE_S = 2.0
"""How long an idle connection is kept: less than the server's 5 s, or a call may go out on one that the
server is closing and fail."""


class Calls:
    """A client of one server on the loopback. Made in a running event loop; ended by `close`."""

    def __init__(self, name: str, port: int, keys: tuple[str, str]) -> None:
        """`name`: of the actor, for messages; `keys`: API key and admin API key of the server."""
        self.name = name
        self._keys = keys
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._http = aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector)

    async def close(self) -> None:
        """End the connections."""
        await self._http.close()

    async def get(self, path: str, timeout_s: float) -> bytes:
        """The body of a good answer; `EngineError` otherwise."""
        return await self._good("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        """The same for a JSON body."""
        return await self._good("POST", path, msgspec.json.encode(body), timeout_s)

    async def knows(self, path: str, timeout_s: float) -> bool:
        """Whether the server has a path that takes POST alone."""
        status, _ = await self._answer("GET", path, self._keys[0], None, timeout_s)
        return status == HTTPStatus.METHOD_NOT_ALLOWED

    async def _good(self, method: str, path: str, data: bytes | None, timeout_s: float) -> bytes:
        key = self._keys[0] if path in OPEN else self._keys[1]
        status, content = await self._answer(method, path, key, data, timeout_s)
        if status != HTTPStatus.OK:
            text = content[:300].decode(errors="replace")
            raise EngineError(f"engine {self.name}: {path}: status {status}: {text}")
        return content

    async def _answer(
        self, method: str, path: str, key: str, data: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._http.request(
                method, path, data=data, headers=headers, timeout=timeout
            ) as answer:
                return answer.status, await answer.read()
        except TimeoutError as error:
            raise EngineError(
                f"engine {self.name}: {path}: no answer within {timeout_s:g} s; kill the engine"
            ) from error
        except aiohttp.ClientError as error:
            raise EngineError(f"engine {self.name}: {path}: {error}; is the server gone?") from error
