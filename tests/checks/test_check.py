import zipfile

import pytest
import torch

from ddkit.challenge import GLYPHS
from ddkit.checks.check import check_path, check_set, check_tensor
from ddkit.data.images import denormalize
from ddkit.errors import UsageError
from ddkit.sets.distilled import read_set, save_set
from ddkit.sets.findings import Finding, report_of


def codes(report, level=None):
    return [finding.code for finding in report.findings if level in (None, finding.level)]


def test_check_path_of_a_right_practice_folder_is_acceptable(folder):
    report = check_path(folder)
    assert report.ok, report
    assert codes(report, "warning") == []
    assert "F021" in codes(report, "info")


def test_check_path_judges_a_file_and_a_zip_alike(tmp_path, folder):
    assert check_path(folder / "glyphs.pt").ok
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.write(folder / "glyphs.pt", "glyphs.pt")
    assert check_path(tmp_path / "s.zip").ok
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.write(folder / "glyphs.pt", "submission/glyphs.pt")
    assert codes(check_path(tmp_path / "s.zip"), "error") == ["F010", "F002"]


@pytest.mark.parametrize(("kind", "level"), [("generated", "warning"), ("refined", "error")])
def test_classes_that_seem_swapped_are_doubted_where_ddkit_made_the_set_class_by_class(tmp_path, glyph_images, kind, level):
    blocks = glyph_images.unflatten(0, (10, 10)).clone()
    blocks[[2, 7]] = blocks[[7, 2]]
    save_set(tmp_path / "glyphs.pt", blocks.flatten(0, 1), GLYPHS, {"kind": kind})
    for report in (check_path(tmp_path), check_path(tmp_path / "glyphs.pt"), check_set(read_set(tmp_path / "glyphs.pt"))):
        (found,) = (finding for finding in report.findings if finding.code == "L007")
        assert found.level == level and "2 (H) and 7 (T)" in found.message and report.ok == (level == "warning")
        assert ("seems right except for a few classes" in found.message) == ("Reorder" not in found.message) == report.ok
    blocks = blocks.flip(0)
    save_set(tmp_path / "glyphs.pt", blocks.flatten(0, 1), GLYPHS, {"kind": kind})
    assert not check_path(tmp_path).ok


@pytest.mark.slow
def test_folder_with_one_of_the_challenges_files_is_f003(tmp_path):
    torch.save(torch.randn(1000, 3, 32, 32), tmp_path / "cifar100.pt")
    assert codes(check_path(tmp_path), "error") == ["F003"]
    torch.save(torch.randn(2000, 3, 64, 64), tmp_path / "tinyimagenet.pt")
    assert check_path(tmp_path).ok


@pytest.mark.slow
def test_name_in_another_case_is_f011(tmp_path):
    torch.save(torch.randn(1000, 3, 32, 32), tmp_path / "CIFAR100.pt")
    torch.save(torch.randn(2000, 3, 64, 64), tmp_path / "tinyimagenet.pt")
    assert codes(check_path(tmp_path), "error") == ["F011"]


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("cifar-100.pt", "cifar100.pt"), ("cifar100.pth", "cifar100.pt"), ("cifar100 (1).pt", "cifar100.pt"),
        ("tiny_imagenet.pt", "tinyimagenet.pt"), ("tiny-imagenet-200.pt", "tinyimagenet.pt"), ("CIFAR-100.PTH", "cifar100.pt"),
    ],
)  # fmt: skip
def test_the_right_name_is_offered_for_a_wrong_one(tmp_path, name, right):
    folder = tmp_path / "submission"
    folder.mkdir()
    torch.save(torch.zeros(1), folder / name)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.write(folder / name, name)
    for path in (folder, tmp_path / "s.zip"):
        report = check_path(path)
        assert not report.ok and any(f.code == "F020" and f"rename it to {right}" in f.message for f in report.findings)
    if (folder / name).stem + ".pt" != right:  # of a file alone the stem is enough
        with pytest.raises(UsageError, match=f"rename it to {right}"):
            check_path(folder / name)


