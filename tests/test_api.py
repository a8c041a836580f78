"""The Python interface: `import ddkit` is instant, and a short script does what the commands do."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from click.testing import CliRunner

import ddkit
from ddkit import api
from ddkit.cli import main
from ddkit.data.glyphs import PER_CLASS
from ddkit.distill.settings import RefineSettings
from ddkit.errors import InterruptedRunError, InvalidSubmissionError, UsageError
from ddkit.generator.config import SamplingSettings
from ddkit.runtime.progress import Progress

README = Path(__file__).resolve().parent.parent / "README.md"


def test_import_loads_nothing_heavy_and_names_what_it_offers():
    code = (
        "import sys, ddkit\n"
        "heavy = {'torch', 'numpy', 'click', 'rich', 'ddkit.api'}\n"
        "print(sorted(heavy & set(sys.modules)), set(ddkit.__all__) <= set(dir(ddkit)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[] True\n"


def test_every_function_has_typed_parameters_and_a_docstring():
    assert set(ddkit.__all__) == {
        name
        for name, value in vars(api).items()
        if getattr(value, "__module__", "") == "ddkit.api" and inspect.isfunction(value) and not name.startswith("_")
    }
    for name in ddkit.__all__:
        function = getattr(ddkit, name)
        assert len(function.__doc__) > 100, name
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        untyped = [parameter for parameter in signature.parameters.values() if parameter.annotation is parameter.empty]
        assert not untyped, name
        # The hub's library shows its own progress.
        assert "progress" in signature.parameters or name in ("read_set", "push", "pull"), name


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = ddkit.distil


def test_enter_with_a_single_name_takes_it_as_a_dataset():
    with pytest.raises(UsageError, match="Unknown dataset 'cifar10'"):
        ddkit.enter("cifar10", seconds=3600)


def test_refining_for_steps_and_for_seconds_at_once_raises_usage_error(tmp_path):
    with pytest.raises(UsageError, match="steps and seconds exclude each other"):
        ddkit.refine(tmp_path / "glyphs.pt", steps=10, seconds=10)


@pytest.mark.slow
def test_what_makes_and_evaluates_sets_of_real_images_does_not_import_diffusers():
    code = (
        "import sys\n"
        "for name in [*sys.modules]:\n"
        "    if name.partition('.')[0] in ('ddkit', 'diffusers'): del sys.modules[name]\n"
        "import ddkit.distill.generate, ddkit.entering.entry\n"
        "from ddkit.cli import main\n"
        "try: main(['evaluate', 'nothing.pt'])\n"
        "except SystemExit: print('diffusers' in sys.modules)"
    )
    assert processes.run("-c", code).stdout == "False\n"


@pytest.mark.slow
def test_load_dataset_and_generate_report_their_progress(tmp_path, monkeypatch):
    for split in ("train", "test"):
        monkeypatch.setitem(PER_CLASS, split, 5)
    reports = []
    dataset = ddkit.load_dataset("glyphs", "test", progress=reports.append)
    made = ddkit.generate("glyphs", ipc=1, from_real="first", out=tmp_path / "glyphs.pt")
    assert len(dataset) > 0 and dataset.images.shape[1:] == made.images.shape[1:] == (3, 32, 32)
    assert made.ipc == 1 and made.kind == "first-real" and ddkit.read_set(made.path).sha256 == made.sha256
    assert reports and all(isinstance(one, Progress) for one in reports)


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(few_letters, tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    done = processes.run("-c", example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"submission/glyphs\.pt 0\.\d+ \(", done.stdout) and "submission.zip" in done.stdout
    assert Path(tmp_path, "report.html").is_file() and Path(tmp_path, "runs/results.jsonl").is_file()


@pytest.mark.slow
def test_train_makes_a_generator_that_generate_samples(few_letters, tmp_path):
    reports = []
    model = ddkit.train(few_letters, preset="demo", seconds=0.5, out=tmp_path / "run", batch_size=8, progress=reports.append)
    made = ddkit.generate("glyphs", ipc=1, model=tmp_path / "run", out=tmp_path / "glyphs.pt")
    assert model.facts.steps > 0 and made.kind == "generated" and len(made.images) == 10 and reports


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_real": "random", "model": "run", "candidates": 5}, "model and candidates cannot be combined with from_real"),
        ({"from_real": "random", "select": "herding"}, "select cannot be combined with from_real"),
        ({"select": "herding"}, "Selecting by herding needs candidates"),
        ({"sampling": SamplingSettings(steps=2), "seed": 1}, "seed has no effect next to sampling"),
        ({"from_real": "random", "ipc": 0}, "at least one image per class, got 0"),
        ({"from_real": True}, "Unknown selection method 'True'. Known: random, first"),
    ],
)
def test_generate_refuses_arguments_that_it_cannot_use(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        ddkit.generate("glyphs", out=tmp_path / "glyphs.pt", **arguments)


def test_generate_makes_the_images_that_the_command_does(colors, colors_model, tmp_path):
    made = ddkit.generate(colors, 2, model=colors_model, out=tmp_path / "colors.pt")
    assert made.provenance["guidance"] == 1 and made.provenance["mode_guidance"] > 0
    words = ["generate", "--dataset", colors, "--ipc", "2", "--model", str(colors_model), "--out", str(tmp_path / "again.pt")]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert (tmp_path / "again.pt").read_bytes() == made.path.read_bytes()


@pytest.mark.slow
def test_evaluate_of_a_set_in_memory_gives_the_numbers_of_its_file(few_letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = ddkit.generate("glyphs", ipc=1, from_real="first")
    evaluations = [
        ddkit.evaluate(given, dataset="glyphs", rounds=1, epochs_setting=1, state=f"state{number}")
        for number, given in enumerate((read.path, read, read.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)))
    ]
    assert len({(result.accuracies, result.loss_curves) for result in evaluations}) == 1
    assert evaluations[1].sha256 == evaluations[0].sha256 and evaluations[2].source == "tensor in memory"
    assert [result.name for result in evaluations] == [read.path.resolve().parent.name] * 2 + ["in-memory"]
    assert [result.kind for result in evaluations] == ["first-real", "first-real", "submission"]
    read.images.mul_(-1)  # which are neither the images of the file then, nor real ones
    changed = ddkit.evaluate(read, rounds=1, epochs_setting=1)
    assert changed.sha256 != evaluations[0].sha256 and changed.kind == "submission"
    with pytest.raises(InvalidSubmissionError, match="tensor in memory: The tensor has 9 rows"):
        ddkit.evaluate(read.images[:9], dataset="glyphs")


@pytest.mark.slow
def test_defaults_of_pytorch_that_a_notebook_changed_change_nothing(few_letters, tmp_path, monkeypatch):
    def accuracy_of_a_refined_set():
        read = ddkit.generate("glyphs", ipc=1, from_real="first", replace=True)
        assert "<img" in read._repr_html_() and ddkit.check(read, ipc=1).ok
        settings = RefineSettings(dm_steps=0, batch_real=8)
        refined = ddkit.refine(read.path, steps=1, settings=settings, out="refined.pt", fresh=True)
        options = {"dataset": "glyphs", "rounds": 1, "epochs_setting": 1, "state": f"state {torch.get_default_dtype()}"}
        return ddkit.evaluate(refined.files.tensor, **options).loss_curves

    monkeypatch.chdir(tmp_path)
    expected = accuracy_of_a_refined_set()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert accuracy_of_a_refined_set() == expected
        assert torch.get_default_dtype() == torch.float64 and torch.empty(()).is_meta
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_check_takes_a_set_in_memory(folder):
    read = ddkit.read_set(folder / "glyphs.pt")
    assert ddkit.check(read) == ddkit.check(read.path)
    assert [f.code for f in ddkit.check(read.images[:9], dataset="glyphs").findings] == ["T003"]
    with pytest.raises(UsageError, match="which dataset"):
        ddkit.check(read.images)
    with pytest.raises(UsageError, match="for glyphs, not for cifar100"):
        ddkit.check(read, dataset="cifar100")


@pytest.mark.slow
def test_interrupted_evaluate_continues_when_called_again(few_letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ddkit.generate("glyphs", ipc=1, from_real="first").path
    options = {"rounds": 1, "epochs_setting": 5, "device": "cpu"}
    reports = []

    def stop_after_three_epochs(report):
        if report.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        ddkit.evaluate(path, **options, progress=stop_after_three_epochs)
    assert not Path("runs/results.jsonl").exists()
    continued = ddkit.evaluate(path, **options, progress=reports.append)
    assert reports[0].done >= 3
    whole = ddkit.evaluate(path, **options, state="other")
    assert (continued.accuracies, continued.loss_curves) == (whole.accuracies, whole.loss_curves)
