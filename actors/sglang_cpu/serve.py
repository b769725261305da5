"""The server's main module on a CPU: ``python -m actors.sglang_cpu.serve --model-path ...``.

It takes SGLang's own command line and runs SGLang's own server, as two processes: one with the HTTP
front end, one with the scheduler and the model.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from actors.sglang_cpu.vision import stand_in_for_torchvision
from buffer.process import end_with_parent


def fork_scheduler(*_: object) -> None:
    """Start the scheduler by fork: without CUDA there is no reason to import everything again.

    Measured on two cores, with the detokenizer left out: ready after 10 s instead of 30 s, in 0.73 GB
    instead of 1.35 GB.
    """
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)


def launch_detokenizer(
    original: Callable[..., Any], cls: type, server_args: Any, port_args: Any, **rest: Any
) -> Any:
    """No detokenizer for a server that returns token ids: SGLang would start one that does nothing."""
    if server_args.skip_tokenizer_init:
        return [], []
    return original(cls, server_args=server_args, port_args=port_args, **rest)


def load_file(instance: str) -> str:
    """Where the scheduler notes its load: a temporary file, since SGLang never removes it."""
    return os.path.join(tempfile.gettempdir(), f"loads-{instance}")


def main(arguments: list[str]) -> None:
    """Serve until stopped; `arguments` as for ``sglang serve``."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from actors.sglang_cpu.platform import declare_attention_deterministic, torch_functions

    engine = "sglang.srt.entrypoints.engine"
    HookRegistry.register(f"{engine}._set_envs_and_config", fork_scheduler, HookType.AFTER)
    HookRegistry.register(
        f"{engine}.Engine._launch_detokenizer_subprocesses", launch_detokenizer, HookType.AROUND
    )
    HookRegistry.register("sglang.srt.managers.load_snapshot.shm_path_for", load_file, HookType.REPLACE)
    for target, ours in torch_functions().items():
        HookRegistry.register(target, ours, HookType.REPLACE)
    load_plugins()
    declare_attention_deterministic()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)  # and SGLang's children end with it
    stand_in_for_torchvision()
    main(sys.argv[1:])
