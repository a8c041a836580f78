"""`ddkit.network.convnet` under the import path that notebooks use."""

from ddkit.network.convnet import ConvNet as ConvNet
