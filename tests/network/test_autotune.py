"""The choice of engine: measured once, remembered, and the plain way where nothing else is possible."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest
import torch
from torch import nn

from ddkit.network import autotune, winograd
from ddkit.network.autotune import candidates, choose_plan, with_smaller_chunks
from ddkit.network.networks import build_network
from ddkit.network.plan import PRECISIONS, EnginePlan

pytestmark = pytest.mark.empty_cache

has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def choose_elsewhere(code="", **environment):
    """The plan that a fresh process chooses for a small ConvNet; and what it logs."""
    program = (
        "import logging, dataclasses, json\n"
        "logging.basicConfig(level=logging.WARNING, format='%(message)s')\n"
        "from ddkit.network.networks import build_network\n"
        "from ddkit.network.autotune import choose_plan\n"
        f"{code}\n"
        "plan = choose_plan(build_network('convnet', 10, 16, seed=0), 'float32', 8)\n"
        "print(json.dumps(dataclasses.asdict(plan)))\n"
    )
    finished = processes.run("-c", program, env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return EnginePlan(**json.loads(finished.stdout)), finished.stderr


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_a_measured_choice_is_remembered(own_cache):
    network = build_network("convnet", 10, 16, seed=0)
    winograd.load.cache_clear()
    plan = choose_plan(network, "float32", 8)
    assert plan in candidates(network, "float32", 8)
    memory = own_cache / "_engines.json"
    (key,) = json.loads(memory.read_text())
    assert "16 pixels" in key and "float32" in key and torch.__version__ in key
    other = EnginePlan("plain", "float32", 5)
    memory.write_text(json.dumps({key: vars(other)}))
    assert choose_plan(network, "float32", 8) == other
    memory.write_text("{torn")
    assert choose_plan(network, "float32", 8) in candidates(network, "float32", 8)
    assert json.loads(memory.read_text())


def test_choices_that_are_made_at_the_same_time_are_all_remembered(own_cache):
    plan = EnginePlan("compiled", "float32")  # a single one, which is not measured
    keys = [f"processor {number}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: autotune._best(key, None, [plan], 8), keys))
    assert sorted(json.loads((own_cache / "_engines.json").read_text())) == sorted(keys)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_a_choice_without_memory_is_made_again(own_cache, monkeypatch):
    def without_memory(*arguments):
        raise torch.OutOfMemoryError("as on a GPU that another process fills")

    network = build_network("convnet", 10, 16, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "build_engine", without_memory)
        assert choose_plan(network, "float32", 8).kind == "plain"
    assert not (own_cache / "_engines.json").exists()
    assert choose_plan(network, "float32", 8) in candidates(network, "float32", 8)
    assert (own_cache / "_engines.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_batches_that_are_computed_in_the_same_chunks_are_measured_once(own_cache):
    network = build_network("convnet", 10, 16, seed=0)
    large = 256 * torch.get_num_threads()  # 256 images of 16 pixels have as many pixels as the largest chunk
    assert candidates(network, "float32", large) == candidates(network, "float32", 10 * large)
    plans = [choose_plan(network, "float32", size) for size in (large, large + 1, 10 * large)]
    assert len(set(plans)) == 1
    (key,) = json.loads((own_cache / "_engines.json").read_text())
    assert f"batches of {large}," in key


@pytest.mark.slow
def test_without_the_chosen_compiler_the_plain_engine_is_taken_with_one_line_of_warning(own_cache):
    plan, log = choose_elsewhere(CXX="no-such-compiler")
    assert plan.kind == "plain"
    assert log.count("\n") == 1
    assert "no-such-compiler" in log and "several times more slowly" in log and "CXX" in log


@pytest.mark.slow
def test_without_any_compiler_the_plain_engine_is_taken(own_cache, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "bin").mkdir()
    plan, log = choose_elsewhere(PATH=str(tmp_path / "bin"))
    assert plan.kind == "plain"
    assert log.count("\n") == 1 and "There is no C++ compiler" in log and "Install g++" in log


@pytest.mark.slow
def test_with_a_failing_compiler_the_plain_engine_is_taken(own_cache):
    plan, log = choose_elsewhere(CXX="false")
    assert plan.kind == "plain" and "does not compile" in log
    assert not [path for path in own_cache.rglob("*") if path.suffix == ".so"]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_where_the_cache_cannot_be_written_the_fast_engine_is_compiled_for_the_process(own_cache, tmp_path):
    (own_cache / "_kernels").write_text("no folder, so that the superuser cannot write there either")
    _, log = choose_elsewhere("from ddkit.network import winograd\nwinograd.load()", TMPDIR=str(tmp_path))
    assert log == "" and not list(tmp_path.iterdir())


def test_other_networks_are_computed_plainly_and_in_chunks_only_without_batch_statistics():
    assert choose_plan(build_network("alexnet", 10, 32, seed=0), "float32", 8) == EnginePlan("plain", "float32", 16)
    assert choose_plan(nn.Sequential(nn.BatchNorm2d(3)), "bfloat16", 8) == EnginePlan("plain", "bfloat16", 0)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
def test_without_bfloat16_instructions_no_engine_needs_them(monkeypatch):
    network = build_network("convnet", 10, 32, seed=0)
    monkeypatch.setattr(autotune, "has_bfloat16", lambda device: True)
    either = [plan for precision in PRECISIONS for plan in candidates(network, precision, 8)]
    assert choose_plan(network, "auto", 8) in either
    monkeypatch.setattr(autotune, "has_bfloat16", lambda device: False)
    assert choose_plan(network, "auto", 8) == choose_plan(network, "float32", 8)
    assert {(plan.kind, plan.products) for plan in candidates(network, "bfloat16", 8)} == {("winograd", "own")}


def test_smaller_plans_of_a_cpu_halve_their_chunks_down_to_one_image():
    plan, chunks = EnginePlan("winograd", "float32", 6, 2), []
    while plan := with_smaller_chunks(plan, 256):
        chunks.append(plan.chunk)
    assert chunks == [3, 1]
    assert with_smaller_chunks(EnginePlan(), 256).chunk == 128


@pytest.mark.parametrize("kind", ["cuda_graph", "compiled"])
@pytest.mark.parametrize("chunk", [0, 64])
def test_a_smaller_plan_of_a_gpu_first_leaves_the_graph_out(kind, chunk):
    plan = EnginePlan(kind, "float32", chunk, channels_last=True)
    assert with_smaller_chunks(plan, 256) == EnginePlan("plain", "float32", chunk, channels_last=True)


def on_gpu():
    return build_network("convnet", 10, 16, seed=0).to("cuda")


def test_both_layouts_and_chunks_within_the_graph_are_tried_on_a_gpu(gpu):
    plans = candidates(build_network("convnet", 10, 64, seed=0).to("cuda"), "float32", 256)
    assert {(plan.kind, plan.chunk, plan.channels_last) for plan in plans} == {
        (kind, chunk, layout)
        for kind, chunk in [("plain", 0), ("cuda_graph", 0), ("cuda_graph", 16)]
        for layout in (False, True)
    }


def test_a_network_is_not_compiled_for_a_short_training(gpu, own_cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: pytest.fail("it was compiled"))
    for images_left in (0, 1000):
        assert choose_plan(on_gpu(), "float32", 8, images_left=images_left).kind in ("plain", "cuda_graph")


@pytest.mark.slow
def test_compiling_is_tried_once_for_a_long_training_and_remembered(gpu, own_cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(1) or function)
    plan = choose_plan(on_gpu(), "float32", 8, images_left=10**9)
    assert len(compiled) == 2  # for each layout
    assert choose_plan(on_gpu(), "float32", 8, images_left=10**9) == plan and len(compiled) == 2
    # What compiling takes counts: for a training that is soon over, the same measurements say no.
    memory = json.loads((own_cache / "_engines.json").read_text())
    (key,) = (key for key in memory if key.endswith("compiled"))
    (other,) = memory.keys() - {key}
    memory[other]["seconds"], memory[key]["seconds"], memory[key]["start"] = 1.0, 0.5, 1000.0
    (own_cache / "_engines.json").write_text(json.dumps(memory))
    assert choose_plan(on_gpu(), "float32", 8, images_left=1999).kind != "compiled"
    assert choose_plan(on_gpu(), "float32", 8, images_left=2001).kind == "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "gcc"), RuntimeError("no backend"), ImportError("triton")])
def test_where_compiling_fails_the_best_of_the_others_is_chosen(gpu, own_cache, monkeypatch, error):
    def no_compiler(function, **options):
        def fail(*args):
            raise error

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert choose_plan(on_gpu(), "float32", 8, images_left=10**9).kind in ("plain", "cuda_graph")


def test_measuring_gives_the_gpus_memory_back(gpu, own_cache):
    choose_plan(on_gpu(), "float32", 8)
    assert gpu.released >= len(candidates(on_gpu(), "float32", 8))


@pytest.mark.slow
def test_with_too_little_memory_chunks_become_smaller():
    """A process that may not grow by what the whole batch needs trains it in parts."""
    program = (
        "import logging, resource, torch\n"
        "logging.basicConfig(format='%(message)s')\n"
        "from ddkit.network.networks import build_network\n"
        "from ddkit.network.plan import EnginePlan\n"
        "from ddkit.network.training import TrainingRun, TrainingSettings\n"
        "network = build_network('convnet', 10, 64, seed=0)\n"
        "images, labels = torch.randn(24, 3, 64, 64), torch.arange(24) % 10\n"
        "def run():\n"
        "    return TrainingRun(network, images, labels, TrainingSettings(0, batch_size=24),\n"
        "                       torch.Generator().manual_seed(0), EnginePlan('plain'))\n"
        "TrainingRun(network, images[:1], labels[:1], TrainingSettings(0), torch.Generator(), EnginePlan('plain')).epoch()\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (120 << 20), -1))\n"
        "training = run()\n"
        "print(len(training.epoch()), training.state_dict()['plan']['chunk'])\n"
    )
    finished = processes.run("-c", program)
    assert finished.returncode == 0, finished.stderr
    batches, chunk = map(int, finished.stdout.split())
    assert batches == 1 and 0 < chunk < 24
    assert "Not enough memory: computing 12 images at a time" in finished.stderr
