"""Check that values are normalized as the scorer expects, with the channels first.

8-bit pixels keep their lattice under every normalization: each channel takes at most 256 values, a constant step apart.
The step gives the standard deviation that was divided by and the lowest value gives the mean, so that any constants can
be solved for, known or not. Images that are only clipped to [0, 1] show the same by their darkest and brightest values.
For all other images the first two moments and the power spectrum are what can be judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from ddkit.challenge import CIFAR100, TINYIMAGENET, DatasetSpec
from ddkit.sets.findings import Finding

_VALUES_TESTED = 200_000  # per channel
_VALUES_SCREENED = 20_000  # per channel; a channel that shows more levels than these cannot be 8-bit
_MOST_LEVELS = 1024  # 8-bit images show 256, or a few more where hardware rounds the same pixel in two ways
_FEWEST_LEVELS = 12  # fewer fit many lattices
_ON_LATTICE = 0.1  # of a step; half precision moves values by up to 0.07
_SHARE_ON_LATTICE = 0.99  # a few values may have been changed afterwards
_SAME_LATTICE = 0.01  # of a step, between two lattices, besides the measured rounding
_HARMLESS = 0.01  # largest difference of normalized values that another rounding of the constants makes
_SAME_CONTRAST = 0.003  # relative difference between channels
_CONTRASTS = (0.2, 5.0)  # beyond these a change of contrast is a mistake
_CORNER = 0.01  # of the range: how near clipped images come to black and white
_CLIPPED_SHARE = 0.001  # of the values exactly at each end
_FITS = 0.125  # times as far from the real moments as under the right constants
_FITS_UNIT = 0.35  # the same for values that were not normalized at all, which noise spreads
_FITS_MEAN_ONLY = 0.05  # the same for a missing division, which low contrast resembles
_MISFITS = 0.15  # distance between moments
_FAR_OFF = 1.0  # distance between moments that no set of images should have
_SMOOTHER = 0.9  # ratio of differences between neighbors, channels last to channels first; noise alone gives 1
_ROWS_COMPARED = 500
_FEWEST_ROWS = 20  # for a power spectrum
_FLAT = 5.0  # power at one cycle over that at four; 7 and more in pictures of any kind, at most 3 after whitening
_UNCORRELATED = 0.4  # between channels at low frequencies; 0.5 to 0.9 in pictures, at most 0.2 after whitening
_HEAVY_TAILS = 4.5  # kurtosis of differences between neighbors; 3 for noise, 6 and more for whitened pictures
_FALLING = 0.8  # power at high frequencies over that at low ones; 1 for noise

_Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Constants:
    """A way to normalize pixels in [0, 1]: (x - mean) / std. code: of the finding; empty for the right one."""

    title: str
    mean: _Triple
    std: _Triple
    code: str = "N004"


_UNIT = Constants("values in [0, 1], not normalized", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "N001")
_SIGNED = Constants("values in [-1, 1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "N002")
_BYTES = Constants("values in [0, 255]", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "N003")
_OF_DATASETS = (
    Constants("CIFAR-10's constants", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    Constants("CIFAR-10's constants", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    Constants("ImageNet's constants", TINYIMAGENET.mean, TINYIMAGENET.std),
    Constants("CIFAR-100's constants", CIFAR100.mean, CIFAR100.std),
)
# These only give a name to constants that are solved for: by their moments, they look like another contrast.
_OFTEN_GIVEN = (
    Constants("constants that are often given for CIFAR-100", (0.5071, 0.4867, 0.4408), (0.2009, 0.1984, 0.2023)),
    Constants("constants that are often given for CIFAR-100", (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    Constants("constants that are often given for CIFAR-100", (0.5070, 0.4865, 0.4409), (0.2011, 0.1987, 0.2025)),
    Constants("constants that are often given for TinyImageNet", (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    Constants("constants that are often given for TinyImageNet", (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
)


@dataclass(frozen=True)
class Verdict:
    """The judgment of how values were normalized. constants: those found; None where none explain the values."""

    finding: Finding
    constants: Constants | None = None


def judge_normalization(images: Tensor, spec: DatasetSpec, where: str = "") -> Verdict | None:
    """Judge how the values were normalized (codes N001 to N012; a table is in submission/README.md).

    images: (N, 3, S, S) float32, finite. The real images are not needed.
    Returns None if nothing speaks for or against the right constants.
    """
    sample = images[:: max(1, len(images) // _ROWS_COMPARED)]
    count, channels, side, _ = sample.shape
    if _roughness(sample.reshape(count, side, side, channels).permute(0, 3, 1, 2)) < _SMOOTHER * _roughness(sample):
        message = (
            "The images were stored channels last, (rows, S, S, 3), and then reshaped: read that way they are smooth, and "
            "in the present shape they are not. Use tensor.reshape(rows, S, S, 3).permute(0, 3, 1, 2).contiguous() on this "
            "file, or permute instead of reshape when you make it."
        )
        return Verdict(Finding("error", "N007", message, where))
    for judge in (_by_lattice, _by_corners, _by_spectrum, _by_moments):
        if verdict := judge(images, spec, where):
            return verdict
    return None


def named_constants(spec: DatasetSpec) -> dict[str, Constants]:
    """The ways to normalize that have a short name: "challenge" is the right one."""
    return {
        "challenge": _right_constants(spec),
        "unit": _UNIT,
        "signed": _SIGNED,
        "bytes": _BYTES,
        "cifar10": _OF_DATASETS[0],
        "imagenet": _OF_DATASETS[2],
        "cifar100": _OF_DATASETS[3],
    }


def _right_constants(spec: DatasetSpec) -> Constants:
    return Constants(f"{spec.name}'s constants", spec.mean, spec.std, "")


def _candidates(spec: DatasetSpec) -> list[Constants]:
    """Named ways to normalize, the right one first, each once."""
    right = _right_constants(spec)
    bases = [right, _SIGNED, *_OF_DATASETS, *_OFTEN_GIVEN]
    plain = [right, _UNIT, _SIGNED, _BYTES, *_OF_DATASETS, *_OFTEN_GIVEN]
    named = [*plain, *(variant for base in bases for variant in _variants(base, exchanged="N006" if base is right else "N004"))]
    for first in bases:
        for second in bases:
            mean = [m1 + s1 * m2 for m1, s1, m2 in zip(first.mean, first.std, second.mean, strict=True)]
            std = [s1 * s2 for s1, s2 in zip(first.std, second.std, strict=True)]
            title = f"{first.title}, twice" if first is second else f"first {first.title}, then {second.title}"
            named.append(Constants(title, _triple(mean), _triple(std)))
    once: dict[tuple[_Triple, _Triple], Constants] = {}
    for constants in named:
        once.setdefault((constants.mean, constants.std), constants)
    return list(once.values())


def _variants(base: Constants, exchanged: str) -> Iterator[Constants]:
    """Slips in the use of known constants. exchanged: code for the wrong order of channels."""
    mean, std = base.mean, base.std
    ones, zeros = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    yield Constants(f"{base.title} with red and blue exchanged (BGR for RGB)", mean[::-1], std[::-1], exchanged)
    yield Constants(f"{base.title}: the mean was subtracted, but not divided by the standard deviation", mean, ones)
    yield Constants(f"{base.title}: divided by the standard deviation, but the mean was not subtracted", zeros, std)
    yield Constants(f"{base.title}: divided by the variance", mean, _triple([s * s for s in std]))
    for factor, words in ((1 / 255, "applied to pixels in [0, 255]"), (255, "applied to pixels divided by 255 twice")):
        yield Constants(f"{base.title}, {words}", _triple([factor * m for m in mean]), _triple([factor * s for s in std]))
    for channel, color in enumerate(("red", "green", "blue")):
        yield Constants(f"{base.title} of the {color} channel for all channels", (mean[channel],) * 3, (std[channel],) * 3)


@dataclass(frozen=True)
class _Lattice:
    """The 8-bit pixels that were found, per channel: normalized value = lowest + step * (pixel - darkest pixel).

    span: brightest minus darkest pixel. rounding: root mean square distance from the lattice, in steps.
    share: of the values on the lattice; the smallest of the channels.
    """

    lowest: np.ndarray
    step: np.ndarray
    span: np.ndarray
    rounding: float
    share: float

    def fits(self, constants: Constants) -> bool:
        """True if normalizing 8-bit pixels with these constants gives this lattice."""
        mean, std = np.array(constants.mean), np.array(constants.std)
        darkest, brightest = (255 * (end * std + mean) for end in (self.lowest, self.lowest + self.step * self.span))
        pixel = darkest.round()
        off = np.abs([darkest - pixel, brightest - (pixel + self.span)])
        inside = (pixel >= 0) & (pixel + self.span <= 255)
        return bool((off <= _SAME_LATTICE + 3 * self.rounding).all() and inside.all())

    def solved(self, spec: DatasetSpec) -> Constants:
        """The constants themselves. Where black or white does not occur, the mean nearest to the right one."""
        std = 1 / (255 * self.step)
        darkest = np.clip((np.array(spec.mean) + self.lowest * std) * 255, 0, 255 - self.span).round()
        return Constants("constants of no known dataset", _triple(darkest / 255 - self.lowest * std), _triple(std))


def _by_lattice(images: Tensor, spec: DatasetSpec, where: str) -> Verdict | None:
    """The constants of 8-bit pixels, solved exactly; nothing where the values are not such pixels."""
    lattice = _find_lattice(images)
    if lattice is None:
        return None
    evidence = f"{lattice.share:.1%} of the values are exact 8-bit pixels"
    found = next(filter(lattice.fits, _candidates(spec)), None)
    if found is not None and not found.code:
        message = f"Normalized with {spec.name}'s constants: {evidence} under them."
        return Verdict(Finding("info", "N010", message, where), found)
    constants = found or lattice.solved(spec)
    if _largest_difference(constants, spec) <= _HARMLESS:
        message = (
            f"Normalized with another rounding of {spec.name}'s constants, {_numbers(constants)}: harmless. "
            f"The scorer's are {_numbers(_right_constants(spec))}."
        )
        return Verdict(Finding("info", "N005", message, where), constants)
    if found is None and (change := _contrast_change(constants, spec)):
        message = f"{evidence} after {change}. That is fine if you intended it."
        return Verdict(Finding("info", "N011", message, where), _right_constants(spec))
    return _wrong_constants(constants, spec, f"{evidence} under {_numbers(constants)}", images, where)


def _find_lattice(images: Tensor) -> _Lattice | None:
    channels = images.transpose(0, 1).flatten(1)
    # An odd step meets all columns.
    screened = channels[:, :: max(1, channels.shape[1] // _VALUES_SCREENED) | 1]
    if max(len(channel.unique()) for channel in screened) > min(_MOST_LEVELS, 0.5 * screened.shape[1]):
        return None
    sample = channels[:, :: max(1, channels.shape[1] // _VALUES_TESTED) | 1]
    found = []
    for whole, values in zip(channels, sample.double().numpy(), strict=True):
        solved = _solve_channel(values)
        if solved is None:
            return None
        lowest, step, span, rounding, share = solved
        # The rarest levels may not be in the sample.
        for end in (float(whole.min()), float(whole.max())):
            place = (end - lowest) / step
            if abs(place - round(place)) <= _ON_LATTICE and max(span, place) - min(0, place) <= 255.5:
                lowest, span = lowest + min(0, round(place)) * step, max(span, round(place)) - min(0, round(place))
        found.append((lowest, step, span, rounding, share))
    by_kind = [np.array(numbers) for numbers in zip(*found, strict=True)]
    return _Lattice(by_kind[0], by_kind[1], by_kind[2], rounding=float(by_kind[3].max()), share=float(by_kind[4].min()))


def _solve_channel(values: np.ndarray) -> tuple[float, float, int, float, float] | None:
    """Lowest value, step, span in steps, rounding and share on the lattice of one channel; None without a lattice."""
    levels, counts = np.unique(values, return_counts=True)
    levels = levels[counts > 1] if len(levels) > 256 else levels
    # The same pixel may be rounded in two ways.
    jitter = 8 * np.finfo(np.float32).eps * np.abs(levels).max(initial=0)
    levels = levels[np.concatenate([[True], np.diff(levels) > jitter])] if len(levels) else levels
    if not _FEWEST_LEVELS <= len(levels) <= _MOST_LEVELS:
        return None
    gaps = np.diff(levels)
    for step in (gaps.min(), np.median(gaps)):
        lowest = levels[0]
        for _ in range(4):  # each round, the step is known better and counts further
            places = np.concatenate([[0], np.cumsum(np.round(gaps / step))])
            if places[-1] < _FEWEST_LEVELS:
                break
            step, lowest = np.polyfit(places, levels, 1)
        place = (values - lowest) / step
        off = place - place.round()
        on = (np.abs(off) <= _ON_LATTICE) & (place > -0.5) & (place < places[-1] + 0.5)
        if places[-1] <= 255 and on.mean() >= _SHARE_ON_LATTICE:
            return float(lowest), float(step), int(places[-1]), float(np.sqrt((off[on] ** 2).mean())), float(on.mean())
    return None


def _contrast_change(constants: Constants, spec: DatasetSpec) -> str:
    """The change from rightly normalized 8-bit pixels, in words, if it is the same for all channels; else empty."""
    if len({*spec.mean}) == len({*spec.std}) == 1:
        return ""  # with equal constants for all channels, every wrong mean and deviation looks like a change of contrast
    mean, std = np.array(spec.mean), np.array(spec.std)
    factor = std / np.array(constants.std)
    shift = mean - factor * np.array(constants.mean)
    if np.ptp(factor) > _SAME_CONTRAST * factor.mean() or not _CONTRASTS[0] <= factor.mean() <= _CONTRASTS[1]:
        return ""
    if np.ptp(shift) <= _SAME_CONTRAST:
        return f"a change of contrast and brightness: pixel * {factor.mean():.3g} {shift.mean():+.3g}"
    if np.abs(shift - mean * (1 - factor)).max() <= _SAME_CONTRAST:
        return f"a change of contrast: the normalized values times {factor.mean():.3g}"
    return ""


def _by_corners(images: Tensor, spec: DatasetSpec, where: str) -> Verdict | None:
    """Constants under which each channel runs from just 0 to just 1, as in images clipped to [0, 1]."""
    channels = images.transpose(0, 1).flatten(1)
    lowest, highest = channels.amin(dim=1), channels.amax(dim=1)
    low, high = lowest.double().numpy(), highest.double().numpy()

    def off(constants: Constants) -> float:
        mean, std = np.array(constants.mean), np.array(constants.std)
        return float(np.abs([low * std + mean, high * std + mean - 1]).max())

    right, *others = _candidates(spec)
    if off(right) <= _CORNER:
        message = f"Normalized with {spec.name}'s constants: every channel runs from black to white exactly."
        return Verdict(Finding("info", "N010", message, where), right)
    ranges = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(low, high, strict=True))
    found = min(others, key=off)
    if off(found) <= _CORNER:
        if _largest_difference(found, spec) <= 2 * _CORNER / min(spec.std):
            return None  # too near to the right constants for this rule
        evidence = f"the channels run from {ranges}, which is [0, 1] under {_numbers(found)}"
        return _wrong_constants(found, spec, evidence, images, where)
    clipped = min(float((channels == end[:, None]).float().mean(dim=1).min()) for end in (lowest, highest))
    if clipped < _CLIPPED_SHARE or max(np.ptp(low), np.ptp(high)) <= _CORNER or (high - low).min() <= 0:
        return None  # nothing was clipped, or all channels to the same normalized values, as optimizers do
    std = 1 / (high - low)
    solved = Constants("constants of no known dataset", _triple(-low * std), _triple(std))
    if _largest_difference(solved, spec) <= 2 * _CORNER / min(spec.std) or _contrast_change(solved, spec):
        return None
    evidence = f"the channels are clipped to {ranges}, which is [0, 1] under {_numbers(solved)}"
    wrong = _wrong_constants(solved, spec, evidence, images, where)
    return replace(wrong, finding=Finding("warning", "N009", wrong.finding.message, where))


def _by_spectrum(images: Tensor, spec: DatasetSpec, where: str) -> Verdict | None:
    """The verdict on images that were whitened (ZCA), with any strength: low frequencies and channels are uncorrelated.

    Pictures have most of their power at the lowest frequencies, where the channels agree. Whitening divides each
    principal component by the root of its variance plus epsilon, which makes just those components equally strong.
    """
    sample = images[:: max(1, len(images) // _ROWS_COMPARED)].double()
    side = sample.shape[-1]
    if len(sample) < _FEWEST_ROWS or side < 16:
        return None
    sample = sample - sample.mean(dim=0)
    coefficients = torch.from_numpy(dctn(sample.numpy(), axes=(2, 3), norm="ortho"))
    frequency = torch.hypot(*torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij"))

    def power(lowest: float, highest: float) -> float:
        return float(coefficients[..., (frequency >= lowest) & (frequency < highest)].square().mean().clamp_min(1e-30))

    middle = power(3.5, 5)
    low = coefficients[..., (frequency > 0) & (frequency < 2.5)].transpose(0, 1).flatten(1)
    correlation = float((torch.corrcoef(low).sum() - 3) / 6)
    if not (power(0.5, 1.2) < _FLAT * middle and power(0, 0.5) < 2 * _FLAT * middle and correlation < _UNCORRELATED):
        return None
    across = sample.diff(dim=3)
    tails = float(across.pow(4).mean() / across.square().mean() ** 2)
    if tails < _HEAVY_TAILS and power(0.25 * side, 0.4 * side) > _FALLING * middle:
        return None  # noise, which was never a picture
    message = (
        f"The images look whitened (ZCA): their power is nearly flat at low frequencies "
        f"({power(0.5, 1.2) / middle:.1f} times as much at one cycle as at four; pictures have 7 and more) and "
        f"the channels are hardly correlated ({correlation:.2f}; in pictures 0.5 to 0.9). The scorer tests on images that "
        f"are only normalized, with {_numbers(_right_constants(spec))}. Undo the whitening with the matrix that it was done "
        "with (kornia: zca.inverse_transform with compute_inv=True), then normalize, or distill again without ZCA."
    )
    return Verdict(Finding("error", "N012", message, where))


def _by_moments(images: Tensor, spec: DatasetSpec, where: str) -> Verdict | None:
    """Constants under which mean and spread are those of the real images, where the right ones are far from it."""
    std, mean = (numbers.double() for numbers in torch.std_mean(images, dim=(0, 2, 3)))
    right = _right_constants(spec)
    slips = list(_variants(right, exchanged="N006"))[:3]
    candidates = [right, _UNIT, _SIGNED, _BYTES, *_OF_DATASETS, *slips]
    distances = [_moment_distance(mean, std, constants, spec) for constants in candidates]
    ours, nearest = distances[0], min(distances)
    found = candidates[distances.index(nearest)]
    moments = f"means {_shown(mean.tolist())}, standard deviations {_shown(std.tolist())}"
    fits = {_UNIT: _FITS_UNIT, slips[1]: _FITS_MEAN_ONLY}.get(found, _FITS)
    if found.code and _largest_difference(found, spec) > _HARMLESS and nearest <= fits * ours and ours >= _MISFITS:
        evidence = f"{moments}, as the real images have them under {_numbers(found)}"
        wrong = _wrong_constants(found, spec, evidence, images, where)
        return replace(wrong, finding=replace(wrong.finding, level="warning"))
    if ours >= _FAR_OFF:
        message = f"The values are far from normalized images': {moments}; they should be near 0 and 1."
        return Verdict(Finding("warning", "N009", message, where))
    return None


def _moment_distance(mean: Tensor, std: Tensor, constants: Constants, spec: DatasetSpec) -> float:
    """Distance of moments from those of the real images, if the images were normalized with `constants`.

    Root mean square over channels of the differences in mean, in standard deviations, and in log deviation. The
    dataset's own constants stand for the moments of its images.
    """
    theirs_mean, theirs_std = torch.tensor(constants.mean).double(), torch.tensor(constants.std).double()
    real_mean, real_std = torch.tensor(spec.mean).double(), torch.tensor(spec.std).double()
    pixel_mean, pixel_std = mean * theirs_std + theirs_mean, std * theirs_std
    shift = (pixel_mean - real_mean) / real_std
    spread = (pixel_std.clamp_min(1e-6) / real_std).log()
    return float(torch.stack([shift, spread]).square().mean().sqrt())


def _roughness(images: Tensor) -> float:
    return float(images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean())


def _largest_difference(constants: Constants, spec: DatasetSpec) -> float:
    """Between values of one pixel in [0, 1] that was normalized with these constants and with the right ones."""
    ends = np.array([[0.0], [1.0]])
    theirs = (ends - np.array(constants.mean)) / np.array(constants.std)
    return float(np.abs(theirs - (ends - np.array(spec.mean)) / np.array(spec.std)).max())


def _wrong_constants(found: Constants, spec: DatasetSpec, evidence: str, images: Tensor, where: str) -> Verdict:
    scale = np.array(found.std) / np.array(spec.std)
    shift = (np.array(found.mean) - np.array(spec.mean)) / np.array(spec.std)
    repair = f"tensor * torch.tensor([{_shown(scale, 7)}]).view(3, 1, 1) + torch.tensor([{_shown(shift, 7)}]).view(3, 1, 1)"
    constants: Constants | None = found
    if found.code == "N006":
        std, mean = (numbers.double() for numbers in torch.std_mean(images, dim=(0, 2, 3)))
        if _moment_distance(mean.flip(0), std.flip(0), _right_constants(spec), spec) < _moment_distance(mean, std, found, spec):
            repair, constants = "tensor.flip(1)", None  # the images themselves are BGR, each channel with its own constants
    message = (
        f"Wrong normalization: {found.title}: {evidence}. The scorer expects (x - mean) / std with "
        f"{_numbers(_right_constants(spec))}. Convert the file's tensor: {repair}"
    )
    return Verdict(Finding("error", found.code, message, where), constants)


def _numbers(constants: Constants) -> str:
    if constants is _BYTES:
        return "mean 0 and std 1/255"
    return f"mean {_shown(constants.mean)} and std {_shown(constants.std)}"


def _shown(values: Sequence[float] | np.ndarray, digits: int = 4) -> str:
    return ", ".join(f"{value:.{digits}g}" for value in values)


def _triple(values: Sequence[float] | np.ndarray) -> _Triple:
    red, green, blue = map(float, values)
    return red, green, blue
