"""Ports for servers that bind them later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from buffer import local_server
from buffer.local_server import free_port


def test_no_outgoing_connection_is_given_the_port_of_a_server() -> None:
    range_of_the_kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not range_of_the_kernel.exists():
        pytest.skip("needs Linux")
    lowest = int(range_of_the_kernel.read_text().split()[0])
    assert all(1024 <= free_port() < lowest for _ in range(50))


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        ports = [taken.getsockname()[1], free_port()]
        monkeypatch.setattr(
            local_server.secrets, "choice", lambda _: tried.append(0) or ports[len(tried) - 1]
        )
        assert (free_port(), len(tried)) == (ports[1], 2)
