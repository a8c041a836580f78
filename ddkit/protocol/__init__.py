"""Import paths that notebooks use; the code is in `ddkit.network` and `ddkit.evaluation`."""
