"""Processes end with their supervisor, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.supervise import Supervisor, process_environment
from tests.waiting import wait_until

DEAF = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True);"
    "time.sleep(60)"
)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_a_process_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path) -> None:
    log = tmp_path / "deaf.log"
    with Supervisor() as children:
        child = children.start("deaf", [sys.executable, "-c", DEAF], {}, log)
        wait_until(lambda: log.read_text().strip().isdigit(), 10, "the grandchild's pid")
        grandchild = int(log.read_text())
        children.stop([child], timeout_s=0.2)
    assert child.returncode == -signal.SIGKILL
    assert "perhaps for want of memory" in child.last_words()
    wait_until(lambda: not alive(grandchild), 10, "the grandchild's end")


def test_the_last_line_of_the_log_is_what_a_child_said_last(tmp_path: Path) -> None:
    with Supervisor() as children:
        argv = [sys.executable, "-c", "print('first'); print('last'); raise SystemExit(2)"]
        child = children.start("c", argv, {}, tmp_path / "c.log")
        child.process.wait(10)
    assert (child.returncode, child.last_words()) == (2, "last")


def test_a_warning_of_torchs_is_nobodys_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    assert process_environment("")["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert process_environment("")["TORCH_CPP_LOG_LEVEL"] == "INFO"


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from launch.supervise import Supervisor;"
        "argv = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "c = Supervisor().start('s', argv, {}, Path(sys.argv[1]));"
        "print(c.process.pid, flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "s.log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not alive(pid), 10, "the child's end")
