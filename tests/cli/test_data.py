"""`ddkit data`: what the commands print, write and answer."""

import io
import json
import zipfile

import pytest
from click.testing import CliRunner
from PIL import Image

from ddkit.cli import main
from ddkit.data.download import RetryPolicy, download


def run(*arguments):
    return CliRunner().invoke(main, ["data", *arguments])


@pytest.fixture
def photos(tmp_path_factory):
    """A zip of two classes with three training and two test images each."""
    path = tmp_path_factory.mktemp("archive") / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", 3), ("test", 2)):
            for label, name in enumerate(("cat", "dog")):
                for k in range(count):
                    buffer = io.BytesIO()
                    Image.new("RGB", (16, 16), (100 * label, k, 7)).save(buffer, "PNG")
                    archive.writestr(f"photos/{split}/{name}/{k}.png", buffer.getvalue())
    return path


@pytest.fixture
def broken(photos):
    with zipfile.ZipFile(photos, "a") as archive:
        archive.writestr("photos/train/cat/notes.txt", b"notes")
    return photos


def test_prepared_dataset_is_listed_and_shown(photos, work, own_cache):
    finished = run("prepare", "pets", "--from", str(photos))
    assert finished.exit_code == 0, finished.stderr
    said = "pets: 2 classes, 16 pixels, 6 train images (3 a class), 4 test images (2 a class)"
    assert " ".join(finished.stdout.split()) == said
    assert f"wrote {own_cache}/pets" in finished.stderr.replace("\n", "")
    assert "next: ddkit generate --dataset pets --from-real random" in finished.stderr

    again = run("prepare", "pets", "--from", str(photos), "--json")
    assert again.exit_code == 0 and "prepared already" in again.stderr and "wrote" not in again.stderr
    assert "downloaded" not in run("prepare", "pets").stderr
    refused = run("prepare", "pets", "--image-size", "32")
    assert refused.exit_code == 2 and "--image-size has no effect without --from" in refused.stderr
    facts = json.loads(again.stdout)
    assert facts["class_names"] == ["cat", "dog"] and facts["source"]["path"] == str(photos)

    listed = run("list", "--json", "--quiet")
    assert listed.stderr == ""
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert set(rows) == {"cifar100", "tinyimagenet", "glyphs", "pets"}
    assert (rows["pets"]["train"], rows["pets"]["test"], rows["pets"]["image_size"]) == (6, 4, 16)
    assert rows["cifar100"]["state"] == "not prepared"

    shown = run("show", "pets", "--split", "test", "--per-class", "1", "--out", "sheet.png")
    assert shown.exit_code == 0, shown.stderr
    assert "wrote sheet.png" in shown.stderr
    pixels = {color for _, color in Image.open(work / "sheet.png").convert("RGB").getcolors(1 << 16)}
    assert {(0, 0, 7), (100, 0, 7)} <= pixels and (0, 1, 7) not in pixels


def test_show_with_classes_draws_only_those(photos, work):
    run("prepare", "pets", "--from", str(photos))
    shown = run("show", "pets", "--classes", "dog", "--json")
    assert json.loads(shown.stdout) == {"out": "pets-train.png", "classes": ["dog"]}
    pixels = {color for _, color in Image.open(work / "pets-train.png").convert("RGB").getcolors(1 << 16)}
    assert {(100, 0, 7), (100, 1, 7), (100, 2, 7)} <= pixels and (0, 0, 7) not in pixels
    wrong = run("show", "pets", "--classes", "dgo")
    assert wrong.exit_code == 2 and "Did you mean 'dog'?" in wrong.stderr


def test_bad_files_exit_with_3_unless_they_may_be_skipped(broken, own_cache):
    finished = run("prepare", "pets", "--from", str(broken))
    assert finished.exit_code == 3 and finished.stdout == ""
    said = " ".join(finished.stderr.split())
    assert "1 file cannot be used: photos/train/cat/notes.txt (not an image that Pillow can read)" in said
    assert "--skip-bad" in said and "Traceback" not in said
    assert not (own_cache / "pets").exists()

    finished = run("prepare", "pets", "--from", str(broken), "--skip-bad")
    assert finished.exit_code == 0 and "6 train images" in finished.stdout
    assert "These train files were left out: photos/train/cat/notes.txt" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["prepare", "tinyimagnet"], 2, "Did you mean 'tinyimagenet'?"),
        (["prepare", "mine"], 2, "ddkit data prepare mine --from PATH"),
        (["show", "mine"], 2, "ddkit data prepare mine --from PATH"),
        (["prepare", "pets", "--from", ".", "--test-split", "train"], 2, "'train' is not one of"),
        (["show", "glyhps"], 2, "Did you mean 'glyphs'?"),
        (["show", "glyphs", "--out", "runs/set.pt"], 2, "Name a file such as runs/set.png"),
        (["prepare", "pets/../x", "--from", "."], 2, "cannot be a dataset's name"),
        (["prepare", "pets", "--from", "nowhere.zip"], 3, "nowhere.zip does not exist"),
        (["prepare", "glyphs", "--from", "."], 2, "drawn, not read"),
        (["prepare", "pets", "--from", ".", "--image-size", "0"], 2, "0 is not in the range"),
        (["show", "glyphs", "--per-class", "0"], 2, "0 is not in the range"),
    ],
)
def test_wrong_usage_is_one_message(arguments, status, message, work):
    finished = run(*arguments)
    assert finished.exit_code == status, finished.stderr
    assert message in " ".join(finished.stderr.split()) and "Traceback" not in finished.stderr
    assert list(work.iterdir()) == []


def test_prepare_without_a_network_names_what_to_give_instead(own_cache, monkeypatch):
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("https_proxy", "http://127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(download.__kwdefaults__, "patience", RetryPolicy(pause=0.01))
    finished = run("prepare", "tinyimagenet")
    said = " ".join(finished.stderr.split())
    assert finished.exit_code == 3
    assert "tiny-imagenet-200.zip could not be downloaded" in said and "give it to ddkit data prepare --from" in said
    assert not (own_cache / "tinyimagenet").exists()


def test_damaged_store_is_listed_with_what_is_wrong(photos, own_cache):
    run("prepare", "pets", "--from", str(photos))
    (own_cache / "pets" / "meta.json").write_text("{")
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert "damaged" in rows["pets"]["state"]
