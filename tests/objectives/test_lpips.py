"""LPIPS against the lpips package on the same random backbone: no weight file is needed to compare them."""

import warnings

import lpips
import pytest
import torch

from latentae.errors import MissingWeights, RequestError
from latentae.objectives import LPIPS, Objective, Step
from latentae.objectives.perceptual import _unit


@pytest.fixture(scope="module", params=["alex", "vgg"])
def reference(request, tmp_path_factory):
    """The package's own network with a random backbone, and a file that holds this backbone in torchvision's names."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    backbone = {f"features.{key.split('.', 1)[1]}": value for key, value in network.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(backbone, path)
    return request.param, network, path


def pixels(seed, size=64):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_value_and_gradient_are_those_of_the_package(reference):
    net, network, path = reference
    ours, target = LPIPS(net=net, path=path), pixels(0)
    gradients, values = [], []
    for distance in (lambda x: network(x, target).mean(), lambda x: ours(Step(target, x))):
        reconstruction = pixels(1).requires_grad_()
        value = distance(reconstruction)
        value.backward()
        values.append(value.detach())
        gradients.append(reconstruction.grad)
    torch.testing.assert_close(values[1], values[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6 * gradients[0].abs().max().item(), rtol=1e-4)


def gradient(distance, reconstruction):
    reconstruction = reconstruction.clone().requires_grad_()
    value = distance(reconstruction)
    value.backward()
    return value.detach(), reconstruction.grad


def test_gradients_are_finite_where_the_package_s_are_not(reference):
    """Features so small that their squares are zero in float32, as a constant image can give in some layer."""
    net, _, path = reference
    ours, target = LPIPS(net=net, path=path), pixels(0)
    network = ours._network[0]
    for layer in network.net.slice1.children():
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.zero_()
    network.net.slice1[0].weight.mul_(1e-24)
    constant = torch.full_like(target, 0.25)

    reference_value, reference_gradient = gradient(lambda x: network(x, target).mean(), constant)
    assert not torch.isfinite(reference_gradient).all(), "the case must be one on which the package fails"
    value, ours_gradient = gradient(lambda x: ours(Step(target, x)), constant)
    assert torch.isfinite(ours_gradient).all()
    torch.testing.assert_close(value, reference_value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_gradients_are_finite_on_constant_images(reference, level):
    net, network, path = reference
    ours, constant = LPIPS(net=net, path=path), torch.full((2, 3, 64, 64), level)
    value, ours_gradient = gradient(lambda x: ours(Step(constant, x)), constant)
    assert value == 0
    assert torch.isfinite(ours_gradient).all()
    value, ours_gradient = gradient(lambda x: ours(Step(pixels(0), x)), constant)
    assert torch.isfinite(ours_gradient).all()
    torch.testing.assert_close(value, network(constant, pixels(0)).mean(), atol=1e-6, rtol=1e-6)


def test_zero_feature_vectors_have_a_gradient_of_ordinary_size():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    _unit(features).sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))

    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    lpips.normalize_tensor(features).sum().backward()
    assert torch.isnan(features.grad).all()


def test_the_network_is_neither_saved_nor_cast_nor_trained(reference):
    net, _, path = reference
    ours = LPIPS(net=net, path=path)
    objective = Objective({"lpips": ours}).to(torch.bfloat16).train()
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours._network[0].parameters())
    assert not any(module.training for module in ours._network[0].modules())
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(Step(pixels(0), pixels(1)))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ours(Step(pixels(0), pixels(1))), rtol=0, atol=0)


def test_missing_weights_name_the_file_the_folder_the_command_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(MissingWeights) as caught:
        LPIPS()
    message = str(caught.value)
    assert all(
        part in message for part in ("vgg16-397923af.pth", str(tmp_path), "curl", "--model.objective.lpips null")
    )


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(RequestError, match=r"lacks features\.0\.bias and 24 other"):
        LPIPS(net="vgg", path=str(tmp_path / "half.pth"))
