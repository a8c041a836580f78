"""Generators and distilled sets on the Hugging Face hub, with cards that are written from what ddkit knows about them.

A generator is a model repository that holds the model folder. A distilled set is a dataset repository that holds
`<dataset>.pt`, its provenance as JSON and its contact sheet.
"""

from __future__ import annotations

import html
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from ddkit import __version__
from ddkit.data.images import denormalize, to_uint8
from ddkit.data.store import class_titles
from ddkit.errors import MissingDataError, UsageError
from ddkit.generator.model_facts import FACTS_FILE, INDEX_FILE, PARTS, has_model, model_hash
from ddkit.generator.training.run_folder import read_run_record
from ddkit.history import RECIPE_FILE, find_recipe
from ddkit.results import RESULTS_FILE, Result, read
from ddkit.runtime import hub
from ddkit.runtime.files import atomic_write, read_json, require_ending, sha256_of, write_json
from ddkit.sets.contact_sheet import contact_sheet
from ddkit.sets.distilled import (
    DistilledSet,
    SetFiles,
    draw_sheet,
    read_set,
    require_nothing_else,
    set_files,
)

_CARD = "README.md"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Upload:
    """What a repository on the hub will hold.

    kind: of the repository. files: path there -> a file here, or its bytes. command: what uses it once it is there.
    """

    hub_id: str
    kind: hub.Kind
    files: Mapping[str, Path | bytes]
    command: str

    @property
    def card(self) -> str:
        """The text of its README.md: the hub's metadata in YAML, then Markdown."""
        card = self.files[_CARD]
        assert isinstance(card, bytes)
        return card.decode()


def plan_upload(
    path: str | os.PathLike[str], hub_id: str, *, license: str | None = None, results: str | os.PathLike[str] = RESULTS_FILE
) -> Upload:
    """What `push` uploads, without a look at the network.

    path: a model folder or a distilled set's .pt file. license: an identifier of the hub such as "cc-by-4.0"; None says
    that it is not known. results: the file whose evaluations the card lists, if they are of this set or of this model's.
    Raises UsageError for an impossible id, and what `load_model` or `read_set` raise.
    """
    hub.require_hub_id(hub_id)
    recorded, license = read(results).results, license or "unknown"
    if Path(path).is_dir():
        return _model_upload(Path(path), hub_id, license, recorded)
    return _set_upload(read_set(path), hub_id, license, recorded)


def push(planned: Upload, *, private: bool = False) -> str:
    """Upload a generator or a set, and return its address. Later versions are commits to the same repository.

    private: a repository that is created can be seen by its owner only. Raises HubError if nobody is logged in or the hub
    refuses, and UsageError if a dataset repository holds another set.
    """
    url = hub.create_repository(planned.hub_id, planned.kind, private=private)
    if planned.kind == "dataset":
        ours = _tensors(planned.files)
        if others := [name for name in _tensors(hub.dataset_files(planned.hub_id)) if name not in ours]:
            raise UsageError(
                f"The dataset {planned.hub_id} on the hub holds another set, {others[0]}.",
                "Give each set a repository of its own.",
            )
    subject = "a generator" if planned.kind == "model" else "a distilled set"
    hub.upload(planned.hub_id, planned.kind, planned.files, f"Upload {subject} with ddkit")
    return url


