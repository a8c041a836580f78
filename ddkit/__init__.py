"""ddkit: train, generate, evaluate, check and pack tiny datasets for a dataset-distillation challenge."""

from ddkit.runtime.openmp import set_defaults as _set_openmp_defaults

__version__ = "0.1.0"

# Before torch is loaded, which reads these once: here, since whatever uses ddkit begins by importing it.
_set_openmp_defaults()
