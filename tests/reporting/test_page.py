"""What the page tells: sets as they lie on the disk, and what is gone since."""

import dataclasses
import re
from pathlib import Path

import pytest

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.reporting.html import render, write_html
from ddkit.reporting.page import gather
from ddkit.results import IN_MEMORY
from ddkit.runtime.files import sha256_of
from ddkit.sets.distilled import save_set


@pytest.fixture
def evaluated(colors, result, tmp_path, monkeypatch):
    """Saves two pictures of each of the colors as NAME/colors.pt and returns the result of evaluating them."""
    monkeypatch.chdir(tmp_path)
    real, spec = load_dataset(colors, "train"), dataset_spec(colors)

    def save(name, *accuracies, first=0, **fields):
        images = normalize(real.images[[first, first + 1, 5 + first, 6 + first]], spec)
        facts = {"kind": "generated", "seed": 3, "sampler": "dpm++", "versions": {"torch": "2.x"}}
        save_set(f"{name}/colors.pt", images, spec, facts)
        known = {"sha256": sha256_of(f"{name}/colors.pt"), "images": 4, "ipc": 2, "epochs_setting": 3,
                 "per_class": (0.25, 0.75), "confusions": ((0, 1, 1.5),), "made_by": facts}  # fmt: skip
        return result(name, "colors", *accuracies, **(known | fields))

    return save


def test_a_set_is_shown_with_images_facts_findings_and_mistakes(evaluated):
    page = gather([evaluated("mine", 0.5, 0.75)])
    (entry,) = page.entries
    (view,) = entry.sets
    assert [row.name for row in view.sheet] == ["blue", "red"]
    assert all(uri.startswith("data:image/webp;base64,") for row in view.sheet for uri in row.pictures)
    assert len(view.sheet[0].pictures) == 2
    assert dict(view.facts)["sampler"] == "dpm++" and dict(view.facts)["accuracies"] == "50.00 %, 75.00 %"
    assert [(c.name, c.accuracy) for c in view.classes] == [("red", 0.75), ("blue", 0.25)]
    assert [(c.truth, c.predicted, c.count) for c in view.confusions] == [("blue", "red", 1.5)]
    assert view.checked and view.loss.lines[0].name == "round 1" and view.loss.x_ticks[-1].label == "3"
    assert view.ranking.missing


def test_a_recipe_that_names_the_set_is_shown(evaluated, tmp_path):
    one = evaluated("mine", 0.5, 0.75)
    (tmp_path / "recipe.toml").write_text(f'# <made by ddkit>\n[[sets]]\nsha256 = "{one.sha256}"\n')
    html = render(gather([one]))
    assert "&lt;made by ddkit&gt;" in html and (tmp_path / "recipe.toml").as_uri() in html
    (tmp_path / "recipe.toml").write_text('[[sets]]\nsha256 = "0"\n')
    assert gather([one]).entries[0].sets[0].recipe is None


def test_a_published_set_is_shown_as_it_was_converted(evaluated, colors, result):
    import torch

    from ddkit.evaluation.published import open_published

    real = load_dataset(colors, "train")
    torch.save([real.images[[0, 5]] / 255, real.labels[[0, 5]]], "theirs.pt")
    found = open_published(Path("theirs.pt"), colors)
    one = result("theirs", colors, 0.5, sha256=found.sha256, source="theirs.pt", made_by=dict(found.provenance))
    (view,) = gather([one]).entries[0].sets
    assert [row.name for row in view.sheet] == ["blue", "red"] and not view.checked and view.findings == ()
    torch.save([real.images[[0, 6]] / 255, real.labels[[0, 6]]], "theirs.pt")
    (view,) = gather([one]).entries[0].sets
    assert view.sheet == () and "has changed" in view.gone


