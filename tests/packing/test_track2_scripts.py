"""The stand-alone track 2 entry in real processes, some of them as organizers start it: nothing of ddkit on its path."""

import functools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import processes
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddkit.data.images import denormalize, normalize, resize
from ddkit.data.store import dataset_spec
from ddkit.errors import UsageError
from ddkit.generator.model_folder import load_model
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered
from ddkit.network.networks import build_network
from ddkit.packing.bundle import BundleModel, BundleSettings, build_folder
from ddkit.runtime.container import available_cpus
from ddkit.runtime.device import has_bfloat16
from ddkit.runtime.torch_file import load_tensors

SAMPLING = SamplingSettings(steps=3, guidance=1.5, batch_size=64)


@pytest.fixture
def entry(colors, colors_model, tmp_path):
    """A bundle's folder with an untrained model of two classes and 16 px, sampled in three steps."""
    return build_folder([BundleModel(colors, colors_model, BundleSettings(SAMPLING, "cpu", keep=1.0))], tmp_path / "entry")


def script(entry, out, *words):
    return [str(entry / "generate.py"), "--dataset", "colors", "--out", str(out), *map(str, words)]


def command(entry, out, *words):
    return [sys.executable, "-I", *script(entry, out, *words)]


def run(entry, out, *words, status=0, **settings):
    """The entry run to its end as organizers run it: what it said."""
    return said_by(subprocess.run(command(entry, out, *words), capture_output=True, text=True, **settings), status)


def make(entry, out, *words, status=0, **settings):
    """The same without the seconds that the libraries take to import, in each of its processes."""
    return said_by(processes.run(*script(entry, out, *words), **settings), status)


def said_by(done, status):
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


def expected(colors_model, rows):
    """What ddkit's own sampler makes for these rows of a set: images of both classes in turn, by rising index."""
    images = Sampler(load_model(colors_model), SAMPLING).images(rows % 2, rows // 2)
    return normalize(torch.cat([*images]), dataset_spec("colors"))


def wait_for(condition):
    """Until the condition holds; fails when that takes very long."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came about")


def is_gone(process):
    """No process that a parent has yet to ask for its status counts."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_fixed_set_is_that_of_ddkits_own_sampler(entry, colors_model, tmp_path):
    said = make(entry, tmp_path / "colors.pt", "--ipc", 3, "--seed", 5, "--processes", 2)
    images = torch.load(tmp_path / "colors.pt", weights_only=True)
    sampler = Sampler(load_model(colors_model), SamplingSettings(steps=3, guidance=1.5, batch_size=64, seed=5))
    wanted = normalize(torch.cat([*sampler.images(*class_ordered(3, 2))]), dataset_spec("colors"))
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32
    step = 1 / 255 / min(dataset_spec("colors").std)
    assert (images - wanted).abs().max() < 1.01 * step and (images - wanted).abs().mean() < 0.05 * step
    assert "sampling on cpu" in said and "6 images, 3 of each class" in said
    assert not (tmp_path / "colors.pt.shards").exists()


@pytest.mark.slow
def test_pixels_are_the_bytes_that_the_floats_are_made_of(entry, colors, tmp_path):
    spec = dataset_spec(colors)
    make(entry, tmp_path / "floats.pt", "--time-budget", 60, "--most", 9, "--processes", 1)
    make(entry, tmp_path / "bytes.pt", "--time-budget", 60, "--most", 9, "--processes", 1, "--pixels")
    floats, made = (torch.load(tmp_path / name, weights_only=True) for name in ("floats.pt", "bytes.pt"))
    assert made["images"].dtype == torch.uint8 and torch.equal(made["labels"], floats["labels"])
    assert made["mean"].tolist() == pytest.approx(spec.mean) and made["std"].tolist() == pytest.approx(spec.std)
    assert torch.equal(normalize(made["images"], spec), floats["images"])
    ours = load_tensors(tmp_path / "bytes.pt", "images", "labels", "mean", "std")
    assert all(torch.equal(tensor, made[key]) for tensor, key in zip(ours, ("images", "labels", "mean", "std"), strict=True))
    assert (tmp_path / "bytes.pt").stat().st_size < 0.5 * (tmp_path / "floats.pt").stat().st_size


@pytest.fixture
def filtering_entry(colors, colors_model, tmp_path):
    """The same bundle, which keeps the half of its images, those that its classifier is surest of."""
    settings = BundleSettings(SAMPLING, "cpu", keep=0.5)
    return build_folder([BundleModel(colors, colors_model, settings)], tmp_path / "filtering")


def probabilities(entry, colors, load, images):
    """What the bundle's classifier makes of normalized images: (N, 2)."""
    folder = entry / "models" / colors
    classifier = load("classifier").Classifier(folder / "classifier", json.loads((folder / "entry.json").read_text()), "cpu")
    return classifier((denormalize(images, dataset_spec(colors)) * 255).round().to(torch.uint8)).float()


@pytest.mark.slow
def test_mode_guidance_of_an_entry_can_be_turned_off(entry, colors, colors_model, tmp_path):
    settings = BundleSettings(replace(SAMPLING, mode_guidance=0.5), "cpu", keep=1.0)
    guided = build_folder([BundleModel(colors, colors_model, settings)], tmp_path / "guided")
    make(guided, tmp_path / "guided.pt", "--ipc", 2, "--processes", 1)
    make(guided, tmp_path / "off.pt", "--ipc", 2, "--processes", 1, "--mode-guidance", 0)
    make(entry, tmp_path / "plain.pt", "--ipc", 2, "--processes", 1)
    images, off, plain = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("guided", "off", "plain"))
    assert torch.equal(off, plain) and (images - plain).abs().max() > 0.1


