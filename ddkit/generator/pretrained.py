"""Networks to start from: pretrained autoencoders, generators that ddkit trained, and diffusion transformers of diffusers.

A generator is adapted to a dataset's own classes: each class begins with the embedding of the class, or the mean of the
classes, that it resembles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from ddkit.errors import BadFileError, MissingModelError, UsageError, did_you_mean
from ddkit.generator.autoencoder import pixel_patch
from ddkit.generator.config import MinimaxConfig
from ddkit.generator.difffit import ParameterCounts, apply_difffit, count_parameters, share_conditioning
from ddkit.generator.model_facts import FACTS_FILE, INDEX_FILE, WEIGHTS_FILE
from ddkit.generator.model_folder import load_model
from ddkit.generator.networks import class_setting, disable_label_dropout, null_class
from ddkit.runtime.files import read_json
from ddkit.runtime.hub import download, is_hub_id

_WNIDS_FILE = Path(__file__).with_name("imagenet_wnids.json")
_IMAGENET_CLASSES = 1000
_SECOND_IMAGENET_CLASS = "goldfish"  # n01443537: distinguishes the order of sorted wnids from others
_DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the name before diffusers 0.28
# The noise schedule of pretrained diffusion transformers, which ours for "epsilon" equals (`ddkit.generator.objective`).
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}
_KNOWN = "Give a DiTPipeline, such as facebook/DiT-XL-2-256, or a generator that ddkit trained."


@dataclass(frozen=True)
class Pretrained:
    """A generator to start from, on the CPU.

    class_names: the names of each label except the null class; a label may have none. prediction: as in ObjectiveConfig.
    """

    denoiser: ModelMixin
    autoencoder: AutoencoderKL
    class_names: tuple[tuple[str, ...], ...]
    prediction: str


@dataclass(frozen=True)
class ClassMap:
    """The labels of a pretrained model that each class of a dataset begins from: the mean of their embeddings.

    names: the dataset's classes. labels: the model's labels for each class; an empty tuple stands for all of them.
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Classes that begin with the mean of all labels."""
        return tuple(name for name, labels in zip(self.names, self.labels, strict=True) if not labels)


@dataclass(frozen=True)
class Start:
    """A generator made ready for fine-tuning on a dataset's classes. source: its folder or hub id."""

    source: str
    generator: Pretrained
    classes: ClassMap
    parameters: ParameterCounts


def start_from(config: MinimaxConfig, class_names: Sequence[str]) -> Start:
    """Read the generator that a fine-tuning starts from and make it ready for a dataset.

    Raises what `load_generator` and `map_classes` raise.
    """
    found = load_generator(config.init)
    classes = map_classes(class_names, found.class_names, dict(config.class_map))
    ready = with_classes(found, classes)
    share_conditioning(ready.denoiser)
    parameters = count_parameters(ready.denoiser) if config.full else apply_difffit(ready.denoiser)
    return Start(config.init, ready, classes, parameters)


def load_generator(source: str) -> Pretrained:
    """Read a generator from a folder, or download it by its hub id.

    source: a folder of `ddkit train`, a folder of a DiTPipeline of any image size, or the hub id of one.
    The variance that such a transformer predicts as well is left out, because no sampler here reads it.
    Raises MissingModelError when there is none or it cannot be downloaded, BadFileError when it is damaged or not a
    diffusion transformer.
    """
    folder = _folder_of(source, [FACTS_FILE, INDEX_FILE, "transformer/*", "vae/*", "scheduler/*"], _KNOWN)
    if (folder / FACTS_FILE).is_file():
        model = load_model(folder)
        names = tuple((name,) for name in model.facts.class_names)
        return Pretrained(disable_label_dropout(model.denoiser), model.autoencoder, names, model.facts.prediction)
    return _read_dit_pipeline(folder)


