import torch

from ddkit.challenge import GLYPHS
from ddkit.checks.content import content_findings
from ddkit.data.images import normalize
from ddkit.data.store import load_dataset


def found(images, **options):
    return {finding.code: finding for finding in content_findings(images, GLYPHS, "glyphs.pt", **options)}


def test_real_images_have_a_summary_only(glyph_images):
    findings = found(glyph_images, test_images=load_dataset("glyphs", "test").images)
    assert list(findings) == ["C008"]
    assert "100 images, 10 of each of 10 classes" in findings["C008"].message
    assert "0.0% of the values outside" in findings["C008"].message


def test_blank_images_are_listed_and_not_called_copies(glyph_images):
    glyph_images[[3, 40]] = 0.25
    findings = found(glyph_images)
    assert set(findings) == {"C001", "C008"}
    assert findings["C001"].level == "warning"
    assert "rows 3, 40" in findings["C001"].message


def test_equal_images_are_found_within_and_across_classes(glyph_images):
    glyph_images[12] = glyph_images[11]
    glyph_images[95] = glyph_images[7]
    findings = found(glyph_images)
    assert "rows 11 and 12" in findings["C002"].message
    assert "1 pair of images of different classes is the same at 8 bits: rows 7 and 95" in findings["C003"].message
    assert not {"C004", "C005"} & set(findings)


def test_nearly_equal_and_mirrored_images_are_found(glyph_images):
    random = torch.Generator().manual_seed(0)
    glyph_images[12] = glyph_images[11] + 0.05 * torch.randn(3, 32, 32, generator=random)
    glyph_images[95] = glyph_images[7].flip(-1) * 1.02
    findings = found(glyph_images)
    assert "rows 11 and 12" in findings["C004"].message
    assert "rows 7 and 95" in findings["C005"].message
    assert findings["C004"].level == "info"


def test_images_that_differ_in_color_or_in_detail_alone_are_no_copies(glyph_images):
    glyph_images[12] = glyph_images[11] + 0.8
    glyph_images[31] *= 0.5
    glyph_images[32] = glyph_images[31] + (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 0.48 - 0.24
    assert list(found(glyph_images)) == ["C008"]


def test_many_near_copies_are_a_warning(glyph_images):
    random = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(9, 3, 32, 32, generator=random)
    glyph_images[1:10] = glyph_images[:1] + noise
    assert found(glyph_images)["C004"].level == "warning"


def test_copies_of_test_images_are_found_exact_and_changed(glyph_images):
    test = load_dataset("glyphs", "test").images
    glyph_images[20] = normalize(test[105:106], GLYPHS)[0]
    glyph_images[30] = normalize(test[151:152], GLYPHS)[0].flip(-1) * 1.03
    findings = found(glyph_images, test_images=test)
    assert findings["C006"].level == "warning"
    assert "20 is test image 105" in findings["C006"].message
    assert "30 is like test image 151" in findings["C007"].message
    assert "C006" not in found(glyph_images)


def test_values_out_of_range_are_counted(glyph_images):
    glyph_images[:50] += 100
    assert "50.0% of the values outside" in found(glyph_images)["C008"].message
