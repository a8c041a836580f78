import os
import subprocess
import sys

from ddkit.runtime.environment import explain_broken_install, versions


def test_a_torch_and_torchvision_that_do_not_fit_are_one_message(tmp_path):
    """A stand-in torchvision that fails on import with the words of the real mismatch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import ddkit.cli.completion, click\n"
        "def body():\n"
        "    import torchvision\n"
        "ddkit.cli.completion.completion = click.Command('completion', callback=body)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-m", "ddkit", "completion"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 3
    assert "were not built for each other" in finished.stderr
    assert "pip install --force-reinstall torch torchvision" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_missing_package_is_named():
    broken = explain_broken_install(ModuleNotFoundError("No module named 'scipy'", name="scipy"))
    assert "'scipy' is missing" in broken.message
    for module, package in (("PIL", "pillow"), ("pyarrow.parquet", "pyarrow")):
        assert explain_broken_install(ModuleNotFoundError(name=module)).remedy == f"pip install {package}"
    assert explain_broken_install(RuntimeError("something else")) is None


def test_versions_name_the_libraries_that_decide_on_results():
    named = versions()
    assert named["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {"ddkit", "torch", "torchvision", "diffusers"} <= set(named)
