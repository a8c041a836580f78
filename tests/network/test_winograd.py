"""The fast engine against the official code's numbers and against the plain engine."""

import pytest
import torch

from ddkit.network import winograd
from ddkit.network.engine import PlainEngine, build_engine
from ddkit.network.networks import build_network
from ddkit.network.plan import EnginePlan


@pytest.fixture(autouse=True)
def compiler():
    from ddkit.network.kernels import CompileError

    try:
        winograd.load()
    except CompileError as error:
        pytest.skip(str(error))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n, classes=10, size=32):
    return torch.randn(n, 3, size, size, generator=seeded()), torch.randint(classes, (n,), generator=seeded(1))


def computed(network, plan, images, labels):
    """Loss, logits, gradients."""
    engine = build_engine(network, plan)
    loss = engine.gradients(images, labels)
    return loss, engine.logits(images), {key: p.grad.clone() for key, p in network.named_parameters()}


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet_20_classes"])
@pytest.mark.parametrize("chunk, workers, products", [(8, 1, "torch"), (2, 2, "torch"), (3, 1, "own")])
def test_winograd_agrees_with_the_official_code(convnet_golden, name, chunk, workers, products):
    golden = convnet_golden(name)
    plan = EnginePlan("winograd", "float32", chunk, workers, products)
    loss, logits, gradients = computed(golden.network(), plan, golden["input"], golden["label"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-4)
    golden.check_gradients(gradients)


@pytest.mark.parametrize("products", ["torch", "own"])
@pytest.mark.parametrize("size, n, chunk, workers", [(16, 5, 2, 2), (32, 7, 3, 2), (32, 1, 4, 2), (48, 3, 2, 1)])
def test_winograd_agrees_with_the_plain_engine_for_any_division(size, n, chunk, workers, products):
    network = build_network("convnet", 10, size, seed=0)
    with torch.no_grad():  # norms that do something
        for place in (1, 5, 9):
            for parameter in network.features[place].parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=seeded(place))
    images, labels = batch(n, size=size)
    loss, logits, gradients = computed(network.double(), EnginePlan(), images.double(), labels)
    fast = computed(network.float(), EnginePlan("winograd", "float32", chunk, workers, products), images, labels)
    assert fast[0].item() == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(fast[1], logits.float(), atol=1e-4, rtol=0)
    for key, gradient in fast[2].items():
        # Looser than rounding: a value within rounding of zero may fall on the other side of a ReLU.
        scale = max(gradients[key].norm().item(), 1e-3)
        assert (gradient - gradients[key]).norm() <= 5e-3 * scale, key


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 3, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused_before_their_memory_is_read(shape):
    engine = build_engine(build_network("convnet", 10, 16, seed=0), EnginePlan("winograd", "float32", 2, 1))
    images, labels = torch.zeros(shape), torch.zeros(2, dtype=torch.int64)
    for compute in (lambda: engine.gradients(images, labels), lambda: engine.logits(images), lambda: engine.embed(images)):
        with pytest.raises(ValueError, match=r"images must be \(N, 3, 16, 16\), got"):
            compute()


def test_gradients_do_not_remember_the_batch_before():
    network = build_network("convnet", 10, 16, seed=0)
    engine = build_engine(network, EnginePlan("winograd", "float32", 2, 2))
    small, large = batch(1, size=16), batch(6, size=16)

    def gradients(data):
        engine.gradients(*data)
        return [p.grad.clone() for p in network.parameters()]

    first = gradients(small)
    gradients(large)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(small), strict=True))


def test_the_same_plan_gives_the_same_bits_in_another_engine():
    images, labels = batch(9)
    runs = [
        computed(build_network("convnet", 10, 32, seed=3), EnginePlan("winograd", "float32", 2, 2), images, labels)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][2][key], runs[1][2][key]) for key in runs[0][2])


@pytest.fixture(params=["instructions", "portable"])
def instructions(request, monkeypatch):
    """With the processor's instructions for bfloat16, where it has some, and without."""
    load = winograd.load
    monkeypatch.setattr(winograd, "load", lambda precision="float32": load(precision, request.param == "portable"))


