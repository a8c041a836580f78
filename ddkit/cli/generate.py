"""`ddkit generate`: make a distilled set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli._options import (
    COUNT,
    FILE,
    FOLDER,
    SAMPLER,
    SAMPLING_PRECISION,
    SUBMISSION_FOLDER,
    compute_options,
    example,
    refuse_unused,
)
from ddkit.cli._output import Output
from ddkit.errors import UsageError, counted
from ddkit.generator.config import (
    BATCH_ELSEWHERE,
    BATCH_ON_GPU,
    MOST_SAMPLING_STEPS,
    SamplingSettings,
    default_mode_guidance,
    default_sampling,
)
from ddkit.runtime.environment import is_main

_DEFAULTS = SamplingSettings()
# Those of ddkit.sets.select, the default first; typed here because that module needs torch. A test compares them.
_METHODS = (
    "most-confident", "median", "least-confident", "stratified", "herding", "k-center", "k-medoids", "minimax",
    "random", "first",
)  # fmt: skip


@click.command(
    short_help="Make a distilled set.", epilog=example("ddkit generate --ipc 10 --dataset cifar100 --candidates 100")
)
@click.option("--dataset", required=True, metavar="NAME", help="Make a set for this dataset, which `ddkit data list` shows.")
@click.option("--ipc", type=COUNT, default=10, help="Make this many images per class; the challenge asks for 10.")
@click.option(
    "--model",
    type=FOLDER,
    metavar="FOLDER_OR_HUB_ID",
    help="Sample the model in this folder, or the one with this id on the Hugging Face hub, such as user/name.  "
    "[default: runs/<dataset>]",
)
@click.option(
    "--candidates",
    type=COUNT,
    help="Sample this many images of each class and choose from them by --select. With mode guidance one is chosen for each "
    "mode.",
)
@click.option(
    "--select",
    metavar="METHOD",
    help=f"Choose from the candidates by this method: {', '.join(_METHODS)}.  [default: {_METHODS[0]}]",
)
@click.option(
    "--from-real",
    metavar="METHOD",
    help="Choose real training images instead of sampling a model: random and first are the usual baselines, and the "
    "other methods of --select choose from all images.",
)
@click.option(
    "--sampling-steps",
    "steps",
    type=click.IntRange(1, MOST_SAMPLING_STEPS),
    help=f"Sample in this many steps.  [default: {_DEFAULTS.steps}]",
)
@click.option(
    "--guidance",
    type=click.FloatRange(0),
    help="Set the scale of classifier-free guidance; larger values show the class more strongly, and 1 turns it off.  "
    f"[default: {default_sampling('flow').guidance:g} with mode guidance, else {_DEFAULTS.guidance:g}]",
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="Guide only between these times, from 0 (clean) to 1 (noise).  "
    f"[default: {' '.join(f'{time:g}' for time in _DEFAULTS.guidance_interval)}]",
)
@click.option(
    "--mode-guidance",
    type=click.FloatRange(0),
    metavar="SCALE",
    help="Set the scale of mode guidance, which steers image i of a class early in sampling to mode i, the center of a cluster "
    "of its real images' latents, and needs these images; 0 turns it off.  "
    f"[default: {default_mode_guidance('flow'):g} for models of flow matching, "
    f"and {default_mode_guidance('epsilon'):g} with --guidance, --guidance-interval or other models]",
)
@click.option(
    "--influence-guidance",
    type=click.FloatRange(0),
    metavar="SCALE",
    help="Set the scale of influence guidance, which steers samples early to images that train a classifier as the real images "
    "of their class do. Sampling then takes four times as long or more; 0 turns it off. On CIFAR-100 0.05 helped with "
    "--guidance 3, and nothing was gained with mode guidance.  "
    f"[default: {_DEFAULTS.influence_guidance:g}]",
)
@click.option("--sampler", type=SAMPLER, help=f"Choose the sampler.  [default: {_DEFAULTS.sampler}]")
@click.option(
    "--batch-size",
    type=COUNT,
    help=f"Sample this many images at once.  [default: {BATCH_ON_GPU} on a GPU, else {BATCH_ELSEWHERE}]",
)
@click.option(
    "--precision",
    type=SAMPLING_PRECISION,
    help="Compute in this precision. auto samples in bfloat16 on GPUs and processors with instructions for it, else in "
    "float32, and chooses images in the faster one.  "
    f"[default: {_DEFAULTS.precision}]",
)
@click.option("--compile/--no-compile", default=None, help="Compile the networks first; worth it above a few thousand images.")
@click.option("--out", type=FILE, help="Write the set to this file.  [default: submission/<dataset>.pt]")
@click.option("--replace", is_flag=True, help="Make the set again, even if it is complete, refined or your own.")
@compute_options
def generate(
    output: Output,
    dataset: str,
    ipc: int,
    model: Path | None,
    candidates: int | None,
    select: str | None,
    from_real: str | None,
    out: Path | None,
    replace: bool,
    seed: int,
    device: str,
    **sampling: Any,
) -> None:
    """Make a distilled set of --ipc images per class, with its JSON and its contact sheet.

    The same seed gives the same images, whatever the batch size and the number of processes; several GPUs share the
    classes with accelerate launch -m ddkit generate. Selection methods that compare images use a network that is
    trained on the real images once, in minutes on a CPU; --influence-guidance trains another one.
    """
    from ddkit.data.store import dataset_spec
    from ddkit.distill import generate as making
    from ddkit.runtime.hub import source_name
    from ddkit.sets.select import LABEL_METHODS

    dataset_spec(dataset)  # refuses an unknown name before anything is announced
    source: making.FromModel | making.FromReal
    if from_real:
        if select or candidates is not None:
            raise UsageError(
                "--candidates and --select apply to a model's images.", "--from-real METHOD chooses from all real ones."
            )
        precision = sampling["precision"] or "auto"
        if from_real not in LABEL_METHODS:
            del sampling["precision"]  # that of the features that these methods compare
        refuse_unused(("model", *sampling), "with --from-real, which samples nothing")
        source = making.FromReal(from_real, seed, device, precision)
        origin = f"from its real training images ({from_real})"
    else:
        given = {name: value for name, value in sampling.items() if value is not None}
        source = making.FromModel.find(dataset, model, candidates=candidates, select=select, device=device, seed=seed, **given)
        settings = source.sampling
        chosen = f", chosen from {candidates} by {source.method}" if candidates else ""
        sampled = f"{settings.sampler}, {counted(settings.steps, 'step', 'steps')}, guidance {settings.guidance:g}"
        if settings.mode_guidance:
            sampled += f", mode guidance {settings.mode_guidance:g}"
        if settings.influence_guidance:
            sampled += f", influence guidance {settings.influence_guidance:g} by a network trained on the real images once"
        origin = f"with {source_name(source.folder)}: {sampled}{chosen}"
    out = out or SUBMISSION_FOLDER / f"{dataset}.pt"
    output.note(f"Making {counted(ipc, 'image', 'images')} per class of {dataset} {origin}.")
    earlier = out.stat() if out.exists() else None
    saved = making.generate(dataset, ipc, source, out, replace=replace, progress=output.progress)
    if not is_main():
        return
    complete = earlier is not None and saved.tensor.stat().st_mtime_ns == earlier.st_mtime_ns
    if complete:
        output.note(f"{out} is complete; nothing was made. --replace makes it again.")
    step = "ddkit refine" if out.parent == SUBMISSION_FOLDER else "ddkit evaluate"
    output.finish([] if complete else [saved.tensor, saved.provenance, saved.sheet], step, saved.tensor)
    output.result({"tensor": saved.tensor, "facts": saved.provenance, "sheet": saved.sheet})
