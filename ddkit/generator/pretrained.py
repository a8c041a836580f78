"""Generators to start from: those that ddkit trained, and pretrained diffusion transformers in diffusers' format.

What they know is put to the use of a dataset's own classes: each class begins with the embedding of the class, or the
classes, that it is like.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn

from ddkit.errors import BadFileError, MissingModelError, UsageError, did_you_mean
from ddkit.generator.autoencoder import refuse_misfits
from ddkit.generator.difffit import ParameterCounts, apply_difffit, count_parameters, share_conditioning
from ddkit.generator.hub import HUB_ERRORS, reason_of
from ddkit.generator.model_folder import FACTS_FILE, INDEX_FILE, load_model
from ddkit.generator.networks import disable_label_dropout, null_class
from ddkit.runtime.files import read_json

_WNIDS_FILE = Path(__file__).with_name("imagenet_wnids.json")
_IMAGENET_CLASSES = 1000
_SECOND_IMAGENET_CLASS = "goldfish"  # n01443537: tells the order of sorted wnids from others
_DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in folders from before diffusers 0.28
# The schedule of pretrained diffusion transformers, and of ours for "epsilon" (`ddkit.generator.objective`).
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}
_KNOWN = "Give a DiTPipeline, such as facebook/DiT-XL-2-256, or a generator that ddkit trained."

ClassChoices = Mapping[str, "str | int | None"]


@dataclass(frozen=True)
class Pretrained:
    """A generator to start from, on the CPU.

    class_names: for each label but the null class, its names, which may be none. prediction: as in ObjectiveConfig.
    """

    denoiser: ModelMixin
    autoencoder: AutoencoderKL
    class_names: tuple[tuple[str, ...], ...]
    prediction: str


@dataclass(frozen=True)
class ClassMap:
    """From which labels of a pretrained model each class of a dataset begins: the mean of their embeddings.

    names: of the dataset's classes. labels: for each the model's labels; none for the mean of them all.
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Classes that begin with the mean of all."""
        return tuple(name for name, labels in zip(self.names, self.labels, strict=True) if not labels)


@dataclass(frozen=True)
class Start:
    """A generator made ready for fine-tuning on a dataset's classes. source: where it was read from."""

    source: str
    generator: Pretrained
    classes: ClassMap
    parameters: ParameterCounts


def start_from(source: str, class_names: Sequence[str], *, full: bool = False, chosen: ClassChoices | None = None) -> Start:
    """Read a generator and make it ready for a dataset.

    full: train all its parameters, not only DiffFit's. chosen: as `map_classes` has it. Raises what `load_generator`
    and `map_classes` raise.
    """
    found = load_generator(source)
    classes = map_classes(class_names, found.class_names, chosen)
    ready = with_classes(found, classes)
    share_conditioning(ready.denoiser)
    parameters = count_parameters(ready.denoiser) if full else apply_difffit(ready.denoiser)
    return Start(source, ready, classes, parameters)


def load_generator(source: str) -> Pretrained:
    """Read a generator from a folder, or download it by its hub id.

    source: the folder of a `ddkit train` or of a DiTPipeline with 256 px or any other size, or such a pipeline's id.
    A variance that the transformer predicts beside the noise is left out: no sampler here reads it.
    Raises MissingModelError where there is none or it cannot be downloaded, BadFileError where it is damaged or no diffusion
    transformer.
    """
    folder = _folder_of(source)
    if (folder / FACTS_FILE).is_file():
        model = load_model(folder)
        names = tuple((name,) for name in model.facts.class_names)
        return Pretrained(disable_label_dropout(model.denoiser), model.autoencoder, names, model.facts.prediction)
    return _read_dit_pipeline(folder)


def with_classes(pretrained: Pretrained, classes: ClassMap) -> Pretrained:
    """The same generator for other classes: label i is class i of the map, the null class stays the last label."""
    denoiser = pretrained.denoiser
    null = null_class(denoiser)
    rows = [list(labels) or list(range(null)) for labels in (*classes.labels, (null,))]
    state = denoiser.state_dict()
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Embedding):  # these networks have no others than those of classes
            table = state[f"{name}.weight"]
            state[f"{name}.weight"] = torch.stack([table[chosen].mean(dim=0) for chosen in rows])
    count = len(classes.names) + isinstance(denoiser, UNet2DModel)  # its configuration counts the null class
    rebuilt = _rebuilt(denoiser, state, **{_class_setting(denoiser): count})
    return replace(pretrained, denoiser=rebuilt, class_names=tuple((name,) for name in classes.names))


