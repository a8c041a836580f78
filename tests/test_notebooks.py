"""What notebooks show: bars of progress, results as escaped HTML, and the notebook in tools/ that runs."""

import re
from pathlib import Path

import pytest

from ddkit.reporting.report import report
from ddkit.results import Result, append
from ddkit.runtime.progress import Progress, default_listener, ignore, progress_bars
from ddkit.sets.distilled import read_set
from ddkit.sets.findings import Finding, report_of

NOTEBOOK = Path(__file__).resolve().parent.parent / "tools" / "ddkit_quickstart.ipynb"
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def result():
    names = {"name": HOSTILE, "source": HOSTILE, "dataset": "glyphs", "sha256": "0" * 64}
    numbers = {"track": 1, "images": 100, "images_per_class": (10, 10), "epochs_setting": 5, "accuracies": (0.5, 0.6)}
    return Result(**names, **numbers, deviations=("E = 5, not 1000",))


def test_progress_bars_show_tasks_one_after_the_other(capsys):
    show = progress_bars()
    for progress in (Progress("Sampling", 1, 4, "images"), Progress("Sampling", 4, 4, "images", {"loss": 0.25}),
                     Progress("Round 1", 3, None), Progress("Round 1", 1, 2)):  # fmt: skip
        show(progress)
    shown = capsys.readouterr().err
    assert "Sampling: 100%" in shown and "4/4" in shown and "loss=0.25" in shown
    assert shown.index("Sampling") < shown.index("Round 1")


def test_outside_a_notebook_nothing_is_shown():
    assert default_listener() is ignore


class TestHtml:
    def test_result_shows_its_accuracy_and_escapes_its_texts(self, result):
        shown = result._repr_html_()
        assert "55.00 % ± 7.07" in shown and "E = 5, not 1000" in shown
        assert "<script>" not in shown and "&lt;script&gt;" in shown

    def test_leaderboard_lists_entries_and_escapes_their_names(self, result, tmp_path):
        append(result, tmp_path / "results.jsonl")
        shown = report(tmp_path / "results.jsonl")._repr_html_()
        assert "M-DATM" in shown and "55.00" in shown
        assert "<script>" not in shown and "&lt;script&gt;" in shown

    def test_check_lists_its_findings_and_escapes_them(self):
        shown = report_of([Finding("error", "T003", HOSTILE, "x.pt")])._repr_html_()
        assert "would refuse" in shown and "T003" in shown
        assert "<script>" not in shown and "&lt;script&gt;" in shown

    def test_set_shows_its_contact_sheet_and_escapes_its_kind(self, folder):
        provenance = folder / "glyphs.json"
        provenance.write_text(provenance.read_text().replace('"method"', f'"kind": "{HOSTILE}", "method"'))
        read = read_set(folder / "glyphs.pt")
        shown = read._repr_html_()
        assert "100 images of 32 × 32 pixels, 10 for each of 10 classes" in shown
        assert re.search(r'<img src="data:image/webp;base64,[\w+/=]{1000,}"', shown)
        assert "glyphs.pt" in repr(read) and "tensor(" not in repr(read)
        assert "<script>" not in shown and "&lt;script&gt;" in shown


class TestQuickstart:
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install '.[test]'")
    SMALLER = {"steps=10": "steps=2", "val_epochs=5": "val_epochs=0, held_out=0.01", "epochs_setting=10": "epochs_setting=0"}

    def read(self):
        return self.nbformat.read(NOTEBOOK, 4)

    def test_stored_notebook_is_executed_small_and_names_no_folder_of_a_machine(self):
        cells = [cell for cell in self.read().cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert NOTEBOOK.stat().st_size < 300_000
        without_pictures = re.sub(r"base64,[\w+/=]+", "", NOTEBOOK.read_text(encoding="utf-8"))
        assert not re.search(r"/(home|root|Users|work|tmp|opt|usr|var)/", without_pictures)

    @pytest.mark.slow
    def test_notebook_runs_from_zero_to_a_packed_set(self, few_letters, tmp_path):
        nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install '.[test]'")
        pytest.importorskip("ipykernel", reason="needs ipykernel: pip install '.[test]'")
        notebook = self.read()
        for was, now in self.SMALLER.items():
            cells = [cell for cell in notebook.cells if was in cell.source]
            assert cells
            for cell in cells:
                cell.source = cell.source.replace(was, now)
        client = nbclient.NotebookClient(
            notebook, timeout=900, startup_timeout=300, coalesce_streams=True, resources={"metadata": {"path": tmp_path}}
        )
        client.execute()  # raises for a cell that fails
        shown = [str(output) for cell in notebook.cells for output in cell.get("outputs", ())]
        assert any("contact sheet" in one for one in shown) and any("found no error" in one for one in shown)
        assert any("submission.zip" in one for one in shown) and (tmp_path / "submission.zip").is_file()
        assert (tmp_path / "report.html").is_file()
