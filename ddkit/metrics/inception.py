"""Features of Inception, in which papers measure the Frechet distance; by torchmetrics and torch-fidelity."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import torch
from torch import Tensor

from ddkit.errors import MissingDataError, UsageError
from ddkit.runtime.device import upload

_IMAGES_AT_ONCE = 50  # enlarged to 299 px


class InceptionFeatures:
    """Features of the Inception network of Heusel et al. 2017 (arXiv 1706.08500): call it with images.

    Its weights, 91 MiB, come from PyTorch's cache of downloads, or are downloaded. Raises UsageError if torch-fidelity
    is not installed, and MissingDataError if the weights are not in the cache and cannot be downloaded.
    """

    num_features = 2048

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise UsageError("torch-fidelity is not installed.", "Install it: pip install 'ddkit[inception]'") from error
        try:
            network = NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)])
        except urllib.error.URLError as error:
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
            raise MissingDataError(
                f"The weights of Inception could not be downloaded: {error.reason}.",
                f"Download {URL_INCEPTION_V3} in another way, and save it as {path}.",
            ) from error
        self._device = torch.device(device)
        self._network = network.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, 2048) float32 on the CPU."""
        return torch.cat([self._network(upload(part, self._device)).float() for part in images.split(_IMAGES_AT_ONCE)]).cpu()