@pytest.mark.slow
def test_an_entry_with_a_filter_keeps_the_images_its_classifier_is_surest_of(filtering_entry, colors, load, tmp_path):
    everything, kept = tmp_path / "all.pt", tmp_path / "kept.pt"
    make(filtering_entry, everything, "--time-budget", 600, "--most", 12, "--processes", 2, "--keep", 1)
    make(filtering_entry, kept, "--time-budget", 600, "--most", 6, "--processes", 2)
    made, surest = (torch.load(path, weights_only=True) for path in (everything, kept))
    assert len(made["labels"]) == 12 and surest["labels"].tolist() == [0, 1] * 3
    by_class = made["labels"].argsort(stable=True)
    shown = probabilities(filtering_entry, colors, load, made["images"][by_class])
    for label in (0, 1):
        best = shown[:, label].topk(3).indices.sort().values  # of all images, whatever they were sampled as
        assert torch.equal(surest["images"][surest["labels"] == label], made["images"][by_class][best])


@pytest.mark.slow
def test_a_fixed_set_of_an_entry_with_a_filter_is_chosen_from_twice_as_many(filtering_entry, colors, load, tmp_path):
    make(filtering_entry, tmp_path / "all.pt", "--ipc", 4, "--processes", 1, "--keep", 1)
    said = make(filtering_entry, tmp_path / "kept.pt", "--ipc", 2, "--processes", 1)
    made, kept = (torch.load(tmp_path / name, weights_only=True) for name in ("all.pt", "kept.pt"))
    shown = probabilities(filtering_entry, colors, load, made)
    best = torch.cat([shown[:, label].topk(2).indices.sort().values for label in (0, 1)])
    assert torch.equal(kept, made[best]) and "4 images, 2 of each class" in said


