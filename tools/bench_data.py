"""How long decoding a dataset takes: one image after another as torchvision does it, ddkit in one process, and on all cores.

    python tools/bench_data.py PATH [--images N] [--repeats N]

PATH: any source of image files. The ways run in turn, `repeats` times; the best time of each is printed.
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

from ddkit.data.archives import Tree
from ddkit.data.decoding import decode_split
from ddkit.data.listing import FileSplit
from ddkit.data.sources import open_source
from ddkit.data.split_file import SplitFile
from ddkit.runtime.openmp import available_cpus


def decode_plainly(tree: Tree, names: Sequence[str]) -> np.ndarray:
    """One image after another into memory, as a loader over torchvision's ImageFolder would."""
    return np.stack([np.asarray(Image.open(io.BytesIO(tree.read(name))).convert("RGB")) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = open_source(arguments.path, Path(folder)).splits["train"]
        if not isinstance(content, FileSplit):
            parser.error("that source holds pixels, so there is nothing to decode")
        tree, names = content.tree, content.names[: arguments.images]
        side = decode_plainly(tree, names[:1]).shape[1]
        target = SplitFile.create(Path(folder) / "images", content.labels[: len(names)], side)
        ways: dict[str, Callable[[], object]] = {
            "one after another": lambda: decode_plainly(tree, names),
            "one process": lambda: decode_split(tree, names, target, workers=0),
            f"{available_cpus()} processes": lambda: decode_split(tree, names, target),
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
