"""How long decoding a dataset takes: one image after another as torchvision does it, here in one process, and on all cores.

    python tools/bench_data.py PATH [--images N] [--repeats N]

PATH: an image folder, a zip of one, or tiny-imagenet-200. The ways run in turn, `repeats` times; the best of each counts.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddkit.data.archives import open_tree
from ddkit.data.decoding import decode_split
from ddkit.data.sources import FileSplit, open_source
from ddkit.data.split_file import SplitFile
from ddkit.runtime.openmp import available_cpus


def decode_plainly(path: Path, names: Sequence[str]) -> np.ndarray:
    """One image after another into memory, as a loader over torchvision's ImageFolder would."""
    tree = open_tree(path)
    return np.stack([np.asarray(Image.open(io.BytesIO(tree.read(name))).convert("RGB")) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    content = open_source(arguments.path).splits["train"]
    if not isinstance(content, FileSplit):
        parser.error("that source holds pixels, there is nothing to decode")
    names = content.names[: arguments.images]
    side = decode_plainly(arguments.path, names[:1]).shape[1]

    with tempfile.TemporaryDirectory() as folder:
        target = SplitFile.create(Path(folder) / "images", content.labels[: len(names)], side)
        ways: dict[str, Callable[[], object]] = {
            "one after another": lambda: decode_plainly(arguments.path, names),
            "one process": lambda: decode_split(arguments.path, names, target, workers=0),
            f"{available_cpus()} processes": lambda: decode_split(arguments.path, names, target),
        }
        seconds: dict[str, float] = dict.fromkeys(ways, float("inf"))
        for _ in range(arguments.repeats):
            for way, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[way] = min(seconds[way], time.perf_counter() - began)
    for way, best in seconds.items():
        print(f"{way:>20}: {best:6.2f} s  {len(names) / best:7.0f} images/s")


if __name__ == "__main__":
    main()
