"""Distilled sets: of a model and of real images, how they say they were made, and what is refused."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from ddkit.data.images import denormalize, to_uint8
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset, train_sha256
from ddkit.distill.generate import FromModel, FromReal, generate
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.model_facts import model_hash
from ddkit.generator.model_folder import load_model, save_model
from ddkit.generator.modes import find_modes
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered
from ddkit.metrics.features import convnet_features
from ddkit.sets.distilled import read_provenance, read_set


def pixels(path, name):
    """A set's tensor as uint8."""
    return to_uint8(denormalize(torch.load(path, weights_only=True), dataset_spec(name)))


def test_real_images_are_saved_exactly_in_class_order(colors, tmp_path):
    saved = generate(colors, 2, FromReal("first"), tmp_path / "set.pt")
    train = load_dataset(colors, "train")
    assert torch.equal(pixels(saved.tensor, colors), train.images[[0, 1, 5, 6]])
    facts = json.loads(saved.provenance.read_text())
    assert facts["kind"] == "first-real"
    assert facts["dataset_sha256"] == train_sha256(colors)


def test_random_real_images_follow_the_seed_and_are_named_so(colors, tmp_path):
    first, again, other = (
        generate(colors, 3, FromReal("random", seed), tmp_path / f"{name}.pt")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert json.loads(first.provenance.read_text())["kind"] == "random-real"
    assert first.tensor.read_bytes() == again.tensor.read_bytes() != other.tensor.read_bytes()


def test_set_of_samples_records_its_provenance(colors, model_folder, tmp_path):
    sampling = SamplingSettings("ddim", steps=2, guidance=1.5, seed=4, batch_size=3)
    saved = generate(colors, 2, FromModel(model_folder, sampling), tmp_path / "set.pt")
    expected = torch.cat([*Sampler(load_model(model_folder), sampling).images(*class_ordered(2, 2))])
    assert torch.equal(pixels(saved.tensor, colors), expected)
    facts = json.loads(saved.provenance.read_text())
    assert facts["kind"] == "generated"
    assert facts["model_sha256"] == model_hash(model_folder)
    stated = {name: facts[name] for name in ("sampler", "steps", "guidance", "seed", "selection", "model_steps")}
    assert stated == {
        "sampler": "ddim", "steps": 2, "guidance": 1.5, "seed": 4, "selection": "none", "model_steps": 3,
    }  # fmt: skip
    assert {"ddkit", "torch", "diffusers"} <= set(facts["versions"])


def test_missing_sheet_is_drawn_again_without_sampling(colors, model_folder, tmp_path):
    source = FromModel(model_folder, SamplingSettings(steps=2))
    saved = generate(colors, 2, source, tmp_path / "set.pt")
    drawn = saved.sheet.read_bytes()
    saved.sheet.unlink()
    sampled = []
    assert generate(colors, 2, source, tmp_path / "set.pt", progress=sampled.append).sheet.read_bytes() == drawn
    assert not sampled


def test_set_of_a_dataset_prepared_again_is_normalized_again(colors, model_folder, tmp_path):
    source = FromModel(model_folder, SamplingSettings(steps=2))
    before = read_set(generate(colors, 2, source, tmp_path / "set.pt").tensor, colors).images
    for picture in (tmp_path / "pictures" / "train" / "red").iterdir():
        Image.open(picture).point(lambda value: value // 2).save(picture)
    prepare(colors, tmp_path / "pictures", force=True)
    after = read_set(generate(colors, 2, source, tmp_path / "set.pt").tensor, colors).images
    assert not torch.equal(before, after)


def test_refined_set_behind_a_link_raises_usage_error(colors, tmp_path):
    (tmp_path / "best").mkdir()
    saved = generate(colors, 2, FromReal("first"), tmp_path / "best" / "set.pt")
    saved.provenance.write_text(saved.provenance.read_text().replace('"first-real"', '"refined"'))
    (tmp_path / "set.pt").symlink_to(saved.tensor)
    with pytest.raises(UsageError, match="is a refined set"):
        generate(colors, 2, FromReal("random"), tmp_path / "set.pt")


def test_set_that_it_did_not_make_raises_usage_error(colors, tmp_path):
    own = generate(colors, 2, FromReal("first"), tmp_path / "set.pt")
    own.provenance.unlink()
    with pytest.raises(UsageError, match="did not make"):
        generate(colors, 2, FromReal("random"), own.tensor)


@pytest.mark.parametrize(("ending", "content"), [(".json", b'{"mine": 1}'), (".json", b"no JSON"), (".png", b"mine")])
def test_json_or_picture_that_ddkit_did_not_write_raises_usage_error(colors, tmp_path, ending, content):
    own = tmp_path / f"notes{ending}"
    own.write_bytes(content)
    with pytest.raises(UsageError, match=f"notes{ending} does not belong to a set"):
        generate(colors, 2, FromReal("first"), tmp_path / "notes.pt")
    assert own.read_bytes() == content and not (tmp_path / "notes.pt").exists()
    generate(colors, 2, FromReal("first"), tmp_path / "notes.pt", replace=True)
    assert own.read_bytes() != content


def test_json_and_picture_of_a_set_whose_tensor_was_removed_are_replaced(colors, tmp_path):
    files = generate(colors, 2, FromReal("first"), tmp_path / "set.pt")
    files.tensor.unlink()
    assert generate(colors, 2, FromReal("first"), files.tensor).tensor.exists()


class TestInvalidRequests:
    @pytest.fixture
    def earlier(self, colors, tmp_path):
        saved = generate(colors, 1, FromReal("first"), tmp_path / "set.pt")
        return saved.tensor, saved.tensor.read_bytes()

    @pytest.mark.parametrize(
        ("changes", "error", "said"),
        [
            ({"ipc": 0}, UsageError, "at least one"),
            ({"ipc": 6}, UsageError, "has 5 images"),
            ({"dataset": "colours"}, UsageError, "Did you mean 'colors'"),
        ],
    )
    def test_invalid_request_keeps_the_earlier_set(self, colors, earlier, changes, error, said):
        path, before = earlier
        wanted = {"dataset": colors, "ipc": 2} | changes
        with pytest.raises(error, match=said):
            generate(**wanted, source=FromReal(), out=path)
        assert path.read_bytes() == before

    def test_set_whose_tensor_was_deleted_is_made_again(self, colors, tmp_path):
        made = generate(colors, 1, FromReal("first"), tmp_path / "set.pt").tensor
        before = made.read_bytes()
        made.unlink()
        assert generate(colors, 1, FromReal("first"), made).tensor.read_bytes() == before

    def test_path_without_pt_ending_raises_usage_error(self, colors, tmp_path):
        with pytest.raises(UsageError, match=".pt"):
            generate(colors, 1, FromReal(), tmp_path / "set.png")

    def test_missing_model_raises_missing_model_error(self, colors, tmp_path):
        with pytest.raises(MissingModelError):
            generate(colors, 1, FromModel(tmp_path / "nowhere"), tmp_path / "set.pt")

    def test_model_of_another_dataset_raises_usage_error(self, colors, model_folder, tmp_path):
        model = load_model(model_folder)
        save_model(dataclasses.replace(model, facts=dataclasses.replace(model.facts, dataset="glyphs")), model_folder)
        with pytest.raises(UsageError, match="was trained on 'glyphs', not on 'colors'"):
            generate(colors, 1, FromModel(model_folder), tmp_path / "set.pt")

    def test_model_of_other_classes_raises_usage_error(self, colors, model_folder, tmp_path):
        model = load_model(model_folder)
        facts = dataclasses.replace(model.facts, class_names=("red", "blue", "green"))
        denoiser = type(model.denoiser).from_config({**model.denoiser.config, "num_classes": 3})
        save_model(dataclasses.replace(model, denoiser=denoiser, facts=facts), model_folder)
        with pytest.raises(UsageError, match="knows 3 classes, but the dataset has 2"):
            generate(colors, 1, FromModel(model_folder), tmp_path / "set.pt")

    @pytest.mark.parametrize(("changes", "said"), [
        ({"class_names": ("blue", "green")}, "class 1 was green and is red"),
        ({"image_size": 8}, "images of 8 pixels, but 'colors' has 16"),
    ])  # fmt: skip
    def test_model_of_the_dataset_before_it_changed_raises_usage_error(self, colors, model_folder, tmp_path, changes, said):
        model = load_model(model_folder)
        save_model(dataclasses.replace(model, facts=dataclasses.replace(model.facts, **changes)), model_folder)
        with pytest.raises(UsageError, match=said):
            generate(colors, 1, FromModel(model_folder), tmp_path / "set.pt")

    def test_unwritable_folder_raises_bad_file_error(self, colors, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(BadFileError):
            generate(colors, 1, FromReal(), tmp_path / "file" / "set.pt")


def test_mode_guidance_makes_another_set_also_of_a_model_without_latents(colors, model_folder, tmp_path):
    assert not (model_folder / "checkpoints").exists()
    sampling = SamplingSettings(steps=2, mode_guidance=0.5)
    guided = generate(colors, 2, FromModel(model_folder, sampling), tmp_path / "guided.pt")
    plain = generate(colors, 2, FromModel(model_folder, SamplingSettings(steps=2)), tmp_path / "plain.pt")
    assert guided.tensor.read_bytes() != plain.tensor.read_bytes()
    facts = read_provenance(guided.tensor)
    assert (facts["mode_guidance"], facts["dataset_sha256"]) == (0.5, train_sha256(colors))
    model, real = load_model(model_folder), load_dataset(colors, "train")
    modes = find_modes(model_folder, model, real, 2, dataset_sha256=train_sha256(colors))
    expected = torch.cat([*Sampler(model, sampling, modes=modes).images(*class_ordered(2, 2))])
    assert torch.equal(pixels(guided.tensor, colors), expected)


def test_mode_guidance_by_images_prepared_since_is_not_taken_for_the_set_that_is_there(colors, model_folder, tmp_path):
    source, out = FromModel(model_folder, SamplingSettings(steps=2, mode_guidance=0.1)), tmp_path / "set.pt"
    made = generate(colors, 1, source, out)
    before, request = made.tensor.read_bytes(), read_provenance(out)["request"]
    assert generate(colors, 1, source, out).tensor.read_bytes() == before
    first, second = (tmp_path / "pictures" / "train" / "red" / f"{number}.png" for number in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)  # the constants, which count as well, stay the same
    prepare(colors, tmp_path / "pictures", force=True)
    generate(colors, 1, source, out)
    assert read_provenance(out)["request"] != request


@pytest.mark.slow
def test_influence_guidance_makes_another_set_and_is_recorded(colors, model_folder, tmp_path):
    settings = SamplingSettings(steps=3, influence_guidance=0.2, precision="float32")
    plain = generate(colors, 2, FromModel(model_folder, SamplingSettings(steps=3, precision="float32")), tmp_path / "plain.pt")
    guided = generate(colors, 2, FromModel(model_folder, settings), tmp_path / "guided.pt")
    assert not torch.equal(pixels(plain.tensor, colors), pixels(guided.tensor, colors))
    facts = [json.loads(saved.provenance.read_text()) for saved in (plain, guided)]
    assert "influence_guidance" not in facts[0] and facts[1]["influence_guidance"] == 0.2
    reports = []
    source = FromModel(model_folder, dataclasses.replace(settings, batch_size=1))
    again = generate(colors, 2, source, tmp_path / "again.pt", progress=reports.append)
    assert {report.task for report in reports} == {"Sampling"}, "the networks are found in the cache"
    off = pixels(again.tensor, colors).int() - pixels(guided.tensor, colors).int()
    assert off.abs().max() <= 1


class TestChoosing:
    """Candidates of a model, and all real images, seen by a network trained on the real ones."""

    @pytest.mark.slow
    def test_set_has_the_selected_candidates_of_a_model(self, colors, model_folder, tmp_path):
        sampling = SamplingSettings("ddim", steps=2, seed=4, batch_size=3)
        source = FromModel(model_folder, sampling, candidates=5, select="least-confident")
        saved = generate(colors, 2, source, tmp_path / "set.pt")
        train = load_dataset(colors, "train")
        features = convnet_features(train, dataset_spec(colors))
        expected = []
        for c in range(2):
            labels = torch.full((5,), c)
            images = torch.cat([*Sampler(load_model(model_folder), sampling).images(labels, torch.arange(5))])
            expected.append(images[features.with_confidence(images, labels)[1].argsort(stable=True)[:2]])
        assert torch.equal(pixels(saved.tensor, colors), torch.cat(expected))
        facts = json.loads(saved.provenance.read_text())
        assert (facts["selection"], facts["candidates"]) == ("least-confident", 5)

    def test_with_mode_guidance_one_candidate_of_each_mode_is_selected(self, colors, model_folder, tmp_path):
        sampling = SamplingSettings("ddim", steps=2, mode_guidance=0.5)
        saved = generate(colors, 2, FromModel(model_folder, sampling, candidates=7, select="random"), tmp_path / "set.pt")
        model, real = load_model(model_folder), load_dataset(colors, "train")
        modes = find_modes(model_folder, model, real, 2, dataset_sha256=train_sha256(colors))
        images = torch.cat([*Sampler(model, sampling, modes=modes).images(torch.zeros(7, dtype=torch.int64), torch.arange(7))])
        first = pixels(saved.tensor, colors)[:2]
        found = [[torch.equal(one, candidate) for candidate in images].index(True) for one in first]
        assert [index % 2 for index in found] == [0, 1] and max(found) > 1

    @pytest.mark.slow
    def test_set_has_the_selected_real_images(self, colors, tmp_path):
        saved = generate(colors, 2, FromReal("most-confident"), tmp_path / "set.pt")
        train = load_dataset(colors, "train")
        confidence = convnet_features(train, dataset_spec(colors)).with_confidence(train.images, train.labels)[1]
        rows = [i for c in (0, 1) for i in confidence[5 * c : 5 * c + 5].argsort(descending=True)[:2].add(5 * c).tolist()]
        assert torch.equal(pixels(saved.tensor, colors), train.images[rows])
        assert json.loads(saved.provenance.read_text())["kind"] == "most-confident-real"

    @pytest.mark.slow
    def test_the_precision_of_features_is_named_and_sets_of_another_one_are_made_again(self, colors, model_folder, tmp_path):
        facts = {}
        for precision in ("float32", "bfloat16"):
            real = generate(colors, 1, FromReal("median", select_precision=precision), tmp_path / "real.pt")
            assert json.loads(real.provenance.read_text())["selected_in"] == precision
            sampling = SamplingSettings("ddim", steps=2, precision=precision)
            source = FromModel(model_folder, sampling, candidates=5, select="median")
            facts[precision] = json.loads(generate(colors, 1, source, tmp_path / "set.pt").provenance.read_text())
            assert facts[precision]["selected_in"] == precision
        assert facts["float32"]["request"] != facts["bfloat16"]["request"]

    def test_fewer_candidates_than_images_raise_usage_error(self, colors, model_folder, tmp_path):
        with pytest.raises(UsageError, match="2 images of each class cannot be chosen from 1"):
            generate(colors, 2, FromModel(model_folder, candidates=1), tmp_path / "set.pt")

    def test_unknown_selection_method_raises_usage_error(self, model_folder):
        with pytest.raises(UsageError, match="Did you mean 'herding'"):
            FromModel(model_folder, candidates=5, select="hering")
        with pytest.raises(UsageError, match="Did you mean 'k-center'"):
            FromReal("k-centers")