def test_zip_with_names_that_begin_with_a_dot_is_judged_like_any_other(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.mkdir("./") if hasattr(archive, "mkdir") else archive.writestr("./", b"")
        archive.write(folder / "glyphs.pt", "./glyphs.pt")
    assert check_path(tmp_path / "s.zip").ok


@pytest.mark.parametrize("extra", [b"\0", b"more" * 1000])
def test_a_zip_with_bytes_after_its_end_is_refused(tmp_path, folder, extra):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.write(folder / "glyphs.pt", "glyphs.pt")
    with (tmp_path / "s.zip").open("ab") as file:
        file.write(extra)
    (first, *_) = check_path(tmp_path / "s.zip").findings
    assert first.code == "F018" and "bytes follow its end" in first.message


def test_empty_or_missing_folder_says_what_to_do(tmp_path):
    assert codes(check_path(tmp_path)) == ["F002"]
    assert codes(check_path(tmp_path / "absent")) == ["F001"]
    assert check_path(tmp_path / "absent.zip").findings[0].message.endswith("make one: ddkit pack")


def test_file_of_an_unknown_dataset_raises_usage_error(tmp_path):
    torch.save(torch.zeros(1), tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="not named after a known dataset"):
        check_path(tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="Did you mean 'cifar100'"):
        check_path(tmp_path / "mine.pt", dataset="cifar10")


def test_the_dataset_of_a_folder_cannot_be_given(folder):
    with pytest.raises(UsageError, match="applies to a single file"):
        check_path(folder, dataset="glyphs")


def test_links_in_a_circle_and_to_nowhere_are_findings(tmp_path):
    (tmp_path / "cifar100.pt").symlink_to("tinyimagenet.pt")
    (tmp_path / "tinyimagenet.pt").symlink_to("cifar100.pt")
    assert codes(check_path(tmp_path)) == ["F004", "F004"]
    (tmp_path / "tinyimagenet.pt").unlink()
    (tmp_path / "tinyimagenet.pt").symlink_to(tmp_path / "absent")
    assert codes(check_path(tmp_path)) == ["F001", "F001"]


def test_damaged_store_of_another_dataset_does_not_stop_the_check_of_a_zip(tmp_path, own_cache):
    for name in ("birds", "Not A Name"):
        (own_cache / name).mkdir()
        (own_cache / name / "meta.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("notes.txt", b"")
    assert "F002" in codes(check_path(tmp_path / "s.zip"))


def test_track_2_bundle_is_named_with_the_command_that_takes_it_and_nothing_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "my track2.zip", "w") as archive:
        for name in ("SHA256SUMS", "generate.py", "models/cifar100/entry.json"):
            archive.writestr(name, b"")
    (finding,) = check_path(tmp_path / "my track2.zip").findings
    assert finding.code == "F018" and "is a track 2 bundle" in finding.message
    assert finding.message.endswith(f"ddkit evaluate --track 2 '{tmp_path}/my track2.zip'")


def test_practice_next_to_the_challenge_is_a_warning(folder):
    torch.save(torch.zeros(1000, 3, 32, 32), folder / "cifar100.pt")
    left_aside = [f.where for f in check_path(folder).findings if f.code == "F020"]
    assert left_aside == ["glyphs.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["glyphs.pt", "secrets.pt", "Glyphs.PT"])
def test_zip_with_more_than_the_challenges_tensors_is_f009(tmp_path, folder, other):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        with archive.open("cifar100.pt", "w") as member:
            torch.save(torch.zeros(1000, 3, 32, 32), member)
        archive.write(folder / "glyphs.pt", other)
    found = [f.code for f in check_path(tmp_path / "s.zip").findings if f.where == other and f.level == "error"]
    assert found == ["F009"]


def test_control_characters_in_names_are_shown_as_escapes(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("\x1b[2J\ncifar100.pt", b"")
    for path in (tmp_path / "s.zip", tmp_path / "folder"):
        path.suffix or (path.mkdir(), (path / "\x1b[2J\ncifar100.pt").write_bytes(b""))
        (finding,) = (f for f in check_path(path).findings if f.code == "F020")
        assert "\\x1b[2J\\ncifar100.pt" in finding.message and (finding.message + finding.where).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_an_error_with_their_rows(glyph_images, value):
    glyph_images[[3, 42], 0, 0, 0] = value
    (finding,) = check_tensor(glyph_images, "glyphs").findings
    assert (finding.level, finding.code) == ("error", "T009")
    assert "rows 3, 42" in finding.where


def test_content_of_wrongly_normalized_images_is_described_as_they_were_normalized(glyph_images):
    (right,) = (f for f in check_tensor(glyph_images, "glyphs").findings if f.code == "C008")
    report = check_tensor(denormalize(glyph_images, GLYPHS), "glyphs")
    assert codes(report, "error") == ["N001"] and right in report.findings


def test_another_number_of_images_per_class_is_t003_unless_any_is_accepted(glyph_images):
    five = glyph_images.unflatten(0, (10, 10))[:, :5].flatten(0, 1)
    assert codes(check_tensor(five, "glyphs"), "error") == ["T003"]
    assert check_tensor(five, "glyphs", ipc=None).ok


def test_check_tensor_judges_type_layout_and_device(glyph_images):
    assert codes(check_tensor(glyph_images.double(), "glyphs"), "error") == ["T002"]
    assert codes(check_tensor(glyph_images.to_sparse(), "glyphs"), "error") == ["T008"]
    assert codes(check_tensor(glyph_images.to("meta"), "glyphs"), "error") == ["T004"]


def test_report_sorts_findings_by_level_and_can_ignore_or_harden_them():
    report = report_of([Finding("info", "C009", "c"), Finding("warning", "T007", "b"), Finding("error", "F003", "a")])
    assert codes(report) == ["F003", "T007", "C009"] and not report.ok
    assert report.ignoring(["F003"]).ok
    assert not report.ignoring(["F003"]).strict().ok
    assert report.to_json()["findings"][0] == {"level": "error", "code": "F003", "message": "a", "where": ""}


def test_check_set_judges_a_set_that_was_read_like_its_file(folder):
    distilled = read_set(folder / "glyphs.pt")
    assert check_set(distilled, ipc=10).findings == check_path(folder / "glyphs.pt").findings
    assert {finding.where for finding in check_set(distilled).findings} == {"glyphs.pt"}


def test_check_set_accepts_any_number_of_images_and_keeps_the_warnings_of_the_file(tmp_path, glyph_images):
    torch.save(glyph_images[::2].contiguous().requires_grad_(), tmp_path / "glyphs.pt")
    report = check_set(read_set(tmp_path / "glyphs.pt"))
    assert report.ok and codes(report, "warning") == ["T005"]


@pytest.mark.slow
def test_whitened_set_in_the_right_order_is_an_error_of_normalization_only(cifar100_store, cifar100_images):
    flat = cifar100_images.flatten(1).float() / 255
    centered = flat - flat.mean(dim=0)
    # The products of images have the same nonzero eigenvalues as those of pixels, and there are fewer.
    variances, vectors = torch.linalg.eigh(centered @ centered.T / (len(flat) - 1))
    whitened = (vectors @ (vectors.T @ centered / (variances.clamp_min(0) + 0.1).sqrt()[:, None])).view(1000, 3, 32, 32)
    for images in (whitened, 2.5 * whitened):
        report = check_tensor(images, "cifar100")
        assert codes(report, "error") == ["N012"] and not any(code.startswith("L") for code in codes(report))
