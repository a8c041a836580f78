"""Plans and dry runs that measure this machine for a moment only; `python -m measuring` is the command `ddkit` with them."""

import dataclasses

import pytest

from ddkit.cli import main


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Measure for a tenth of a second what is measured for one to three seconds otherwise, and refinements on few images."""
    from ddkit.entering import plan
    from ddkit.evaluation.estimate import estimate_evaluation
    from ddkit.generator.training.estimate import estimate

    def measure_refinement(images, spec, real, settings, *, device):
        return whole(images, spec, real, dataclasses.replace(settings, batch_real=2), device=device)

    whole = plan.measure_refinement
    patch.setattr(plan, "measure_refinement", measure_refinement)
    patch.setattr(plan, "_TRIED", 0.1)
    patch.setitem(estimate_evaluation.__kwdefaults__, "tried_seconds", 0.1)
    patch.setitem(estimate.__kwdefaults__, "seconds", 0.1)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        main(prog_name="ddkit")
