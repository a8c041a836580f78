"""The network against numbers recorded from the official code."""

import pytest
import torch
from torch.nn import functional as F

from ddkit.errors import UsageError
from ddkit.network.convnet import ConvNet

OFFICIAL_KEYS = {f"features.{i}.{kind}" for i in (0, 1, 4, 5, 8, 9) for kind in ("weight", "bias")} | {
    "classifier.weight",
    "classifier.bias",
}


def test_state_dict_has_the_official_keys_and_shapes():
    state = ConvNet(200, 64).state_dict()
    assert set(state) == OFFICIAL_KEYS
    assert state["features.0.weight"].shape == (128, 3, 3, 3)
    assert state["features.8.weight"].shape == (128, 128, 3, 3)
    assert state["features.9.weight"].shape == (128,)
    assert state["classifier.weight"].shape == (200, 8192)


def gradients(network, golden):
    """Logits, embedding, loss and gradients of the recorded batch."""
    dtype = network.classifier.weight.dtype
    embedding = network.embed(golden["input"].to(dtype))
    logits = network(golden["input"].to(dtype))
    loss = F.cross_entropy(logits, golden["label"])
    loss.backward()
    return embedding, logits, loss, {key: parameter.grad for key, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet_20_classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward_agree_with_the_official_code(convnet_golden, name, dtype):
    golden = convnet_golden(name)
    embedding, logits, loss, grads = gradients(golden.network().to(dtype), golden)
    for ours, recorded in ((embedding, "embedding"), (logits, "logits"), (loss, "loss")):
        torch.testing.assert_close(ours.flatten().float(), golden[recorded].flatten(), atol=1e-4, rtol=0)
    golden.check_gradients(grads, float64=dtype == torch.float64)


@pytest.mark.parametrize("image_size", [0, 4, 30])
def test_size_that_cannot_be_halved_three_times_raises_usage_error(image_size):
    with pytest.raises(UsageError, match="multiple of 8"):
        ConvNet(10, image_size)
