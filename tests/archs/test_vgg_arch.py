"""VGG19 against torchvision's layers and files."""

from __future__ import annotations

import pytest
import torch
from basicsr.archs import build_network
from torchvision.models.vgg import cfgs, make_layers

from kdsr.archs.vgg_arch import VGG19
from kdsr.runtime.checkpoint import load_weights
from kdsr.runtime.errors import CheckpointError, DataError

RELU = {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu5_1": 29}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[torch.nn.Sequential, str]:
    """torchvision's layers with random weights, and a file with their names and a stub of the classifier."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["E"])
    weights = {f"features.{name}": value for name, value in layers.state_dict().items()}
    weights |= {
        f"classifier.{index}.{kind}": torch.zeros(4) for index in (0, 3, 6) for kind in ("weight", "bias")
    }
    file = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(weights, file)
    return layers, str(file)


def load(net: VGG19, file: str, **options) -> None:
    load_weights(net, file, param_key="auto", required=net.required_prefixes, **options)


def test_features_are_torchvisions(published):
    layers, file = published
    net = build_network({"type": "VGG19"}).eval()
    load(net, file, strict=False)
    x = torch.rand(2, 3, 35, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected, z = [], (x - mean) / std
    with torch.no_grad():
        for index, layer in enumerate(layers):
            z = layer(z)
            if index in RELU.values():
                expected.append(z.clone())
        features = net(x)
    assert [tuple(f.shape) for f in features] == [
        (2, 64, 35, 32), (2, 128, 17, 16), (2, 256, 8, 8), (2, 512, 4, 4), (2, 512, 2, 2),
    ]  # fmt: skip
    for ours, theirs in zip(features, expected, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_normalisation_is_no_part_of_the_file():
    net = VGG19()
    assert all(name.startswith("features.") for name in net.state_dict())
    assert sum(p.numel() for p in net.parameters()) == 12_944_960


def test_strict_loading_names_additional_tensors(published):
    with pytest.raises(CheckpointError, match=r"features\.30\.weight .* in the file, not in the network"):
        load(VGG19(), published[1], strict=True)


def test_a_file_that_lacks_a_layer_is_refused_in_any_case(published, tmp_path):
    weights = torch.load(published[1], weights_only=True)
    del weights["features.28.bias"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"features\.28\.bias is not in the file"):
        load(VGG19(), str(tmp_path / "cut.pth"), strict=False)


def test_gradient_reaches_the_image():
    net = VGG19().requires_grad_(False)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    for feature in net(x):
        (gradient,) = torch.autograd.grad(feature.sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_images_that_are_too_small():
    with pytest.raises(DataError, match="images of 15x16 pixels are too small.*set gt_size to 16"):
        VGG19()(torch.rand(1, 3, 15, 16))
