"""Transformers of stock diffusers on packed planes, as the README says: shapes, gradients, what depends on what."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)

from latentae.nn.planes import PlaneLayout

LAYOUT = PlaneLayout(3, 4, 6, planes=2, channels=4)  # a mosaic of 2 * 4 + 2 * 3 = 14 rows and 6 columns


def tokens(batch=2):
    return torch.randn(batch, LAYOUT.num_tokens, LAYOUT.channels, generator=torch.Generator().manual_seed(0))


def flux():
    """Tokens, at their positions (t, y, x)."""
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return (
        model,
        lambda packed, time: (
            model(
                LAYOUT.pack(packed, "tokens"),
                img_ids=LAYOUT.ids.to(packed),
                timestep=time,
                encoder_hidden_states=torch.zeros(len(packed), 1, 8),
                txt_ids=torch.zeros(1, 3),
                pooled_projections=torch.zeros(len(packed), 8),
            ).sample
        ),
    )


def of_mosaic(model):
    return model, lambda packed, time: LAYOUT.unpack(
        model(
            LAYOUT.pack(packed, "mosaic"), encoder_hidden_states=torch.ones(len(packed), 1, 8), timestep=1000 * time
        ).sample,
        "mosaic",
    )


def pixart():
    """A mosaic; sizes other than its own square are interpolated positions."""
    return of_mosaic(
        PixArtTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, caption_channels=8, sample_size=14, patch_size=1, use_additional_conditions=False,
        )
    )  # fmt: skip


def sana():
    """A mosaic."""
    return of_mosaic(
        SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_attention_heads=1, attention_head_dim=32,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8,
            sample_size=14, patch_size=1,
        )
    )  # fmt: skip


def wan():
    """A volume of (K + 2)·C channels; its answer is averaged to planes, and no tokens are saved."""
    channels = LAYOUT.volume_channels
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels,
        text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, lambda packed, time: LAYOUT.unpack(
        model(
            LAYOUT.pack(packed, "volume"), timestep=1000 * time, encoder_hidden_states=torch.zeros(len(packed), 2, 8)
        ).sample,
        "volume",
    )


@pytest.mark.parametrize("kind", [flux, pixart, sana, wan])
def test_a_stock_transformer_takes_planes(kind):
    torch.manual_seed(0)
    x = tokens().requires_grad_()
    model, velocity = kind()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin as zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    time = torch.tensor([0.2, 0.8])
    predicted = velocity(x, time)
    assert predicted.shape == x.shape
    assert predicted.isfinite().all()
    # a token of xt is answered with knowledge of every plane of its clip, and of no other clip
    (gradient,) = torch.autograd.grad(predicted[0, LAYOUT.types == 2].square().sum(), x, retain_graph=True)
    for k in range(4):
        assert gradient[0, LAYOUT.types == k].abs().max() > 0
    assert gradient[1].abs().max() == 0
    predicted.square().mean().backward()
    reached = [p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.ndim > 1]
    assert sum(reached) >= 0.8 * len(reached)  # texts are constant
    assert not torch.allclose(velocity(x, 1 - time), predicted)


def test_flux_knows_where_a_token_is():
    torch.manual_seed(0)
    x = tokens(1)
    _, velocity = flux()
    with torch.no_grad():
        here = velocity(x, torch.tensor([0.5]))
        order = torch.randperm(LAYOUT.num_tokens)
        assert not torch.allclose(velocity(x[:, order], torch.tensor([0.5])), here[:, order], atol=1e-5)