def pull(
    hub_id: str, out: str | os.PathLike[str] | None = None, *, dataset: str | None = None, replace: bool = False
) -> SetFiles:
    """Download a distilled set, and write it, its JSON and its contact sheet.

    out: the tensor's file; None means submission/<dataset>.pt. dataset: None takes its name from the JSON on the hub, else
    from the file's name. replace: write even over another set, or other files. The file is read as those of strangers are:
    nothing in it is executed.
    Raises UsageError if another set, or something else, is at `out`, MissingDataError if the hub has no such set, and what
    `read_set` raises.
    """
    hub.require_hub_id(hub_id)
    tensors = _tensors(hub.dataset_files(hub_id))
    if len(tensors) != 1:
        found = "no .pt file" if not tensors else f"{len(tensors)} .pt files"
        raise MissingDataError(
            f"The dataset {hub_id} on the hub is not one distilled set: it holds {found}.",
            f"To get a file of it: hf download {hub_id} FILE --repo-type dataset --local-dir FOLDER. Then: ddkit check FILE",
        )
    tensor = Path(tensors[0])
    folder = hub.download(hub_id, "dataset", [str(tensor), str(tensor.with_suffix(".json"))])
    sha256 = sha256_of(folder / tensor)
    provenance = _provenance(folder / tensor.with_suffix(".json"), sha256)
    found_set = read_set(folder / tensor, dataset or provenance.get("dataset"))
    spec = found_set.spec
    files = set_files(Path("submission", f"{spec.name}.pt") if out is None else out)
    require_ending(files.tensor, ".pt")
    if not replace:
        require_nothing_else(files.tensor)
    if not replace and files.tensor.exists() and sha256_of(files.tensor) != sha256:
        raise UsageError(f"{files.tensor} is another set, which would be lost.", "Name a file with --out, or add --replace.")
    with atomic_write(files.tensor) as target:
        shutil.copyfile(folder / tensor, target)
    facts = {"dataset": spec.name, "images_per_class": found_set.ipc, "sha256": sha256, "hub": f"{hub_id}@{folder.name}"}
    write_json(files.provenance, {**provenance, **facts})
    draw_sheet(found_set.images, spec, files.sheet)
    return files


def _provenance(path: Path, sha256: str) -> dict[str, Any]:
    """The JSON that was uploaded with a set, if it belongs to the tensor of that hash; else {}."""
    value = read_json(path) if path.is_file() else {}
    belongs = isinstance(value, dict) and value.get("sha256") == sha256 and isinstance(value.get("dataset"), str)
    return value if belongs else {}


def _tensors(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".pt") and "/" not in name)


def _set_upload(one: DistilledSet, hub_id: str, license: str, recorded: Iterable[Result]) -> Upload:
    assert one.path is not None
    name, spec = one.spec.name, one.spec
    sheet = io.BytesIO()
    titles = class_titles(name)
    contact_sheet(to_uint8(denormalize(one.images, spec)), one.labels, titles).save(sheet, format="PNG")
    provenance = _without_folders(one.provenance)
    images = f"{len(one.images):,} images of {spec.image_size} x {spec.image_size} pixels"
    data = DatasetCardData(
        license=license,
        pretty_name=f"{name}, {one.ipc} images a class",
        task_categories=["image-classification"],
        size_categories=[next((title for most, title in _SIZES if len(one.images) < most), "n>1M")],
        source_datasets=[f"extended|{name}"],
        tags=["dataset-distillation", "ddkit", name],
    )
    made = {key: value for key, value in provenance.items() if key not in ("class_names", "request")}
    recipe = find_recipe(one.path, one.sha256)
    again = f"\n`ddkit enter --recipe {RECIPE_FILE}` makes it again, with that file of this repository.\n" if recipe else ""
    text = f"""# {name} in {one.ipc} images a class

A distilled set: {images}, {one.ipc} for each of the {spec.num_classes} classes of {name}. A network that trains on these
images alone is tested on the real test images. Uploaded with ddkit {__version__}.

![The set, one row a class]({name}.png)

## Scores

{_scores(result for result in recorded if result.sha256 == one.sha256)}

## How it was made

{_json_block(made) if made else "It is not recorded how this set was made."}
{again}

## Use

```
ddkit pull {hub_id}
ddkit evaluate submission/{name}.pt
```

or without ddkit:

```python
import torch

images = torch.load("{name}.pt", weights_only=True)  # {tuple(one.images.shape)} float32
labels = torch.arange({spec.num_classes}).repeat_interleave({one.ipc})
```

The values are normalized by channel with mean {_numbers(spec.mean)} and standard deviation {_numbers(spec.std)}. The rows
are in the order of the classes. SHA-256 of `{name}.pt`: `{one.sha256}`
"""
    files: dict[str, Path | bytes] = {
        f"{name}.pt": one.path,
        f"{name}.png": sheet.getvalue(),
        _CARD: _card(data, text),
    }
    if provenance:
        files[f"{name}.json"] = (json.dumps(provenance, indent=2, ensure_ascii=False) + "\n").encode()
    if recipe:
        files[RECIPE_FILE] = Path(recipe)
    return Upload(hub_id, "dataset", files, f"ddkit pull {hub_id}")


