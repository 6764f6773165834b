"""The network of LPIPS, as training and measuring both use it."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from latentae.errors import MissingExtra, RequestError


def lpips_network(net: str, backbone: Mapping[str, Tensor]) -> nn.Module:
    """The ``lpips`` package's network, version 0.1, with the package's linear heads on a torchvision backbone, frozen.

    Args:
        net: ``vgg`` or ``alex``.
        backbone: state dict of torchvision's network, whole or of its ``features`` alone.

    Raises:
        MissingExtra: the ``lpips`` package is not installed.
        RequestError: the state dict is of another network.
    """
    try:
        import lpips
    except ImportError as error:
        raise MissingExtra("LPIPS", "all") from error
    with warnings.catch_warnings(), torch.device("meta"):  # on meta: the classifier's 120 million weights are unused
        warnings.simplefilter("ignore", UserWarning)  # lpips passes arguments that torchvision has deprecated
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    # slice1.0.weight of lpips is torchvision's features.0.weight
    prefix = "features." if any(key.startswith("features.") for key in backbone) else ""
    sources = {f"net.{key}": prefix + key.split(".", 1)[1] for key in network.net.state_dict()}
    if missing := [source for source in sources.values() if source not in backbone]:
        raise RequestError(
            f"The weight file is not that of torchvision's network for LPIPS ({net}): it lacks {missing[0]} and "
            f"{len(missing) - 1} other tensors; fetch it again."
        )
    network.load_state_dict({**{k: backbone[v] for k, v in sources.items()}, **heads}, strict=False, assign=True)
    return network.eval().requires_grad_(False)
