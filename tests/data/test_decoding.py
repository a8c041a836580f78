"""Image files to RGB pixels: every mode, damage, other sizes, and several processes at once."""

import importlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddkit.data.archives import FolderTree, ZipTree
from ddkit.data.decoding import BadImageError, WrongSizeError, decode_split, read_image
from ddkit.data.split_file import SplitFile
from ddkit.errors import BadFileError, ComputeError


def tree_of(path):
    return ZipTree(path) if path.suffix == ".zip" else FolderTree(path)


def as_file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_color(data, side=4):
    pixels = read_image(data, side)
    assert pixels.shape == (3, side, side) and pixels.dtype == np.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def palette(index, transparent=None):
    image = Image.new("P", (4, 4), index)
    image.putpalette([255, 0, 0, 10, 20, 30])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def sixteen_bits(value):
    return Image.fromarray(np.full((4, 4), value, np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (as_file(Image.new("RGB", (4, 4), (1, 2, 3))), (1, 2, 3)),
        (as_file(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (as_file(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (as_file(palette(1)), (10, 20, 30)),
        (as_file(palette(1), "GIF"), (10, 20, 30)),
        (as_file(palette(1, transparent=0)), (10, 20, 30)),
        # What is transparent lies on white.
        (as_file(palette(1, transparent=1)), (255, 255, 255)),
        (as_file(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (255, 255, 255)),
        (as_file(Image.new("RGBA", (4, 4), (200, 0, 0, 255))), (200, 0, 0)),
        (as_file(Image.new("LA", (4, 4), (100, 255))), (100, 100, 100)),
        # Ink: none is white, all black is black.
        (as_file(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (as_file(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        # 16 bits are scaled and not cut off.
        (as_file(sixteen_bits(65535)), (255, 255, 255)),
        (as_file(sixteen_bits(257 * 100)), (100, 100, 100)),
        (as_file(sixteen_bits(257 * 100), "TIFF"), (100, 100, 100)),
        (as_file(sixteen_bits(300)), (1, 1, 1)),
        (as_file(Image.fromarray(np.full((4, 4), 257 * 9, np.int32)), "TIFF"), (9, 9, 9)),
    ],
)
def test_every_mode_becomes_rgb(data, expected):
    assert one_color(data) == expected


def test_jpeg_of_four_inks_is_close_to_its_color():
    data = as_file(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")
    assert np.abs(np.subtract(one_color(data), (255, 0, 0))).max() <= 3


def test_pixels_keep_their_places():
    values = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert (read_image(as_file(Image.fromarray(values)), 4) == values.transpose(2, 0, 1)).all()


def test_photograph_taken_sideways_is_turned_upright():
    values = np.zeros((4, 4, 3), np.uint8)
    values[0] = 255
    tags = Image.Exif()
    tags[0x0112] = 6  # turn a quarter clockwise to see it upright
    pixels = read_image(as_file(Image.fromarray(values), "PNG", exif=tags), 4)
    assert (pixels[:, :, 3] == 255).all() and (pixels[:, :, :3] == 0).all()


def test_other_sizes_are_refused_unless_they_may_be_resized():
    data = as_file(Image.new("RGB", (6, 4), (9, 8, 7)))
    with pytest.raises(WrongSizeError, match="6 x 4"):
        read_image(data, 4)
    assert (read_image(data, 2, resize=True) == np.array([9, 8, 7])[:, None, None]).all()


def test_resizing_crops_to_the_center_and_antialiases():
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard of single pixels
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 32:96] = fine
    pixels = read_image(as_file(Image.fromarray(wide)), 8, resize=True)
    # Every pixel averages the board; taking single pixels would give 0 or 255, the whole width less than half.
    assert np.abs(pixels.astype(int) - 127.5).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_file_is_bad(kind):
    data = as_file(Image.effect_noise((32, 32), 60).convert("RGB"), kind)
    with pytest.raises(BadImageError):
        read_image(data[: len(data) // 2], 32)


def test_text_empty_file_and_floating_point_pixels_are_bad():
    for data in (b"this is no image", b""):
        with pytest.raises(BadImageError, match="not an image"):
            read_image(data, 4)
    with pytest.raises(BadImageError, match="floating-point"):
        read_image(as_file(Image.new("F", (4, 4), 0.5), "TIFF"), 4)


def test_eps_program_is_not_run():
    """EPS is a program; Pillow would hand it to Ghostscript."""
    with pytest.raises(BadImageError, match="not an image"):
        read_image(as_file(Image.new("RGB", (4, 4)), "EPS"), 4)


def test_image_of_absurd_size_is_not_decoded():
    header = b"P6\n100000 100000\n255\n"
    with pytest.raises(BadImageError, match="exceeds limit"):
        read_image(header, 4)


SAMPLES = [as_file(Image.new("RGB", (8, 8), (5, 6, 7)), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on what it reads
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_file_is_a_bad_image_or_pixels(sample, data):
    damaged = bytearray(sample)
    for place in data.draw(st.lists(st.integers(0, len(sample) - 1), max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(sample)))
    try:
        pixels = read_image(bytes(damaged[:cut]), 8, resize=True)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels.shape == (3, 8, 8)


@pytest.fixture
def many(write_tree, picture):
    """600 images, of which number 5 is a text, 300 is cut short and 599 has another size."""
    files = {f"{k:03}.png": picture((k % 256, k // 256, 3), side=4) for k in range(600)}
    files["005.png"] = b"a text"
    files["300.png"] = files["300.png"][:40]
    files["599.png"] = picture(side=6)
    return files


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["many", "many.zip"])
def test_rows_are_filled_in_order_and_problems_named(many, write_tree, tmp_path, workers, name):
    path, names = write_tree(many, name), sorted(many)
    target = SplitFile.create(tmp_path / "out", [0] * len(names), 4)
    reports = []
    problems = decode_split(tree_of(path), names, target, workers=workers, report=reports.append)
    assert [(problem.row, problem.name, problem.other_size) for problem in problems] == [
        (5, "005.png", False),
        (300, "300.png", False),
        (599, "599.png", True),
    ]
    assert problems[2].reason == "6 x 6"
    assert sorted(reports) == reports and reports[-1] == 600
    rows = np.concatenate(list(target.blocks()))
    expected = [(0, 0, 0) if k in (5, 300, 599) else (k % 256, k // 256, 3) for k in range(600)]
    assert rows[:, :, 1, 2].tolist() == [list(color) for color in expected]


@pytest.mark.parametrize("workers", [0, 1])
def test_target_that_cannot_be_written_is_a_bad_file_error(many, write_tree, tmp_path, workers):
    path = write_tree(many)
    target = SplitFile.create(tmp_path / "out", [0] * 600, 4)
    target.path.unlink()
    with pytest.raises(BadFileError, match="out: No such file"):
        decode_split(tree_of(path), sorted(many), target, workers=workers)


def test_decoding_gives_up_after_the_given_number_of_problems(write_tree, tmp_path):
    files = {f"{k:04}.png": b"a text" for k in range(1500)}
    target = SplitFile.create(tmp_path / "out", [0] * len(files), 4)
    problems = decode_split(FolderTree(write_tree(files)), sorted(files), target, give_up_after=10, workers=0)
    assert 10 <= len(problems) < 1500


def test_python_files_in_the_working_folder_are_not_run(many, write_tree, tmp_path, monkeypatch):
    path = write_tree({name: many[name] for name in sorted(many)[6:20]})
    (path / "dataclasses.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(path)
    names = sorted(item.name for item in path.glob("*.png"))
    target = SplitFile.create(tmp_path / "out", [0] * len(names), 4)
    assert decode_split(tree_of(path), names, target, workers=2) == []


@pytest.mark.slow
def test_processes_need_no_main_guard_in_the_users_program(many, write_tree, tmp_path):
    path = write_tree({name: many[name] for name in sorted(many)[6:200]})
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from ddkit.data.archives import FolderTree\n"
        "from ddkit.data.decoding import decode_split\n"
        "from ddkit.data.split_file import SplitFile\n"
        f"path = Path({str(path)!r})\n"
        "names = sorted(item.name for item in path.iterdir())\n"
        f"target = SplitFile.create(Path({str(tmp_path / 'out')!r}), [0] * len(names), 4)\n"
        "print(decode_split(FolderTree(path), names, target, workers=2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    finished = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert (finished.stdout, finished.stderr) == ("[]\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
def test_killed_process_is_a_compute_error(tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text(
        "import os, signal\n"
        "from ddkit.data.archives import FolderTree\n"
        "class Tree(FolderTree):\n"
        "    def __reduce__(self):\n"
        "        return Tree, (self.path,)\n"
        "    def read(self, name):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = importlib.import_module("killed").Tree(tmp_path)
    target = SplitFile.create(tmp_path / "out", [0] * 600, 4)
    with pytest.raises(ComputeError, match="ended with status -9") as caught:
        decode_split(tree, ["1.png"] * 600, target, workers=2)
    assert "lack of memory" in caught.value.remedy