def test_the_pictures_are_those_of_the_file(evaluated, colors):
    import base64
    import io

    import numpy as np
    from PIL import Image

    (entry,) = gather([evaluated("mine", 0.5)]).entries
    uri = entry.sets[0].sheet[1].pictures[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
    assert (pixels == load_dataset(colors, "train").images[6].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("spoil, said", [
    (lambda path: path.unlink(), "is no longer there"),
    (lambda path: path.write_bytes(b"something else"), "has changed since this evaluation"),
])  # fmt: skip
def test_a_set_that_is_gone_or_changed_leaves_the_rest(evaluated, tmp_path, spoil, said):
    known = evaluated("mine", 0.5, 0.75)
    spoil(tmp_path / "mine" / "colors.pt")
    (view,) = gather([known]).entries[0].sets
    assert said in view.gone and view.sheet == () and not view.checked
    assert view.classes and view.confusions and view.loss and dict(view.facts)["sampler"] == "dpm++"


def test_a_deleted_folder_and_a_dataset_that_is_not_prepared_leave_the_numbers(result):
    page = gather([result("mine", "unheard-of", 0.5, epochs_setting=3)])
    (view,) = page.entries[0].sets
    assert "no longer there" in view.gone and view.classes[0].name == "class 3"
    assert "class 0" in render(page)


def test_a_set_without_a_file_is_said_to_have_had_none(result):
    page = gather([result("mine", "cifar100", 0.5, source=IN_MEMORY, epochs_setting=3)])
    assert "evaluated in memory" in page.entries[0].sets[0].gone


def test_a_path_that_cannot_be_read_leaves_the_numbers(result):
    page = gather([result("mine", "cifar100", 0.5, source="x" * 5000 + "/cifar100.pt", epochs_setting=3)])
    assert page.entries[0].sets[0].gone and page.entries[0].sets[0].classes


def test_a_generator_is_shown_without_images(evaluated):
    (view,) = gather([evaluated("mine", 0.5, track=2)]).entries[0].sets
    assert "other images for each round" in view.gone and view.sheet == view.findings == ()


def test_page_of_a_generator_does_not_advise_what_only_sets_can_do(evaluated):
    html = render(gather([evaluated("mine", 0.5, track=2)]))
    assert "other images for each round" in html
    assert not any(text in html for text in ("Not checked.", "--ranking</code>", "No random real images were evaluated"))


def test_the_same_file_is_shown_and_checked_once(evaluated):
    first = evaluated("mine", 0.5)
    later = dataclasses.replace(first, epochs_setting=9, accuracies=(0.6,))
    views = [entry.sets[0] for entry in gather([first, later]).entries]
    assert [bool(view.sheet) for view in views] == [True, False]
    assert views[1].gone == "The images are shown with an entry above."
    assert views[0].findings is views[1].findings


def test_of_many_sets_the_pictures_of_the_best_are_shown(evaluated):
    views = [entry.sets[0] for entry in gather([evaluated(f"run-{i}", i / 10, first=i % 3) for i in range(5)]).entries]
    assert [view.result.name for view in views] == [f"run-{i}" for i in (4, 3, 2, 1, 0)]
    assert [bool(view.sheet) for view in views[:3]] == [True] * 3


@pytest.mark.slow
def test_thousands_of_results_make_a_page_that_can_be_sent(result):
    results = [result(f"run-{i % 500}", "letters", i / 5000, epochs_setting=50) for i in range(3000)]
    page = gather(results)
    assert len(page.tables[1].group.rows) == 100 and page.tables[1].left_out == 2900
    assert len(page.entries) == 8 and page.entries_left_out == 492
    html = render(page)
    assert "2,900 more" in html and len(html) < 2_000_000


def test_cards_name_the_best_entry_and_its_differences(result):
    page = gather([
        result("mine", "cifar100", 0.50, 0.52, 0.51),
        result("mine", "tinyimagenet", 0.25, 0.26, 0.24),
        result("weak", "cifar100", 0.10, 0.11, 0.12, epochs_setting=50),
    ])  # fmt: skip
    titles = {card.title: card for card in page.cards}
    assert titles["Best entry: mine"].value == "38.00 %" and "rank 1" in titles["Best entry: mine"].note
    assert titles["To first place (M-DATM)"].tone == "good"
    assert titles["Your evaluations"].value == "3" and "1 complete and official entry" in titles["Your evaluations"].note


def test_the_best_entry_is_official_or_else_of_the_highest_accuracy_on_the_challenges_datasets(result):
    strong, weak = result("strong", "cifar100", 0.36, epochs_setting=50), result("weak", "cifar100", 0.34, epochs_setting=25)
    letters = result("letters", "glyphs", 0.95, epochs_setting=50)
    (best, *_) = gather([weak, strong, letters]).cards
    assert (best.title, best.value, best.note) == ("Best entry: strong", "36.00 %", "CIFAR-100; not official: E = 50")
    (best, *_) = gather([weak, strong, letters, result("true", "cifar100", 0.30, 0.31, 0.32)]).cards
    assert best.title == "Best entry: true" and best.note.endswith("CIFAR-100; official: E = 1000, 3 rounds")


@pytest.mark.parametrize(
    "accuracies, note, tone",
    [((0.5, 0.5), "points, interval n/a (equal rounds)", ""), ((0.5,), "points, interval n/a (1 round)", "")],
)
def test_card_of_a_difference_without_an_interval_says_why(result, accuracies, note, tone):
    random = result("random", "glyphs", *(0.1 for _ in accuracies), kind="random-real")
    cards = {card.title: card for card in gather([result("mine", "glyphs", *accuracies), random]).cards}
    card = cards["To random real images"]
    assert (card.value, card.note, card.tone) == ("+40.00", note, tone)


def test_no_results_yet_say_what_to_type():
    html = render(gather([]))
    assert "ddkit evaluate" in html and "M-DATM" in html
    assert 'id="accuracy"' not in html and 'id="entries"' not in html


HOSTILE = "<img src=x onerror=alert(1)>[red]{{ 7*7 }}&amp;\"'"


def test_text_from_files_is_escaped(evaluated):
    known = evaluated("mine", 0.5, 0.6)
    hostile = dataclasses.replace(
        known, name=HOSTILE, deviations=(HOSTILE,), device=HOSTILE, made_by={HOSTILE: HOSTILE, "class_names": [HOSTILE]}
    )
    html = render(gather([hostile], problems=[HOSTILE]))
    assert "<img src=x" not in html and "49&amp;" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;") > 5
    assert len(re.findall(r"<script", html)) == 1


def test_the_page_is_one_file_without_addresses(evaluated, tmp_path):
    write_html(gather([evaluated("mine", 0.5, 0.6)]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "default-src 'none'" in html and "http" not in re.sub(r"http-equiv", "", html)
