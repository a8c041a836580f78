import json
import zipfile
from importlib import resources

import pytest
import torch

from ddkit.challenge import CIFAR100, GLYPHS
from ddkit.checks.classifier import ClassModel
from ddkit.checks.order import detected_rows, judge_order, order_findings
from ddkit.data.class_names import CIFAR100_FINE_LABELS, TINYIMAGENET_WNIDS
from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import load_dataset
from ddkit.errors import MissingDataError

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


def test_the_right_order_is_right_for_any_number_of_images():
    for ipc in (1, 2, 10, 50):
        verdict = judged(scores(ipc).flatten(0, 1))
        assert verdict.code == "L001"
        assert torch.equal(verdict.labels, torch.arange(CLASSES).repeat_interleave(ipc))


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
def test_wrong_orders_are_named_and_can_be_put_right(code, blocks):
    rows = blocks(scores()).flatten(0, 1)
    verdict = judged(rows, {"L012": TEXT_ORDER})
    assert verdict.code == code
    put_right = rows[verdict.labels.argsort(stable=True)]
    assert judged(put_right).code == "L001"


def test_two_classes_swapped_among_many_right_ones():
    rows = scores(evidence=2.5)
    rows[[3, 17]] = rows[[17, 3]]
    verdict = judged(rows.flatten(0, 1))
    assert verdict.code == "L007"
    assert verdict.labels[30] == 17 and verdict.labels[170] == 3
    assert (verdict.labels != torch.arange(CLASSES).repeat_interleave(10)).sum() == 20


def test_rows_shuffled_one_by_one_and_rows_that_show_nothing():
    rows = scores(evidence=4.0).flatten(0, 1)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))]
    assert judged(shuffled).code == "L009"
    assert judged(shuffled).labels is None
    same = torch.log_softmax(torch.randn(1, CLASSES, generator=torch.Generator().manual_seed(3)), dim=1)
    assert judged(same.expand(400, -1)).code == "L010"


def test_right_orders_with_weak_evidence_raise_no_alarm():
    codes = [judged(scores(evidence=1.0, seed=seed).flatten(0, 1)).code for seed in range(100)]
    assert codes.count("L001") == 100


def test_recorded_orders_are_permutations_of_the_classes_and_not_the_right_ones():
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text())
    for order, names in (
        (recorded["cifar100"]["superclass"], CIFAR100_FINE_LABELS.split()),
        (recorded["tinyimagenet"]["wnids.txt"], TINYIMAGENET_WNIDS.split()),
    ):
        assert sorted(order) == names
        assert order != names


def test_the_recorded_wnids_are_in_the_order_of_the_archive(tinyimagenet_zip):
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text())
    with zipfile.ZipFile(tinyimagenet_zip) as archive:
        listed = archive.read("tiny-imagenet-200/wnids.txt").decode().split()
    assert recorded["tinyimagenet"]["wnids.txt"] == listed


def test_without_real_images_it_says_how_to_get_them():
    images = torch.randn(1000, 3, 32, 32)
    [finding] = order_findings(images, CIFAR100, "cifar100.pt")
    assert (finding.level, finding.code) == ("info", "L011")
    assert "ddkit data prepare cifar100" in finding.message
    with pytest.raises(MissingDataError):
        detected_rows(images, CIFAR100)


def test_letters_in_their_order_and_in_others(glyph_images):
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


def test_noise_is_not_called_wrong(glyph_store, monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", str(glyph_store))
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    [finding] = order_findings(noise, GLYPHS, "glyphs.pt")
    assert (finding.level, finding.code) == ("warning", "L010")
    assert detected_rows(noise, GLYPHS) is None


def test_real_images_in_superclass_order(cifar100_zip):
    prepare("cifar100", cifar100_zip)
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
