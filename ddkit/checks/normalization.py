"""Whether the numbers are normalized as the scorer takes them, and stored channels first.

Images of 8-bit pixels lie exactly on the lattice (k / 255 - mean) / std of the constants they were normalized with,
which names those constants beyond doubt. Images that were only clipped to [0, 1] begin and end at its corners. For
others the moments say something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddkit.challenge import CIFAR100, TINYIMAGENET, DatasetSpec
from ddkit.sets.findings import Finding

_VALUES_TESTED = 50_000  # per channel
_ON_LATTICE = 0.02  # of an 8-bit step, either way; by chance 4 in 100 values are this near
_SHARE_ON_LATTICE = 0.99  # a few values may have been touched
_SCREENED_VALUES = 50  # every so many are looked at first
_SCREENED_SHARE = 0.9  # of them, on the lattice, to look at all
_FEWEST_LEVELS = 12  # different 8-bit values; fewer lie on many lattices
_CORNER = 0.01  # of the range: how near the extremes of clipped images come to its ends
_FITS = 0.125  # times as far from the real moments as under the right constants
_FITS_UNIT = 0.35  # the same of values that were not normalized at all, which noise spreads
_MISFITS = 0.15  # distance of moments
_FAR_OFF = 1.0  # distance of moments that no set of images should have
_SMOOTHER = 0.9  # differences between neighbors, channels last against as it stands; noise alone makes it 1
_ROWS_COMPARED = 500


@dataclass(frozen=True)
class _Constants:
    """What images may have been normalized with. code: of the finding; empty for the right ones."""

    title: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    code: str = "N004"


_UNIT = _Constants("values in [0, 1], not normalized", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "N001")
_SIGNED = _Constants("values in [-1, 1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "N002")
_BYTES = _Constants("values in [0, 255]", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "N003")
_OTHERS = (
    _Constants("CIFAR-10's constants", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    _Constants("CIFAR-10's constants", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    _Constants("ImageNet's constants", TINYIMAGENET.mean, TINYIMAGENET.std),
    _Constants("CIFAR-100's constants", CIFAR100.mean, CIFAR100.std),
)
# Other roundings of CIFAR-100's constants: values differ by a hundredth of a standard deviation at most.
_ROUNDINGS = (
    _Constants("another rounding of CIFAR-100's constants", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "N005"),
    _Constants("another rounding of CIFAR-100's constants", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "N005"),
    _Constants("another rounding of CIFAR-100's constants", (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), "N005"),
)


def normalization_findings(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """What the values say about how they were normalized (codes N001-N010; a table is in submission/README.md).

    images: (N, 3, S, S) float32, finite. The real images are not needed.
    """
    if _is_channels_last(images):
        return [_channels_last(where)]
    return _by_lattice(images, spec, where) or _by_corners(images, spec, where) or _by_moments(images, spec, where)


def _candidates(spec: DatasetSpec) -> list[_Constants]:
    """All that images may have been normalized with, the right constants first, each once."""
    right = _Constants(f"{spec.name}'s constants", spec.mean, spec.std, "")
    exchanged = "the dataset's constants with red and blue exchanged (BGR for RGB)"
    named = [right, _UNIT, _SIGNED, _BYTES, *_OTHERS, _Constants(exchanged, spec.mean[::-1], spec.std[::-1], "N006")]
    named += _ROUNDINGS if spec.name == CIFAR100.name else ()
    kept: dict[tuple[float, ...], _Constants] = {}
    for constants in named:
        kept.setdefault((*constants.mean, *constants.std), constants)
    return list(kept.values())


def _by_lattice(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """The one set of constants under which the values are 8-bit pixels; nothing where none or several fit."""
    values = _sample(images)
    few = values[:, ::_SCREENED_VALUES]
    likely = [each for each in _candidates(spec) if _share(_levels(few, each)[1]) >= _SCREENED_SHARE]
    fitting = [(share, each) for each in likely if (share := _lattice_share(values, each)) >= _SHARE_ON_LATTICE]
    if not fitting:
        return []
    share, found = max(fitting, key=lambda pair: pair[0])
    evidence = f"{share:.1%} of the values are exact 8-bit pixels under {_numbers(found)}"
    if found.code == "" or any(each.code == "" for _, each in fitting):
        return [Finding("info", "N010", f"Normalized with {spec.name}'s constants: {share:.1%} are exact 8-bit pixels.", where)]
    return [_wrong_constants(found, spec, evidence, where)]


def _lattice_share(values: Tensor, constants: _Constants) -> float:
    """Smallest share over channels of values on the lattice; 0 where too few levels occur. values: (3, M) float64."""
    levels, on = _levels(values, constants)
    if min(len(channel.unique()) for channel in levels) < _FEWEST_LEVELS:
        return 0.0
    return _share(on)


def _levels(values: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """(3, M): the nearest 8-bit value of each, and whether it is one."""
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None] for numbers in (constants.mean, constants.std))
    pixels = (values * std + mean) * 255
    levels = pixels.round()
    return levels, ((pixels - levels).abs() <= _ON_LATTICE) & (levels >= 0) & (levels <= 255)


def _share(on: Tensor) -> float:
    """Smallest share over channels of values that are 8-bit ones."""
    return float(on.double().mean(dim=1).min())


def _by_corners(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """Constants under which each channel runs from just 0 to just 1, as in images clipped to [0, 1]."""
    channels = images.double().transpose(0, 1).flatten(1)
    lowest, highest = channels.amin(dim=1), channels.amax(dim=1)
    fitting = []
    for constants in _candidates(spec):
        mean, std = torch.tensor(constants.mean).double(), torch.tensor(constants.std).double()
        off = torch.stack([lowest * std + mean, highest * std + mean - 1]).abs().max()
        if off <= _CORNER:
            fitting.append((float(off), constants))
    if not fitting:
        return []
    found = min(fitting, key=lambda pair: pair[0])[1]
    if found.code == "" or any(constants.code == "" for _, constants in fitting):
        message = f"Normalized with {spec.name}'s constants: every channel runs from black to white exactly."
        return [Finding("info", "N010", message, where)]
    ranges = ", ".join(f"{low:.2f} to {high:.2f}" for low, high in zip(lowest.tolist(), highest.tolist(), strict=True))
    return [_wrong_constants(found, spec, f"the channels run from {ranges}, which is [0, 1] under {_numbers(found)}", where)]


def _by_moments(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """Constants under which mean and spread are those of the real images, where the right ones are far from it."""
    mean, std = images.double().mean(dim=(0, 2, 3)), images.double().std(dim=(0, 2, 3))
    distances = [(_moment_distance(mean, std, constants, spec), constants) for constants in _candidates(spec)]
    ours = distances[0][0]
    nearest, found = min(distances, key=lambda pair: pair[0])
    moments = f"means {_triple(mean.tolist())}, standard deviations {_triple(std.tolist())}"
    fits = _FITS_UNIT if found is _UNIT else _FITS
    if found.code not in ("", "N005") and nearest <= fits * ours and ours >= _MISFITS:
        evidence = f"{moments}, as the real images have them under {_numbers(found)}"
        wrong = _wrong_constants(found, spec, evidence, where)
        return [Finding("warning", wrong.code, wrong.message, where)]
    if ours >= _FAR_OFF:
        message = f"The values are far from normalized images': {moments}; they should be near 0 and 1."
        return [Finding("warning", "N009", message, where)]
    return []


def _moment_distance(mean: Tensor, std: Tensor, constants: _Constants, spec: DatasetSpec) -> float:
    """How far moments are from those of the real images, had they been normalized with `constants`.

    Root mean square over channels of the differences in mean, in standard deviations, and in log deviation. The
    dataset's own constants stand for the moments of its images.
    """
    theirs_mean, theirs_std = torch.tensor(constants.mean).double(), torch.tensor(constants.std).double()
    real_mean, real_std = torch.tensor(spec.mean).double(), torch.tensor(spec.std).double()
    pixel_mean, pixel_std = mean * theirs_std + theirs_mean, std * theirs_std
    shift = (pixel_mean - real_mean) / real_std
    spread = (pixel_std.clamp_min(1e-6) / real_std).log()
    return float(torch.stack([shift, spread]).square().mean().sqrt())


def _is_channels_last(images: Tensor) -> bool:
    """Whether the memory makes clearly smoother images when read as (N, S, S, 3)."""
    sample = images[:: max(1, len(images) // _ROWS_COMPARED)]
    count, channels, side, _ = sample.shape
    other = sample.reshape(count, side, side, channels).permute(0, 3, 1, 2)
    return _roughness(other) < _SMOOTHER * _roughness(sample)


def _roughness(images: Tensor) -> float:
    """Mean absolute difference between vertical and horizontal neighbors."""
    return float(images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean())


def _channels_last(where: str) -> Finding:
    message = (
        "The images were stored channels last, (rows, S, S, 3), and only reshaped: read that way they are smooth, as "
        "they stand they are not. Use tensor.reshape(rows, S, S, 3).permute(0, 3, 1, 2) on this file, "
        "or permute instead of reshape when making it."
    )
    return Finding("error", "N007", message, where)


def _wrong_constants(found: _Constants, spec: DatasetSpec, evidence: str, where: str) -> Finding:
    right = f"{_triple(spec.mean)} and {_triple(spec.std)}"
    if found.code == "N005":
        message = f"Normalized with {found.title}: {evidence}. Harmless; the scorer's are {right}."
        return Finding("info", "N005", message, where)
    message = f"Wrong normalization: {found.title}: {evidence}. The scorer takes (x - mean) / std with {right}."
    return Finding("error", found.code, message, where)


def _sample(images: Tensor) -> Tensor:
    """(3, M) float64: evenly chosen values of each channel."""
    channels = images.transpose(0, 1).flatten(1)
    # An odd step meets all columns.
    step = max(1, channels.shape[1] // _VALUES_TESTED) | 1
    return channels[:, ::step].double()


def _numbers(constants: _Constants) -> str:
    if constants is _BYTES:
        return "mean 0 and std 1/255"
    return f"mean {_triple(constants.mean)} and std {_triple(constants.std)}"


def _triple(values: tuple[float, ...] | list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
