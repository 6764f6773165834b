import torch

from latentae.nn.attention import relu_linear_attention


def quadratic(q, k, v):
    """The same attention as the N x N matrix that linear attention avoids."""
    scores = q.relu() @ k.relu().transpose(-1, -2)
    return (scores / (scores.sum(-1, keepdim=True) + 1e-15)) @ v


def test_equals_the_quadratic_form():
    q, k, v = torch.randn(3, 2, 4, 50, 8).double().unbind(0)
    actual = relu_linear_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(actual.double(), quadratic(q, k, v), atol=1e-5, rtol=1e-4)


def test_stays_in_fp32_under_autocast():
    q, k, v = torch.randn(3, 1, 2, 4096, 16).unbind(0)
    expected = relu_linear_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = relu_linear_attention(q, k, v)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_a_pixel_without_any_match_is_zero_and_finite():
    q = torch.full((1, 1, 3, 4), -1.0, requires_grad=True)
    out = relu_linear_attention(q, torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert q.grad.isfinite().all()
