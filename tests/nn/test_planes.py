"""The packed forms of planes: bijections, the growth law, and an einsum that spreads planes by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout

SIDES = st.integers(1, 7)
LAYOUTS = st.builds(PlaneLayout, SIDES, SIDES, SIDES, planes=st.integers(1, 3), channels=st.integers(1, 4))


def tokens_of(layout, batch=2):
    return torch.randn(batch, layout.num_tokens, layout.channels, generator=torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=60)
@given(LAYOUTS)
def test_every_form_gives_the_tokens_back(layout):
    tokens = tokens_of(layout)
    assert torch.equal(layout.join(layout.split(tokens)), tokens)
    assert torch.equal(layout.unpack(layout.pack(tokens, "tokens"), "tokens"), tokens)
    assert torch.equal(layout.unpack(layout.pack(tokens, "mosaic"), "mosaic"), tokens)
    torch.testing.assert_close(layout.unpack(layout.pack(tokens, "volume"), "volume"), tokens, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(LAYOUTS)
def test_every_token_has_a_place_of_its_own(layout):
    assert layout.ids.shape == (layout.num_tokens, 3)
    named = torch.cat([layout.types[:, None], layout.ids], dim=1)
    assert len(named.unique(dim=0)) == layout.num_tokens
    assert (layout.ids >= 0).all()
    assert (layout.ids <= torch.tensor([layout.t - 1, layout.h - 1, layout.w - 1])).all()


@pytest.mark.parametrize(
    ("t", "h", "w", "volume", "triplane", "fourplane"),
    [
        (5, 16, 16, 1280, 416, 672),
        (5, 32, 32, 5120, 1344, 2368),
        (4, 32, 32, 4096, 1280, 2304),
        (16, 32, 32, 16384, 2048, 3072),
        (17, 32, 32, 17408, 2112, 3136),
        (33, 64, 64, 135168, 8320, 12416),
        (21, 60, 104, 131040, 9684, 15924),
    ],
)
def test_tokens_grow_with_the_faces(t, h, w, volume, triplane, fourplane):
    assert t * h * w == volume
    assert PlaneLayout(t, h, w, planes=1).num_tokens == triplane == h * w + t * (h + w)
    assert PlaneLayout(t, h, w, planes=2).num_tokens == fourplane == 2 * h * w + t * (h + w)


def test_an_image_is_one_plane():
    layout = PlaneLayout(1, 3, 4, planes=2, channels=5)
    assert layout.num_tokens == 12
    volume = layout.pack(tokens_of(layout), "volume")
    assert volume.shape == (2, 20, 1, 3, 4)
    assert volume[:, 5:].abs().max() == 0


def test_a_volume_holds_each_plane_along_the_axis_that_it_lacks():
    layout = PlaneLayout(3, 4, 5, planes=2, channels=2)
    tokens = tokens_of(layout)
    planes = layout.split(tokens)
    ones = {"t": torch.ones(3), "h": torch.ones(4), "w": torch.ones(5)}
    expected = [
        torch.einsum("bchw,t->bcthw", planes["xy1"], ones["t"]),
        torch.einsum("bchw,t->bcthw", planes["xy2"], ones["t"]),
        torch.einsum("bctw,h->bcthw", planes["xt"], ones["h"]),
        torch.einsum("bcth,w->bcthw", planes["yt"], ones["w"]),
    ]
    torch.testing.assert_close(layout.pack(tokens, "volume"), torch.cat(expected, dim=1))


def test_positions_and_values_of_tokens():
    layout = PlaneLayout(3, 2, 4, planes=2, channels=1)
    place = torch.einsum("nd,d->n", layout.ids, torch.tensor([100.0, 10.0, 1.0]))
    planes = layout.split(place[None, :, None])
    assert planes["xy1"][0, 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert planes["xy2"][0, 0].tolist() == [[200, 201, 202, 203], [210, 211, 212, 213]]
    assert planes["xt"][0, 0, 1].tolist() == [105, 106, 107, 108]
    assert planes["yt"][0, 0, 2].tolist() == [201.5, 211.5]
    of_tokens = layout.split(layout.of_tokens(torch.arange(4.0))[None])
    assert [plane.unique().tolist() for plane in of_tokens.values()] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("kind", ["tokens", "mosaic", "volume"])
def test_what_is_packed_for_another_layout_is_refused(kind):
    layout, other = PlaneLayout(3, 4, 5), PlaneLayout(3, 4, 6)
    with pytest.raises(RequestError, match="packed for another layout"):
        layout.unpack(other.pack(tokens_of(other), kind), kind)
    with pytest.raises(RequestError, match="packed for another layout"):
        layout.pack(tokens_of(other), kind)


def test_other_forms_and_empty_layouts_are_refused():
    layout = PlaneLayout(2, 2, 2)
    with pytest.raises(RequestError, match="choose tokens, mosaic or volume"):
        layout.pack(tokens_of(layout), "cube")
    with pytest.raises(RequestError, match="at least 1"):
        PlaneLayout(0, 2, 2)
