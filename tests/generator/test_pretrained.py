"""Generators to start from: DiT folders as diffusers writes them, ours, hub ids, and whose classes become whose."""

import json
import os
import shutil
import socketserver
import threading
import zipfile

import processes
import pytest
import torch
from diffusers import DiTPipeline

from ddkit.data.class_names import CLASS_NAMES
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.model_folder import save_model
from ddkit.generator.networks import null_class, predict
from ddkit.generator.pretrained import ClassMap, imagenet_wnids, load_generator, map_classes, with_classes

TITLES = (
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "brown bear, bruin",
    "ice bear",
    "tiger, Panthera tigris",
)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def dit_folder(save_dit, tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("dit") / "tiny", TITLES)


@pytest.fixture
def own_dit(dit_folder, tmp_path):
    return shutil.copytree(dit_folder, tmp_path / "copy")


def noisy_batch(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([0.0, 400.0, 999.0])[:count]


def tables(denoiser):
    return [module.weight for module in denoiser.modules() if isinstance(module, torch.nn.Embedding)]


class TestReading:
    @torch.no_grad()
    def test_dit_predicts_the_same_noise_as_in_diffusers_pipeline(self, dit_folder):
        theirs = DiTPipeline.from_pretrained(dit_folder).transformer.eval()
        ours = load_generator(str(dit_folder))
        noisy, times = noisy_batch()
        labels = torch.tensor([0, 4, 5])
        expected = theirs(noisy, timestep=times, class_labels=labels).sample[:, :4]
        torch.testing.assert_close(predict(ours.denoiser, noisy, times, labels), expected)
        assert ours.denoiser.config.out_channels == 4 and null_class(ours.denoiser) == 5
        assert ours.prediction == "epsilon"
        assert ours.autoencoder.config.scaling_factor == pytest.approx(0.18215)
        assert ours.class_names[1] == ("goldfish", "Carassius auratus")

    def test_loaded_network_keeps_no_path_of_this_machine(self, dit_folder, tmp_path):
        load_generator(str(dit_folder)).denoiser.save_pretrained(tmp_path)
        assert str(dit_folder) not in (tmp_path / "config.json").read_text()

    def test_dit_output_is_the_same_in_training_mode(self, dit_folder):
        """diffusers' own label dropout would change some answers at random."""
        denoiser = load_generator(str(dit_folder)).denoiser.train()
        noisy, times = noisy_batch(2)
        noisy, times, labels = noisy.repeat(50, 1, 1, 1), times.repeat(50), torch.tensor([0, 1] * 50)
        answers = predict(denoiser, noisy, times, labels)
        torch.testing.assert_close(answers, answers[:2].repeat(50, 1, 1, 1), atol=1e-5, rtol=1e-4)

    def test_folder_with_the_former_transformer_class_loads(self, own_dit, dit_folder):
        config = own_dit / "transformer" / "config.json"
        change(config, _class_name="Transformer2DModel", cross_attention_dim=None, only_cross_attention=False)
        old, new = (load_generator(str(folder)).denoiser.state_dict() for folder in (own_dit, dit_folder))
        assert all(torch.equal(old[name], new[name]) for name in new)

    @pytest.mark.parametrize("architecture", ["uvit", "dit"])
    def test_generator_by_ddkit_loads(self, make_model, tmp_path, architecture):
        model = make_model(architecture, "v")
        save_model(model, tmp_path)
        found = load_generator(str(tmp_path))
        assert found.prediction == "v"
        assert found.class_names == tuple((name,) for name in model.facts.class_names)
        state = model.denoiser.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.denoiser.state_dict().items())


