"""Loading into an engine whose server is written down: nothing is generated meanwhile, no false label."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from actors.calls import Calls
from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from actors.errors import EngineError
from tests.unit.weightsync.versions import version
from weightsync.errors import Untouched
from weightsync.holder import Held
from weightsync.ticket import Report, answer, read_ticket


class Written:
    """SGLang's calls, in the order in which they came; answers as the test says."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder, self.returncode, self.pid = "a", folder, None, 0
        self.calls: list[str] = []
        self.label = "default"
        self.keys: list[str] = []
        self.reports = [Report(0, 1, way="plan")]
        self.release = asyncio.Event()
        """Set: answers come at once."""
        self.release.set()
        self.aborted = False
        self.hang = asyncio.Event()
        """Cleared: loading does not come to an end, as in an engine that was stopped."""
        self.hang.set()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append("generate")
        self.keys.append(body["extra_key"])
        await self.release.wait()
        reason, self.aborted = ("abort" if self.aborted else "length"), False
        meta = {
            "weight_version": self.label,
            "output_token_logprobs": [[-1.0, 5, None]],
            "input_token_logprobs": [[None, 1, None], [-float(self.label != "default"), 2, None]],
        }
        reasons = ["length"] * (len(body["input_ids"]) - 1) + [reason]  # an abort may come late for some
        answers = [
            {"output_ids": [5], "meta_info": {**meta, "finish_reason": {"type": one}}} for one in reasons
        ]
        return web.json_response(answers)

    async def abort(self, request: web.Request) -> web.Response:
        assert (await request.json())["abort_all"]
        self.calls.append("abort")
        self.aborted = True
        self.release.set()
        return web.Response()

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(f"load {len(body['serialized_named_tensors'])}")
        assert body["load_format"] == "weightsync.loader.load"
        assert not body["flush_cache"]
        assert "weight_version" not in body
        await self.hang.wait()
        ticket = read_ticket(self.folder)
        for report in self.reports:
            answer(self.folder, msgspec.structs.replace(report, number=ticket.number))
        return web.json_response({"success": True})

    async def name_version(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        self.calls.append("label")
        return web.json_response({"success": True})


Make = Callable[..., Any]


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes an engine and the server that is written down."""
    made = []

    async def make(**config: Any) -> tuple[Engine, Written]:
        server = Written(tmp_path)
        app = web.Application()
        app.router.add_post("/generate", server.generate)
        app.router.add_post("/abort_request", server.abort)
        app.router.add_post("/update_weights_from_tensor", server.load)
        app.router.add_post("/update_weight_version", server.name_version)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        calls = Calls("t", port, ("k", "a"))
        engine = Engine(server, EngineConfig(**config), calls, frozenset())  # type: ignore[arg-type]
        made.append((engine, runner, server))
        return engine, server

    yield make
    for engine, runner, server in made:
        server.hang.set()
        server.release.set()
        await engine._calls.close()
        await runner.cleanup()


def held(number: int = 3) -> Held:
    image, manifest = version(number)
    return Held(manifest, image)


async def ask(engine: Engine) -> str:
    """The label of one answer."""
    (answer,) = await engine.generate([1, 2], [7], SamplingConfig(max_new_tokens=1))
    ((_, label),) = answer.labels
    return label


async def test_answers_under_way_are_finished_and_new_ones_wait(engine: Make) -> None:
    one, server = await engine(pause="finish")
    server.release.clear()
    old = asyncio.create_task(ask(one))
    while server.calls != ["generate"]:
        await asyncio.sleep(0.01)
    version3 = held()
    loading = asyncio.create_task(one.load_weights(version3, check=True))
    await asyncio.sleep(0.05)
    new = asyncio.create_task(ask(one))
    await asyncio.sleep(0.05)
    assert server.calls == ["generate"], "nothing is loaded under an answer, none begins meanwhile"
    server.release.set()
    assert (await loading).way == "plan"
    assert await old == "default"
    assert await new == version3.manifest.label
    assert server.calls == ["generate", "load 1", "label", "generate"]


async def test_a_refusal_leaves_the_old_version_and_its_label(engine: Make) -> None:
    one, server = await engine()
    server.reports = [Report(0, 1, problem="no such image")]
    with pytest.raises(Untouched, match="no such image"):
        await one.load_weights(held(), check=True)
    assert await ask(one) == "default"


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([Report(0, 1, problem="half", touched=True)], "half"),
        ([], "got 0 reports, expected one of each of 1 ranks"),
        ([Report(0, 1), Report(0, 2)], "got 2 reports"),
    ],
)
async def test_an_engine_with_unknown_weights_never_answers_again(
    engine: Make, reports: list[Report], said: str
) -> None:
    one, server = await engine()
    server.reports = reports
    with pytest.raises(EngineError, match=said):
        await one.load_weights(held(), check=True)
    asked = asyncio.create_task(ask(one))
    await asyncio.sleep(0.1)
    assert not asked.done()
    assert "generate" not in server.calls
    asked.cancel()


async def test_every_rank_must_have_loaded(engine: Make) -> None:
    one, server = await engine(server_args={"tp-size": 2})
    server.reports = [Report(0, 1, way="names"), Report(0, 2, problem="no image here", touched=False)]
    with pytest.raises(EngineError, match="no image here"):
        await one.load_weights(held(), check=True)
    assert server.calls == ["load 2"]


async def test_an_engine_that_hangs_is_given_up_in_time(engine: Make) -> None:
    one, server = await engine(update_timeout_s=0.3)
    server.hang.clear()
    began = asyncio.get_running_loop().time()
    with pytest.raises(EngineError, match=r"no answer within 0\.3 s; kill the engine"):
        await one.load_weights(held(), check=True)
    assert asyncio.get_running_loop().time() - began < 2


async def test_answers_that_do_not_end_cost_the_engine(engine: Make) -> None:
    one, server = await engine(update_timeout_s=0.2, pause="finish")
    server.release.clear()
    old = asyncio.create_task(ask(one))
    while not server.calls:
        await asyncio.sleep(0.01)
    with pytest.raises(EngineError, match=r"raise engine\.update_timeout_s"):
        await one.load_weights(held(), check=True)
    server.release.set()
    assert await old == "default"


async def test_answers_under_way_are_ended_with_their_tokens_and_go_on(engine: Make) -> None:
    """`abort`, the default: each token has the label of the weights that wrote it."""
    one, server = await engine()
    server.release.clear()
    asked = asyncio.create_task(one.generate([1, 2], [7], SamplingConfig(max_new_tokens=2)))
    while not server.calls:
        await asyncio.sleep(0.01)
    new = held()
    assert (await one.load_weights(new, check=True)).way == "plan"
    (answer,) = await asked
    assert answer.labels == [(1, "default"), (1, new.manifest.label)]
    assert server.calls == ["generate", "abort", "load 1", "label", "generate"]
    assert server.keys == ["", new.manifest.label], "a prefix belongs to the version that computed it"


async def test_scores_that_are_asked_for_together_are_of_one_version(engine: Make) -> None:
    one, server = await engine()
    server.release.clear()
    asked = asyncio.create_task(one.score([[1, 2], [3, 2]]))
    while not server.calls:
        await asyncio.sleep(0.01)
    new = held()
    await one.load_weights(new, check=True)
    label, scores = await asked
    assert label == new.manifest.label
    assert [values.tolist() for values in scores] == [[-1.0], [-1.0]]
