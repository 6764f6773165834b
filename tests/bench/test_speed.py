"""Costs: parameters and arithmetic against published figures, timings by their consistency only."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL

import latentae
from latentae.bench import speed
from latentae.bench.speed import SpeedGrid, count_gmac, count_parameters, measure_speed
from latentae.codec import LatentCodec
from latentae.errors import RequestError


def count_by_hooks(model, run):
    """10^9 multiply-accumulates of convolutions, linear layers and single-head attention, from their shapes."""
    total = 0

    def convolution(module, inputs, output):
        nonlocal total
        total += output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    def linear(module, inputs, output):
        nonlocal total
        total += output.numel() * module.in_features

    def attention(module, inputs, output):
        nonlocal total
        channels, positions = inputs[0].shape[1], inputs[0].shape[2] * inputs[0].shape[3]
        total += 2 * positions**2 * channels

    handles = []
    for module in model.modules():
        kinds = {"Conv2d": convolution, "Linear": linear, "Attention": attention}
        if kind := kinds.get(type(module).__name__):
            handles.append(module.register_forward_hook(kind))
    run()
    for handle in handles:
        handle.remove()
    return total / 1e9


def test_stable_diffusions_autoencoder_costs_what_is_published():
    with torch.device("meta"):
        kl = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
        encode = count_by_hooks(kl, lambda: kl.encode(torch.empty(1, 3, 256, 256)))
        decode = count_by_hooks(kl, lambda: kl.decode(torch.empty(1, 4, 32, 32)))
    parameters = count_parameters(kl)
    gmac = count_gmac(LatentCodec(kl.to_empty(device="cpu")), 256)
    # LiteVAE (arXiv 2405.14477) states 34.16 M parameters and 137 "GFLOPs" for this encoder
    assert parameters["encoder"] / 1e6 == pytest.approx(34.16, abs=0.01)
    assert gmac["encode"] == pytest.approx(137, rel=0.01)
    assert gmac["encode"] == pytest.approx(encode, rel=1e-9)
    assert gmac["decode"] == pytest.approx(decode, rel=1e-9)


def test_a_model_that_cannot_be_counted_says_why():
    class Stubborn(torch.nn.Module):
        config = {"spatial_compression_ratio": 1, "latent_channels": 3}

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, pixels):
            return pixels * float(pixels.mean())  # needs values

        def decode(self, latents):
            return latents

    assert "Stubborn" in count_gmac(LatentCodec(Stubborn()), 32)["reason"]


def test_timings_are_consistent():
    codec = LatentCodec(latentae.create("dc-ae-tiny"))
    speed = measure_speed(codec, 64, batch_size=3, repeats=5)
    assert (speed["size"], speed["batch_size"], speed["device"], speed["dtype"]) == (64, 3, "cpu", "float32")
    assert speed["threads"] == torch.get_num_threads()
    for half in ("encode", "decode"):
        low, high = speed[half]["quartiles"]
        assert 0 < low <= speed[half]["images_per_second"] <= high
        assert speed[half]["images_per_second"] * speed[half]["seconds_per_batch"] == pytest.approx(3)
        assert speed[half]["repeats"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory is read from /proc")
def test_peak_memory_sees_what_a_step_allocates():
    class Greedy(torch.nn.Module):
        config = {"spatial_compression_ratio": 1, "latent_channels": 3}

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, pixels):
            return pixels + torch.ones(100 * 2**20 // 4).sum() * 0  # 100 MiB, written to

        def decode(self, latents):
            return latents

    speed = measure_speed(LatentCodec(Greedy()), 32)
    assert speed["encode"]["peak_memory_bytes"] - speed["decode"]["peak_memory_bytes"] > 60 * 2**20


def test_a_grid_times_every_combination_and_leaves_the_model_as_it_was():
    codec = LatentCodec(latentae.create("dc-ae-tiny"))
    before = {name: value.clone() for name, value in codec.autoencoder.state_dict().items()}
    rows = SpeedGrid([32, 36], ["float32", "bfloat16"]).measure(codec, 64, 2, repeats=3)
    assert [(row["size"], row["dtype"]) for row in rows] == [
        (32, "float32"), (32, "bfloat16"), (36, "float32"), (36, "bfloat16")
    ]  # fmt: skip
    for row in rows:
        assert not row["compiled"]
        assert row["batch_size"] == 2
        assert row["decode"]["seconds_per_batch"] > 0
    assert all(torch.equal(value, before[name]) for name, value in codec.autoencoder.state_dict().items())
    assert codec.dtype == torch.float32
    (row,) = SpeedGrid(dtypes=["float32"]).measure(codec, 64, 1, repeats=3)
    assert row["size"] == 64
    assert not SpeedGrid()


def test_what_fails_in_a_grid_has_a_reason_and_the_rest_is_timed(monkeypatch):
    codec = LatentCodec(latentae.create("dc-ae-tiny"))
    measure = speed.measure_speed

    def too_large(codec, size, *arguments):
        if size > 32:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return measure(codec, size, *arguments)

    monkeypatch.setattr(speed, "measure_speed", too_large)
    large, small = SpeedGrid([64, 32]).measure(codec, 32, 1, repeats=3)
    assert large["reason"] == "CUDA out of memory."
    assert "decode" in small
    with pytest.raises(RequestError, match="int8"):
        SpeedGrid(dtypes=["int8"])


@pytest.mark.slow
def test_compiled_models_say_how_long_compiling_took():
    codec = LatentCodec(latentae.create("dc-ae-tiny"))
    eager, compiled = SpeedGrid(compiled=True).measure(codec, 32, 1, repeats=3)
    assert not eager["compiled"]
    assert compiled["compiled"]
    assert compiled["compile_seconds"] > compiled["decode"]["seconds_per_batch"]
    torch._dynamo.reset()
