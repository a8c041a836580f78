"""The influence of images on training, and sampling that raises it."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalize
from ddkit.errors import UsageError
from ddkit.generator.influence import Influence, class_gradients, find_influence, gradient_similarity
from ddkit.generator.objective import Objective
from ddkit.generator.samplers import make_scheduler
from ddkit.generator.sampling import Sampler, SamplingSettings
from ddkit.network.networks import build_network

SPEC = DatasetSpec("colors", 3, 16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
LABELS, INDICES = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 4])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(layer, embedding, labels):
    """(C * F + C,): the gradient of the mean cross-entropy in a linear layer, its weight and bias side by side."""
    weight, bias = torch.autograd.grad(F.cross_entropy(layer(embedding), labels), [layer.weight, layer.bias])
    return torch.cat([weight, bias[:, None]], dim=1).flatten()


@pytest.fixture
def influence(images):
    """Two untrained networks of the three colors, and the gradients of all the images."""
    networks, gradients = [], []
    for seed in range(2):
        networks.append(build_network("convnet", 3, 16, seed=seed))
        pixels = normalize(images.images, SPEC)
        gradients.append(class_gradients(networks[-1].embed, networks[-1].classifier, pixels, images.labels))
    return Influence(networks, torch.stack(gradients), SPEC, "cpu")


def test_similarity_is_the_cosine_of_the_gradients_that_autograd_finds():
    layer = nn.Linear(5, 3)
    embedding, labels, gradients = random(7, 5), torch.arange(7) % 3, random(3, 3, 6, seed=1)
    found = gradient_similarity(embedding, layer(embedding), labels, gradients)
    for row, label in enumerate(labels.tolist()):
        own = by_autograd(layer, embedding[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(found[row], F.cosine_similarity(own, gradients[label].flatten(), dim=0))


def test_image_without_error_has_no_influence_and_finite_gradients():
    logits = torch.tensor([[500.0, 0.0]]).requires_grad_()
    found = gradient_similarity(torch.ones(1, 4), logits, torch.tensor([0]), random(2, 2, 5))
    assert found.item() == 0 and torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_class_gradients_are_the_mean_gradients_that_autograd_finds(images):
    network, pixels = build_network("convnet", 3, 16, seed=0), normalize(images.images, SPEC)
    found = class_gradients(network.embed, network.classifier, pixels, images.labels)
    for label in range(3):
        own = images.labels == label
        expected = by_autograd(network.classifier, network.embed(pixels[own]), images.labels[own])
        torch.testing.assert_close(found[label].flatten(), expected, atol=1e-6, rtol=1e-4)


def test_influence_is_the_mean_over_the_networks(influence, images):
    found = influence(images.images.float() / 255, images.labels)
    assert found.shape == (12,) and (0 < found).all() and (found <= 1).all()
    alone = [
        Influence([network], gradients[None], SPEC, "cpu")(images.images.float() / 255, images.labels)
        for network, gradients in zip(influence._networks, influence._gradients, strict=True)
    ]
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2)


class TestSampling:
    def images(self, make_model, influence, scale, size=4, **settings):
        chosen = SamplingSettings(steps=5, batch_size=size, influence_guidance=scale, precision="float32", **settings)
        sampler = Sampler(make_model(), chosen, influence=influence if scale else None)
        return torch.cat([*sampler.images(LABELS, INDICES)])

    def test_guided_samples_have_more_influence_than_unguided_ones(self, make_model, influence):
        unguided, guided = (self.images(make_model, influence, scale) for scale in (0.0, 0.3))
        scores = [influence(images.float() / 255, LABELS) for images in (unguided, guided)]
        assert (scores[1] > scores[0]).all()

    def test_images_do_not_depend_on_the_batch_size(self, make_model, influence):
        whole, small = (self.images(make_model, influence, 0.1, size).int() for size in (4, 1))
        assert (whole - small).abs().max() <= 1

    @pytest.mark.parametrize(("sampler", "prediction"), [("ddim", "v"), ("dpm++", "flow"), ("unipc", "epsilon")])
    def test_term_has_the_gradients_direction_and_the_noises_length(self, make_model, influence, sampler, prediction):
        model = make_model(prediction=prediction)
        ours = Sampler(model, SamplingSettings(sampler, steps=5, influence_guidance=0.1), influence=influence)
        point = random(4, 2, 4, 4)
        time = float(make_scheduler(sampler, prediction).timesteps[400])
        output, term = ours._influence_term(point.clone(), time, LABELS)
        objective, times = Objective(dataclasses.replace(ours._objective.config)), torch.full((4,), time)
        signal, _ = objective.levels(times, point)
        noise = point - signal * objective.clean(point, output, times)
        torch.testing.assert_close(term.flatten(1).norm(dim=1), 0.1 * noise.flatten(1).norm(dim=1))

        def influence_at(points):
            with torch.no_grad():
                output = ours._output(ours._guided, points, time, LABELS)
                return influence(ours._decoder(objective.clean(points, output, times)), LABELS)

        small = 1e-2 * term / term.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        along = influence_at(point + small) - influence_at(point - small)
        other = random(4, 2, 4, 4, seed=3)
        other = 1e-2 * other / other.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (along > (influence_at(point + other) - influence_at(point - other)).abs()).all()

    def test_mode_guidance_can_be_added(self, make_model, influence):
        modes = random(3, 3, 2, 4, 4, seed=5)
        settings = SamplingSettings(steps=5, mode_guidance=0.1)
        alone = Sampler(make_model(), settings, modes=modes)
        settings = dataclasses.replace(settings, influence_guidance=0.3)
        both = Sampler(make_model(), settings, modes=modes, influence=influence)
        made = [sampler.from_noise(random(4, 2, 4, 4), LABELS, INDICES).float() / 255 for sampler in (alone, both)]
        assert (influence(made[1], LABELS) > influence(made[0], LABELS)).all()


class TestFinding:
    def find(self, images, **changes):
        return find_influence(images, SPEC, dataset_sha256="of-these-pixels", **changes)

    @pytest.mark.slow
    def test_networks_are_trained_once_and_found_again(self, images):
        reports = []
        first = self.find(images, progress=reports.append)
        assert [(report.done, report.total) for report in reports] == [(12 * epoch, 48) for epoch in range(5)]
        again = self.find(images, progress=lambda report: pytest.fail("trained again"))
        unit = images.images.float() / 255
        torch.testing.assert_close(first(unit, images.labels), again(unit, images.labels))
        networks = [torch.cat([weights.flatten() for weights in network.parameters()]) for network in first._networks]
        assert len(torch.stack(networks).unique(dim=0)) == 3, "after 1, 2 and 4 epochs"

    def test_class_without_images_raises_usage_error(self, images):
        with pytest.raises(UsageError, match="none of 2"):
            self.find(dataclasses.replace(images, labels=images.labels.clamp(max=1)))
