"""`ddkit generate`: make a distilled set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ddkit.cli._options import RUNS_FOLDER, SUBMISSION_FOLDER, device_option, example, output_options, seed_option
from ddkit.cli._output import Output
from ddkit.errors import UsageError
from ddkit.runtime.environment import is_main

if TYPE_CHECKING:
    from ddkit.distill.generate import FromModel, FromReal


@click.command(epilog=example("ddkit generate --ipc 10 --dataset cifar100 --candidates 100"))
@click.option("--dataset", required=True, help="A dataset of `ddkit data list`.")
@click.option("--ipc", type=int, default=10, show_default=True, help="Images per class; the challenge asks for 10.")
@click.option("--model", type=click.Path(file_okay=False, path_type=Path), help="A model folder; runs/<dataset>.")
@click.option("--candidates", type=click.IntRange(1), help="Images of each class to choose from; see --select.")
@click.option(
    "--select",
    metavar="METHOD",
    help="How to choose from the candidates: easy (the default), herding, k-center, "
    "k-medoids, minimax, middling, hard, spread, random or first.",
)
@click.option(
    "--from-real",
    metavar="METHOD",
    help="Real training images instead of a model's: random and first are the "
    "baselines, the other methods of --select choose from all.",
)
@click.option("--sampling-steps", "steps", type=click.IntRange(1, 1000), help="Of the sampler.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="How strongly the class is insisted on; 1 is not at all.  [default: 3]"
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="The times, 0 (clean) to 1 (noise), in which guidance acts.",
)
@click.option("--sampler", type=click.Choice(["ddim", "dpm++", "unipc", "euler"]), help="How noise is removed.")
@click.option("--batch-size", type=click.IntRange(1), help="Images at once.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="bfloat16 is faster on GPUs and on processors with instructions for it.",
)
@click.option("--compile/--no-compile", default=None, help="Compile first; pays from some thousands of images on.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The file; submission/<dataset>.pt.")
@click.option("--replace", is_flag=True, help="Make it anew, even where the set has been refined or is there already.")
@seed_option
@device_option
@output_options
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

    The same seed gives the same images, whatever the batch size and the number of processes: several GPUs share the
    classes with accelerate launch -m ddkit generate. Choosing looks through the eyes of a network that is
    trained on the real images once, in minutes on a CPU.
    """
    from ddkit.distill.generate import FromReal
    from ddkit.distill.generate import generate as generate_set

    if from_real and (select or candidates is not None):
        raise UsageError("--candidates and --select are of a model's images.", "--from-real METHOD chooses from all real ones.")
    if select and candidates is None:
        raise UsageError("--select chooses from candidates.", "Say how many of each class with --candidates.")
    unused = [f"--{name.replace('_', '-')}" for name, value in {"model": model, **sampling}.items() if value is not None]
    if from_real and unused:
        raise UsageError(f"{', '.join(unused)}: nothing is sampled with --from-real.")
    if from_real:
        source = FromReal(from_real, seed, device)
    else:
        choice = {"candidates": candidates} | ({"select": select} if select else {})
        source = _from_model(model or RUNS_FOLDER / dataset, seed, device, choice, sampling)
    out = out or SUBMISSION_FOLDER / f"{dataset}.pt"
    output.quiet = output.quiet or not is_main()
    output.say(f"Making {ipc} images per class of {escape(dataset)} {escape(_origin(source))}.")
    saved = generate_set(dataset, ipc, source, out, replace=replace, progress=output.listen)
    if not is_main():
        return
    output.done([saved.tensor, saved.provenance, saved.sheet], f"ddkit evaluate {saved.tensor}")
    output.result({"tensor": saved.tensor, "facts": saved.provenance, "sheet": saved.sheet})


def _from_model(folder: Path, seed: int, device: str, choice: dict[str, Any], sampling: dict[str, Any]) -> FromModel:
    from ddkit.distill.generate import FromModel
    from ddkit.generator.sampling import SamplingSettings

    given = {name: value for name, value in sampling.items() if value is not None}
    return FromModel(folder, SamplingSettings(seed=seed, **given), device, **choice)


def _origin(source: FromModel | FromReal) -> str:
    from ddkit.distill.generate import FromReal

    if isinstance(source, FromReal):
        return f"from its real training images ({source.choice})"
    config = source.sampling
    chosen = f", chosen from {source.candidates} by {source.select}" if source.candidates else ""
    return f"with {source.folder}: {config.sampler}, {config.steps} steps, guidance {config.guidance:g}{chosen}"
