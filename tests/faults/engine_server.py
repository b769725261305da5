"""SGLang's HTTP calls by a script: `python -m tests.faults.engine_server PORT LIVES`.

Each start takes the first line off the file LIVES, which says how this life goes:

    good      every answer is one token, `65 + seed % 5`, with log-probability -1
    dies      it ends in the middle of a request
    nothing   it answers with an empty list
    nan       log-probabilities that are no numbers, which SGLang's JSON writes as null
    silent    it never answers a request
    held      as `good`, one request for each byte of the file `go` beside LIVES; it can be aborted till then
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from buffer.process import end_with_parent

TOKENS = 5
"""How many different answers there are."""


def token(seed: int) -> int:
    """What a seed draws."""
    return 65 + seed % TOKENS


class Script:
    """One life of the engine."""

    def __init__(self, life: str, go: Path) -> None:
        self.life, self.label, self.go = life, "default", go
        self.answered = self.aborts = 0

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def loads(self, _: web.Request) -> web.Response:
        idle = {"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.0}
        return web.json_response({"loads": [idle]})

    async def update(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["weight_version"]
        return web.json_response({"success": True})

    async def abort(self, _: web.Request) -> web.Response:
        self.aborts += 1
        return web.Response()

    async def generate(self, request: web.Request) -> web.Response:
        asked = (await request.json())["sampling_params"]
        if self.life == "dies":
            os._exit(1)
        if self.life == "silent":
            await asyncio.Event().wait()
        if self.life == "held" and not await self._let_go():
            return web.json_response([self._aborted() for _ in asked])
        answers = [self._answer(one["sampling_seed"]) for one in asked]
        return web.json_response([] if self.life == "nothing" else answers)

    async def _let_go(self) -> bool:
        """Waits for a byte; whether it came before an abort."""
        aborts = self.aborts
        while self.go.stat().st_size == self.answered:
            if self.aborts > aborts:
                return False
            await asyncio.sleep(0.01)
        self.answered += 1
        return True

    def _aborted(self) -> dict[str, Any]:
        meta = {"finish_reason": {"type": "abort"}, "weight_version": self.label, "output_token_logprobs": []}
        return {"output_ids": [], "meta_info": meta}

    def _answer(self, seed: int) -> dict[str, Any]:
        logprob = None if self.life == "nan" else -1.0
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": self.label,
            "output_token_logprobs": [[logprob, token(seed), None]],
        }
        return {"output_ids": [token(seed)], "meta_info": meta}


def main() -> None:
    """Serves until it is killed, or the actor is."""
    end_with_parent()
    port, path = int(sys.argv[1]), Path(sys.argv[2])
    life, *later = path.read_text().split()
    path.write_text(" ".join(later))
    script, app = Script(life, path.with_name("go")), web.Application()
    app.router.add_get("/model_info", script.info)
    app.router.add_get("/v1/loads", script.loads)
    app.router.add_post("/generate", script.generate)
    app.router.add_post("/abort_request", script.abort)
    app.router.add_post("/update_weights_from_distributed", script.update)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main()
