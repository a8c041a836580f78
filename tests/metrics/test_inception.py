"""Inception's features, by weights that stand in for the published ones, which are 91 MiB to download."""

import pytest
import torch

from ddkit.errors import MissingDataError
from ddkit.metrics.inception import InceptionFeatures

extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """PyTorch's folder of downloads, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def weights(hub, monkeypatch):
    """Random weights where the published ones would be kept."""
    path = hub / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with monkeypatch.context() as without_weights:
        without_weights.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = extractor.FeatureExtractorInceptionV3("any", ["2048"])
    torch.save(network.state_dict(), path)


@pytest.mark.slow
@pytest.mark.usefixtures("weights")
def test_features_of_each_image_whatever_its_company():
    images = torch.randint(0, 256, (52, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = InceptionFeatures()
    seen = features(images)
    assert seen.shape == (52, InceptionFeatures.num_features) and seen.dtype == torch.float32
    assert torch.allclose(features(images[51:]) / seen.max(), seen[51:] / seen.max(), atol=1e-4)
    assert not torch.allclose(seen[0] / seen.max(), seen[1] / seen.max(), atol=1e-2)


@pytest.mark.usefixtures("hub")
def test_without_weights_it_says_where_to_put_them(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(MissingDataError, match="weights-inception.*save it as .*checkpoints"):
        InceptionFeatures()
