"""The pretended GPU finds planted mistakes, and computes what the CPU does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

CUDA = torch.device("cuda")


def test_tensors_of_two_devices_in_one_operation_raise(gpu):
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_tensors_of_two_devices_in_the_backward_pass_raise(gpu):
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(3)

    x = torch.ones(3).to(CUDA).requires_grad_()
    with pytest.raises(RuntimeError, match="two devices"):
        Forgetful.apply(x).sum().backward()


@pytest.mark.parametrize("generator, device", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_generator_of_the_other_device_raises(gpu, generator, device):
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, generator=torch.Generator(generator), device=device)


def test_a_fused_optimizer_with_momentum_of_another_layout_raises(gpu):
    convolution = nn.Conv2d(3, 4, 3).to(CUDA)
    optimizer = torch.optim.SGD(convolution.parameters(), 0.1, momentum=0.9, fused=True)

    def step():
        optimizer.zero_grad()
        convolution(torch.ones(1, 3, 5, 5, device=CUDA)).sum().backward()
        optimizer.step()

    step()
    state = optimizer.state[convolution.weight]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="same strides"):
        step()


def test_waits_of_the_host_are_counted(gpu):
    x = torch.ones(3).to(CUDA, non_blocking=True)
    y = (x * 2).sum()
    assert gpu.waits_in_all == 0
    assert y.item() == 6
    x.cpu(), x.tolist(), x.nonzero(), x[x > 0], x[torch.tensor([0])]
    assert gpu.waits_in_all == 6
    gpu.reset()
    assert gpu.waits_in_all == 0 and not gpu.kernels


def test_a_wait_during_a_capture_raises(gpu):
    x, graph = torch.ones(3, device=CUDA), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
        x.sum().item()


def test_a_replayed_graph_computes_from_the_same_memory(gpu):
    network = nn.Linear(3, 2).to(CUDA)
    x, graph = torch.ones(4, 3, device=CUDA), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network.zero_grad()
        loss = F.cross_entropy(network(x), torch.zeros(4, dtype=torch.int64, device=CUDA))
        loss.backward()
    recorded = network.weight.grad
    x.copy_(torch.arange(12.0).view(4, 3))
    graph.replay()
    expected = F.cross_entropy(network(x), torch.zeros(4, dtype=torch.int64, device=CUDA))
    (gradient,) = torch.autograd.grad(expected, network.weight)
    torch.testing.assert_close(loss.cpu(), expected.cpu())
    torch.testing.assert_close(recorded.cpu(), gradient.cpu())


def test_an_operation_that_makes_too_large_a_tensor_is_out_of_memory(gpu):
    x = torch.ones(100, device=CUDA)
    gpu.largest_tensor = 1000
    with pytest.raises(torch.OutOfMemoryError):
        x[:, None] * x


def test_after_the_block_there_is_no_gpu():
    from pretended_gpu import pretend_gpu

    before = torch.cuda.is_available()
    with pretend_gpu():
        assert torch.cuda.is_available() and torch.ones(2, device=CUDA).is_cuda
    assert torch.cuda.is_available() == before
    assert isinstance(torch.Generator(), torch.Generator)
