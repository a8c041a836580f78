"""Reads mutated submissions, one after another, in a process that may not execute, hang or grow.

`python fuzz_worker.py SEED COUNT CANARY`: prints the number of files read; any traceback is a failure of ddkit.
A file that takes over 5 seconds ends the process by SIGALRM; memory beyond 512 MiB more than at the start, by MemoryError.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from ddkit.challenge import DatasetSpec
from ddkit.checks.archive import Member, read_members
from ddkit.sets.findings import Finding
from ddkit.sets.reading import read_tensor_bytes

SPEC = DatasetSpec("tiny", 2, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SECONDS_PER_FILE = 5
EXTRA_BYTES = 512 << 20


class Hostile:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def seeds(canary: str) -> list[tuple[bool, bytes]]:
    """Files to mutate, each with whether it is a submission zip: good, unfortunate and hostile ones."""
    images = torch.randn(20, *SPEC.image_shape, generator=torch.Generator().manual_seed(0))
    values = [images, images.double(), images[:10], {"images": images}, [images], torch.nn.Parameter(images),
              images.numpy(), [(image, 1) for image in images], images[:1].expand(images.shape),
              Hostile(canary), {"images": images, "hook": Hostile(canary)}]  # fmt: skip
    tensors = [_saved(value, pickle_protocol=protocol) for value in values for protocol in (2, 4)]
    tensors += [_saved(images, _use_new_zipfile_serialization=False), pickle.dumps(Hostile(canary))]
    zips = [_zipped({"tiny.pt": data, "other.pt": tensors[0]}, kind)
            for data in tensors[:3] for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]  # fmt: skip
    return [(False, data) for data in tensors] + [(True, data) for data in zips]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to eight edits: bits and bytes changed, blocks cut, doubled, zeroed or moved, numbers made extreme."""
    mutated = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        if not mutated:
            break
        # The ends of these files hold their structure: half of the edits go there.
        at = chance.randrange(len(mutated)) if chance.random() < 0.5 else -1 - chance.randrange(min(400, len(mutated)))
        at %= len(mutated)
        length = chance.choice((1, 2, 4, 8, 64, 512))
        edit = chance.randrange(7)
        if edit == 0:
            mutated[at] ^= 1 << chance.randrange(8)
        elif edit == 1:
            mutated[at] = chance.randrange(256)
        elif edit == 2:
            del mutated[at : at + length]
        elif edit == 3:
            mutated[at:at] = mutated[at : at + length]
        elif edit == 4:
            mutated[at : at + length] = bytes(len(mutated[at : at + length]))
        elif edit == 5:
            mutated[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"))
        else:
            to = chance.randrange(len(mutated))
            mutated[to:to] = mutated[at : at + length]
    return bytes(mutated)


def mutate_within(data: bytes, chance: random.Random) -> bytes:
    """A file of torch.save with a member changed and its checksum right, so that the change is not refused for that."""
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(rebuilt, "w") as new:
        names = old.namelist()
        changed = chance.choice([name for name in names if name.endswith(("data.pkl", "byteorder"))] * 4 + names)
        for name in names:
            content = old.read(name)
            if name == changed:
                content = chance.choice((b"big", b"")) if chance.random() < 0.1 else mutate(content, chance)
            new.writestr(name, content)
    return rebuilt.getvalue()


def read(is_zip: bool, data: bytes, folder: Path) -> None:
    """What `check` does with a file of a stranger, up to where its numbers are looked at."""
    if not is_zip:
        tensor, findings = read_tensor_bytes(data, "tiny.pt", SPEC, ipc=10)
        assert (tensor is None) == any(finding.level == "error" for finding in findings)
        return
    path = folder / "mutated.zip"
    path.write_bytes(data)
    for item in read_members(path, lambda name: name.endswith(".pt"), largest_bytes=100_000):
        assert isinstance(item, (Member, Finding))
        if isinstance(item, Member) and item.data is not None:
            read(False, item.data, folder)


def main() -> None:
    seed, count, canary = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    chance = random.Random(seed)
    originals = seeds(canary)
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            is_zip, original = chance.choice(originals)
            within = original.startswith(b"PK") and not is_zip and chance.random() < 0.5
            signal.alarm(SECONDS_PER_FILE)
            read(is_zip, (mutate_within if within else mutate)(original, chance), Path(folder))
            signal.alarm(0)
    print(count)


def _saved(value: object, **kwargs: bool | int) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def _zipped(members: dict[str, bytes], kind: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
