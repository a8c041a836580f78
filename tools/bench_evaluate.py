#!/usr/bin/env python3
"""The speed of ddkit's evaluation next to the challenge's own code: both on this machine, in turn, in one run.

    python tools/bench_evaluate.py --official PATH/TO/ECCV2024-Dataset-Distillation-Challenge --memory

For each dataset both train the same network on the same random images (ten a class, batches of 256, augmentation
drawn as each does it); the official code's functions are imported from the checkout and called as its own loop calls
them, with only the device changed. Each measurement is one process, so that its peak memory is its own; a
measurement of the official code is always followed by one of ddkit. Figures are images a second over whole batches,
training only, over at least five seconds after an epoch to warm up; the ratio is of the medians.

--pass features and --pass gradients measure instead what refinement does with such a network: the embeddings of images,
and these with their gradients to the images. --processor-time counts seconds in which a core computed, for a machine whose
cores other work shares; set OMP_NUM_THREADS=1 with it.

--memory adds the peak memory of a whole TinyImageNet evaluation at E = 0, one round, test set included: the official
code loads its reference file of 10,000 float images, ddkit tests from uint8 pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DATASETS = ("cifar100", "tinyimagenet")
CONTENDERS = ("official", "float32", "bfloat16")
BATCHES = {"cifar100": 2, "tinyimagenet": 1}  # of 256 images, in one epoch of this benchmark
PASSES = ("training", "features", "gradients")
SECONDS = 5.0  # of epochs that are timed in one measurement


def main() -> None:
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(_measure(arguments)))
        return
    load = os.getloadavg()[0]
    tables = {"speed": _speed_rows(arguments)}
    if arguments.memory:
        tables["memory"] = _memory_rows(arguments)
    from ddkit.runtime.device import cpu_model
    from ddkit.runtime.environment import versions

    for rows in tables.values():
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")
        print()
    print(f"{cpu_model()}, {os.cpu_count()} cores, torch {versions()['torch']}; load average before: {load:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a checkout of the challenge's repository")
    parser.add_argument("--dataset", choices=DATASETS, action="append", help="one of them; both when left out")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append", help="one of them; training when left out")
    parser.add_argument("--processor-time", action="store_true", help="count what a core computed, not what the clock showed")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a whole evaluation")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _speed_rows(arguments: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for dataset, what in itertools.product(arguments.dataset or DATASETS, arguments.passes or PASSES[:1]):
        found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for repeat in range(arguments.repeats):
            for contender in CONTENDERS:
                found[contender].append(_in_own_process(arguments, contender, dataset, what))
                done = f"{dataset}, {what}, {contender}, {repeat + 1}: {found[contender][-1]}"
                print(done, file=sys.stderr, flush=True)
        speeds = {each: statistics.median(run["images_per_second"] for run in runs) for each, runs in found.items()}
        for contender, runs in found.items():
            rows.append(
                {
                    "dataset": dataset,
                    "pass": what,
                    "code": contender if contender == "official" else f"ddkit {contender}",
                    "images/s": round(speeds[contender], 1),
                    "x official": round(speeds[contender] / speeds["official"], 2),
                    "x float32": round(speeds[contender] / speeds["float32"], 2),
                    "peak MiB": round(max(run["peak_mib"] for run in runs)),
                }
            )
    return rows


def _memory_rows(arguments: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments.reference = Path(folder) / "tinyimagenet_test.pt"
        _write_reference(arguments.reference)
        runs = {each: _in_own_process(arguments, each, "tinyimagenet", "training") for each in ("official", "float32")}
    return [
        {
            "a whole TinyImageNet evaluation": contender if contender == "official" else f"ddkit {contender}",
            "peak MiB": round(run["peak_mib"]),
            "of official": round(run["peak_mib"] / runs["official"]["peak_mib"], 2),
            "seconds": round(run["seconds"]),
        }
        for contender, run in runs.items()
    ]


def _in_own_process(arguments: argparse.Namespace, contender: str, dataset: str, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--official", str(arguments.official), "--device", arguments.device]
    command += ["--dataset", dataset, "--pass", what, "--measure", contender]
    command += ["--processor-time"] if arguments.processor_time else []
    command += ["--reference", str(arguments.reference)] if arguments.reference else []
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"measuring {contender} on {dataset} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The measurement of one contender, in a separate process."""
    (dataset,) = arguments.dataset
    if arguments.reference:
        measured = _whole_evaluation(arguments, dataset)
    else:
        measured = _speed(arguments, dataset)
    return {**measured, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """The largest amount of memory that this process has held.

    Linux's VmHWM where there is one, as getrusage counts what the process that started this one held, too.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _speed(arguments: argparse.Namespace, dataset: str) -> dict[str, float]:
    import torch

    size, classes = _facts(dataset)
    images = torch.randn(10 * classes, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(classes).repeat_interleave(10)
    if arguments.passes != ["training"]:
        make = _look
    else:
        make = _official_epoch if arguments.measure == "official" else _ddkit_epoch
    count = 256 * BATCHES[dataset]
    places = torch.arange(count) % len(images)
    epoch = make(arguments, dataset, images[places], labels[places])
    epoch()  # compiling, choosing and the first touch of all memory are not part of it
    now = time.process_time if arguments.processor_time else time.perf_counter
    epochs, began = 0, now()
    while now() - began < SECONDS:
        epoch()
        epochs += 1
    if arguments.device.startswith("cuda"):
        torch.cuda.synchronize(arguments.device)  # embeddings are only queued
    seconds = now() - began
    return {"images_per_second": epochs * count / seconds}


def _official_epoch(arguments: argparse.Namespace, dataset: str, images, labels) -> Callable[[], object]:
    import torch

    official, _, utils = _official_modules(arguments.official)
    network = _official_network(arguments, dataset)
    data = official.TensorDataset(images.to(arguments.device), labels.to(arguments.device))
    loader = torch.utils.data.DataLoader(data, batch_size=256, shuffle=True, num_workers=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    loss = torch.nn.CrossEntropyLoss()
    augmentation = utils.ParamDiffAug()
    return lambda: official.epoch(
        "train", loader, network, optimizer, loss, aug=True, dsa_param=augmentation, device=arguments.device
    )


def _official_network(arguments: argparse.Namespace, dataset: str):
    _, network_module, _ = _official_modules(arguments.official)
    size, classes = _facts(dataset)
    network = network_module.ConvNet(3, classes, 128, 3, "relu", "instancenorm", "avgpooling", (size, size))
    return network.to(arguments.device)


def _look(arguments: argparse.Namespace, dataset: str, images, labels) -> Callable[[], object]:
    """One pass over the images without training: their embeddings, and the gradients to them where those are asked for."""
    import torch

    from ddkit.network.embedding import build_embedder
    from ddkit.network.networks import build_network

    size, classes = _facts(dataset)
    if arguments.measure == "official":
        embed = _official_network(arguments, dataset).requires_grad_(False).embed
    else:
        embed = build_embedder(build_network("convnet", classes, size, seed=0).to(arguments.device), 256, arguments.measure)
    batches = images.to(arguments.device).split(256)

    def features() -> None:
        with torch.no_grad():
            for batch in batches:
                embed(batch)

    def gradients() -> None:
        for batch in batches:
            embed(batch.requires_grad_()).sum().backward()

    return gradients if arguments.passes == ["gradients"] else features


def _ddkit_epoch(arguments: argparse.Namespace, dataset: str, images, labels) -> Callable[[], object]:
    import torch

    from ddkit.network.networks import build_network
    from ddkit.network.training import TrainingRun, TrainingSettings

    size, classes = _facts(dataset)
    network = build_network("convnet", classes, size, seed=0).to(arguments.device)
    settings = TrainingSettings(1000, precision=arguments.measure)
    images, labels = images.to(arguments.device), labels.to(arguments.device)
    return TrainingRun(network, images, labels, settings, torch.Generator().manual_seed(0)).epoch


def _whole_evaluation(arguments: argparse.Namespace, dataset: str) -> dict[str, float]:
    import torch

    size, classes = _facts(dataset)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        submission = Path(folder) / f"{dataset}.pt"
        torch.save(torch.randn(10 * classes, 3, size, size), submission)
        if arguments.measure == "official":
            _official_evaluation(arguments, submission, dataset)
        else:
            _ddkit_evaluation(arguments, submission, dataset)
    return {"seconds": time.perf_counter() - began}


def _official_evaluation(arguments: argparse.Namespace, submission: Path, dataset: str) -> None:
    """The steps of the official evaluator, E = 0 and one round."""
    import torch

    official, _, _ = _official_modules(arguments.official)
    _, classes = _facts(dataset)
    images = torch.load(submission)
    labels = torch.arange(classes).repeat_interleave(10)
    _official_epoch(arguments, dataset, images, labels)()
    reference = torch.load(arguments.reference, map_location="cpu")
    tests = official.TensorDataset(reference["images_val"], reference["labels_val"])
    loader = torch.utils.data.DataLoader(tests, batch_size=256, shuffle=True, num_workers=0)
    official.epoch(
        "test",
        loader,
        _official_network(arguments, dataset),
        None,
        torch.nn.CrossEntropyLoss(),
        aug=False,
        dsa_param=None,
        device=arguments.device,
    )


def _ddkit_evaluation(arguments: argparse.Namespace, submission: Path, dataset: str) -> None:
    import torch
    from safetensors.torch import safe_open

    from ddkit.data.store import ImageSet
    from ddkit.evaluation.evaluate import evaluate

    with safe_open(arguments.reference.with_suffix(".safetensors"), "pt") as file:
        tests = ImageSet(file.get_tensor("images"), file.get_tensor("labels"), tuple(map(str, range(200))))
    images = torch.load(submission, weights_only=True)
    labels = torch.arange(_facts(dataset)[1]).repeat_interleave(10)
    evaluate(images, labels, tests, epochs_setting=0, rounds=1, device=arguments.device)


def _write_reference(path: Path) -> None:
    """Random test images, as the challenge's reference file and as ddkit's prepared store hold them."""
    import torch
    from safetensors.torch import save_file

    from ddkit.challenge import TINYIMAGENET
    from ddkit.data.images import normalize

    pixels = torch.randint(0, 256, (10_000, 3, 64, 64), dtype=torch.uint8)
    labels = torch.arange(10_000) % 200
    torch.save({"images_val": normalize(pixels, TINYIMAGENET), "labels_val": labels}, path)
    save_file({"images": pixels, "labels": labels}, path.with_suffix(".safetensors"))


def _official_modules(checkout: Path):
    """The challenge's evaluate.py, its network and its augmentation; the script asks for a GPU's state on import."""
    sys.path.insert(0, str(checkout))
    with contextlib.redirect_stdout(sys.stderr):
        import evaluate as official
        from utils import network, utils

    return official, network, utils


def _facts(dataset: str) -> tuple[int, int]:
    from ddkit.challenge import DATASETS as SPECS

    return SPECS[dataset].image_size, SPECS[dataset].num_classes


if __name__ == "__main__":
    main()
