"""ddkit: train, generate, evaluate, check and pack tiny datasets for a dataset-distillation challenge."""

__version__ = "0.1.0"
