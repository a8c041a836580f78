"""`ddkit.packing.pack` under the import path that notebooks use."""

from ddkit.packing.pack import pack as pack
