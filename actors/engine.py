"""An engine: the SGLang server of one actor, and what is asked of it.

    engine = await Engine.start(folder, EngineConfig(), name="actor-0", seed=0, log=Path("engine.log"))
    answers = await engine.generate([5, 6, 7], [1, 2, 3, 4], SamplingConfig())
    await engine.stop()

Whatever goes wrong is an `EngineError`, and nothing waits longer than its timeout in `EngineConfig`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from actors.answers import Answer, Loads, end_tokens, expert_layers, routed_experts
from actors.calls import LOADS, Calls
from actors.concurrency import Load
from actors.config import EngineConfig, Sampling
from actors.continuation import Ask, Completion, Part, complete
from actors.errors import EngineError
from actors.gate import Gate
from actors.server import Server, command, environment, ranks
from buffer.local_server import free_port
from weightsync.errors import Untouched
from weightsync.holder import Held
from weightsync.manifest import Manifest
from weightsync.ticket import LOADER, Ticket, hand_in, reports

POLL_S = 0.1
"""How often a starting server is asked whether it is ready."""
PROBE_S = 5.0
"""How long `alive` waits for an answer."""
_NOTHING = "gARdlC4="
"""An empty list in the form in which SGLang takes tensors; the ticket says what to load."""


class Loaded(msgspec.Struct, frozen=True):
    """How a version was loaded."""

    pause_s: float
    """Seconds in which no request could begin."""
    way: str
    """As in `weightsync.ticket.Report`, with the reason if there is one."""


class Engine:
    """A running server with its HTTP client. Made by `start`; ended by `stop` or `kill`."""

    def __init__(
        self,
        server: Server,
        config: EngineConfig,
        calls: Calls,
        ends: frozenset[int],
        experts: tuple[int, int] | None = None,
    ) -> None:
        """Use `start`. `ends`: the model's end-of-sequence tokens; `experts`: L and k, if returned."""
        self._server, self._config, self._calls = server, config, calls
        self._ends, self._experts = ends, experts
        self.gate = Gate()
        """Where requests wait while new weights go in."""
        self._label, self._ticket, self._brackets = "", 0, False

    @classmethod
    async def start(
        cls,
        model: Path,
        config: EngineConfig,
        *,
        name: str,
        seed: int,
        log: Path,
        load_format: Literal["dummy", "auto"] = "dummy",
        routed: bool = False,
    ) -> Engine:
        """Start a server on a free port of the loopback and wait until it answers.

        Args:
            model: Hugging Face folder; with `dummy` weights it needs no more than ``config.json``.
            config: what to serve with.
            name: of the actor, for messages.
            seed: the server's own random seed; answers depend on the seeds of `generate` alone.
            log: file for the server's output, replaced.
            load_format: `dummy` fills in random weights, `auto` reads the folder's safetensors.
            routed: return with every answer the experts that its tokens were sent to.

        Raises `EngineError` with what the log says last; nothing of the server is left then.
        """
        if not (model / "config.json").is_file():
            raise EngineError(
                f"engine {name}: no config.json in {model}, expected a Hugging Face model folder"
            )
        if routed and config.pause == "retract":
            raise EngineError(
                f"engine {name}: engine.pause: got 'retract' with objective.routing_replay, where the server "
                "would return the experts of new weights for old tokens; set abort or finish"
            )
        experts = expert_layers(model) if routed else None
        port, keys = free_port(), (secrets.token_hex(16), secrets.token_hex(16))
        arguments = command(model, config, port=port, seed=seed, load_format=load_format, routed=routed)
        server = await Server.start(name, log, arguments, environment(config), keys)
        engine = cls(server, config, Calls(name, port, keys), end_tokens(model), experts)
        try:
            await engine._ready()
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def pid(self) -> int:
        """Process id of the server, which is also its process group's."""
        return self._server.pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the server; None while it runs."""
        return self._server.returncode

    async def generate(self, prompt: list[int], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Answer one prompt once for each seed; the answers come in the order of the seeds.

        A seed (0 <= seed < 2^63) repeats its answer under the same weights. Answers live through updates,
        see `actors.continuation`: their labels say which version wrote what.
        """

        async def generate(asks: list[Ask]) -> list[Part]:
            parameters = [
                {
                    "temperature": sampling.temperature,
                    "max_new_tokens": ask.max_new_tokens,
                    "stop_token_ids": sampling.stop_token_ids,
                    "ignore_eos": sampling.ignore_eos,
                    "sampling_seed": ask.seed,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                }
                for ask in asks
            ]
            options = {"return_routed_experts": True} if self._experts else {}
            answers = await self._generate([ask.context for ask in asks], parameters, **options)
            return [self._part(ask, answer) for ask, answer in zip(asks, answers, strict=True)]

        return await complete(generate, prompt, seeds, sampling, self._ends)

    async def score(self, sequences: list[list[int]]) -> tuple[str, list[np.ndarray]]:
        """Log-probabilities of tokens 1.. of each sequence at temperature 1, float32 [T - 1] each.

        All of them by one version of the weights, whose label comes first.
        """
        parameters = [{"temperature": 1.0, "max_new_tokens": 1, "sampling_seed": 0}] * len(sequences)
        while True:
            answers = [
                answer.meta_info
                for answer in await self._generate(sequences, parameters, logprob_start_len=0)
            ]
            labels = {answer.weight_version for answer in answers}
            if len(labels) == 1 and not any(answer.finish_reason.type == "abort" for answer in answers):
                values = [[entry.value for entry in answer.input_token_logprobs[1:]] for answer in answers]
                return labels.pop(), [np.array(found, np.float32) for found in values]

    async def load(self) -> Load:
        """How much it has to do; of several data-parallel ranks the sum, and the fullest cache."""
        content = await self._calls.get(LOADS, PROBE_S)
        try:
            ranks = msgspec.json.decode(content, type=Loads).loads
        except msgspec.DecodeError as error:
            raise EngineError(
                f"engine {self._calls.name}: {LOADS}: {error}; is it SGLang 0.5.18 to 0.5.23?"
            ) from error
        return Load(
            sum(rank.num_running_reqs for rank in ranks),
            sum(rank.num_waiting_reqs for rank in ranks),
            max((rank.token_usage for rank in ranks), default=0.0),
        )

    async def join_group(self, *, group: str, address: str, port: int) -> None:
        """Meet the learner, which listens at `address`, in a two-rank gloo group; the engine is rank 1.

        After a failure the engine may wait for the learner for ever: kill it.
        """
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": group,
            "backend": "gloo",
        }
        await self._calls.post("/init_weights_update_group", body, self._config.update_timeout_s)

    async def update_weights(self, *, group: str, manifest: Manifest) -> None:
        """Receive a version through the group as one broadcast, and serve it.

        The samples under way are ended or finished first, as `EngineConfig.pause` says, and new ones wait;
        every answer from then on shows the label. After a failure the weights are unknown: kill the engine.
        """
        body = {
            "names": [entry.name for entry in manifest.tensors],
            "dtypes": [entry.dtype for entry in manifest.tensors],
            "shapes": [entry.shape for entry in manifest.tensors],
            "group_name": group,
            "load_format": "flattened_bucket",
            "weight_version": manifest.label,
        }
        async with self.idle():
            await self._update("/update_weights_from_distributed", body)
            self._label = manifest.label

    async def load_weights(self, held: Held, *, check: bool) -> Loaded:
        """Load a staged version and serve it.

        The samples under way are ended or finished first, as `EngineConfig.pause` says, and new ones wait.
        Raises `Untouched` if the engine refused the version and serves the old one entirely, `EngineError`
        if its weights are unknown now: nothing passes its gate any more, and it is to be killed.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        async with self.idle():
            self._ticket += 1
            way = await self._obey(
                Ticket(self._ticket, held.path, held.encoded, check, held.place is not None)
            )
            label = {"new_version": held.manifest.label, "abort_all_requests": False}
            await self._calls.post("/update_weight_version", label, self._config.update_timeout_s)
            self._label = held.manifest.label
        return Loaded(clock() - began, way)

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Nothing is generated within the block: samples under way are ended, finished or put back before it.

        Those not finished keep their tokens, and go on by themselves after it.
        """
        if self._config.pause == "retract":
            async with self.gate.shut(), self._retracted():
                yield
            return
        end = self._abort if self._config.pause == "abort" else None
        async with self.gate.closed(end, self._config.update_timeout_s):
            yield

    async def alive(self) -> bool:
        """Whether the server answers, generating or not."""
        if self.returncode is not None:
            return False
        try:
            await self._calls.get("/model_info", PROBE_S)
        except EngineError:
            return False
        return True

    async def stop(self) -> None:
        """End the server's whole process group and remove its files."""
        await self._calls.close()
        await self._server.stop()

    def kill(self) -> None:
        """End the server's process group at once; `stop` is still to be called."""
        self._server.kill()

    async def _obey(self, ticket: Ticket) -> str:
        """Have every rank of the engine obey a ticket; the way it was loaded.

        Raises `Untouched`, `EngineError`.
        """
        hand_in(self._server.folder, ticket)
        count = ranks(self._config)
        body = {
            "serialized_named_tensors": [_NOTHING] * count,
            "load_format": LOADER,
        }
        await self._update("/update_weights_from_tensor", body)
        found = reports(self._server.folder, ticket.number)
        problems = [report.problem for report in found if report.problem]
        if len(found) == count and not problems:
            return f"{found[0].way}: {found[0].reason}" if found[0].reason else found[0].way
        told = "; ".join(problems) or f"got {len(found)} reports, expected one of each of {count} ranks"
        if len(problems) == count and not any(report.touched for report in found):
            raise Untouched(f"engine {self._calls.name}: {told}")
        raise EngineError(f"engine {self._calls.name}: half of a version may be loaded: {told}; kill it")

    async def _ready(self) -> None:
        """Wait until the server answers."""
        deadline = asyncio.get_running_loop().time() + self._config.start_timeout_s
        while not await self.alive():
            if self.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise self._server.failure()
            await asyncio.sleep(POLL_S)
        self._brackets = await self._calls.knows("/begin_weight_update", PROBE_S)
        if self._config.pause == "retract" and not self._brackets:
            raise EngineError(
                f"engine {self._calls.name}: engine.pause: got 'retract', and this SGLang ends when it "
                "is to flush its cache then; set abort or finish, or use SGLang 0.5.21 or later"
            )

    async def _update(self, path: str, body: dict[str, Any]) -> None:
        """Have the server change its weights, between a beginning and an end where it wants them said."""
        timeout_s = self._config.update_timeout_s
        # Prefixes are cached under the version's name, so that a flush is wanted only where requests that
        # have begun under another name are still there; where some are running it ends the server.
        body["flush_cache"] = self._config.pause == "retract"
        if self._brackets:
            await self._calls.post("/begin_weight_update", {}, timeout_s)
        await self._calls.post(path, body, timeout_s)
        if self._brackets:
            await self._calls.post("/end_weight_update", {}, timeout_s)

    @asynccontextmanager
    async def _retracted(self) -> AsyncIterator[None]:
        """Every request is back in the server's queue within the block, with its tokens and no state."""
        timeout_s = self._config.update_timeout_s
        await self._calls.post("/pause_generation", {"mode": "retract"}, timeout_s)
        try:
            yield
        except Untouched:
            await self._calls.post("/continue_generation", {}, timeout_s)
            raise
        await self._calls.post("/continue_generation", {}, timeout_s)

    async def _abort(self) -> None:
        """End every request; each is answered with its tokens so far."""
        await self._calls.post(
            "/abort_request", {"rid": "", "abort_all": True}, self._config.update_timeout_s
        )

    async def _generate(
        self, prompts: list[list[int]], parameters: list[dict[str, Any]], **options: int
    ) -> list[Answer]:
        """One ``/generate`` call for a list of prompts, each with its sampling parameters."""
        async with self.gate.passing():
            body = {
                "input_ids": prompts,
                "sampling_params": parameters,
                "return_logprob": True,
                # A cached prefix is of use to the version that computed it only.
                "extra_key": self._label,
                **options,
            }
            content = await self._calls.post("/generate", body, self._config.request_timeout_s)
        try:
            answers = msgspec.json.decode(content, type=list[Answer])
        except msgspec.DecodeError as error:
            raise EngineError(
                f"engine {self._calls.name}: /generate: {error}; is it SGLang 0.5.18 to 0.5.23?"
            ) from error
        if len(answers) != len(prompts):
            raise EngineError(
                f"engine {self._calls.name}: /generate: got {len(answers)} answers, expected {len(prompts)}"
            )
        return answers

    def _part(self, ask: Ask, answer: Answer) -> Part:
        """The answer as a part of a completion, after checking that it is whole."""
        meta = answer.meta_info
        reason, logprobs = meta.finish_reason.type, meta.output_token_logprobs
        values = [entry.value for entry in logprobs if entry.value is not None]
        if [entry.token for entry in logprobs] != answer.output_ids or len(values) != len(logprobs):
            raise EngineError(
                f"engine {self._calls.name}: got {len(values)} log-probabilities, "
                f"expected those of the answer's {len(answer.output_ids)}"
            )
        routed = None
        if self._experts and answer.output_ids:
            tokens = len(ask.context) + len(answer.output_ids)
            try:
                routed = routed_experts(meta.routed_experts, self._experts, tokens)
            except ValueError as error:
                raise EngineError(f"engine {self._calls.name}: /generate: {error}") from error
        return Part(answer.output_ids, values, reason, answer.labels(), routed)
