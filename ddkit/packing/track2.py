"""Packing track 2: the bundle built, zipped, proved, and never half written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddkit.generator.model_folder import Model, load_model
from ddkit.generator.sampling import Sampler
from ddkit.packing.bundle import EntryModel, build_folder, zip_folder
from ddkit.packing.pack import PackedFile, packed_files
from ddkit.packing.proof import Proof, ProofSettings, prove
from ddkit.runtime.files import atomic_write, sha256_of
from ddkit.runtime.progress import Listener, ignore


@dataclass(frozen=True)
class PackedEntry:
    """A packed track 2 entry. proofs: of each dataset; empty where none was asked for."""

    path: Path
    sha256: str
    files: tuple[PackedFile, ...]
    proofs: tuple[Proof, ...]

    @property
    def size(self) -> int:
        """Bytes of the zip."""
        return self.path.stat().st_size


def pack_entry(
    models: Sequence[EntryModel], out: Path, *, proof: ProofSettings | None, progress: Listener = ignore
) -> PackedEntry:
    """Bundle models with the stand-alone scripts into the zip `out`, and prove it before it takes its place.

    The same models and settings always make the same bytes. proof: None packs without. An earlier zip stays as it was
    when anything fails. Raises what `build_folder` and `prove` raise.
    """
    with tempfile.TemporaryDirectory(prefix="ddkit-pack-") as temporary, atomic_write(out) as zipped:
        zip_folder(build_folder(models, Path(temporary) / "bundle"), zipped)
        proofs = prove(zipped, proof, progress=progress) if proof else ()
    return PackedEntry(out, sha256_of(out), packed_files(out), proofs)


@dataclass(frozen=True)
class RoundingCost:
    """What storing weights as float16 changes in images: differences of pixels, in steps of 1/255."""

    mean: float
    largest: int
    images: int


@torch.no_grad()
def rounding_cost(model: EntryModel, *, images: int = 32, device: str = "cpu") -> RoundingCost:
    """Sample the same images with the weights as they are and rounded to float16, and compare them."""
    original, rounded = load_model(model.folder), _rounded(load_model(model.folder))
    classes = len(original.facts.class_names)
    labels, indices = torch.arange(images) % classes, torch.arange(images) // classes
    config = replace(model.settings.sampling, batch_size=images, compile=False)
    samplers = (Sampler(model, config, device) for model in (original, rounded))
    first, second = (torch.cat([*sampler.images(labels, indices)]) for sampler in samplers)
    difference = (first.int() - second.int()).abs()
    return RoundingCost(float(difference.float().mean()), int(difference.max()), images)


@torch.no_grad()
def _rounded(model: Model) -> Model:
    for network in (model.denoiser, model.autoencoder):
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    return model
