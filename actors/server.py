"""The process of an engine: SGLang's command line and environment, and the process group it lives in."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from actors.config import EngineConfig
from actors.errors import EngineError
from weightsync.ticket import FOLDER, LOADER

OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "MemoryError",
    "OutOfMemoryError",
    "(exit code: -9)",
)
"""How torch, the C library, Python, CUDA and, after the kernel killed a child, SGLang say it."""


class Server:
    """A server process with its children, in a session and process group of its own.

    Lifecycle: `start`, then `stop`, which can be called at any time and leaves nothing behind. The
    server's sockets and scratch files are in a folder of its own, since it does not remove them.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log: Path, scratch: tempfile.TemporaryDirectory
    ) -> None:
        """Use `start`."""
        self.name = name
        """Name of the actor, for messages."""
        self._process, self._log, self._scratch = process, log, scratch

    @classmethod
    async def start(
        cls, name: str, log: Path, arguments: list[str], variables: dict[str, str], keys: tuple[str, str]
    ) -> Server:
        """Start the command `arguments` with the environment `variables`; `log`, replaced, takes what it
        prints.

        `keys`, API key and admin API key, go by a file in a folder that nobody else may read: the command
        line of a process is everybody's.
        """
        scratch = tempfile.TemporaryDirectory(prefix="slipstream-engine-")  # with mode 0700
        secrets = Path(scratch.name) / "keys.yaml"  # JSON is YAML
        secrets.write_bytes(msgspec.json.encode(dict(zip(("api-key", "admin-api-key"), keys, strict=True))))
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                *("--config", str(secrets)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables | {"TMPDIR": scratch.name, FOLDER: scratch.name},
                start_new_session=True,
            )
        return cls(name, process, log, scratch)

    @property
    def pid(self) -> int:
        """Process id of the main process, which is also the id of its process group."""
        return self._process.pid

    @property
    def folder(self) -> Path:
        """Where tickets for its weight loader go."""
        return Path(self._scratch.name)

    @property
    def returncode(self) -> int | None:
        """Exit status of the main process, negative for a signal; None while it runs."""
        return self._process.returncode

    def kill(self) -> None:
        """End the whole process group at once; `stop` is still to be called."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    async def stop(self) -> None:
        """End the whole process group and remove its files.

        An engine has nothing to save, and SGLang looks at SIGTERM only every 5 s: so it is killed.
        """
        self.kill()
        await self._process.wait()
        self._scratch.cleanup()

    def failure(self) -> EngineError:
        """Why the server ended or does not come up, as its log tells it."""
        text = self._log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "nothing"
        status = "is not ready" if self.returncode is None else f"ended with status {self.returncode}"
        if any(sign in text for sign in OUT_OF_MEMORY):
            advice = (
                "it ran out of memory: lower engine.max_total_tokens, use a smaller model, or free memory"
            )
        else:
            advice = "see its log"
        return EngineError(
            f"engine {self.name}: the server {status}; {advice} ({self._log}). It said last: {last:.300}"
        )


def command(
    model: Path,
    config: EngineConfig,
    *,
    port: int,
    seed: int,
    load_format: str,
    routed: bool = False,
) -> list[str]:
    """The server's command line, without its keys; `routed`: whether it can return routed experts."""
    options: dict[str, str | int | float | bool] = {
        "model-path": str(model),
        "load-format": load_format,
        "host": "127.0.0.1",
        "port": port,
        "random-seed": seed,
        "device": config.device,
        "dtype": config.dtype,
        "max-running-requests": config.max_running_requests,
        "max-total-tokens": config.max_total_tokens,
        # Ids in, ids out: no tokenizer files and no detokenizer process.
        "skip-tokenizer-init": True,
        "skip-server-warmup": True,
        "custom-weight-loader": LOADER,
        # SGLang reads the seed of a request only in this mode.
        "enable-deterministic-inference": True,
        # Cached prefixes would have to be keyed by version; prompts are short against answers.
        "disable-radix-cache": True,
        "enable-return-routed-experts": routed,
        # Fused, a shared expert is one choice more than SGLang has room for.
        "disable-shared-experts-fusion": routed,
        "log-level": "warning",
    }
    if config.context_length is not None:
        options["context-length"] = config.context_length
    module = "sglang.launch_server"
    if config.device == "cpu":
        module = "actors.sglang_cpu.serve"
        options |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "disable-overlap-schedule": True,
            # Otherwise the idle scheduler polls without pause and takes a core from the others.
            "sleep-on-idle": True,
        }
    options |= config.server_args
    return [sys.executable, "-m", module, *_flags(options)]


def ranks(config: EngineConfig) -> int:
    """Processes of the engine that hold a part of the weights each: tensor times pipeline parallelism.

    >>> ranks(EngineConfig(server_args={"tp-size": 4})), ranks(EngineConfig())
    (4, 1)
    """
    given = config.server_args
    pipeline = given.get("pp-size", given.get("pipeline-parallel-size", 1))
    return _tensor_parallel(config) * int(pipeline)


def _tensor_parallel(config: EngineConfig) -> int:
    given = config.server_args
    return int(given.get("tp-size", given.get("tp", given.get("tensor-parallel-size", 1))))


def _flags(options: dict[str, str | int | float | bool]) -> list[str]:
    """Options as arguments: `True` is the bare flag, `False` is left out."""
    flags = []
    for option, value in options.items():
        if value is True:
            flags.append(f"--{option}")
        elif value is not False:
            flags += [f"--{option}", str(value)]
    return flags


def environment(config: EngineConfig) -> dict[str, str]:
    """The server's environment: ours, offline, and on a CPU one thread and our platform."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
    }
    if config.device == "cpu":
        variables |= {
            "SGLANG_PLATFORM": "slipstream_cpu",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # Compiling takes longer than a tiny model's whole run, and needs a compiler.
            "TORCHDYNAMO_DISABLE": "1",
            # Inputs of gated DeltaNet's convolution, bfloat16 otherwise.
            "SGLANG_MAMBA_CONV_DTYPE": config.dtype,
            # Gloo would otherwise look up the host's name, which may not resolve offline.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        if (tensor := _tensor_parallel(config)) > 1:
            variables |= {
                # One entry a rank: without it SGLang wants a NUMA node for each. No thread is bound by it.
                "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor))),
                # All ranks share the host's memory; what else it does is no imbalance between them.
                "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
            }
    return variables