def with_classes(pretrained: Pretrained, classes: ClassMap) -> Pretrained:
    """The same generator for other classes: label i is class i of the map, and the null class stays the last label."""
    denoiser = pretrained.denoiser
    null = null_class(denoiser)
    rows = [list(labels) or list(range(null)) for labels in (*classes.labels, (null,))]
    state = denoiser.state_dict()
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Embedding):  # these networks embed only classes
            table = state[f"{name}.weight"]
            state[f"{name}.weight"] = torch.stack([table[chosen].mean(dim=0) for chosen in rows])
    rebuilt = _rebuilt(denoiser, state, **{class_setting(denoiser): len(classes.names)})
    return replace(pretrained, denoiser=rebuilt, class_names=tuple((name,) for name in classes.names))


def map_classes(
    names: Sequence[str], known: Sequence[Sequence[str]], chosen: Mapping[str, str | int | None] | None = None
) -> ClassMap:
    """Find the model's labels for a dataset's classes, by name.

    names: the dataset's classes; wnids ("n01443537") match exactly. known: the names of each of the model's labels.
    A class matches labels with the same name, ignoring case and "_", else labels whose names end in it as a whole word
    ("brown bear" for "bear"). Homonyms are not distinguished.
    chosen: classes mapped by hand to a label's number, a label's name, or None for the mean of all labels.
    Raises UsageError when nothing matches at all, or when `chosen` names an unknown class or label.
    """
    readable = [[_readable(name) for name in label] for label in known]
    labels = {name: _matching(_readable(name), readable) for name in names}
    for name, choice in (chosen or {}).items():
        if name not in labels:
            raise UsageError(f"The dataset has no class '{name}' to map.", did_you_mean(name, list(labels)))
        labels[name] = _chosen(choice, readable)
    if not any(labels.values()) and not chosen:
        raise UsageError(
            f"The model knows none of the classes {', '.join(list(names)[:3])} ... by name.",
            "Rename the class folders to ImageNet's names or wnids, or map them with --class-map FILE.",
        )
    return ClassMap(tuple(names), tuple(labels.values()))


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 wnids of ImageNet-1k in the order of its labels: sorted as strings."""
    return tuple(read_json(_WNIDS_FILE))


def load_pretrained_autoencoder(source: str) -> AutoencoderKL:
    """A pretrained autoencoder from a folder or a hub id: its own, or that of a pipeline, with the part in `vae`.

    Raises MissingModelError when there is none or it cannot be downloaded, BadFileError when it is damaged or does not
    encode color images.
    """
    remedy = "Give a folder in diffusers' format with safetensors weights, or the hub id of one."
    folder = _folder_of(source, ["config.json", WEIGHTS_FILE, "vae/*"], remedy)
    autoencoder = _read_part(AutoencoderKL, folder / "vae" if (folder / "vae").is_dir() else folder, ("AutoencoderKL",), remedy)
    channels = autoencoder.config.in_channels
    if channels != 3 * pixel_patch(autoencoder) ** 2:
        raise BadFileError(
            f"The autoencoder in {source} takes {channels} channels, so it does not encode color images.", remedy
        )
    return autoencoder


def _folder_of(source: str, patterns: Sequence[str], remedy: str) -> Path:
    """The folder `source`, or where the files of that hub id are downloaded to."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise MissingModelError(f"There is no folder {source} to start from.", remedy)
    return download(source, "model", patterns)


def _read_dit_pipeline(folder: Path) -> Pretrained:
    if not (folder / INDEX_FILE).is_file():
        raise MissingModelError(f"{folder} does not hold a generator: it has neither {FACTS_FILE} nor {INDEX_FILE}.", _KNOWN)
    index = read_json(folder / INDEX_FILE)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != "DiTPipeline":
        holds = f"a {kind}" if kind else f"something without a _class_name in {INDEX_FILE}"
        raise BadFileError(f"{folder} holds {holds}, not a DiTPipeline.", _KNOWN)
    _check_schedule(folder / "scheduler" / "scheduler_config.json")
    transformer = _read_part(DiTTransformer2DModel, folder / "transformer", _DIT_CLASSES)
    autoencoder = _read_part(AutoencoderKL, folder / "vae", ("AutoencoderKL",))
    if transformer.config.in_channels != autoencoder.config.latent_channels:
        raise BadFileError(f"The transformer and the autoencoder in {folder} have latents of different numbers of channels.")
    names = _label_names(index.get("id2label"), null_class(transformer))
    return Pretrained(disable_label_dropout(_noise_only(transformer)), autoencoder.eval(), names, "epsilon")


