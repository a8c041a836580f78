"""Track 2 entries as scripts, in processes of their own and on the clock."""

import dataclasses
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import processes
import pytest
import torch

from ddkit.errors import ComputeError, InterruptedRunError, InvalidSubmissionError
from ddkit.evaluation.timed_script import ScriptEntry


def script(folder, body):
    """A stand-alone generator; `arguments` holds what it was called with."""
    path = folder / "generate.py"
    path.write_text(
        "import argparse, os, sys, time\nparser = argparse.ArgumentParser()\n"
        "for name, kind in (('dataset', str), ('out', str), ('time-budget', float), ('seed', int), ('device', str)):\n"
        "    parser.add_argument(f'--{name}', type=kind)\n"
        "arguments = parser.parse_args()\n" + textwrap.dedent(body)
    )
    return path


def copies(folder, saved):
    """What a script does to save what is given, without the seconds that importing torch would take."""
    torch.save(saved, folder / "saved.pt")
    return f"import shutil\nshutil.copy({str(folder / 'saved.pt')!r}, arguments.out)\n"


@pytest.mark.slow
def test_a_script_is_run_with_dataset_budget_and_seed(tmp_path, capfd):
    heard = []
    body = "print('chatter')\nassert (arguments.dataset, arguments.time_budget, arguments.seed) == ('cifar100', 60.0, 7)\n"
    saved = {"images": torch.full((3, 3, 32, 32), 7.0), "labels": torch.tensor([0, 1, 1])}
    entry = ScriptEntry(script(tmp_path, body + copies(tmp_path, saved)), "cifar100", progress=heard.append)
    made = entry(7, 60.0)
    assert made.images.unique().tolist() == [7.0] and made.labels.tolist() == [0, 1, 1]
    assert 0 < made.seconds < 60
    assert heard and all(report.total == 60.0 and report.unit == "s" for report in heard)
    heard.clear()
    dataclasses.replace(entry, may_end_early=True)(7, 60.0)
    assert heard and all(report.total is None for report in heard)
    assert capfd.readouterr() == ("", "")  # standard output is for our own result, the other for progress


@pytest.mark.parametrize("seconds, budget, said", [(60, 0.5, "still running"), (0.3, 0.2, "after its budget of 0.2 s")])
def test_script_over_its_budget_is_refused(tmp_path, seconds, budget, said):
    entry = ScriptEntry(script(tmp_path, f"time.sleep({seconds})"), "cifar100")
    with pytest.raises(InvalidSubmissionError, match=said):
        entry(0, budget)


@pytest.mark.slow
@pytest.mark.parametrize("body, error, said", [
    ("sys.exit(4)", ComputeError, "status 4"),
    ("sys.exit('no GPU here')", ComputeError, "no GPU here"),
    ("pass", InvalidSubmissionError, "not write a readable file"),
    ("open(arguments.out, 'wb').write(b'x' * 100)", InvalidSubmissionError, "not write a readable file"),
])  # fmt: skip
def test_failing_script_raises_with_the_reason(tmp_path, body, error, said):
    with pytest.raises(error, match=said):
        ScriptEntry(script(tmp_path, body), "cifar100")(0, 60.0)


def test_memory_that_pytorch_keeps_on_a_gpu_is_free_for_the_script(gpu, tmp_path):
    with pytest.raises(ComputeError, match="status 4"):
        ScriptEntry(script(tmp_path, "sys.exit(4)"), "cifar100")(0, 60.0)
    assert gpu.released == 1


def test_a_script_that_saves_anything_else_is_refused(tmp_path):
    with pytest.raises(InvalidSubmissionError, match="has no images and labels"):
        ScriptEntry(script(tmp_path, copies(tmp_path, torch.zeros(3))), "cifar100")(0, 60.0)


class Smuggled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_script_cannot_smuggle_in_code(tmp_path):
    saved = {"images": Smuggled(str(tmp_path / "executed")), "labels": 0}
    with pytest.raises(InvalidSubmissionError):
        ScriptEntry(script(tmp_path, copies(tmp_path, saved)), "cifar100")(0, 60.0)
    assert not (tmp_path / "executed").exists()


def test_arguments_folder_and_environment_are_passed_on(tmp_path):
    body = f"""
    assert (arguments.device, os.environ["WORDS"], os.getcwd()) == ("cpu", "four", {str(tmp_path)!r})
    """
    saved = {"images": torch.zeros(1, 3, 32, 32), "labels": torch.tensor([0])}
    entry = ScriptEntry(
        script(tmp_path, textwrap.dedent(body) + copies(tmp_path, saved)), "cifar100", ("--device", "cpu"),
        environment={**os.environ, "WORDS": "four"}, folder=tmp_path,
    )  # fmt: skip
    assert entry(0, 60.0).labels.tolist() == [0]


def test_stop_request_ends_the_script_and_its_children(tmp_path):
    body = """
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("child.new", "w").write(str(child.pid))
    os.rename("child.new", "child")
    time.sleep(600)
    """
    child = tmp_path / "child"

    def interrupt():
        wait_for(child.exists)
        os.kill(os.getpid(), signal.SIGINT)

    entry = ScriptEntry(script(tmp_path, body), "cifar100", folder=tmp_path)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(InterruptedRunError):
        entry(0, 600.0)
    thread.join()
    wait_for(lambda: not is_running(int(child.read_text())))


@pytest.mark.slow
def test_script_ends_with_a_process_that_is_killed(tmp_path):
    body = """
    open("script.new", "w").write(str(os.getpid()))
    os.rename("script.new", "script")
    time.sleep(600)
    """
    path = script(tmp_path, body)
    code = f"""
from pathlib import Path
from ddkit.evaluation.timed_script import ScriptEntry
ScriptEntry(Path({str(path)!r}), "cifar100", folder=Path({str(tmp_path)!r}))(0, 600.0)
"""
    process = processes.start("-c", code)
    wait_for((tmp_path / "script").exists)
    process.kill()
    wait_for(lambda: not is_running(int((tmp_path / "script").read_text())))


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition):
    """Until the condition holds; fails when that takes very long."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came about")
