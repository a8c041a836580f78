"""What an evaluation will take is measured, and nothing of it is kept."""

import pytest
import torch

from ddkit.challenge import CIFAR100, GLYPHS, DatasetSpec
from ddkit.data.store import load_dataset
from ddkit.errors import InvalidSubmissionError
from ddkit.evaluation.estimate import estimate_evaluation
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.sources import FixedSet
from ddkit.evaluation.test_sets import TestSet


@pytest.fixture
def tests(letters):
    real = load_dataset(letters, "test")
    return TestSet(real.images[::10].clone(), real.labels[::10].clone(), GLYPHS)


def source(count=20, **more):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return FixedSet(images, torch.arange(10).repeat(count // 10), **more)


@pytest.mark.slow
def test_estimate_is_of_the_epochs_and_rounds_that_are_to_come(tests, tmp_path):
    settings, state = EvaluationSettings(rounds=2, epochs_setting=3, device="cpu"), StateFolder(tmp_path)
    reports = []
    before = estimate_evaluation(source(), "a.pt", tests, settings, state=state, tried_seconds=0.1, progress=reports.append)
    assert (before.rounds, before.finished_rounds, before.epochs, before.images) == (2, 0, 4, 20)
    assert before.seconds == pytest.approx(2 * (4 * before.seconds_per_epoch + before.test_seconds))
    assert before.seconds_per_epoch > 0 and before.test_seconds > 0 and 0 < before.memory < 1 << 36
    assert reports and list(tmp_path.iterdir()) == []
    evaluate_source(source(), tests, settings, state=state)
    after = estimate_evaluation(source(), "a.pt", tests, settings, state=state, tried_seconds=0.1)
    assert after.finished_rounds == 2 and after.seconds == 0


@pytest.mark.slow
def test_estimate_says_what_is_not_official(tests):
    estimate = estimate_evaluation(
        source(converted="a list"), "a.pt", tests, EvaluationSettings(rounds=1, device="cpu"), tried_seconds=0.1
    )
    assert not estimate.official
    assert "converted from a list" in estimate.deviations and "1 round instead of 3" in estimate.deviations


def test_first_batch_of_each_size_which_a_gpu_may_compile_does_not_count():
    spec = DatasetSpec("dots", 2, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images, labels = torch.randn(258, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(258) % 2
    reports = []
    estimate_evaluation(
        FixedSet(images, labels), "a.pt", TestSet(images, labels, spec), EvaluationSettings(device="cpu"),
        tried_seconds=1e-9, progress=reports.append,
    )  # fmt: skip
    assert [report.done > 0 for report in reports] == [False, False, True, True, True]


def test_estimate_of_images_of_another_shape_raises(tests):
    other = TestSet(tests.images, tests.labels, CIFAR100)
    with pytest.raises(InvalidSubmissionError, match=r"of shape \(2, 3, 16, 16\); cifar100 needs"):
        estimate_evaluation(FixedSet(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])), "a.pt", other, EvaluationSettings())