@pytest.mark.slow
@pytest.mark.parametrize("products", ["torch", "own"])
@pytest.mark.parametrize("size, n", [(16, 5), (32, 7), (48, 2), (64, 3)])
def test_bfloat16_without_relus_is_as_near_as_its_rounding(size, n, products, instructions):
    network = build_network("convnet", 10, size, seed=0)
    with torch.no_grad():  # no value is below zero, so no ReLU makes a step of a rounding error
        for place in (1, 5, 9):
            network.features[place].bias += 8
    (images, labels), plan = batch(n, size=size), EnginePlan("winograd", "bfloat16", 2, 2, products)
    towards = torch.randn(n, network.classifier.in_features, generator=seeded(2))

    def image_gradients(engine):
        kept = winograd.FeatureMaps(n, size)
        engine.embed(images, kept)
        return engine.image_gradients(images, towards, kept)

    loss, logits, gradients = computed(network, plan, images, labels)
    image_gradient = image_gradients(winograd.WinogradEngine(network, plan))
    exact = computed(network.double(), EnginePlan(), images.double(), labels)
    network.float()
    exact_image_gradient = image_gradients(winograd.WinogradEngine(network, EnginePlan("winograd", chunk=2)))
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-2)
    assert 1e-4 < relative_error(logits, exact[1]) < 3e-2
    assert 1e-3 < relative_error(image_gradient, exact_image_gradient) < 3e-2
    for key, gradient in gradients.items():
        if exact[2][key].norm() > 1e-6:  # those of the convolutions' biases are zero
            assert relative_error(gradient, exact[2][key]) < 3e-2, key


@pytest.mark.slow
@pytest.mark.parametrize("products", ["torch", "own"])
@pytest.mark.parametrize("size, n", [(32, 7), (64, 3)])
def test_bfloat16_is_near_and_not_the_same(size, n, products, instructions):
    network, (images, labels) = build_network("convnet", 10, size, seed=0), batch(n, size=size)
    exact = computed(network, EnginePlan(), images, labels)
    rounded = computed(network, EnginePlan("winograd", "bfloat16", 3, 2, products), images, labels)
    assert 1e-3 < relative_error(rounded[1], exact[1]) < 3e-2
    for key, gradient in exact[2].items():
        if gradient.norm() > 1e-6:
            # Up to 0.14 by autograd under autocast: ReLUs whose inputs round to the other side of zero pass another gradient.
            assert relative_error(rounded[2][key], gradient) < 0.3, key


def relative_error(tensor, exact):
    return ((tensor - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [1, 5, 16, 135])
def test_own_products_are_those_of_rounded_factors(precision, tiles, instructions):
    library, dtype = winograd.load(precision), getattr(torch, precision)
    distance = tiles * 128 + 32
    inputs, gradients = (
        torch.randn(36, distance, generator=seeded(seed)).to(dtype)[:, : tiles * 128].unflatten(1, (tiles, 128))
        for seed in (0, 1)
    )
    sums = torch.randn(36, 128, 128, generator=seeded(2))
    expected = sums + inputs.float().transpose(1, 2) @ gradients.float()
    library.multiply_to_weights(inputs.data_ptr(), gradients.data_ptr(), distance, tiles, sums.data_ptr())
    torch.testing.assert_close(sums, expected, atol=1e-3, rtol=1e-5)

    weight = torch.randn(128, 128, 3, 3, generator=seeded(3))
    expected_factor, factor = (
        winograd._factor(weight, EnginePlan("winograd", precision, products=products)) for products in ("torch", "own")
    )
    expected = inputs.float() @ expected_factor.float()
    library.multiply(inputs.data_ptr(), gradients.data_ptr(), distance, tiles, factor.data_ptr())
    torch.testing.assert_close(gradients.float(), expected, atol=1e-3, rtol=1e-2 if precision == "bfloat16" else 1e-5)


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    build_engine(build_network("convnet", 10, 16, seed=0), EnginePlan("winograd", "float32", 2, 3)).logits(batch(6, size=16)[0])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("make", [lambda: build_network("resnet18", 10, 32, seed=0),
                                  lambda: build_network("convnet", 10, 40, seed=0),
                                  lambda: build_network("convnet", 10, 32, seed=0).double()])  # fmt: skip
def test_fits_is_false_for_other_networks_devices_and_sizes(make):
    assert not winograd.fits(make())


def test_the_plain_engines_chunks_add_up_to_the_batch():
    images, labels = batch(7, size=16)
    network = build_network("convnet", 10, 16, seed=0).double()
    whole, chunked = (computed(network, EnginePlan("plain", chunk=chunk), images.double(), labels) for chunk in (0, 3))
    torch.testing.assert_close(chunked[0], whole[0])
    torch.testing.assert_close(chunked[1], whole[1])
    assert PlainEngine(network, EnginePlan()).logits(images.double()).dtype == torch.float32
    for key, gradient in chunked[2].items():
        torch.testing.assert_close(gradient, whole[2][key], msg=key)
