"""What each phase of DC-AE trains, what its frozen parts cost, what is validated, and structured latents."""

from types import SimpleNamespace

import pytest
import torch
import yaml

import latentae
from latentae.errors import RequestError
from latentae.objectives import ChannelPrefix
from latentae.training.optimization import select_trainable
from latentae.training.recipes import find_recipe
from latentae.training.start import build_autoencoder

MIDDLE = {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight", "decoder.conv_in.bias"}
HEAD = {
    "decoder.norm_out.weight",
    "decoder.norm_out.bias",
    "decoder.conv_out.conv.weight",
    "decoder.conv_out.conv.bias",
}
TRAINED = {1: None, 2: MIDDLE, 3: HEAD}  # None: everything
RATIOS = ("f32c32", "f64c128", "f128c512")


def recipe(ratio, phase):
    return yaml.safe_load(find_recipe(f"dcae/{ratio}-phase{phase}").read_text())


def shrunken(preset):
    """The preset's architecture, stage by stage and with its shortcuts and norms, at a 32nd of its width."""
    config = dict(latentae.families.presets.find_preset(preset).config)
    for half in ("encoder", "decoder"):
        config[f"{half}_block_out_channels"] = [w // 32 * 8 // 8 for w in config[f"{half}_block_out_channels"]]
        config[f"{half}_layers_per_block"] = [min(d, 1) for d in config[f"{half}_layers_per_block"]]
    return latentae.create(
        preset, **config | {"latent_channels": config["latent_channels"] // 32, "attention_head_dim": 4}
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("phase", TRAINED)
def test_each_phase_trains_exactly_these_and_frozen_parts_cost_nothing(runs, folder, tmp_path, ratio, phase):
    config = recipe(ratio, phase)
    autoencoder = shrunken(config["model"]["autoencoder"]["preset"])
    size = autoencoder.spatial_compression_ratio
    before = {name: value.clone() for name, value in autoencoder.named_parameters()}
    expected = TRAINED[phase] or set(before)
    adversary = runs.adversary() if "adversary" in config["model"] else None
    assert (adversary is not None) == (phase == 3)
    module = runs.module(adversary, autoencoder=autoencoder, trainable=config["model"].get("trainable"))
    trainer = runs.trainer(tmp_path, 2)
    with runs.quiet():
        trainer.fit(module, runs.data(folder, size=size, val_fraction=0.0))

    named = dict(autoencoder.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == expected
    assert {name for name in named if not torch.equal(named[name], before[name])} <= expected
    moved = {name for name in named if not torch.equal(named[name], before[name])}
    assert moved == expected if phase > 1 else len(moved) > 0.9 * len(expected)
    assert all(p.grad is None for name, p in named.items() if name not in expected)
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(named[name]) for name in expected}
    assert len(trainer.optimizers[0].state) == len(expected)
    assert set(module.ema.average) == expected


def test_frozen_parts_keep_no_activations():
    """Bytes that autograd keeps of a forward pass: of the frozen encoder none, of the rest only what gradients need."""
    pixels = torch.rand(1, 3, 64, 64)

    def kept(phase):
        autoencoder = shrunken("dc-ae-f32c32-in-1.0")
        select_trainable(autoencoder, recipe("f32c32", phase)["model"].get("trainable"))
        own = {p.untyped_storage().data_ptr() for p in autoencoder.parameters()}
        saved = SimpleNamespace(bytes=0)

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                saved.bytes += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents = autoencoder.encode(pixels).latent_dist.mode()
            encoder = saved.bytes
            autoencoder.decode(latents)
        return encoder, saved.bytes - encoder

    (full_encoder, full_decoder), (middle_encoder, middle_decoder), (head_encoder, head_decoder) = map(kept, (1, 2, 3))
    assert middle_encoder < 0.01 * full_encoder
    assert middle_decoder <= full_decoder
    assert head_encoder == 0
    assert head_decoder < 0.2 * full_decoder


def test_every_phase_validates_both_resolutions():
    for ratio in RATIOS:
        for phase in TRAINED:
            assert recipe(ratio, phase)["data"]["val_sizes"] == [256, 512]


def test_both_sizes_are_measured_each_by_itself(runs, folder, tmp_path):
    """The values of two sizes are those of two runs with one size."""

    def go(name, sizes):
        module, data = runs.module(), runs.data(folder, val_sizes=sizes, val_fraction=0.4)
        trainer = runs.trainer(tmp_path / name, 1)
        return trainer.validate(module, data, verbose=False), trainer

    merged = {}
    both, _ = go("both", [32, 64])
    for results in both:
        merged |= results
    for size in (32, 64):
        (alone,), _ = go(f"only-{size}", [size])
        for name in ("psnr", "ssim", "l1"):
            assert merged[f"val/{name}@{size}"] == pytest.approx(alone[f"val/{name}"], rel=1e-6)
    assert merged["val/psnr@32"] != merged["val/psnr@64"]


def structured(**options):
    return latentae.create("dc-ae-tiny", decoder_in_shortcut=False, encoder_out_shortcut=False, **options)


def test_a_prefix_zeroes_the_other_channels():
    prefix = ChannelPrefix([2, 5], always_full=True)
    latents, pixels = torch.randn(2, 8, 4, 4), torch.rand(2, 3, 32, 32)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        cut, target = prefix(latents, pixels)
        count = int((cut[0] != 0).flatten(1).any(1).sum())
        seen.add(count)
        assert torch.equal(cut[:2, :count], latents[:, :count])
        assert not cut[:2, count:].any()
        assert torch.equal(cut[2:], latents)
        assert torch.equal(target, torch.cat([pixels, pixels]))
    assert seen == {2, 5}


def test_a_zeroed_latent_decodes_as_a_sliced_decoder():
    """The paper's form: the first convolution cut to c input channels."""
    autoencoder = structured().double()
    latents = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    cut, _ = ChannelPrefix([3])(latents, latents)
    whole = autoencoder.decode(cut).sample
    conv = autoencoder.decoder.conv_in
    conv.weight = torch.nn.Parameter(conv.weight[:, :3].clone())
    conv.in_channels = 3
    torch.testing.assert_close(autoencoder.decoder(latents[:, :3]), whole, rtol=1e-12, atol=1e-12)


def test_training_on_prefixes_helps_prefixes(runs, folder, tmp_path):
    def error_of_prefix(**options):
        module = runs.module(autoencoder=structured(), ema=None, **options)
        runs.fit(module, runs.data(folder, dead_leaves=0.0), tmp_path / str(len(options)), 60)
        pixels = torch.stack([runs.pixels(folder, i) for i in range(4)])
        with torch.no_grad():
            latents = module.autoencoder.encode(pixels).latent_dist.mode()
            return (module.autoencoder.decode(latents[:, :2]).sample - pixels).abs().mean().item()

    assert error_of_prefix(latent_transforms=[ChannelPrefix([2, 4, 8])]) < 0.9 * error_of_prefix()


@pytest.mark.parametrize(
    ("make", "channels", "message"),
    [
        (lambda: latentae.create("dc-ae-tiny"), [4], "decoder_in_shortcut"),
        (structured, [4, 9], "between 1 and 8"),
        (structured, [], "between 1 and 8"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(runs, make, channels, message):
    with pytest.raises(RequestError, match=message):
        runs.module(autoencoder=make(), latent_transforms=[ChannelPrefix(channels)])


def test_init_from_takes_the_average_and_its_count(runs, folder, tmp_path, capsys):
    runs.fit(runs.module(ema=0.5), runs.data(folder), tmp_path, 3)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    description = {"preset": "dc-ae-tiny", "init_from": str(tmp_path)}
    autoencoder = build_autoencoder(description, seed=5)
    said = capsys.readouterr().err
    assert "took 64 of 64 tensors (encoder 31 of 31, decoder 33 of 33)" in said
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(value, checkpoint["latentae_ema"][name])

    module = runs.module(autoencoder=description, trainable=["decoder.conv_out"])
    runs.fit(module, runs.data(folder), tmp_path / "second", 2)
    assert module.ema.updates == 3 + 2
