"""Real processes that need not import PyTorch, diffusers and ddkit first: they are forked from one that has.

`start("-m", "ddkit", "train")` is what `subprocess.Popen([sys.executable, "-m", "ddkit", "train"])` would be, without the two
to six seconds of processor time that the imports take: a process with an environment, a folder, limits and an end of its own.
The processes that a script starts are forked from it in turn, and not spawned. Tests of what is imported, or of what the
environment does to an import, start Python itself.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import types
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ddkit.api", "ddkit.cli.enter", "ddkit.entering.entry", "ddkit.generator.training.train", "torch._dynamo"]
)


class Process:
    """A process that `start` started, with the names of `subprocess.Popen`; its output is text."""

    def __init__(self, words: tuple[str, ...], folder: Path, environment: Mapping[str, str], limits: Mapping[int, int]) -> None:
        (out, to_out), (errors, to_errors) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
        arguments = (words, folder, dict(environment), dict(limits), to_out, to_errors)
        self._process = CONTEXT.Process(target=_become, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            # Libraries look for GPUs when they are imported, after which CUDA refuses to work in forks. NVML does not mind.
            patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
            forkserver.ensure_running()
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (open(os.dup(pipe.fileno()), encoding="utf-8") for pipe in (out, errors))
        for pipe in (out, to_out, errors, to_errors):
            pipe.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for its end. Returns what it has written to standard output and to standard error since they were last read."""
        with ThreadPoolExecutor(2) as readers:
            texts = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                out, errors = [text.result(timeout) for text in texts]
            except BaseException:
                self.kill()
                raise
        self._process.join(timeout)
        self.stdout.close()
        self.stderr.close()
        return out, errors


class Script(Process):
    """What `subprocess.Popen` is to a script on the clock. Options of the interpreter have no effect; it speaks at its end."""

    def __init__(
        self, command: list[str], cwd: Path | None, env: Mapping[str, str] | None, stdout: IO[bytes], **options: object
    ) -> None:
        script = next(place for place, word in enumerate(command) if word.endswith(".py"))
        super().__init__(tuple(command[script:]), cwd or Path.cwd(), os.environ if env is None else env, {})
        self._log = stdout

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.write("".join(self.communicate()).encode())


def start(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
) -> Process:
    """A process that does what Python does with these words: "-m" and a module, "-c" and code, or a script; and arguments.

    cwd, env: its folder and its environment variables; None: those of this process. limits: of its resources (RLIMIT_...).
    """
    return Process(tuple(map(str, words)), cwd or Path.cwd(), os.environ if env is None else env, limits or {})


def run(*words: str | Path, **options) -> CompletedProcess[str]:
    """Such a process, run to its end."""
    process = start(*words, **options)
    out, errors = process.communicate()
    return CompletedProcess(words, process.returncode, out, errors)


def run_together(*words: str | Path, cwd: Path | None = None) -> list[CompletedProcess[str]]:
    """Two such processes with the environment variables by which `torchrun` and `accelerate launch` tell each its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | group | {"OMP_NUM_THREADS": "1"}
    started = [start(*words, cwd=cwd, env=environment | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    ended = [(process, *process.communicate()) for process in started]
    return [CompletedProcess(words, process.returncode, out, errors) for process, out, errors in ended]


def _become(
    words: tuple[str, ...],
    folder: Path,
    environment: dict[str, str],
    limits: dict[int, int],
    out: Connection,
    errors: Connection,
) -> None:
    """Be the process that was asked for, from within the fork."""
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for pipe, number in ((out, 1), (errors, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # Those of the server may have been files, which have a position.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    if "OMP_NUM_THREADS" in environment:  # which OpenMP has read already
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[:0] = rest, [str(folder)]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(sys.modules["__main__"]))
    else:
        contexts = multiprocessing.context._concrete_contexts
        contexts["spawn"] = contexts["fork"]
        sys.argv, sys.path[:0] = list(words), [str((folder / first).parent)]
        runpy.run_path(first, run_name="__main__")