def map_classes(names: Sequence[str], known: Sequence[Sequence[str]], chosen: ClassChoices | None = None) -> ClassMap:
    """Find the model's labels for a dataset's classes, by name.

    names: of the dataset's classes; wnids ("n01443537") are found exactly. known: of each of the model's labels.
    A class is matched by labels with a name equal to its own, whatever case and "_", else by labels whose names end in
    it as words of their own ("brown bear" for "bear"); homonyms are not told apart.
    chosen: classes decided otherwise: a label's number, a label's name, or None for the mean of all.
    Raises UsageError where nothing matches at all, or `chosen` names what is not there.
    """
    readable = [[_readable(name) for name in label] for label in known]
    labels = {name: _matching(_readable(name), readable) for name in names}
    for name, choice in (chosen or {}).items():
        if name not in labels:
            raise UsageError(f"The dataset has no class '{name}' to map.", did_you_mean(name, list(labels)))
        labels[name] = _chosen(choice, readable)
    if not any(labels.values()) and not chosen:
        raise UsageError(
            f"None of the classes {', '.join(list(names)[:3])} ... is known to the model by name.",
            "Rename the class folders to ImageNet's names or wnids, or decide with --class-map FILE.",
        )
    return ClassMap(tuple(names), tuple(labels.values()))


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 wnids of ImageNet-1k in the order of its labels: sorted as strings."""
    return tuple(read_json(_WNIDS_FILE))


def _folder_of(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise MissingModelError(f"There is no folder {source} to start from.", _KNOWN)
    try:
        wanted = [INDEX_FILE, "transformer/*", "vae/*", "scheduler/*"]
        return Path(snapshot_download(source, allow_patterns=wanted))
    except HUB_ERRORS as error:
        raise MissingModelError(
            f"'{source}' is no folder here, and it cannot be downloaded: {reason_of(error)}",
            f"Where there is a network: hf download {source} --local-dir FOLDER. Then give that FOLDER.",
        ) from error


def _read_dit_pipeline(folder: Path) -> Pretrained:
    if not (folder / INDEX_FILE).is_file():
        raise MissingModelError(f"{folder} holds no generator: it has neither {FACTS_FILE} nor {INDEX_FILE}.", _KNOWN)
    index = read_json(folder / INDEX_FILE)
    if not isinstance(index, dict) or index.get("_class_name") != "DiTPipeline":
        kind = index.get("_class_name") if isinstance(index, dict) else None
        raise BadFileError(f"{folder} holds a {kind or 'thing of no kind'}, which is no diffusion transformer.", _KNOWN)
    _check_schedule(folder / "scheduler" / "scheduler_config.json")
    transformer = _read_part(DiTTransformer2DModel, folder / "transformer", _DIT_CLASSES)
    autoencoder = _read_part(AutoencoderKL, folder / "vae", ("AutoencoderKL",))
    if transformer.config.in_channels != autoencoder.config.latent_channels:
        raise BadFileError(f"The transformer and the autoencoder in {folder} have latents of different channels.")
    names = _label_names(index.get("id2label"), null_class(transformer))
    return Pretrained(disable_label_dropout(_noise_only(transformer)), autoencoder.eval(), names, "epsilon")


def _read_part(kind: type[ModelMixin], folder: Path, classes: Sequence[str]) -> ModelMixin:
    """A network and its weights, every key of which must fit. Nothing in the folder is executed."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in classes:
        raise BadFileError(f"{folder} holds a {name}, not a {classes[0]}.", _KNOWN)
    try:
        network, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise BadFileError(f"{folder} cannot be read: {str(error).splitlines()[0]}", "The folder is damaged.") from error
    refuse_misfits(found, folder)
    # Where it lay on this machine is nothing to save with what it becomes.
    network.register_to_config(_name_or_path="")
    return network


def _check_schedule(path: Path) -> None:
    config = read_json(path)
    for name, ours in _SCHEDULE.items():
        theirs = config.get(name, ours) if isinstance(config, dict) else None
        if theirs != ours:
            raise BadFileError(f"{path} has {name} {theirs}; only {ours} is known here.", _KNOWN)


def _label_names(titles: Any, count: int) -> tuple[tuple[str, ...], ...]:
    """The names of each label, from "tench, Tinca tinca" and the like; ImageNet's wnids as well where it is ImageNet."""
    titles = titles if isinstance(titles, dict) else {}
    names = [[name.strip() for name in str(titles.get(str(i), "")).split(",")] for i in range(count)]
    names = [[name for name in label if name] for label in names]
    is_imagenet = count == _IMAGENET_CLASSES and (not names[1] or _SECOND_IMAGENET_CLASS in names[1])
    wnids = [[wnid] for wnid in imagenet_wnids()] if is_imagenet else [[] for _ in names]
    return tuple((*wnid, *label) for wnid, label in zip(wnids, names, strict=True))


def _noise_only(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Without the second half of its output channels, the variance, where it has them."""
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


def _class_setting(denoiser: ModelMixin) -> str:
    """What a denoiser's configuration calls the number of classes."""
    if isinstance(denoiser, UNet2DModel):
        return "num_class_embeds"
    return "num_embeds_ada_norm" if isinstance(denoiser, DiTTransformer2DModel) else "num_classes"


def _readable(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _matching(name: str, known: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Labels with exactly that name, else those one of whose names ends in it."""
    exact = tuple(label for label, names in enumerate(known) if name in names)
    return exact or tuple(label for label, names in enumerate(known) if any(n.endswith(f" {name}") for n in names))


def _chosen(choice: str | int | None, known: Sequence[Sequence[str]]) -> tuple[int, ...]:
    if choice is None:
        return ()
    if isinstance(choice, int):
        if isinstance(choice, bool):
            raise UsageError(f"A class is mapped to a label's name or number, or to null, not to {choice}.")
        if not 0 <= choice < len(known):
            raise UsageError(f"The model has labels 0 to {len(known) - 1}, not {choice}.")
        return (choice,)
    if found := _matching(_readable(choice), known):
        return found
    raise UsageError(f"The model knows no class '{choice}'.", did_you_mean(choice, [n for names in known for n in names]))
