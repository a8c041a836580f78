"""`ddkit.network.training` under the import path that notebooks use."""

from ddkit.network.training import train_network as train_network