@pytest.mark.slow
def test_a_share_that_leaves_a_remainder_keeps_neither_more_nor_fewer_images_than_asked_for(filtering_entry, tmp_path):
    for most, share in ((5, 0.3), (6, 0.7)):
        make(filtering_entry, tmp_path / "kept.pt", "--time-budget", 600, "--most", most, "--processes", 1, "--keep", share)
        labels = torch.load(tmp_path / "kept.pt", weights_only=True)["labels"]
        assert labels.tolist() == [0, 1] * (most // 2)


@pytest.mark.slow
def test_a_filter_keeps_at_least_one_image_of_each_class(filtering_entry, tmp_path):
    make(filtering_entry, tmp_path / "kept.pt", "--time-budget", 600, "--most", 2, "--processes", 1, "--keep", 0.01)
    assert torch.load(tmp_path / "kept.pt", weights_only=True)["labels"].tolist() == [0, 1]


def test_fewer_images_than_classes_are_wrong_usage(entry, filtering_entry, tmp_path):
    for folder in (entry, filtering_entry):
        said = run(folder, tmp_path / "x.pt", "--time-budget", 60, "--most", 1, status=2)
        assert said == "generate.py: --most 1 is less than an image of each of the 2 classes; give 2 or more.\n"
    assert not list(tmp_path.glob("x.pt*"))


def test_a_share_that_cannot_be_kept_is_wrong_usage(entry, tmp_path):
    assert "has none; pack it again without --keep 1" in run(entry, tmp_path / "x.pt", "--ipc", 1, "--keep", 0.5, status=2)
    assert "has none; pack it again with --mode-guidance" in run(
        entry, tmp_path / "x.pt", "--ipc", 1, "--mode-guidance", 0.1, status=2
    )
    assert "a share above 0" in run(entry, tmp_path / "x.pt", "--ipc", 1, "--keep", 0, status=2)
    with pytest.raises(UsageError, match="keep must be above 0"):
        BundleSettings(keep=0)


@pytest.mark.slow
def test_joining_takes_less_memory_than_the_bytes_of_the_images(entry, tmp_path):
    """Shards of 96 MB are joined in a process of their own, which says what it took beyond loading the libraries."""
    code = """
    import resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    from safetensors.torch import save_file
    import shards
    colors = {"num_classes": 2, "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    job = shards.Job(Path("model"), colors, Path(sys.argv[2]), 0, "cpu", 2, None, 1 << 30, 0.0, 600.0)
    job.shards.mkdir()
    pixels = torch.randint(0, 256, (1024, 3, 64, 64), dtype=torch.uint8)
    for worker in range(2):
        for first in range(0, 4 * 1024, 1024):
            images = [job.image(worker, position) for position in range(first, first + 1024)]
            labels, indices = (torch.tensor(part) for part in zip(*images))
            path = job.shards / f"{worker}-{first}-{first + 1024}.safetensors"
            save_file({"images": pixels, "labels": labels, "indices": indices}, path)
    shards.write_run(job, {"settings": {"entry": colors, "workers": 2, "ipc": None}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made, _ = shards.join(job)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (made * 3 * 64 * 64))
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(entry), str(tmp_path / "images.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2
    assert (tmp_path / "images.pt").stat().st_size > 4 * 8 * 1024 * 3 * 64 * 64


@pytest.mark.slow
def test_killed_script_leaves_shards_to_join_or_to_continue(entry, colors_model, tmp_path):
    out, shards = tmp_path / "out" / "images.pt", tmp_path / "out" / "images.pt.shards"
    words = "--time-budget", 200, "--processes", 1

    def spent():
        """Seconds that count when the run is continued; none before the first shard."""
        run = shards / "run.json"
        return json.loads(run.read_text()).get("spent", 0.0) if run.exists() else 0.0

    killed = processes.start(*script(entry, out, *words))
    wait_for(spent)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.communicate()
    assert workers
    wait_for(lambda: all(map(is_gone, workers)))  # each ends by itself
    assert not out.exists()
    shutil.copytree(shards, tmp_path / "left")

    make(entry, out, "--join")
    joined = torch.load(out, weights_only=True)
    step = 1 / 255 / min(dataset_spec("colors").std)
    rows = torch.linspace(0, len(joined["labels"]) - 1, 32).long()
    assert (joined["images"][rows] - expected(colors_model, rows)).abs().max() < 1.01 * step
    assert joined["labels"].dtype == torch.int64 and torch.equal(joined["labels"], torch.arange(len(joined["labels"])) % 2)
    assert not shards.exists()

    shutil.copytree(tmp_path / "left", shards)
    before = spent()
    left = {path.name for path in shards.iterdir()}
    resumed = processes.start(*script(entry, out, *words))
    wait_for(lambda: {path.name for path in shards.glob("0-*.safetensors")} - left)
    resumed.send_signal(signal.SIGTERM)
    _, said = resumed.communicate()
    assert resumed.returncode == 0, said
    assert f"stopped after {before:.0f} s" in said
    more = torch.load(out, weights_only=True)
    assert len(more["labels"]) > len(joined["labels"])
    assert torch.equal(more["images"][: len(joined["images"])], joined["images"])
    assert torch.bincount(more["labels"]).diff().abs() <= 1


@pytest.mark.slow
def test_a_budget_that_is_too_short_fails_before_it_is_over(entry, tmp_path):
    said = run(entry, tmp_path / "images.pt", "--time-budget", 0.4, status=3)
    assert "a budget of 0.4 s, while importing and loading the model" in said
    assert not (tmp_path / "images.pt.shards").exists()


@pytest.mark.slow
def test_no_gpu_where_one_is_asked_for(entry, tmp_path):
    said = make(entry, tmp_path / "images.pt", "--time-budget", 600, "--device", "cuda:77", status=3)
    assert "there is no GPU 'cuda:77'" in said.splitlines()[-1]
    assert not (tmp_path / "images.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words, status, said", [
    (["--time-budget", "0"], 2, "--time-budget cannot be 0"),
    (["--time-budget", "60", "--dataset", "colours"], 2, "Did you mean 'colors'?"),
    (["--time-budget", "60", "--dataset", "../entry"], 2, "Known: colors"),
    (["--ipc", "900000000"], 3, "900,000,000 are needed"),
    (["--time-budget", "60", "--out", "."], 3, "is a folder"),
    (["--time-budget", "60", "--out", "file/images.pt"], 3, "cannot be written"),
    (["--join"], 3, "nothing to join"),
    (["--time-budget", "60", "--device", "bogus"], 2, "--device cannot be 'bogus'"),
])  # fmt: skip
def test_wrong_arguments_fail_at_once_with_one_line(entry, tmp_path, words, status, said):
    (tmp_path / "file").write_text("")
    message = run(entry, tmp_path / "images.pt", *words, status=status, cwd=tmp_path)
    assert said.replace("900,000,000", "1,800,000,000") in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("alter", [
    lambda model: (model / "vae" / "config.json").write_text("{}"),
    lambda model: (model / "vae" / "config.json").unlink(),
    lambda model: (model / "entry.json").write_text((model / "entry.json").read_text().replace("1.5", "2.5")),
    lambda model: (model / "another.json").write_text("{}"),
])  # fmt: skip
def test_a_model_that_was_altered_is_not_used(entry, tmp_path, alter):
    alter(entry / "models" / "colors")
    said = run(entry, tmp_path / "images.pt", "--time-budget", 60, status=3)
    assert "is not the file that was packed" in said


def test_a_truncated_list_of_hashes_fails(entry, tmp_path):
    hashes = entry / "SHA256SUMS"
    hashes.write_bytes(hashes.read_bytes()[:100])
    assert "SHA256SUMS is damaged" in run(entry, tmp_path / "images.pt", "--time-budget", 60, status=3)


def test_a_disk_without_room_is_known_before_the_budget_is_spent(entry, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    inside = f"mount -t tmpfs -o size=4k none {small} && exec " + " ".join(
        command(entry, small / "images.pt", "--time-budget", 600)
    )
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system of one's own can be mounted here (unshare -Urm)")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", inside], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "room for" in done.stderr and "2 are needed" in done.stderr


def test_the_images_that_a_killed_run_left_take_no_room_from_the_run_that_continues_it(entry, tmp_path):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system of one's own can be mounted here (unshare -Urm)")
    small = tmp_path / "small"
    small.mkdir()
    code = textwrap.dedent("""
        import sys; from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import generate
        out = Path(sys.argv[2], "images.pt")
        arguments = {"num_classes": 2, "image_size": 16}, out, 11, 4
        before = generate.check_space(*arguments)
        (shards := out.with_name("images.pt.shards")).mkdir()
        (shards / "0-0-52.safetensors").write_bytes(bytes(40960))
        print(before, generate.check_space(*arguments))
    """)
    words = ["sh", "-c", f"mount -t tmpfs -o size=100k none {small} && exec \"$@\"", "sh",
             sys.executable, "-I", "-c", code, entry, small]  # fmt: skip
    done = subprocess.run(["unshare", "-Urm", *words], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["24", "24"], done.stderr


def limited(size):
    """Of a process: files that would become larger are refused, as by a disk without room."""
    return {resource.RLIMIT_FSIZE: size}


@pytest.mark.slow
def test_no_room_for_the_joined_file_costs_no_image(entry, tmp_path):
    out = tmp_path / "images.pt"
    # 80 images of 768 bytes in a shard, of 3,072 joined.
    said = make(entry, out, "--ipc", 40, "--processes", 1, status=3, limits=limited(150_000))
    assert "File too large" in said and "--join" in said
    assert [path.name for path in tmp_path.glob("*images.pt*")] == ["images.pt.shards"]
    make(entry, out, "--join")
    assert torch.load(out, weights_only=True).shape == (80, 3, 16, 16)


@pytest.mark.slow
def test_a_worker_that_cannot_write_says_why(entry, tmp_path):
    said = make(entry, tmp_path / "images.pt", "--ipc", 400, "--processes", 1, status=3, limits=limited(100_000))
    assert "File too large" in said
    assert not (tmp_path / "images.pt").exists()


@pytest.fixture
def load(entry, monkeypatch):
    """Imports the entry's modules by name."""
    import importlib

    monkeypatch.syspath_prepend(entry)
    names = ("generate", "shards", "worker", "sampling", "classifier", "denoiser", "linear_plan", "container")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def job(load, entry, tmp_path):
    """Makes jobs."""

    def make(**changes):
        settings = {
            "model": entry / "models" / "colors", "entry": {"num_classes": 5}, "out": tmp_path / "images.pt",
            "seed": 0, "device": "cpu", "workers": 1, "ipc": None, "limit": 1000, "began": 0.0, "budget": 600.0,
        }  # fmt: skip
        return load("shards").Job(**(settings | changes))

    return make


class TestParts:
    """What the scripts decide, in this process."""

    def test_workers_deal_out_the_indices_and_take_all_classes_in_turn(self, job):
        shared = job(workers=2)
        first = [shared.image(0, position) for position in range(10)]
        second = [shared.image(1, position) for position in range(10)]
        assert first == [(c, 0) for c in range(5)] + [(c, 2) for c in range(5)]
        assert second[:5] == [(c, 1) for c in (2, 3, 4, 0, 1)]  # another class first
        assert len(set(first + second)) == 20
        assert [job(workers=2, ipc=3).share(worker) for worker in (0, 1)] == [10, 5]

    @pytest.mark.parametrize("classes, workers, of_each", [(5, 1, 3), (5, 2, 3), (5, 8, 1), (100, 8, 1), (100, 6, 10)])
    def test_workers_share_a_limited_number_of_images_evenly_over_the_classes(self, job, classes, workers, of_each):
        shared = job(workers=workers, entry={"num_classes": classes}, limit=of_each * classes)
        images = [shared.image(worker, place) for worker in range(workers) for place in range(shared.share(worker))]
        assert len(set(images)) == len(images)
        assert Counter(c for c, _ in images) == dict.fromkeys(range(classes), of_each)

    def test_no_class_is_more_than_one_image_ahead(self, load):
        labels = torch.tensor([0, 0, 1, 2, 1, 0, 0])
        chosen = load("shards").choose(labels, 3, None)
        assert labels[chosen].tolist() == [0, 1, 2, 0, 1] and chosen.tolist() == [0, 2, 3, 1, 4]
        by_class = load("shards").choose(labels, 3, 4)
        assert labels[by_class].tolist() == [0, 0, 0, 0, 1, 1, 2] and by_class.tolist() == [0, 1, 5, 6, 2, 4, 3]

    def test_each_class_gets_the_images_that_show_it_most_surely_and_each_image_one_class(self, load):
        shown = torch.tensor(
            [[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.9, 0.0], [0.5, 0.1, 0.4]]
        )
        assign = load("shards").assign
        assert assign(shown.half(), 1).tolist() == [0, -1, -1, -1, 1, 2]
        assert assign(shown.half(), 2).tolist() == [0, 0, 2, 1, 1, 2], "what a full class refuses goes to the next likeliest"
        assert assign(shown[:2].half(), 1).tolist() == [0, 1], "with fewer images than classes every image is kept"

    def test_the_class_of_an_images_mode_is_favored_as_a_prior_by_bayes_rule(self, load):
        shards, shown = load("shards"), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0], [0.98, 0.01, 0.01]])
        favored = shown.half()
        shards.favor(favored, torch.tensor([1, 1, 2]))
        joint = shown * torch.tensor([[1, shards.OWN_CLASS, 1], [1, shards.OWN_CLASS, 1], [1, 1, shards.OWN_CLASS]])
        assert torch.allclose(favored.float(), joint / joint.sum(1, keepdim=True), atol=1e-3)
        assert shards.assign(favored, 1).tolist() == [2, 1, 0]

    @pytest.mark.parametrize("seed", range(3))
    def test_assigned_images_fill_every_class_and_no_swap_of_two_would_be_surer(self, load, seed):
        generator = torch.Generator().manual_seed(seed)
        shown = (3 * torch.randn(400, 10, generator=generator) + torch.arange(10) / 3).softmax(1).half()
        labels = load("shards").assign(shown, 10)
        assert torch.bincount(labels[labels >= 0], minlength=10).tolist() == [10] * 10
        for label in range(10):
            unused = shown[labels < 0, label]
            assert unused.max() <= shown[labels == label, label].min()

    def test_shards_that_overlap_are_counted_once(self, load, job):
        folder = job().shards
        folder.mkdir()
        for first, end in ((0, 5), (5, 9), (5, 12), (10, 15), (12, 13)):
            (folder / f"0-{first}-{end}.safetensors").touch()
        assert load("shards").shards_of(job(), 0) == [(0, 5), (5, 12), (12, 13)]

    def test_seconds_of_a_killed_run_count_when_it_is_continued(self, load, job, capfd):
        shards = load("shards")
        opened = shards.open_shards(job(began=100.0))
        (opened.shards / "0-0-5.safetensors").touch()
        run = json.loads((opened.shards / "run.json").read_text())
        (opened.shards / "run.json").write_text(json.dumps(run | {"spent": 30.0}))
        assert shards.open_shards(job(began=500.0)).began == 470.0
        assert shards.shards_of(opened, 0) == [(0, 5)]
        assert shards.open_shards(job(began=500.0, seed=1)).began == 500.0
        assert shards.shards_of(opened, 0) == []
        assert "discarding" in capfd.readouterr().err

    def test_workers_stop_early_enough_to_join_what_there_is(self, load, job):
        clock = load("generate").Clock(job(began=1000.0))
        assert clock.stop_at == 1600.0 - 20.0 - 1.0
        for seconds in (0.1, 0.2, 5.0):  # one slow write is no rule
            clock.heard(100, seconds)
        assert clock.stop_at == pytest.approx(1579.0 - 2 * 4 * 0.002 * 300)
        clock.slowness = 1000.0  # others leave nearly nothing of the machine
        assert clock.stop_at == pytest.approx(1580.0 - 0.06 * 600 - 2 * 4 * 0.002 * 300)

    def test_workers_stop_early_enough_to_label_images_of_which_a_share_is_written(self, load, job):
        clock = load("generate").Clock(job(began=1000.0, entry={"num_classes": 5, "keep": 0.5}))
        clock.heard(10**8, 2.0)
        assert clock.stop_at == pytest.approx(1579.0 - 3e-8 * 5 * 10**8 - 2 * 4 * 0.5 * 2.0)

    def test_the_margin_is_there_in_short_budgets_and_not_the_whole_of_them(self, job):
        assert [job(budget=seconds).margin for seconds in (4.0, 20.0, 120.0, 600.0)] == [1.0, 2.0, 4.8, 20.0]

    def test_batches_grow_while_that_pays(self, load):
        BatchSize = load("worker").BatchSize
        batch = BatchSize(longest=3.0)
        for seconds in (0.5, 0.2, 0.2, 0.3, 0.7):  # 8, 16, 32, 64 images, and 128, which are slower each
            batch.learn(seconds)
            batch.learn(seconds)
        assert batch.size == 64
        short = BatchSize(longest=1.0)
        for _ in range(2):
            short.learn(0.9)
        assert short.size == 8

    def test_first_batches_of_their_size_which_a_gpu_prepares_for_do_not_end_the_growth_of_batches(self, load):
        batch = load("worker").BatchSize(longest=1.0)
        for size in (8 << n for n in range(10)):
            assert batch.size == size
            batch.learn(1.6)
            assert batch.expected == pytest.approx(2.4)
            batch.learn(0.02 + size / 10_000)
        assert batch.size == 4096 and batch.expected < 4.0

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
            (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
            (MemoryError(), True),
            (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        ],
    )
    def test_every_way_to_say_that_memory_is_used_up_is_known(self, load, error, expected):
        assert load("worker").is_out_of_memory(error) is expected

    def test_precision_auto_is_bfloat16_on_processors_with_instructions_for_it(self, load, monkeypatch):
        sampling, cpu = load("sampling"), torch.device("cpu")
        assert sampling.computes_in_bfloat16("auto", cpu) is has_bfloat16(cpu)
        for flags, expected in (({"avx2", "avx512f"}, False), ({"avx512f", "avx512_bf16"}, True), (set(), False)):
            monkeypatch.setattr(sampling, "cpu_flags", lambda flags=flags: flags)
            assert sampling.computes_in_bfloat16("auto", cpu) is expected
            assert sampling.computes_in_bfloat16("bfloat16", cpu) and not sampling.computes_in_bfloat16("float32", cpu)

    @pytest.mark.parametrize(("ipc", "bytes_per_value", "said"), [(50, 4, "room for 48 images"), (None, 4, ""), (50, 1, "")])
    def test_the_memory_of_whoever_loads_the_file_limits_a_fixed_set_too(
        self, load, tmp_path, monkeypatch, ipc, bytes_per_value, said
    ):
        generate, shards, out = load("generate"), load("shards"), tmp_path / "images.pt"
        files = {"cgroup": "0::/\n", "mountinfo": f"30 23 0:28 / {tmp_path} rw - cgroup2 cgroup2 rw\n", "memory.max": "850000",
                 "memory.current": "0", "memory.stat": "inactive_file 0\n"}  # fmt: skip
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(generate, "free_memory", functools.partial(generate.free_memory, tmp_path))
        entry = {"num_classes": 2, "image_size": 32}
        if said:
            with pytest.raises(shards.Failure, match=said):
                generate.check_space(entry, out, ipc, bytes_per_value)
        else:
            assert generate.check_space(entry, out, ipc, bytes_per_value) == 595_000 // (3072 * bytes_per_value)

    def test_without_memory_a_run_with_a_budget_ends_before_it_begins(self, load, tmp_path, monkeypatch):
        generate, shards = load("generate"), load("shards")
        monkeypatch.setattr(generate, "free_memory", lambda: 0)  # as in a container at its limit
        with pytest.raises(shards.Failure, match=r"0 MB of memory are free, room for 0 images; 2 are needed\."):
            generate.check_space({"num_classes": 2, "image_size": 32}, tmp_path / "images.pt", None, 4)

    def test_the_process_began_before_it_looked_at_the_clock(self, load):
        assert 0 <= load("generate").process_age() < 10

    def test_classifier_gives_the_probabilities_of_ddkits_network(self, load, tmp_path):
        network, spec = build_network("convnet", 3, 16, seed=0), dataset_spec("cifar100")
        save_file(network.state_dict(), tmp_path / "classifier.safetensors")
        (tmp_path / "config.json").write_text('{"image_size": 16}')
        pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        wanted = network(resize(normalize(pixels, spec), 16)).softmax(1)
        facts = {"num_classes": 3, "mean": spec.mean, "std": spec.std}
        shown = load("classifier").Classifier(tmp_path, facts, "cpu")(pixels)
        torch.testing.assert_close(shown.float(), wanted, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("architecture, prediction, sampler, precision, mode_guidance", [
        ("uvit", "epsilon", "ddim", "float32", 0.2), ("dit", "v", "unipc", "float32", 0.0),
        ("dit", "v", "unipc", "float32", 0.2), ("uvit", "flow", "ddim", "float32", 0.2),
        ("uvit", "flow", "dpm++", "float32", 0.2), ("uvit", "epsilon", "dpm++", "bfloat16", 0.0),
    ])  # fmt: skip
    def test_every_kind_of_model_samples_as_in_ddkit(
        self, load, colors, save_colors_model, tmp_path, architecture, prediction, sampler, precision, mode_guidance
    ):
        folder = save_colors_model(tmp_path / "model", architecture, prediction)
        config = SamplingSettings(
            sampler, steps=3, guidance=2.0, guidance_interval=(0.2, 0.9), mode_guidance=mode_guidance, batch_size=6, seed=3,
            precision=precision,
        )  # fmt: skip
        settings = BundleSettings(config, keep=1.0)
        built = build_folder([BundleModel(colors, folder, settings)], tmp_path / "other")
        facts = json.loads((built / "models" / colors / "entry.json").read_text())
        ours = load("sampling").Sampler(built / "models" / colors, facts, "cpu", 3)([0, 1, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5])
        modes = load_file(built / "models" / colors / "modes.safetensors")["modes"].float() if mode_guidance else None
        sampler = Sampler(load_model(folder), config, modes=modes)
        theirs = torch.cat([*sampler.images(torch.tensor([0, 1, 1, 0, 1, 0]), torch.arange(6))])
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_samples_get_the_side_of_the_datasets_images(self, load, colors, save_colors_model, tmp_path, precision):
        settings = BundleSettings(SamplingSettings(steps=2, guidance=1.0, precision=precision), keep=1.0)
        built = build_folder([BundleModel(colors, save_colors_model(tmp_path / "model"), settings)], tmp_path / "other")
        facts = json.loads((built / "models" / colors / "entry.json").read_text())
        sampler = load("sampling").Sampler(built / "models" / colors, facts | {"image_size": 40}, "cpu", 3)
        assert sampler([0, 1], [0, 0]).shape == (2, 3, 40, 40)


class TestOnAPretendedGPU:
    """The worker of the second of two GPUs: what it makes, on which device, and how often it waits."""

    pytestmark = pytest.mark.usefixtures("second_gpu")

    @pytest.fixture
    def build(self, colors, save_colors_model, entry, tmp_path):
        """A model's folder as it is packed, and its entry.json."""

        def make(architecture="uvit", prediction="flow", sampler="ddim"):
            folder = save_colors_model(tmp_path / "model", architecture, prediction)
            config = replace(SAMPLING, sampler=sampler, precision="float32", guidance_interval=(0.2, 0.9), mode_guidance=0.2)
            settings = BundleSettings(config, classifier=True, keep=0.5)
            built = build_folder([BundleModel(colors, folder, settings)], tmp_path / "other")
            return built / "models" / colors, json.loads((built / "models" / colors / "entry.json").read_text())

        return make

    @pytest.fixture
    def make_images(self, load, job, build, monkeypatch):
        """Lets both workers make images in this process; returns what they say, the second one's images with the
        probabilities of their classes, and the model and its facts. loaded: called when a worker has loaded the model."""

        def rows_of(shard):
            return zip(shard["images"], shard["probabilities"], strict=True)

        def run(loaded=lambda: None):
            model, facts = build()
            shared = job(model=model, entry=facts, device="cuda", workers=2, limit=64)
            shared.shards.mkdir()
            monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: True))
            said = []

            def hear(message):
                said.append(message)
                if message[0] == "loaded":
                    loaded()

            for worker in (0, 1):
                load("worker").work(shared, worker, SimpleNamespace(value=math.inf), SimpleNamespace(send=hear))
            files = sorted(shared.shards.glob("1-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))
            made = [row for path in files for row in rows_of(load_file(path))]
            return said, made, model, facts

        return run

    @pytest.fixture
    def places(self, job):
        """Classes and indices of the second worker's 32 images."""
        shared = job(workers=2, entry={"num_classes": 2})
        return zip(*(shared.image(1, position) for position in range(32)), strict=True)

    @pytest.mark.slow
    def test_workers_make_on_gpus_what_a_cpu_makes(self, load, make_images, places):
        said, made, model, facts = make_images()
        assert [kind for kind, _ in said if kind != "written"] == ["loaded", "loaded"]
        assert sum(value[0] for kind, value in said if kind == "written") == 64
        classes, indices = places
        wanted = load("sampling").Sampler(model, facts, "cpu", 0)(classes, indices)
        images, shown = zip(*made, strict=True)
        assert (torch.stack(images).int() - wanted.int()).abs().max() <= 1
        judged = load("classifier").Classifier(model / "classifier", facts, "cpu")(wanted)
        torch.testing.assert_close(torch.stack(shown), judged, atol=0.02, rtol=0)

    @pytest.mark.slow
    def test_worker_halves_its_batches_where_memory_is_short(self, load, gpu, make_images, places):
        def allow_maps_of_five_images():
            gpu.largest_tensor = 5 * 128 * 16 * 16 * 4

        said, made, model, facts = make_images(loaded=allow_maps_of_five_images)
        assert gpu.released and not [value for kind, value in said if kind == "failed"]
        wanted = load("sampling").Sampler(model, facts, "cpu", 0)(*places)
        assert (torch.stack([image for image, _ in made]).int() - wanted.int()).abs().max() <= 1

    @pytest.mark.slow
    def test_worker_without_memory_for_one_image_says_so(self, gpu, make_images):
        def run_out():
            gpu.largest_tensor = 50

        said, images, *_ = make_images(loaded=run_out)
        assert not images and said[1] == ("failed", "the memory of cuda:0 is too small for one image.")

    @pytest.mark.slow
    @pytest.mark.parametrize("architecture, prediction, sampler", [
        ("uvit", "flow", "ddim"), ("dit", "v", "unipc"), ("uvit", "epsilon", "dpm++"),
    ])  # fmt: skip
    def test_sampler_waits_once_a_batch_and_makes_what_a_cpu_makes(
        self, load, gpu, second_gpu, build, architecture, prediction, sampler
    ):
        model, facts = build(architecture, prediction, sampler)
        places = [0, 1, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5]
        sampler = load("sampling").Sampler(model, facts, second_gpu, 3)
        gpu.reset()
        found = sampler(*places)
        assert gpu.waits_in_all == 1, gpu.waits
        wanted = load("sampling").Sampler(model, facts, "cpu", 3)(*places)
        assert found.dtype == torch.uint8 and (found.int() - wanted.int()).abs().max() <= 1
        classifier = load("classifier").Classifier(model / "classifier", facts, second_gpu)
        gpu.reset()
        classifier(wanted)
        assert gpu.waits_in_all == 1, gpu.waits

    def test_precision_auto_is_bfloat16_where_the_gpu_is_fast_at_it(self, load, gpu):
        computes = load("sampling").computes_in_bfloat16
        assert computes("auto", torch.device("cuda"))
        gpu.capability = (7, 5)
        assert not computes("auto", torch.device("cuda"))

    def test_gpu_that_is_not_there_is_one_message(self, load, job):
        for device in ("cuda:2", "cuda:7"):
            with pytest.raises(load("shards").Failure, match=f"there is no GPU '{device}'"):
                load("worker").choose_device(job(device=device), 0)
        assert [load("worker").choose_device(job(device="auto"), worker) for worker in range(3)] == [
            "cuda:0",
            "cuda:1",
            "cuda:0",
        ]


@pytest.mark.skipif(available_cpus() < 2, reason="needs two CPUs, of which a container allows one")
def test_threads_follow_the_quota_of_a_container(entry, tmp_path):
    """Otherwise four workers on 64 cores would compute with 16 threads each in a container that may use four."""
    for name, text in (("cgroup", "0::/\n"), ("mountinfo", f"30 23 0:28 / {tmp_path} rw - cgroup2 cgroup2 rw\n"),
                       ("cpu.max", "100000 100000\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    code = (
        "import os, sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import container\n"
        "container.set_defaults.__defaults__ = (os.environ, Path(sys.argv[1]))\n"
        "import generate, torch\n"
        "print(torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path, entry], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) == 1
