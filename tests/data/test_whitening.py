"""ZCA whitening is undone for images that were whitened by the formula of the published code."""

import torch

from ddkit.data.prepare import prepare
from ddkit.data.store import ImageSet, load_dataset
from ddkit.data.whitening import undo_zca


def whiten(pixels, train):
    """kornia's ZCAWhitening(eps=0.1): its matrix by singular values, the covariance divided by N - 1."""
    flat = train.flatten(1).double()
    centered = flat - flat.mean(0)
    u, s, _ = torch.linalg.svd(centered.T @ centered / (len(flat) - 1))
    matrix = u @ torch.diag((s + 0.1).rsqrt()) @ u.T
    return ((pixels.flatten(1).double() - flat.mean(0)) @ matrix).float().view(pixels.shape)


def test_undo_zca_gives_back_the_pixels(photos, write_tree):
    prepare("photos", write_tree(photos))
    generator = torch.Generator().manual_seed(0)
    real = load_dataset("photos", "train")
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    train = ImageSet(pixels, torch.zeros(40, dtype=torch.int64), real.class_names)
    others = torch.rand(6, 3, 8, 8, generator=generator)
    whitened = whiten(others, pixels / 255)
    assert (whitened - others).abs().mean() > 0.1
    reports = []
    assert torch.allclose(undo_zca(whitened, "photos", train, progress=reports.append), others, atol=1e-4)
    assert reports[-1].done == reports[-1].total
    before = len(reports)
    undo_zca(whitened, "photos", train, progress=reports.append)
    assert len(reports) == before  # the matrix was kept