class TestInvalidSources:
    def test_neither_folder_nor_hub_id_raises_missing_model_error(self):
        with pytest.raises(MissingModelError, match="no folder not/a/place"):
            load_generator("not/a/place")

    def test_folder_without_a_generator_raises_missing_model_error(self, tmp_path):
        with pytest.raises(MissingModelError, match="neither ddkit.json nor model_index.json"):
            load_generator(str(tmp_path))

    def test_another_pipeline_raises_bad_file_error(self, own_dit):
        change(own_dit / "model_index.json", _class_name="StableDiffusionPipeline")
        with pytest.raises(BadFileError, match="StableDiffusionPipeline, not a DiTPipeline.*DiTPipeline"):
            load_generator(str(own_dit))

    def test_another_network_raises_bad_file_error(self, own_dit):
        change(own_dit / "transformer" / "config.json", _class_name="UNet2DConditionModel")
        with pytest.raises(BadFileError, match="transformer holds a UNet2DConditionModel, not a DiTTransformer2DModel"):
            load_generator(str(own_dit))

    def test_another_noise_schedule_raises_bad_file_error(self, own_dit):
        change(own_dit / "scheduler" / "scheduler_config.json", beta_schedule="squaredcos_cap_v2")
        with pytest.raises(BadFileError, match="beta_schedule squaredcos_cap_v2, but only linear"):
            load_generator(str(own_dit))

    @pytest.mark.parametrize("setting", [{"num_layers": 3}, {"num_layers": 1}, {"attention_head_dim": 16}])
    def test_weights_that_do_not_fit_raise_bad_file_error(self, own_dit, setting):
        change(own_dit / "transformer" / "config.json", **setting)
        with pytest.raises(BadFileError, match="transformer.*damaged"):
            load_generator(str(own_dit))

    def test_truncated_weights_raise_bad_file_error(self, own_dit):
        path = own_dit / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BadFileError, match="vae cannot be read"):
            load_generator(str(own_dit))

    @pytest.mark.slow
    def test_unusable_hub_raises_missing_model_error(self, tmp_path):
        """A portal's page, such as a hotel's, and a connection that ends, as of a proxy that lets nothing through."""
        asked = set()
        # Without the line on the connection, the next request may come by this one while it ends, and so be lost.
        page = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 13\r\n\r\n<html></html>"

        class Impostor(socketserver.BaseRequestHandler):
            def handle(self):
                ends = b"DiT-XL-2-512" in self.request.recv(65536)
                asked.add(ends)
                self.request.sendall(b"" if ends else page)

        names = ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512")
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Impostor) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            told = self.told_by_a_hub_at(f"http://127.0.0.1:{server.server_address[1]}", tmp_path, names)
            server.shutdown()
        assert asked == {True, False}
        for name in names:
            assert f"'{name}' is not a folder here, and it cannot be downloaded: " in told
            assert f"hf download {name} --local-dir FOLDER" in told

    def told_by_a_hub_at(self, address, tmp_path, names):
        """What a process of its own, which looks for its hub there, has to say of a hub's ids."""
        code = (
            "from huggingface_hub import constants\n"
            f"constants.ENDPOINT, constants.HF_HUB_CACHE = {address!r}, {str(tmp_path)!r}\n"
            "from ddkit.errors import MissingModelError\nfrom ddkit.generator.pretrained import load_generator\n"
            f"for name in {names!r}:\n"
            "    try: load_generator(name)\n    except MissingModelError as error: print(error)\n"
        )
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "_offline"))}
        done = processes.run("-c", code, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


class TestMapping:
    def test_exact_name_is_preferred_to_a_name_that_ends_in_it(self):
        known = [[name.strip() for name in title.split(",")] for title in TITLES]
        found = map_classes(["tiger", "bear", "Ice_Bear", "road"], known)
        assert found.labels == ((4,), (2, 3), (3,), ())
        assert found.unmatched == ("road",)

    def test_chosen_labels_are_preferred_to_names(self):
        known = [["mouse"], ["lion"], []]
        found = map_classes(["mouse", "lion", "road"], known, {"mouse": None, "road": 2, "lion": "MOUSE"})
        assert found.labels == ((), (0,), (2,))

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            ({"hose": 1}, "no class 'hose' to map. Did you mean 'house'"),
            ({"house": 2}, "labels 0 to 1, got 2"),
            ({"house": "tigger"}, "knows no class 'tigger'. Did you mean 'tiger'"),
        ],
    )
    def test_invalid_choice_raises_usage_error(self, chosen, message):
        with pytest.raises(UsageError, match=message):
            map_classes(["house"], [["tiger"], ["lion"]], chosen)

    def test_unknown_classes_raise_usage_error(self):
        with pytest.raises(UsageError, match="knows none of the classes alpha, beta, gamma ... by name.*--class-map"):
            map_classes(["alpha", "beta", "gamma", "delta"], [["tench"], []])

    @pytest.mark.slow
    def test_every_tinyimagenet_class_is_the_imagenet_label_of_the_same_wnid(self, tinyimagenet_zip):
        """The archive's own names of the wnids are torchvision's names of those labels."""
        from torchvision.models import ResNet18_Weights

        titles = ResNet18_Weights.DEFAULT.meta["categories"]
        with zipfile.ZipFile(tinyimagenet_zip) as archive:
            lines = archive.read("tiny-imagenet-200/words.txt").decode().splitlines()
        words = dict(line.split("\t") for line in lines)
        found = map_classes(CLASS_NAMES["tinyimagenet"], [[wnid] for wnid in imagenet_wnids()])
        assert len(set(found.labels)) == 200 and not found.unmatched
        for wnid, (label,) in zip(found.names, found.labels, strict=True):
            assert titles[label] in words[wnid].split(", "), wnid

    @pytest.mark.slow
    def test_imagenet_is_recognized_by_its_size_and_names(self, save_dit, tmp_path):
        from torchvision.models import ResNet18_Weights

        titles = ResNet18_Weights.DEFAULT.meta["categories"]
        right = load_generator(str(save_dit(tmp_path / "imagenet", titles)))
        assert right.class_names[1] == ("n01443537", "goldfish")
        found = map_classes(CLASS_NAMES["cifar100"], right.class_names)
        by_name = dict(zip(found.names, found.labels, strict=True))
        assert by_name["tiger"] == (292,) and by_name["orange"] == (950,) and by_name["bear"] == (294, 295, 296, 297)
        assert by_name["cloud"] == ()
        change(tmp_path / "imagenet" / "model_index.json", id2label={str(i): f"thing {i}" for i in range(1000)})
        assert load_generator(str(tmp_path / "imagenet")).class_names[1] == ("thing 1",)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["uvit", "dit"])
def test_with_classes_takes_the_mean_embeddings_of_the_mapped_labels(make_model, tmp_path, architecture):
    save_model(make_model(architecture), tmp_path)
    before = load_generator(str(tmp_path))
    after = with_classes(before, ClassMap(("x", "y", "z", "x again"), ((2,), (0, 1), (), (2,))))
    assert null_class(before.denoiser) == 3 and null_class(after.denoiser) == 4
    for old, new in zip(tables(before.denoiser), tables(after.denoiser), strict=True):
        expected = [old[2], old[:2].mean(dim=0), old[:3].mean(dim=0), old[2], old[3]]
        assert torch.equal(new, torch.stack(expected))
    noisy, times = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 700.0])
    answers = [
        predict(denoiser, noisy, times, torch.tensor(labels))
        for denoiser, labels in ((before.denoiser, (2, 3)), (after.denoiser, (3, 4)))
    ]
    torch.testing.assert_close(*answers)
    after.denoiser.save_pretrained(tmp_path / "after")
    saved = type(after.denoiser).from_pretrained(tmp_path / "after")
    torch.testing.assert_close(predict(saved.eval(), noisy, times, torch.tensor((3, 4))), answers[1])
