import pytest
import torch

from latentae.nn.norms import RMSNorm2d


def reference(x, norm):
    """RMS norm in float64, straight from its definition."""
    x = x.double()
    y = x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return y * norm.weight.double().view(1, -1, 1, 1) + norm.bias.double().view(1, -1, 1, 1)


@pytest.fixture
def norm():
    norm = RMSNorm2d(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_definition(norm, grad, layout):
    x = torch.randn(2, 6, 3, 5).contiguous(memory_format=layout)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(norm(x).double(), reference(x, norm), atol=1e-6, rtol=1e-5)
    assert torch.equal(x, before)


def test_overwriting_gives_the_same_result_and_never_happens_under_autograd(norm):
    x = torch.randn(2, 6, 3, 5)
    expected = reference(x, norm)
    y = x.clone()
    norm(y, overwrite=True)
    assert torch.equal(y, x)
    with torch.no_grad():
        torch.testing.assert_close(norm(y, overwrite=True).double(), expected, atol=1e-6, rtol=1e-5)


def test_half_precision_is_rounded_once(norm):
    x = torch.randn(1, 6, 4, 4).bfloat16()
    with torch.no_grad():
        assert torch.equal(norm(x), reference(x, norm).bfloat16())


def test_large_half_values_do_not_overflow(norm):
    x = torch.full((1, 6, 1, 1), 60000.0, dtype=torch.float16)
    assert norm(x).isfinite().all()
