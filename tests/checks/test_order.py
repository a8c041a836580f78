import json
import zipfile
from importlib import resources

import pytest
import torch
import torch.nn.functional as F

from ddkit.challenge import CIFAR100, DATASETS, GLYPHS
from ddkit.checks.classifier import ClassModel
from ddkit.checks.order import detected_rows, judge_order, order_findings, reorder_rows
from ddkit.data.class_names import CIFAR100_FINE_LABELS, TINYIMAGENET_WNIDS
from ddkit.data.images import normalize
from ddkit.data.store import load_dataset
from ddkit.errors import InvalidSubmissionError, MissingDataError, UsageError

CLASSES = 40
# As informative as the drawn log-probabilities of `scores` are.
MODEL = ClassModel(torch.empty(0), torch.empty(0), real_gain=1.0, real_information=1.0)
TEXT_ORDER = torch.tensor(sorted(range(CLASSES), key=str))


def scores(ipc=10, evidence=1.5, seed=0):
    """(CLASSES, ipc, CLASSES): log-probabilities of rows that each favor their class a little."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(CLASSES, ipc, CLASSES, generator=random)
    logits[torch.arange(CLASSES), :, torch.arange(CLASSES)] += evidence
    return torch.log_softmax(logits, dim=-1)


def judged(rows, orders=None):
    return judge_order(rows, orders or {}, MODEL)


def test_right_order_with_any_number_of_images_is_l001():
    for ipc in (1, 2, 10, 50):
        verdict = judged(scores(ipc).flatten(0, 1))
        assert verdict.code == "L001"
        assert torch.equal(verdict.labels, torch.arange(CLASSES).repeat_interleave(ipc))


def test_a_block_that_looks_like_another_class_is_no_shift_of_its_rows():
    for resembled in (15, 16, 18):
        rows = scores(evidence=4.0)
        seeming = 8.0 * F.one_hot(torch.tensor(resembled), CLASSES) - 4.0 * F.one_hot(torch.tensor(17), CLASSES)
        rows[17, :8] = torch.log_softmax(rows[17, :8] + seeming, dim=-1)
        assert judged(rows.flatten(0, 1)).code == "L001", resembled


@pytest.mark.parametrize(
    ("code", "blocks"),
    [
        ("L005", lambda rows: rows.roll(-1, 0)),
        ("L005", lambda rows: rows.roll(1, 0)),
        ("L005", lambda rows: torch.cat([rows[:20], rows[20:].roll(-1, 0)])),
        ("L006", lambda rows: rows.flip(0)),
        ("L012", lambda rows: rows[TEXT_ORDER]),
        ("L008", lambda rows: rows[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]),
        ("L004", lambda rows: rows.transpose(0, 1)),
        ("L004", lambda rows: rows[TEXT_ORDER].transpose(0, 1)),
    ],
)
def test_wrong_orders_of_blocks_are_named_and_can_be_reordered(code, blocks):
    rows = blocks(scores()).flatten(0, 1)
    verdict = judged(rows, {"L012": TEXT_ORDER})
    assert verdict.code == code
    put_right = rows[verdict.labels.argsort(stable=True)]
    assert judged(put_right).code == "L001"


def exchanged(rows, *, phase=0, count=5, first=-1, second=1, chain=False):
    """(C, ipc, ...): `count` rows at one end of each block exchanged with those of the next. first, second: -1 for last."""
    rows = rows.clone()
    places = {-1: slice(-count, None), 1: slice(0, count)}
    for block in range(phase, len(rows) - 1, 1 if chain else 2):
        kept = rows[block, places[first]].clone()
        rows[block, places[first]] = rows[block + 1, places[second]]
        rows[block + 1, places[second]] = kept
    return rows


def moved(rows, start, end):
    """(C, ipc, ...): the row at `start` moved to `end`, with those between one place nearer to the start."""
    flat = rows.flatten(0, 1)
    return torch.cat([flat[:start], flat[start + 1 : end + 1], flat[start : start + 1], flat[end + 1 :]]).view(rows.shape)


OUT_OF_STEP = {
    **{f"shifted by {s}": ("L013", lambda rows, s=s: rows.flatten(0, 1).roll(s, 0).view(rows.shape)) for s in (1, 2, 5, 8)},
    **{f"shifted by -{s}": ("L013", lambda rows, s=s: rows.flatten(0, 1).roll(-s, 0).view(rows.shape)) for s in (1, 3, 8, 13)},
    "one image missing": ("L013", lambda rows: moved(rows, 57, 399)),
    "one image moved": ("L013", lambda rows: moved(rows, 57, 301)),
    "last half with first half of the next": ("L014", exchanged),
    "last half with last half": ("L014", lambda rows: exchanged(rows, second=-1)),
    "first half with first half, from the second block": ("L014", lambda rows: exchanged(rows, first=1, phase=1)),
    "three rows": ("L014", lambda rows: exchanged(rows, count=3)),
    "one row": ("L014", lambda rows: exchanged(rows, count=1, second=-1)),
    "one after the other": ("L014", lambda rows: exchanged(rows, chain=True)),
}


@pytest.mark.parametrize("mistake", OUT_OF_STEP)
def test_rows_out_of_step_with_the_blocks_are_named_and_can_be_reordered(mistake):
    code, wrong = OUT_OF_STEP[mistake]
    rows = wrong(scores(evidence=3.0))
    shown = wrong(torch.arange(CLASSES)[:, None].expand(CLASSES, 10)).flatten()
    verdict = judged(rows.flatten(0, 1))
    assert verdict.code == code
    assert verdict.labels.bincount().tolist() == [10] * CLASSES
    assert (verdict.labels != shown).sum() <= 4  # a single row that was moved may stay among its neighbors


def test_halves_of_two_blocks_exchanged_are_l014():
    rows = scores(evidence=3.5)
    rows[4, 5:], rows[30, :5] = rows[30, :5].clone(), rows[4, 5:].clone()
    verdict = judged(rows.flatten(0, 1))
    assert verdict.code == "L014"
    assert set(verdict.labels[45:50].tolist()) == {30} and set(verdict.labels[300:305].tolist()) == {4}


def test_one_half_of_all_blocks_shuffled_is_l014():
    rows = scores(evidence=3.5)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(5))
    rows[:, 5:] = rows[order, 5:]
    verdict = judged(rows.flatten(0, 1))
    assert verdict.code == "L014"
    assert torch.equal(verdict.labels.view(CLASSES, 10)[:, 5], order)


def test_a_known_wrong_order_that_is_also_shifted_is_found_whole():
    rows = scores(evidence=3.0)[TEXT_ORDER].flatten(0, 1).roll(2, 0)
    verdict = judged(rows, {"L012": TEXT_ORDER})
    assert verdict.code == "L013" and "sorted as text" in verdict.words
    assert torch.equal(verdict.labels, TEXT_ORDER.repeat_interleave(10).roll(2))


@pytest.mark.parametrize("ipc", [1, 2, 3, 50])
def test_right_orders_of_any_number_of_images_are_not_called_out_of_step(ipc):
    codes = [judged(scores(ipc, evidence=2.0, seed=seed).flatten(0, 1)).code for seed in range(5)]
    assert codes == ["L001"] * 5


def test_two_swapped_classes_are_l007():
    rows = scores(evidence=2.5)
    rows[[3, 17]] = rows[[17, 3]]
    verdict = judged(rows.flatten(0, 1))
    assert verdict.code == "L007"
    assert verdict.labels[30] == 17 and verdict.labels[170] == 3
    assert (verdict.labels != torch.arange(CLASSES).repeat_interleave(10)).sum() == 20


def test_shuffled_rows_are_l009_and_equal_rows_l010():
    rows = scores(evidence=4.0).flatten(0, 1)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))]
    assert judged(shuffled).code == "L009"
    assert judged(shuffled).labels is None
    same = torch.log_softmax(torch.randn(1, CLASSES, generator=torch.Generator().manual_seed(3)), dim=1)
    assert judged(same.expand(400, -1)).code == "L010"


@pytest.mark.parametrize("images_alike", [1, 10])
def test_rows_that_look_like_a_few_classes_only_are_not_called_shuffled(images_alike):
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(400, CLASSES, generator=random)
    shown = torch.randint(15, (400 // images_alike,), generator=random).repeat_interleave(images_alike)
    logits[torch.arange(400), shown] += 5
    assert judged(torch.log_softmax(logits, dim=1)).code == "L010"


@pytest.mark.slow
def test_right_orders_with_weak_evidence_are_l001():
    codes = [judged(scores(evidence=1.0, seed=seed).flatten(0, 1)).code for seed in range(100)]
    assert codes.count("L001") == 100


def test_recorded_wrong_orders_are_permutations_of_the_classes():
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text())
    for order, names in (
        (recorded["cifar100"]["superclass"], CIFAR100_FINE_LABELS.split()),
        (recorded["tinyimagenet"]["wnids.txt"], TINYIMAGENET_WNIDS.split()),
    ):
        assert sorted(order) == names
        assert order != names


def test_recorded_wnids_are_in_the_order_of_the_archive(tinyimagenet_zip):
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text())
    with zipfile.ZipFile(tinyimagenet_zip) as archive:
        listed = archive.read("tiny-imagenet-200/wnids.txt").decode().split()
    assert recorded["tinyimagenet"]["wnids.txt"] == listed


def test_order_without_real_images_says_how_to_get_them():
    images = torch.randn(1000, 3, 32, 32)
    [finding] = order_findings(images, CIFAR100, "cifar100.pt")
    assert (finding.level, finding.code) == ("info", "L011")
    assert "ddkit data prepare cifar100" in finding.message
    with pytest.raises(MissingDataError):
        detected_rows(images, CIFAR100)


@pytest.mark.slow
def test_orders_of_letters_are_recognized(glyph_images):
    blocks = glyph_images.clone().unflatten(0, (10, 10))
    [right] = order_findings(glyph_images, GLYPHS, "glyphs.pt")
    assert (right.level, right.code) == ("info", "L001")
    assert torch.equal(detected_rows(glyph_images, GLYPHS), torch.arange(100))
    blocks[[2, 7]] = blocks[[7, 2]]
    swapped = blocks.flatten(0, 1)
    [finding] = order_findings(swapped, GLYPHS, "glyphs.pt")
    assert (finding.level, finding.code) == ("error", "L007")
    assert "2 (H) and 7 (T)" in finding.message
    assert torch.equal(swapped[detected_rows(swapped, GLYPHS)], glyph_images)
    [finding] = order_findings(glyph_images.flip(0), GLYPHS, "glyphs.pt")
    assert finding.code == "L006"


@pytest.mark.slow
def test_noise_is_a_warning_and_has_no_order(glyph_store, monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", str(glyph_store))
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    [finding] = order_findings(noise, GLYPHS, "glyphs.pt")
    assert (finding.level, finding.code) == ("warning", "L010")
    assert detected_rows(noise, GLYPHS) is None


@pytest.mark.slow
def test_real_images_in_superclass_order_are_l002(cifar100_store):
    test = load_dataset("cifar100", "test")
    blocks = normalize(test.images.unflatten(0, (100, 100))[:, :10].flatten(0, 1), CIFAR100).unflatten(0, (100, 10))
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text())["cifar100"]
    order = [test.class_names.index(name) for name in recorded["superclass"]]
    [right] = order_findings(blocks.flatten(0, 1), CIFAR100, "cifar100.pt")
    assert right.code == "L001"
    wrong = blocks[order].flatten(0, 1)
    [finding] = order_findings(wrong, CIFAR100, "cifar100.pt")
    assert finding.code == "L002"
    assert torch.equal(wrong[detected_rows(wrong, CIFAR100)], blocks.flatten(0, 1))


@pytest.mark.slow
def test_letters_shifted_by_rows_are_reported_by_rows_and_reordered(tmp_path, glyph_images):
    torch.save(glyph_images.roll(2, 0), tmp_path / "glyphs.pt")
    [finding] = order_findings(glyph_images.roll(2, 0), GLYPHS, "glyphs.pt")
    assert (finding.level, finding.code) == ("error", "L013")
    assert "20 of 100 rows have a wrong label: all rows stand 2 places too late" in finding.message
    assert reorder_rows(tmp_path / "glyphs.pt", tmp_path / "fixed.pt") > 0
    [finding] = order_findings(torch.load(tmp_path / "fixed.pt"), GLYPHS, "fixed.pt")
    assert finding.code == "L001"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_real_images_out_of_step_are_found_and_reordered(name, request):
    request.getfixturevalue(f"{name}_store")
    spec = DATASETS[name]
    right = normalize(request.getfixturevalue(f"{name}_images"), spec)
    blocks = right.unflatten(0, (spec.num_classes, 10))
    assert [f.code for f in order_findings(right, spec, "set.pt")] == ["L001"]
    shifts = (1, -8) if name == "cifar100" else (3,)
    mistakes = [(right.roll(shift, 0), "L013", f"all rows stand {abs(shift)} place") for shift in shifts]
    mistakes.append((exchanged(blocks).flatten(0, 1), "L014", f"{len(right) // 2} of {len(right)} rows"))
    for wrong, code, words in mistakes:
        restored = wrong[detected_rows(wrong, spec)].unflatten(0, blocks.shape[:2])
        assert all(same_images(block, true) for block, true in zip(restored, blocks, strict=True))
        if name == "cifar100":  # more classes take longer, and are called the same
            [finding] = order_findings(wrong, spec, "set.pt")
            assert finding.code == code and words in finding.message


def same_images(first, second):
    """True if two blocks hold the same images in any order."""
    return {image.numpy().tobytes() for image in first} == {image.numpy().tobytes() for image in second}


@pytest.mark.slow
def test_channels_exchanged_with_the_right_constants_are_judged_by_their_classes(glyph_images):
    """Letters in colors that tell nothing are left alone; the classifier of the real images decides."""
    assert "N006" not in {finding.code for finding in order_findings(glyph_images.flip(1), GLYPHS, "glyphs.pt")}


@pytest.mark.slow
def test_blobs_that_are_alike_within_each_class_are_accused_of_nothing(glyph_images):
    random = torch.Generator().manual_seed(76)  # as images of their own, these are clearer with red and blue exchanged
    blobs = F.interpolate(torch.rand(10, 3, 4, 4, generator=random), size=32, mode="bilinear").repeat_interleave(10, 0)
    images = normalize(blobs + 0.02 * torch.randn(100, 3, 32, 32, generator=random), GLYPHS)
    [finding] = order_findings(images, GLYPHS, "glyphs.pt")
    assert (finding.level, finding.code) == ("warning", "L010")


@pytest.mark.slow
def test_bgr_images_of_cifar100_are_found_by_their_classes(cifar100_store, cifar100_images):
    # Of the test images, one class with wrong colors resembles another one.
    test_images = load_dataset("cifar100", "test").images.unflatten(0, (100, 100))[:, :10].flatten(0, 1)
    for images in (cifar100_images, test_images):
        [finding] = order_findings(normalize(images.flip(1), CIFAR100), CIFAR100, "cifar100.pt")
        assert (finding.level, finding.code) == ("error", "N006")


def test_reorder_rows_writes_a_swapped_pair_to_another_file(tmp_path, folder, glyph_images):
    blocks = glyph_images.unflatten(0, (10, 10)).clone()
    blocks[[2, 7]] = blocks[[7, 2]]
    wrong = tmp_path / "glyphs.pt"
    torch.save(blocks.flatten(0, 1), wrong)
    before = wrong.read_bytes()
    assert reorder_rows(wrong, tmp_path / "fixed.pt") == 20
    assert torch.equal(torch.load(tmp_path / "fixed.pt", weights_only=True), glyph_images)
    assert wrong.read_bytes() == before


def test_reorder_rows_of_a_right_order_copies_it(tmp_path, folder):
    assert reorder_rows(folder / "glyphs.pt", tmp_path / "fixed.pt", dataset="glyphs") == 0
    written, original = (torch.load(path, weights_only=True) for path in (tmp_path / "fixed.pt", folder / "glyphs.pt"))
    assert torch.equal(written, original)


def test_reorder_rows_onto_another_file_raises_usage_error(tmp_path, folder):
    before = (folder / "glyphs.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to(folder / "glyphs.pt")
    (tmp_path / "other.pt").write_bytes(before)
    for out in (folder / "glyphs.pt", folder / ".." / "submission" / "glyphs.pt", tmp_path / "link.pt", tmp_path / "other.pt"):
        with pytest.raises(UsageError, match="reordered set would replace"):
            reorder_rows(folder / "glyphs.pt", out)
    with pytest.raises(UsageError, match="does not end in .pt"):
        reorder_rows(folder / "glyphs.pt", tmp_path / "results.jsonl")
    assert (folder / "glyphs.pt").read_bytes() == (tmp_path / "other.pt").read_bytes() == before


def test_reorder_rows_of_noise_raises_and_writes_nothing(tmp_path, folder):
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(noise, tmp_path / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="do not show which order"):
        reorder_rows(tmp_path / "glyphs.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_reorder_rows_of_a_folder_or_a_zip_raises_usage_error(tmp_path, folder):
    for path in (folder, tmp_path / "submission.zip"):
        with pytest.raises(UsageError, match="one tensor at a time"):
            reorder_rows(path, tmp_path / "out.pt")