def _model_upload(folder: Path, hub_id: str, license: str, recorded: Iterable[Result]) -> Upload:
    from ddkit.generator.model_folder import load_model  # imports diffusers, which takes seconds and no set needs

    if not has_model(folder):
        raise UsageError(
            f"{folder} holds no generator: it has no {FACTS_FILE}.", "Name the folder of a generator, or the .pt file of a set."
        )
    facts = load_model(folder).facts  # every part must be there and fit the others
    sha256, record = model_hash(folder), read_run_record(folder)
    name = facts.dataset
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["dataset-distillation", "ddkit", "class-conditional", name],
    )
    training: dict[str, Any] = {key: value for key, value in asdict(facts).items() if key != "class_names"}
    if record is not None:
        training["settings"] = asdict(record.config)
    text = f"""# A generator of {name}

A class-conditional latent diffusion model: {len(facts.class_names)} classes of {name}, images of {facts.image_size} x
{facts.image_size} pixels, {facts.steps:,} steps of training. Made with ddkit {facts.ddkit_version} to generate small training
sets (dataset distillation).

## Scores of its sets

{_scores(result for result in recorded if result.made_by.get("model_sha256") == sha256)}

## How it was trained

{_json_block(_without_folders(training))}

## Use

```
ddkit generate --dataset {name} --model {hub_id}
ddkit pack --track 2 --model {name}={hub_id}
```

The autoencoder loads with diffusers as well: `AutoencoderKL.from_pretrained("{hub_id}", subfolder="vae")`. All weights are
safetensors. The class labels are 0 to {len(facts.class_names) - 1} in the order of `class_names` in `{FACTS_FILE}`;
{len(facts.class_names)} stands for no class.
"""
    files: dict[str, Path | bytes] = {file: folder / file for file in (INDEX_FILE, FACTS_FILE)}
    for part in PARTS:
        for file in sorted((folder / part).glob("*")):
            if file.suffix in (".json", ".safetensors"):
                files[f"{part}/{file.name}"] = file
    return Upload(hub_id, "model", {**files, _CARD: _card(data, text)}, f"ddkit generate --dataset {name} --model {hub_id}")


def _card(data: DatasetCardData | ModelCardData, text: str) -> bytes:
    return f"---\n{data.to_yaml()}\n---\n\n{text}".encode()


def _scores(results: Iterable[Result]) -> str:
    """The evaluations as a table."""
    rows = [
        "| dataset | track | accuracy | 95 % interval | rounds | E | official | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        interval = "–" if one.interval is None else " to ".join(f"{100 * end:.2f} %" for end in one.interval)
        official = "yes" if one.official else f"no: {'; '.join(one.deviations)}"
        mean, date = f"{100 * one.mean:.2f} %", one.date[:10]
        cells = (one.dataset, one.track, mean, interval, one.rounds, one.epochs_setting, official, date)
        # The texts may come from elsewhere.
        plain = (html.escape(str(cell)).replace("|", "&#124;").replace("\n", " ") for cell in cells)
        rows.append(f"| {' | '.join(plain)} |")
    if len(rows) == 2:
        return "No evaluation of it is recorded."
    return "\n".join(rows) + "\n\nE is the challenge's epochs setting: E + 1 epochs ran."


def _json_block(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False, default=str).replace('```', '')}\n```"


def _without_folders(value: Any) -> Any:
    """The same JSON value, with the name alone of each absolute path: where it lies on this machine is nobody's business."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
