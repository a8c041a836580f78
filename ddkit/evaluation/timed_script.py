"""Track 2 entries as scripts, run on the clock in separate processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ddkit.errors import ComputeError, InterruptedRunError, InvalidSubmissionError
from ddkit.evaluation.tracks import Generated
from ddkit.runtime.device import release_memory
from ddkit.runtime.interrupt import stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.torch_file import TorchFileError, load_tensors

_SECONDS_BETWEEN_LOOKS = 0.5
_LINES_OF_OUTPUT = 3  # that are quoted if a script fails
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class ScriptEntry:
    """An entry that runs as `python script --dataset NAME --out FILE --time-budget SECONDS --seed N`.

    The script writes {"images": (N, 3, S, S) float32 normalized or uint8 pixels, "labels": (N,) int64} with torch.save.
    arguments: further arguments of the script. python: the interpreter and its options.
    environment, folder: the script's environment variables and working folder; None takes those of this process.
    may_end_early: True if it stops at a number of images, so that its budget does not tell how long it will run.
    progress: called with the seconds spent.
    """

    script: Path
    dataset: str
    arguments: tuple[str, ...] = ()
    python: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] | None = None
    folder: Path | None = None
    may_end_early: bool = False
    progress: Listener = ignore

    def __call__(self, seed: int, budget: float) -> Generated:
        """Run the script once. Its seconds count from before its start to its end, without reading its file.

        Raises InvalidSubmissionError if it exceeds its budget or leaves no readable file, ComputeError with its last lines
        of output if it fails, InterruptedRunError once asked to stop.
        """
        release_memory(torch.device("cuda"))  # which the script may need, on the same GPU
        with tempfile.TemporaryDirectory(prefix="ddkit-entry-") as temporary:
            out = Path(temporary) / "images.pt"
            command = [*self.python, str(self.script.resolve()), "--dataset", self.dataset, "--out", str(out)]
            command += ["--time-budget", f"{budget:g}", "--seed", str(seed), *self.arguments]
            seconds = self._run(command, budget, Path(temporary) / "output.txt")
            try:
                images, labels = load_tensors(out, "images", "labels")
            except (OSError, TorchFileError, MemoryError) as error:
                message = f"The generator did not write a readable file of images and labels: {error}."
                raise InvalidSubmissionError(message) from error
            return Generated(images, labels, seconds)

    def _run(self, command: list[str], budget: float, log: Path) -> float:
        """Run the command to its end, with its output in `log`. Returns the seconds that it took."""
        began = time.monotonic()
        total = None if self.may_end_early else budget
        # If this process is killed, the script must not go on beside the next run, whose time it would take.
        killed_too = None
        if sys.platform == "linux":
            killed_too = functools.partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, int(signal.SIGKILL))
        # In a new session, so that the processes it starts can be ended with it.
        with log.open("wb") as output, stop_requests() as stop, subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=killed_too,
        ) as process:  # fmt: skip
            try:
                while process.poll() is None:
                    spent = time.monotonic() - began
                    if spent > budget:
                        raise self._overrun("was still running", budget)
                    if stop:
                        remedy = "Run the same command again to generate them from the start."
                        raise InterruptedRunError("Interrupted while images were generated.", remedy)
                    self.progress(Progress(f"generating {self.dataset}", spent, total, "s"))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_SECONDS_BETWEEN_LOOKS)
            finally:  # end the process and those that it started, if any still run
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        seconds = time.monotonic() - began
        if process.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES_OF_OUTPUT:]
            raise ComputeError(
                f"{self.script} ended with status {process.returncode} after {seconds:.0f} s of a budget of {budget:g} s.",
                "Its last output: " + " | ".join(lines) if lines else "",
            )
        if seconds > budget:
            raise self._overrun(f"ended after {seconds:.1f} s,", budget)
        return seconds

    def _overrun(self, what: str, budget: float) -> InvalidSubmissionError:
        return InvalidSubmissionError(
            f"{self.script} {what} after its budget of {budget:g} s.",
            "In the challenge an entry that overruns its time scores nothing.",
        )
