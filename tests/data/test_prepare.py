"""From sources to stores: pixels, what is skipped or refused, and what stays when something goes wrong."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest
import torch

from ddkit.challenge import CIFAR100
from ddkit.data import glyphs
from ddkit.data import prepare as preparing
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.download import Archive
from ddkit.data.glyphs import draw
from ddkit.data.images import normalize
from ddkit.data.prepare import open_dataset, prepare
from ddkit.data.store import dataset_spec, load_dataset, store_facts
from ddkit.errors import BadDataError, BadFileError, MissingDataError, UsageError
from ddkit.evaluation.test_sets import as_test_set

pytestmark = pytest.mark.empty_cache


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_cache(cache):
    """What lies in the cache, but for the locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


@pytest.fixture
def pets(write_tree, photos, own_cache):
    """A store of an earlier preparation, and what it held."""
    folder = prepare("pets", write_tree(photos, "earlier"))
    return folder, contents(folder)


class TestImageFolders:
    @pytest.mark.parametrize("name", ["photos", "photos.zip"])
    def test_folder_and_zip_give_the_same_store(self, write_tree, photos, colors, name):
        folder = prepare("pets", write_tree(photos, name))
        test = load_dataset("pets", "test")
        assert colors(test.images) == [(0, 0, 7), (0, 1, 7), (100, 0, 7), (100, 1, 7)]
        assert test.labels.tolist() == [0, 0, 1, 1]
        assert set(contents(folder)) == {"train.safetensors", "test.safetensors", "meta.json"}

    def test_progress_counts_images_of_each_split(self, write_tree, photos):
        reports = []
        prepare("pets", write_tree(photos), progress=reports.append)
        assert [(r.task, r.done, r.total, r.unit) for r in reports] == [
            ("pets, train", 6, 6, "images"),
            ("pets, test", 4, 4, "images"),
        ]

    def test_bad_files_are_refused_by_name_unless_skipped(self, write_tree, photos, colors, own_cache):
        photos["train/cat/1.png"] = photos["train/cat/1.png"][:30]
        photos["train/dog/notes.txt"] = b"notes"
        path = write_tree(photos)
        with pytest.raises(BadDataError, match="2 files cannot be used") as caught:
            prepare("pets", path)
        assert "train/cat/1.png (" in caught.value.message
        assert "train/dog/notes.txt (not an image that Pillow can read)" in caught.value.message
        assert caught.value.exit_code == 3 and "--skip-bad" in caught.value.remedy
        assert in_cache(own_cache) == []

        prepare("pets", path, skip_bad=True)
        train = load_dataset("pets", "train")
        assert train.labels.tolist() == [0, 0, 1, 1, 1]
        assert colors(train.images) == [(0, 0, 7), (0, 2, 7), (100, 0, 7), (100, 1, 7), (100, 2, 7)]
        facts = store_facts("pets").splits["train"]
        assert facts.skipped == ("train/cat/1.png", "train/dog/notes.txt") and facts.per_class == (2, 3)
        split_file = own_cache / "pets" / "train.safetensors"
        assert facts.sha256 == hashlib.sha256(split_file.read_bytes()).hexdigest()

    def test_file_names_that_are_not_text_are_recorded_readably(self, write_tree, photos, own_cache):
        path = write_tree(photos)
        strange = os.fsencode(path / "train" / "cat") + b"/caf\xe9.txt"
        try:
            with open(strange, "wb") as file:
                file.write(b"notes")
        except OSError:
            pytest.skip("this file system takes only names that are text")
        with pytest.raises(BadDataError, match="1 file cannot be used: train/cat/caf"):
            prepare("pets", path)
        prepare("pets", path, skip_bad=True)
        assert store_facts("pets").splits["train"].skipped == ("train/cat/caf?.txt",)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_pipe_is_refused_without_waiting(self, write_tree, photos, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadDataError, match="is a pipe or a device"):
            prepare("pets", tmp_path / "pipe")
        path = write_tree(photos)
        os.mkfifo(path / "train" / "cat" / "pipe.png")
        with pytest.raises(BadDataError, match="pipe.png .is a pipe or a device"):
            prepare("pets", path)

    def test_long_list_of_bad_files_is_cut(self, write_tree, photos):
        photos |= {f"train/cat/x{k:02}.txt": b"" for k in range(30)}
        with pytest.raises(BadDataError, match=r"30 files cannot be used: .*; and 20 more\."):
            prepare("pets", write_tree(photos))

    def test_skipping_that_empties_a_class_is_refused(self, write_tree, photos):
        for k in range(2):
            photos[f"test/dog/{k}.png"] = b"broken"
        with pytest.raises(BadDataError, match="test split has no usable image of the class 'dog'"):
            prepare("pets", write_tree(photos), skip_bad=True)

    def test_source_without_images_is_refused(self, write_tree, photos):
        with pytest.raises(BadDataError, match="none of its 6 training files is an image"):
            prepare("pets", write_tree(dict.fromkeys(photos, b"text")), skip_bad=True)

    def test_other_sizes_are_refused_by_name_unless_resized(self, write_tree, photos, picture):
        photos["test/cat/1.png"] = picture((1, 2, 3), side=20)
        path = write_tree(photos)
        for skip_bad in (False, True):
            with pytest.raises(BadDataError, match=r"not all 8 x 8 pixels: test/cat/1.png \(20 x 20\)") as caught:
                prepare("pets", path, skip_bad=skip_bad)
            assert "--image-size 8" in caught.value.remedy
        prepare("pets", path, image_size=16)
        assert load_dataset("pets", "test").images.shape == (4, 3, 16, 16)
        assert store_facts("pets").image_size == 16
        with pytest.raises(UsageError, match="size of 4"):
            prepare("pets", path, image_size=4)

    @pytest.mark.slow
    def test_large_images_are_read_a_few_at_a_time(self, write_tree, picture, colors):
        files = {f"{s}/{c}/{k}.png": picture((k, 2, 3), side=1024) for s in ("train", "test") for c in "ab" for k in range(3)}
        prepare("large", write_tree(files))
        assert colors(load_dataset("large", "train").images)[3:] == [(0, 2, 3), (1, 2, 3), (2, 2, 3)]
        assert dataset_spec("large").mean == (round(1 / 255, 4), round(2 / 255, 4), round(3 / 255, 4))

    def test_oblong_images_without_a_size_are_refused(self, write_tree, photos, tmp_path):
        from PIL import Image

        path = write_tree(photos)
        Image.new("RGB", (9, 7)).save(path / "train/cat/0.png")
        with pytest.raises(BadDataError, match="train/cat/0.png is 9 x 7 pixels"):
            prepare("pets", path)

    def test_broken_source_is_one_error_and_leaves_nothing(self, tmp_path, own_cache):
        (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(BadDataError, match="not a whole zip"):
            prepare("pets", tmp_path / "x.zip")
        with pytest.raises(MissingDataError, match="does not exist"):
            prepare("pets", tmp_path / "nowhere")
        assert in_cache(own_cache) == []


class TestFinishedWork:
    def test_prepared_store_is_not_made_again(self, pets, tmp_path):
        folder, _ = pets
        times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        shutil.rmtree(tmp_path / "earlier" / "test")
        assert prepare("pets", tmp_path / "earlier") == folder
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times

    def test_another_source_without_force_is_refused(self, pets, write_tree, photos, picture):
        photos["train/cat/0.png"] = picture((250, 0, 0))
        other = write_tree(photos, "other")
        with pytest.raises(UsageError, match="already prepared from .*earlier") as caught:
            prepare("pets", other)
        assert "--force" in caught.value.remedy and contents(pets[0]) == pets[1]
        prepare("pets", other, force=True)
        assert load_dataset("pets", "train").images[0, :, 0, 0].tolist() == [250, 0, 0]

    def test_another_test_split_without_force_is_refused(self, write_tree, photos, picture):
        path = write_tree({**photos, "val/cat/v.png": picture(), "val/dog/v.png": picture()})
        prepare("pets", path)
        with pytest.raises(UsageError, match="already prepared from .*, without --test-split val"):
            prepare("pets", path, test_split="val")
        prepare("pets", path, test_split="val", force=True)
        assert len(load_dataset("pets", "test")) == 2
        prepare("pets", path, test_split="val")

    def test_damaged_store_is_made_again(self, pets, tmp_path):
        folder, before = pets
        (folder / "train.safetensors").write_bytes(b"damaged")
        prepare("pets", tmp_path / "earlier")
        assert contents(folder)["train.safetensors"] == before["train.safetensors"]

    def test_open_store_outlives_its_replacement(self, pets, tmp_path, colors):
        train = load_dataset("pets", "train")
        prepare("pets", tmp_path / "earlier", force=True)
        assert colors(train.images)[5] == (100, 2, 7)


class TestNothingLost:
    def test_failure_keeps_the_earlier_store(self, pets, write_tree, photos, own_cache):
        photos["test/dog/1.png"] = b"broken"
        with pytest.raises(BadDataError):
            prepare("pets", write_tree(photos), force=True)
        assert contents(pets[0]) == pets[1] and in_cache(own_cache) == ["pets"]

    @pytest.mark.slow
    def test_limit_on_file_sizes_keeps_the_earlier_store(self, pets, write_tree, photos, own_cache, picture):
        """A limit on the size of files stands in for the disk; the system refuses the write in the same way."""
        resource = pytest.importorskip("resource", reason="needs limits on file sizes")
        photos |= {f"train/cat/more{k}.png": picture(side=8) for k in range(300)}
        path = write_tree(photos)
        limit = 20_000  # bytes; the training split takes 58,000

        finished = subprocess.run(
            [sys.executable, "-m", "ddkit", "data", "prepare", "pets", "--from", str(path), "--force"],
            capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        assert finished.returncode == 3
        assert "File too large" in finished.stderr and "Traceback" not in finished.stderr
        assert contents(pets[0]) == pets[1] and in_cache(own_cache) == ["pets"]

    @pytest.mark.slow
    def test_full_disk_is_named_and_leaves_nothing(self, write_tree, photos, tmp_path, picture, monkeypatch):
        """On a tmpfs of 64 KiB, where the user may mount one."""
        small = tmp_path / "small"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small file system needs rights that this user lacks")
        try:
            photos |= {f"train/cat/more{k}.png": picture(side=16) for k in range(300)}
            photos = {name: picture(side=16) for name in photos}
            monkeypatch.setenv("DDKIT_CACHE", str(small))
            with pytest.raises(BadFileError, match="No space left on device") as caught:
                prepare("pets", write_tree(photos))
            assert "Free some space" in caught.value.remedy
            assert in_cache(small) == []
        finally:
            subprocess.run(["umount", str(small)], check=True)

    def test_cache_that_may_not_be_written_is_refused(self, write_tree, photos, tmp_path, monkeypatch):
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(0o555)
        if os.access(locked, os.W_OK):
            # Root may write anywhere; a file where the folder should be is refused to everybody.
            locked.rmdir()
            locked.write_text("")
        monkeypatch.setenv("DDKIT_CACHE", str(locked / "cache"))
        with pytest.raises(BadFileError, match="Permission denied|Not a directory|File exists"):
            prepare("pets", write_tree(photos))

    @pytest.mark.slow
    def test_stopped_preparation_leaves_the_earlier_store(self, pets, write_tree, photos, own_cache, picture):
        big = picture((1, 2, 3), side=256)
        photos = {f"{s}/{c}/{k:04}.png": big for s in ("train", "test") for c in ("cat", "dog") for k in range(1500)}
        path = write_tree(photos, "big.zip")
        process = subprocess.Popen(
            [sys.executable, "-m", "ddkit", "data", "prepare", "pets", "--from", str(path), "--force"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(own_cache.glob(".pets.*.tmp/train.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130 and "Traceback" not in errors
        assert contents(pets[0]) == pets[1] and in_cache(own_cache) == ["pets"]

    def test_remains_of_a_killed_preparation_are_mended(self, pets, own_cache, tmp_path):
        """Killed between the two renames that exchange the stores: the earlier one lies aside, the new one is not in place."""
        folder, before = pets
        folder.rename(own_cache / ".pets.abcd1234.old")
        (own_cache / ".pets.abcd1234.tmp").mkdir()
        others = [".pets.training.abcd1234.tmp", ".pets.v2.abcd1234.tmp"]  # of other datasets, perhaps being prepared now
        for other in others:
            (own_cache / other).mkdir()
        prepare("pets", tmp_path / "earlier")
        assert contents(folder) == before
        assert in_cache(own_cache) == [*others, "pets"]

    @pytest.mark.slow
    def test_two_preparations_at_once_make_one_store(self, write_tree, photos, own_cache):
        path = write_tree(photos)
        program = f"from ddkit.data.prepare import prepare; prepare('pets', {str(path)!r})"
        both = [processes.start("-c", program) for _ in range(2)]
        said = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert in_cache(own_cache) == ["pets"] and len(load_dataset("pets", "train")) == 6

    def test_file_system_without_locks_is_used(self, write_tree, photos, own_cache, monkeypatch):
        fcntl = pytest.importorskip("fcntl", reason="no such locks on this system")

        def flock(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", flock)
        prepare("pets", write_tree(photos))
        assert len(load_dataset("pets", "train")) == 6


class TestBuiltInNames:
    def test_misspelt_name_without_a_source_offers_the_nearest(self, pets):
        with pytest.raises(UsageError, match="Unknown dataset 'tinyimagnet'") as caught:
            prepare("tinyimagnet")
        assert "Did you mean 'tinyimagenet'?" in caught.value.remedy
        with pytest.raises(UsageError) as caught:
            prepare("pest")
        assert "Did you mean 'pets'?" in caught.value.remedy

    def test_glyphs_from_a_source_are_refused(self, write_tree, photos):
        with pytest.raises(UsageError, match="drawn, not read"):
            prepare("glyphs", write_tree(photos))

    def test_another_size_of_a_built_in_dataset_is_refused(self, write_tree, photos):
        with pytest.raises(UsageError, match="'cifar100' are 32 pixels, not 64"):
            prepare("cifar100", write_tree(photos), image_size=64)

    def test_other_classes_under_a_built_in_name_are_refused(self, write_tree, picture):
        names = [name for name in CLASS_NAMES["cifar100"] if name != "beaver"]
        files = {f"{split}/{name}/1.png": picture(side=32) for split in ("train", "test") for name in names}
        with pytest.raises(
            BadDataError, match="is not 'cifar100': it has 99 classes, where cifar100 has 100: without beaver"
        ) as caught:
            prepare("cifar100", write_tree(files))
        assert "another name" in caught.value.remedy

    @pytest.fixture
    def hundred(self, write_tree, picture):
        """Every class of CIFAR-100, one image a split, whose red is the label."""
        return {
            f"{split}/{name}/1.png": picture((label, 0, 0), side=32)
            for split in ("train", "test")
            for label, name in enumerate(CLASS_NAMES["cifar100"])
        }

    def test_labels_of_a_built_in_dataset_are_the_challenges(self, hundred, write_tree):
        prepare("cifar100", write_tree(hundred))
        train = load_dataset("cifar100", "train")
        assert train.images[:, 0, 0, 0].tolist() == train.labels.tolist() == list(range(100))
        assert (store_facts("cifar100").mean, store_facts("cifar100").std) == (CIFAR100.mean, CIFAR100.std)

    def test_reference_file_replaces_only_the_test_split(self, hundred, write_tree, tmp_path):
        prepare("cifar100", write_tree(hundred))
        train = load_dataset("cifar100", "train").images.clone()
        images = torch.full((200, 3, 32, 32), 9, dtype=torch.uint8)
        labels = torch.arange(200) % 100
        reference = tmp_path / "cifar100_test.pt"
        torch.save({"images_val": normalize(images, CIFAR100), "labels_val": labels}, reference)
        prepare("cifar100", reference, force=True)
        assert torch.equal(load_dataset("cifar100", "train").images, train)
        test = load_dataset("cifar100", "test")
        assert (test.images == 9).all() and test.labels.tolist() == sorted(labels.tolist())

    def test_reference_file_alone_has_no_training_split(self, tmp_path):
        reference = tmp_path / "cifar100_test.pt"
        images = normalize(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), CIFAR100)
        torch.save({"images_val": images, "labels_val": torch.arange(100)}, reference)
        prepare("cifar100", reference)
        assert len(load_dataset("cifar100", "test")) == 100
        with pytest.raises(MissingDataError, match="has no train split") as caught:
            load_dataset("cifar100", "train")
        assert "ddkit data prepare cifar100" in caught.value.remedy
        with pytest.raises(BadDataError, match="only test images"):
            prepare("mine", reference)

    def test_opening_a_missing_dataset_downloads_it_once(self, hundred, write_tree, own_cache, serve, monkeypatch):
        data = write_tree(hundred, "cifar100.zip").read_bytes()
        server = serve(data)
        monkeypatch.setitem(preparing.OFFICIAL, "cifar100", Archive(server.url, hashlib.md5(data).hexdigest()))
        begun = own_cache / ".downloads" / "tiny-imagenet-200.zip.part"
        begun.parent.mkdir()
        begun.write_bytes(b"half of it")
        assert len(open_dataset("cifar100", "test")) == 100
        assert [path.name for path in begun.parent.iterdir()] == [begun.name], "another's download stays, and no archive"
        assert len(server.requests) == 1
        open_dataset("cifar100", "train")
        assert len(server.requests) == 1, "prepared once"
        assert in_cache(own_cache) == [".downloads", "cifar100"]
        with pytest.raises(UsageError):
            open_dataset("cifar10", "test")


@pytest.fixture(scope="module")
def drawn(glyph_store):
    """Both splits of glyphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(glyph_store))
        return [open_dataset("glyphs", split) for split in ("train", "test")]


@pytest.mark.slow
class TestGlyphs:
    def test_there_are_500_training_and_100_test_images_of_each_letter(self):
        counts = {name: np.bincount(split.labels).tolist() for name, split in glyphs.source().splits.items()}
        assert counts == {"train": [500] * 10, "test": [100] * 10}

    def test_letters_are_balanced_and_distinct(self, drawn):
        for images, per_class in zip(drawn, (500, 20), strict=True):
            assert images.images.shape == (10 * per_class, 3, 32, 32)
            assert images.labels.tolist() == [label for label in range(10) for _ in range(per_class)]
        assert len({image.tobytes() for images in drawn for image in images.images.numpy()}) == 5200

    def test_letter_is_the_same_whenever_it_is_drawn(self, drawn):
        train, test = drawn
        assert (draw("train", 3, 7) == train.images[3 * 500 + 7].numpy()).all()
        assert (draw("test", 9, 19) == test.images[-1].numpy()).all()

    def test_letters_can_be_read(self, drawn):
        """The nearest training picture shows the same letter, although place, size, angle and colors differ."""
        train, test = drawn

        def features(images):
            # Gray, coarse, and without the picture's own brightness and contrast.
            gray = torch.nn.functional.avg_pool2d(images.float().mean(1), 2).flatten(1)
            return torch.nn.functional.normalize(gray - gray.mean(1, keepdim=True))

        nearest = (features(test.images) @ features(train.images).T).argmax(1)
        assert (train.labels[nearest] == test.labels).float().mean() > 0.8


@pytest.mark.slow
class TestRealArchives:
    def test_cifar100_is_prepared_with_memory_for_a_fraction_of_it(self, cifar100_store):
        """With memory, in every process, for a fraction of the 176 MiB of pixels."""
        mebibytes = cifar100_store
        # Python and its libraries take the most of it; a copy of the training pixels would be 147 more.
        assert mebibytes and max(mebibytes) < 130
        train, test = load_dataset("cifar100", "train"), load_dataset("cifar100", "test")
        assert train.labels.bincount().tolist() == [500] * 100 and test.labels.bincount().tolist() == [100] * 100
        assert train.class_names == CLASS_NAMES["cifar100"]
        assert as_test_set(test, CIFAR100).is_official
        # The protocol's constants are those of these very pixels.
        mean = train.images.double().mean((0, 2, 3)) / 255
        assert np.allclose(mean, CIFAR100.mean, atol=2e-4)

    def test_grayscale_images_of_tinyimagenet_have_equal_channels(self, tinyimagenet_zip, write_tree):
        """Some of every class, in the archive's own layout; grayscale ones come out with three equal channels."""
        import io
        import zipfile

        from PIL import Image

        real = zipfile.ZipFile(tinyimagenet_zip)
        top = "tiny-imagenet-200"
        annotations = real.read(f"{top}/val/val_annotations.txt").decode().splitlines()
        one_each = {line.split("\t")[1]: line for line in reversed(annotations)}
        names = [name for name in real.namelist() if name.endswith(("_0.JPEG", "_1.JPEG")) and "/train/" in name]
        names += [f"{top}/val/images/{line.split(chr(9))[0]}" for line in one_each.values()]
        files = {name: real.read(name) for name in names}
        files[f"{top}/val/val_annotations.txt"] = "\n".join(one_each.values()).encode()
        prepare("tinyimagenet", write_tree(files, "some.zip"))

        train = load_dataset("tinyimagenet", "train")
        assert train.images.shape == (400, 3, 64, 64)
        gray = [Image.open(io.BytesIO(files[name])).mode == "L" for name in sorted(n for n in names if "/train/" in n)]
        assert 0 < sum(gray) < 40
        for index in np.flatnonzero(gray):
            red, green, blue = train.images[index]
            assert torch.equal(red, green) and torch.equal(green, blue)
