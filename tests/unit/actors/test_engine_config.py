"""What the configuration of the engine and of sampling allows, and the command line made of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from actors.config import OURS, EngineConfig, SamplingConfig
from actors.server import command, environment


@pytest.mark.parametrize(("field", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1)])
def test_a_filter_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"{field}: got {value}"):
        msgspec.convert({field: value}, SamplingConfig)


@pytest.mark.parametrize("field", ["repetition_penalty", "logit_bias", "n"])
def test_an_unknown_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{field}`"):
        msgspec.convert({field: 1}, SamplingConfig)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_the_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.temperature"):
        msgspec.convert({"temperature": temperature}, SamplingConfig)


def test_server_args_win_and_make_flags() -> None:
    config = EngineConfig(server_args={"sleep-on-idle": False, "tp-size": 2, "enable-metrics": True})
    line = command(Path("m"), config, port=1, seed=2, load_format="dummy")
    assert "--sleep-on-idle" not in line
    assert "--enable-metrics" in line
    assert line[line.index("--tp-size") + 1] == "2"


def test_only_a_cpu_engine_gets_our_platform() -> None:
    assert environment(EngineConfig())["SGLANG_PLATFORM"] == "slipstream_cpu"
    cuda = EngineConfig(device="cuda")
    assert "SGLANG_PLATFORM" not in environment(cuda)
    line = command(Path("m"), cuda, port=1, seed=2, load_format="auto")
    assert "sglang.launch_server" in line
    assert "torch_native" not in line


def test_ranks_of_a_cpu_engine_need_no_numa_node_each() -> None:
    pair = EngineConfig(server_args={"tp-size": 2, "pp-size": 2})
    assert environment(pair)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert environment(pair)["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment(EngineConfig())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *OURS.items(),
        ("speculative-algorithm", "weights of a draft, multi-token prediction too, are not sent"),
    ],
)
def test_an_option_that_is_not_the_users_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"server_args: got '{name}', .*{why}.*; remove it"):
        msgspec.convert({"server_args": {"tp-size": 2, name: "x"}}, EngineConfig)


def test_an_engine_listens_on_loopback_and_takes_weights_by_our_loader_whatever_is_asked() -> None:
    line = command(Path("m"), EngineConfig(), port=1, seed=2, load_format="dummy")
    assert [line[line.index(f"--{name}") + 1] for name in ("host", "port", "load-format")] == [
        *("127.0.0.1", "1", "dummy")
    ]
    assert {f"--{name}" for name in OURS} - {"--config", "--api-key", "--admin-api-key"} <= set(line)


def test_a_pause_that_would_falsify_records_is_refused_with_the_reason() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"caches of the old weights.*set abort, finish or"):
        msgspec.convert({"pause": "in_place"}, EngineConfig)
