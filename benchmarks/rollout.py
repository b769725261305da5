"""What an actor spends on a group beside generation and reward.

    python -m benchmarks.rollout [--json] [--quick]

A real engine client, rollout and codec; a server in another process has its answer to `/generate` ready, and
the reward is a constant. Processor time of this process for a group of 16 answers of 256 tokens. *ours*: all
from the lease to the bytes that go to Redis, which is the request over HTTP, the answer decoded and
checked, 16 conversations, the record, compressed; *encode*: the record's part of it. *json* is the
baseline, the least that an actor does which hands in JSON: the same request and answer, the answer through
`json.loads`, prompt, tokens, log-probabilities and reward of each sample through `json.dumps`. In turn,
medians.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import uvloop

from actors.calls import Calls
from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from actors.environments import SingleTurn
from actors.rewards.pool import Verdict
from actors.rollout import Recipe, rollout
from benchmarks.groups import PROMPT, SAMPLES, log_probabilities, token_ids
from benchmarks.harness import parser, report, table
from buffer.admission import Lease
from buffer.codec import encode
from buffer.schema import Prompt

ANSWER = 256
"""Tokens of each answer."""
ROUNDS = 60


def sglang_answer(source: np.random.Generator) -> bytes:
    """What SGLang answers for a group, as JSON."""
    answers = []
    for _ in range(SAMPLES):
        tokens = token_ids(source, ANSWER).tolist()
        logprobs = log_probabilities(source, ANSWER).tolist()
        meta = {
            "id": "0" * 32,
            "finish_reason": {"type": "length", "length": ANSWER},
            "prompt_tokens": PROMPT,
            "weight_version": "0:digest",
            "output_token_logprobs": [
                [value, token, None] for value, token in zip(logprobs, tokens, strict=True)
            ],
        }
        answers.append({"text": "", "output_ids": tokens, "meta_info": meta})
    return json.dumps(answers, separators=(",", ":")).encode()


def serve(port: multiprocessing.connection.Connection, answer: bytes) -> None:
    """Answers every request so, on one connection at a time; first tells its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


class Constant:
    """A reward that costs nothing."""

    async def score(self, text: str, answer: str, tokens: int) -> Verdict:
        return Verdict(1.0, {"correct": 1.0})


class NoText:
    """A tokenizer for a reward that reads nothing."""

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Sequence[int]) -> str:
        return ""


async def measure(port: int, lease: Lease, rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time of each way."""
    assert lease.prompt is not None
    calls, config = Calls("actor-0", port, ("", "")), EngineConfig()
    engine = Engine(None, config, calls, frozenset())  # type: ignore[arg-type]
    recipe = Recipe(
        actor="actor-0",
        actor_epoch=1,
        run_seed=0,
        group_size=SAMPLES,
        sampling=SamplingConfig(max_new_tokens=ANSWER),
        environment=SingleTurn(),
        timeout_s=60.0,
        rewards=Constant(),
        text=NoText(),
        invalid=Counter(),
    )
    body = {"input_ids": [lease.prompt.tokens] * SAMPLES, "return_logprob": True}
    spent: dict[str, list[float]] = {"ours": [], "encode": [], "json": []}
    for _ in range(rounds + 3):
        began = time.process_time()
        group = await rollout(engine, lease, recipe)
        made = time.process_time()
        encode(group)
        ended = time.process_time()
        answers = json.loads(await calls.post("/generate", body, 60.0))
        samples = [
            {
                "prompt": lease.prompt.tokens,
                "tokens": one["output_ids"],
                "logprobs": [value for value, *_ in one["meta_info"]["output_token_logprobs"]],
                "reward": 1.0,
            }
            for one in answers
        ]
        json.dumps(samples)
        spent["ours"].append(ended - began)
        spent["encode"].append(ended - made)
        spent["json"].append(time.process_time() - ended)
    await calls.close()
    return {way: 1e3 * statistics.median(seconds[3:]) for way, seconds in spent.items()}


def main() -> int:
    """Prints the table."""
    options = parser("what an actor spends on a group beside generation and reward").parse_args()
    source = np.random.default_rng(0)
    prompt = Prompt(0, token_ids(source, PROMPT).tolist(), "#### 7")
    lease = Lease("lease", "", "0:x", "0000-0000000000-00", 0, 0, 0, 2, prompt)
    told, tells = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.Process(target=serve, args=(tells, sglang_answer(source)), daemon=True)
    server.start()
    found = uvloop.run(measure(told.recv(), lease, 5 if options.quick else ROUNDS))
    server.kill()
    ratio = found["ours"] / found["json"]
    result = {**{f"{way}_ms": value for way, value in found.items()}, "ours_to_json": ratio}
    report(result, table(["way", "ms a group"], list(found.items())), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
