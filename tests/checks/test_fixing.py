import pytest
import torch

from ddkit.checks.fixing import fix_row_order
from ddkit.errors import InvalidSubmissionError, UsageError


def test_a_swapped_pair_is_put_back_into_a_file_of_its_own(tmp_path, folder, glyph_images):
    blocks = glyph_images.unflatten(0, (10, 10)).clone()
    blocks[[2, 7]] = blocks[[7, 2]]
    wrong = tmp_path / "glyphs.pt"
    torch.save(blocks.flatten(0, 1), wrong)
    before = wrong.read_bytes()
    fixed = fix_row_order(wrong, tmp_path / "fixed.pt")
    assert fixed.moved_rows == 20
    assert torch.equal(torch.load(fixed.path, weights_only=True), glyph_images)
    assert wrong.read_bytes() == before


def test_a_right_order_is_copied_as_it_is(tmp_path, folder):
    fixed = fix_row_order(folder / "glyphs.pt", tmp_path / "fixed.pt", dataset="glyphs")
    assert fixed.moved_rows == 0
    assert torch.equal(torch.load(fixed.path, weights_only=True), torch.load(folder / "glyphs.pt", weights_only=True))


def test_the_original_is_never_written_over(tmp_path, folder):
    before = (folder / "glyphs.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to(folder / "glyphs.pt")
    for out in (folder / "glyphs.pt", folder / ".." / "submission" / "glyphs.pt", tmp_path / "link.pt"):
        with pytest.raises(UsageError, match="would replace the original"):
            fix_row_order(folder / "glyphs.pt", out)
    assert (folder / "glyphs.pt").read_bytes() == before


def test_what_cannot_be_told_is_not_written(tmp_path, folder):
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(noise, tmp_path / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="do not tell which order"):
        fix_row_order(tmp_path / "glyphs.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_folder_or_a_zip_is_no_tensor(tmp_path, folder):
    for path in (folder, tmp_path / "submission.zip"):
        with pytest.raises(UsageError, match="one tensor at a time"):
            fix_row_order(path, tmp_path / "out.pt")