def _read_part(kind: type[ModelMixin], folder: Path, classes: Sequence[str], remedy: str = _KNOWN) -> ModelMixin:
    """A network and its weights, every key of which must fit. Nothing in the folder is executed."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in classes:
        raise BadFileError(f"{folder} holds a {name}, not a {classes[0]}.", remedy)
    try:
        network, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise BadFileError(f"{folder} cannot be read: {str(error).splitlines()[0]}", "The folder is damaged.") from error
    # diffusers would continue with random weights in their places.
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise BadFileError(
            f"The weights in {folder} do not fit its config.json: {wrong[0]}.", "They are damaged or incomplete."
        )
    # The folder on this machine must not be saved with the fine-tuned network.
    network.register_to_config(_name_or_path="")
    return network


def _check_schedule(path: Path) -> None:
    config = read_json(path)
    for name, ours in _SCHEDULE.items():
        theirs = config.get(name, ours) if isinstance(config, dict) else None
        if theirs != ours:
            raise BadFileError(f"{path} has {name} {theirs}, but only {ours} is supported.", _KNOWN)


def _label_names(titles: Any, count: int) -> tuple[tuple[str, ...], ...]:
    """The names of each label, from strings such as "tench, Tinca tinca", and the wnids if the labels are ImageNet's."""
    titles = titles if isinstance(titles, dict) else {}
    names = [[name.strip() for name in str(titles.get(str(i), "")).split(",")] for i in range(count)]
    names = [[name for name in label if name] for label in names]
    is_imagenet = count == _IMAGENET_CLASSES and (not names[1] or _SECOND_IMAGENET_CLASS in names[1])
    wnids = [[wnid] for wnid in imagenet_wnids()] if is_imagenet else [[] for _ in names]
    return tuple((*wnid, *label) for wnid, label in zip(wnids, names, strict=True))


def _noise_only(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The transformer without the second half of its output channels, the variance, if it has them."""
    channels = transformer.config.in_channels
    if transformer.out_channels == channels:
        return transformer
    state = transformer.state_dict()
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        # The layer's outputs are (patch rows, patch columns, channels).
        state[name] = state[name].unflatten(0, (-1, transformer.out_channels))[:, :channels].flatten(0, 1)
    return _rebuilt(transformer, state, out_channels=channels)


def _rebuilt(network: ModelMixin, state: Mapping[str, Tensor], **changes: Any) -> ModelMixin:
    """A network of the same kind with some settings and all weights changed."""
    with torch.random.fork_rng(devices=[]):
        rebuilt = type(network).from_config({**network.config, **changes})
    rebuilt.load_state_dict(state)
    return disable_label_dropout(rebuilt).eval()


def _readable(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _matching(name: str, known: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Labels with exactly that name, else those with a name that ends in it."""
    exact = tuple(label for label, names in enumerate(known) if name in names)
    return exact or tuple(label for label, names in enumerate(known) if any(n.endswith(f" {name}") for n in names))


def _chosen(choice: str | int | None, known: Sequence[Sequence[str]]) -> tuple[int, ...]:
    if choice is None:
        return ()
    if isinstance(choice, int):
        if isinstance(choice, bool):
            raise UsageError(f"A class must be mapped to a label's name or number, or to null, got {choice}.")
        if not 0 <= choice < len(known):
            raise UsageError(f"The model has labels 0 to {len(known) - 1}, got {choice}.")
        return (choice,)
    if found := _matching(_readable(choice), known):
        return found
    raise UsageError(f"The model knows no class '{choice}'.", did_you_mean(choice, [n for names in known for n in names]))
