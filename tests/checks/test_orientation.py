import pytest

from ddkit.challenge import CIFAR100, GLYPHS
from ddkit.checks.check import check_tensor
from ddkit.checks.orientation import turned_findings


def codes(images):
    return [finding.code for finding in turned_findings(images, GLYPHS, "glyphs.pt")]


def test_upright_images_draw_no_remark(glyph_images):
    assert codes(glyph_images) == []


@pytest.mark.parametrize("turn", [lambda images: images.flip(2), lambda images: images.transpose(2, 3),
                                  lambda images: images.transpose(2, 3).flip(2)])  # fmt: skip
def test_upside_down_and_lying_images_are_told_by_their_classes(glyph_images, turn):
    assert codes(turn(glyph_images).contiguous()) == ["N008"]
    report = check_tensor(turn(glyph_images).contiguous(), "glyphs")
    assert "N008" in {finding.code for finding in report.findings} and not report.ok


def test_a_wrong_order_is_not_taken_for_a_turn(glyph_images):
    """Reversed letters lying on their side look more like those of their rows: Z is an N, X stays an X."""
    found = {finding.code for finding in check_tensor(glyph_images.flip(0), "glyphs").findings}
    assert "L006" in found and "N008" not in found


def test_without_real_images_nothing_is_said(own_cache, glyph_images):
    assert turned_findings(glyph_images.repeat(10, 1, 1, 1), CIFAR100, "cifar100.pt") == []
