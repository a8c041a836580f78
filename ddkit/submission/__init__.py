"""Import paths that notebooks use; the code is in `ddkit.checks` and `ddkit.packing`."""
