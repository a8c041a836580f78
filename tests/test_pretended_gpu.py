"""The pretended GPU finds planted mistakes, and computes what the CPU does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

CUDA = torch.device("cuda")


def on_gpu(*shape, device="cuda"):
    return torch.rand(*shape, generator=torch.Generator(device).manual_seed(0), device=device)


def features_less_a_mean_on_the_cpu():
    features = on_gpu(6, 4)
    return features - features.cpu().mean(0)


def distances_to_real_features_on_the_cpu():
    return torch.cdist(on_gpu(3, 4), torch.rand(5, 4))


def confidences_of_labels_on_the_cpu():
    return on_gpu(3, 4).softmax(1).gather(1, torch.zeros(3, 1, dtype=torch.int64))


def herding_with_a_sum_on_the_cpu():
    features, total = on_gpu(6, 4), torch.zeros(4)
    return ((total + features) / 2 - features.mean(0)).square().sum(1).argmin()


def sampling_with_coefficients_on_the_cpu():
    return (torch.rand(3).view(-1, 1) * on_gpu(3, 4)).sum(0)


def sampling_of_labels_on_the_cpu():
    return nn.Embedding(4, 2).to(CUDA)(torch.tensor([0, 3]))


def minimax_memories_on_the_cpu():
    return torch.bmm(on_gpu(2, 3, 4), torch.zeros(2, 4, 5))


def an_average_of_the_weights_on_the_cpu():
    weights = [on_gpu(3)]
    average = [weight.cpu() for weight in weights]
    torch._foreach_sub_(average, weights)


def momentum_of_a_pool_on_the_cpu():
    momentum = torch.zeros(4)
    return momentum.mul_(0.9).add_(on_gpu(4))


def an_augmentation_drawn_on_the_cpu():
    return on_gpu(2, 3, 4, 4) + torch.rand(2).view(-1, 1, 1, 1)


def a_loss_of_targets_on_the_cpu():
    return F.cross_entropy(on_gpu(2, 4), torch.tensor([0, 1]))


def predictions_compared_with_labels_on_the_cpu():
    return on_gpu(2, 4).argmax(1) == torch.tensor([0, 1])


def a_network_left_on_the_cpu():
    return nn.Linear(4, 2)(on_gpu(3, 4))


def images_left_on_the_cpu():
    return nn.Conv2d(3, 2, 3).to(CUDA)(torch.rand(1, 3, 4, 4))


def a_buffer_on_the_first_gpu_for_work_on_the_second():
    return on_gpu(3, device="cuda:1") + torch.zeros(3, device=CUDA)


def numbers_drawn_on_the_first_gpu_for_work_on_the_second():
    return on_gpu(3, device="cuda:1") + torch.rand(3, generator=torch.Generator(CUDA), device=CUDA)


def rows_on_the_first_gpu_of_images_on_the_second():
    return on_gpu(3, device="cuda:1")[torch.arange(2, device=CUDA)]


@pytest.mark.parametrize("mistake", [
    features_less_a_mean_on_the_cpu, distances_to_real_features_on_the_cpu, confidences_of_labels_on_the_cpu,
    herding_with_a_sum_on_the_cpu, sampling_with_coefficients_on_the_cpu, sampling_of_labels_on_the_cpu,
    minimax_memories_on_the_cpu, an_average_of_the_weights_on_the_cpu, momentum_of_a_pool_on_the_cpu,
    an_augmentation_drawn_on_the_cpu, a_loss_of_targets_on_the_cpu, predictions_compared_with_labels_on_the_cpu,
    a_network_left_on_the_cpu, images_left_on_the_cpu, a_buffer_on_the_first_gpu_for_work_on_the_second,
    numbers_drawn_on_the_first_gpu_for_work_on_the_second, rows_on_the_first_gpu_of_images_on_the_second,
], ids=lambda mistake: mistake.__name__)  # fmt: skip
def test_tensors_of_two_devices_in_one_operation_raise(second_gpu, mistake):
    with pytest.raises(RuntimeError, match="two devices"):
        mistake()


def test_same_operations_on_tensors_of_one_device_do_not_raise(gpu, second_gpu):
    for device in ("cuda", "cuda:0", second_gpu):
        features = on_gpu(6, 4, device=device)
        features = features - features.mean(0)
        nn.Linear(4, 2).to(device)(features).sum().backward()
        assert features.device == torch.device("cuda", int(device == second_gpu))
        assert (features + torch.tensor(1.0)).device == features.device  # a number may come from the CPU
    with torch.cuda.device(1):
        assert torch.zeros(3, device=CUDA).device == torch.device(second_gpu)
    assert on_gpu(3).to(second_gpu).device.index == 1 and on_gpu(3).device.index == 0


def test_gradients_flow_back_to_the_device_they_came_from(gpu, second_gpu):
    x = torch.ones(3, requires_grad=True)
    (x.to(CUDA).to(second_gpu) * 2).cpu().sum().backward()
    assert x.grad.device.type == "cpu" and x.grad.tolist() == [2, 2, 2]


def test_a_capture_on_another_gpu_than_the_current_one_raises(gpu, second_gpu):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(second_gpu)
    with pytest.raises(RuntimeError, match="current device"), torch.cuda.graph(graph, stream=stream):
        torch.ones(3, device=second_gpu)


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


LARGE = 20_000  # numbers, of more bytes than CUDA copies without waiting from memory that is not pinned


def small_copies_from_the_host():
    return torch.ones(3).to(CUDA, non_blocking=True), on_gpu(3).copy_(torch.ones(3), non_blocking=True)


def a_large_copy_from_pinned_memory():
    return torch.ones(LARGE).pin_memory().to(CUDA, non_blocking=True)


def part_of_pinned_memory():
    return on_gpu(LARGE // 2).copy_(torch.ones(LARGE).pin_memory()[LARGE // 2 :], non_blocking=True)


def what_a_step_may_do():
    x = on_gpu(4, 4)
    y = (x @ x).clamp(min=0).sum() + x.argmax(1).float().mean()
    return torch.where(x > 0.5, y, x)[torch.arange(2, device=CUDA)]


@pytest.mark.parametrize("run", [
    small_copies_from_the_host, a_large_copy_from_pinned_memory, part_of_pinned_memory, what_a_step_may_do,
], ids=lambda run: run.__name__)  # fmt: skip
def test_what_needs_no_wait_is_counted_as_none(gpu, run):
    run()
    assert gpu.waits_in_all == 0, gpu.waits


WAITS = {
    "a loss read each step": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.sum() > 0),
    "a number of images": lambda x: int((x > 0).sum()),
    "a list": lambda x: x.tolist(),
    "features fetched batch by batch": lambda x: x.cpu(),
    "a mask": lambda x: x[x > 0],
    "a mask to select by": lambda x: x.masked_select(x > 0),
    "places": lambda x: x.nonzero(),
    "classes": lambda x: x.unique(),
    "rows on the CPU": lambda x: x[torch.tensor([0])],
    "numbers": lambda x: torch.tensor([1.0], device=x.device),
    "a copy": lambda x: torch.ones(3).to(x.device),
    "a copy into a buffer": lambda x: x.copy_(torch.ones(3)),
    "a large copy from memory that is not pinned": lambda x: torch.ones(LARGE).to(x.device, non_blocking=True),
    "parameters one by one": lambda x: torch._foreach_copy_([x], [torch.ones(3)]),
    "a matrix that may be singular": lambda x: torch.linalg.inv(torch.diag(x + 1)),
    "a synchronization": lambda x: torch.cuda.synchronize(),
    "a stream": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_waits_of_the_host_are_counted(gpu, wait):
    x = on_gpu(3)
    gpu.reset()
    WAITS[wait](x)
    assert gpu.waits_in_all == 1, gpu.waits
    gpu.reset()
    assert gpu.waits_in_all == 0 and not gpu.kernels


def test_a_copy_to_the_host_is_garbage_until_it_is_waited_for(gpu):
    x = torch.arange(3.0, device=CUDA)
    found = x.to("cpu", non_blocking=True)
    assert found.isnan().all()
    torch.cuda.synchronize()
    assert found.tolist() == [0, 1, 2]


@pytest.mark.parametrize("run", [lambda x: x.numpy(), lambda x: x.detach().numpy(), lambda x: x.pin_memory()])
def test_what_only_a_cpu_can_do_raises(gpu, run):
    with pytest.raises((TypeError, RuntimeError), match="cuda"):
        run(on_gpu(3))


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
