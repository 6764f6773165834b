"""Stock autoencoders of every kind train, whole or in part, and come back as what they were, with fresh statistics."""

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import latentae
from latentae.cli.export import refresh_normalisation
from latentae.cli.main import main
from latentae.errors import RequestError
from latentae.objectives import KL, L1
from latentae.training.start import build_autoencoder

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
STOCK = {
    "AutoencoderKL": lambda: diffusers.AutoencoderKL(**BLOCKS, latent_channels=4),
    "AutoencoderDC": lambda: diffusers.AutoencoderDC(**latentae.families.presets.find_preset("dc-ae-tiny").config),
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "VQModel": lambda: diffusers.VQModel(**BLOCKS, latent_channels=3, num_vq_embeddings=16),
}


@pytest.fixture(params=STOCK)
def stock_folder(request, tmp_path):
    torch.manual_seed(0)
    STOCK[request.param]().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_a_stock_autoencoder_trains_and_comes_back(runs, folder, tmp_path, stock_folder, capsys):
    module = runs.module(autoencoder={"pretrained": str(stock_folder)}, objective={"l1": L1()})
    before = {name: value.clone() for name, value in module.autoencoder.named_parameters()}
    steps = runs.fit(module, runs.data(folder), tmp_path / "run", 3)
    moved = {name for name, value in module.autoencoder.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} >= {"encoder", "decoder"}
    assert ("commitment" in steps[1]) == (stock_folder.name == "VQModel")
    assert ("quantize.embedding.weight" in moved) == (stock_folder.name == "VQModel")

    # opened by the stock class, with the averaged weights
    argv = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--data", str(folder), "--size", "48"]
    assert main(argv) == 0
    stock = getattr(diffusers, stock_folder.name).from_pretrained(tmp_path / "out").eval()
    averaged = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["latentae_ema"]
    for name, value in stock.state_dict().items():
        assert torch.equal(value, averaged[name])

    # the scaling factor of the images, computed by hand with the stock class
    images = [np.asarray(Image.open(path).crop((8, 0, 56, 48))) for path in sorted(folder.iterdir())]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        output = stock.encode(pixels)
    z = next(output[key] for key in ("latent_dist", "latents", "latent") if key in output)
    if stock_folder.name == "AutoencoderKL":
        spread = (z.mode().var(correction=0) + z.var.mean()).sqrt()  # that of samples, in expectation
        assert stock.config.scaling_factor == pytest.approx(1 / spread.item(), rel=0.05)
    else:
        size = z.square().mean().sqrt() if stock_folder.name == "AutoencoderDC" else z.std(correction=0)
        assert stock.config.scaling_factor == pytest.approx(1 / size.item(), rel=1e-4)
    printed = capsys.readouterr()
    assert "scaling_factor: " in printed.out
    assert "to keep it, export without --data" in printed.err


def test_the_decoder_alone_leaves_the_latents_as_they_are(runs, folder, tmp_path, stock_folder):
    parts = ["decoder"] + ["post_quant_conv"] * (stock_folder.name in ("AutoencoderKL", "VQModel"))
    module = runs.module(autoencoder={"pretrained": str(stock_folder)}, objective={"l1": L1()}, trainable=parts)
    before = {name: value.clone() for name, value in module.autoencoder.state_dict().items()}
    runs.fit(module, runs.data(folder), tmp_path / "run", 2)
    for name, value in module.autoencoder.state_dict().items():
        if not name.startswith(tuple(parts)):
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[n]) for n, value in module.autoencoder.state_dict().items())


def test_a_stock_class_from_scratch_is_the_stock_class(runs):
    description = {"diffusers": "AutoencoderKL", **BLOCKS, "latent_channels": 4}
    one, same, other = (build_autoencoder(description, seed=seed) for seed in (0, 0, 1))
    assert type(one) is diffusers.AutoencoderKL
    name = "decoder.conv_in.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    with pytest.raises(RequestError, match="did you mean AutoencoderKL"):
        build_autoencoder({"diffusers": "AutoencoderLK"})
    with pytest.raises(RequestError, match="did you mean latent_channels"):
        build_autoencoder({"diffusers": "AutoencoderKL", "latent_chanels": 4})


def test_statistics_follow_the_rule_of_the_class():
    measured = {"mean": [1.0] * 4, "std": [2.0] * 4, "overall_mean": 1.0, "overall_std": 2.0}
    shifted = diffusers.AutoencoderKL(**BLOCKS, latent_channels=4, scaling_factor=0.4, shift_factor=0.1)
    changes = refresh_normalisation(shifted, measured)
    assert changes == {"shift_factor": (0.1, 1.0), "scaling_factor": (0.4, 0.5)}
    assert (shifted.config.shift_factor, shifted.config.scaling_factor) == (1.0, 0.5)
    options = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    per_channel = diffusers.AutoencoderKL(**BLOCKS, latent_channels=4, scaling_factor=0.4, **options)
    assert set(refresh_normalisation(per_channel, measured)) == {"latents_mean", "latents_std"}
    assert per_channel.config.latents_std == [2.0] * 4
    assert refresh_normalisation(latentae.create("dc-ae-tiny"), measured) == {
        "scaling_factor": (1.0, pytest.approx(5**-0.5))
    }


def test_gradient_norms_of_terms_are_those_of_autograd(runs, folder, tmp_path):
    module = runs.module(
        runs.adversary(weight=0.2), objective={"l1": L1(2.0)}, term_gradients_every=1, gradient_clip=None
    )
    steps = runs.fit(module, runs.data(folder), tmp_path / "both", 1)
    assert set(steps[1]) >= {"gradient_of_l1", "gradient_of_adversarial"}

    alone = runs.module(objective={"l1": L1(2.0)}, gradient_clip=None)
    pixels = torch.stack([s["pixels"] for s in first_batch(runs, folder, tmp_path)]) / 127.5 - 1
    reconstruction = alone.autoencoder(pixels).sample
    loss = 2 * (pixels - reconstruction).abs().mean()
    (gradient,) = torch.autograd.grad(loss, alone.autoencoder.decoder.conv_out.conv.weight)
    assert steps[1]["gradient_of_l1"] == pytest.approx(gradient.norm().item(), rel=1e-4)

    without = runs.module(runs.adversary(weight=0.2), objective={"l1": L1(2.0)}, gradient_clip=None)
    plain = runs.fit(without, runs.data(folder), tmp_path / "plain", 1)
    assert plain[1]["gradient_norm"] == steps[1]["gradient_norm"], "measuring changes nothing"


def first_batch(runs, folder, tmp_path):
    data = runs.data(folder)
    data.setup("fit")
    data.trainer = runs.trainer(tmp_path / "other", 1)
    data.trainer.strategy._lightning_module = runs.module()
    dataset = data.train_dataloader().dataset
    return [dataset[0], dataset[1]]


def test_a_kl_term_needs_a_spread(runs, folder, tmp_path):
    module = runs.module(objective={"kl": KL()})
    with pytest.raises(RequestError, match="Gaussian posterior"):
        runs.fit(module, runs.data(folder), tmp_path, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_run_is_the_run(runs, folder, tmp_path):
    """Through the whole of torch.compile but the code generation, which needs a compiler."""
    import torch._dynamo

    plain = runs.module(runs.adversary())
    expected = runs.fit(plain, runs.data(folder), tmp_path / "plain", 2)
    compiled = runs.module(runs.adversary(), compile=True)
    with pytest.MonkeyPatch.context() as patch:
        original = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="aot_eager"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = runs.fit(compiled, runs.data(folder), tmp_path / "compiled", 2)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "name"), [("eq-vae/finetune-kl", "AutoencoderKL"), ("eq-vae/finetune-vq", "VQModel")]
)
def test_the_recipes_of_eq_vae_run_on_a_folder(tmp_path, folder, recipe, name):
    """As shipped, but for LPIPS, whose weights are not here, a smaller discriminator and one device."""
    torch.manual_seed(0)
    stock = STOCK[name]()
    stock.save_pretrained(tmp_path / "stock")
    argv = ["--config", recipe, "--run_dir", str(tmp_path / "run"), "--data.path", str(folder)]
    argv += ["--model.autoencoder.pretrained", str(tmp_path / "stock"), "--model.objective.lpips", "L2"]
    argv += ["--model.adversary.discriminator.channels", "32", "--model.adversary.discriminator.layers", "1"]
    argv += ["--model.adversary.start_step", "1", "--model.latent_transforms.eq_prob", "0.8"]
    argv += ["--data.size", "32", "--data.batch_size", "2", "--data.workers", "0", "--trainer.max_steps", "3"]
    argv += ["--trainer.devices", "1", "--trainer.accelerator", "cpu", "--model.accumulate", "1"]
    assert main(["fit", *argv]) == 0
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["latent_transforms"]
    assert [transform["class_path"] for transform in saved] == ["latentae.objectives.Equivariance"]
    assert saved[0]["init_args"]["eq_prob"] == 0.8
    trained = latentae.load(tmp_path / "run")
    assert type(trained) is type(stock)
    assert not torch.equal(trained.encoder.conv_in.weight, stock.encoder.conv_in.weight)


def test_a_start_that_is_not_set_is_asked_for():
    with pytest.raises(RequestError, match="pretrained is not set: give the folder or hub id to start from"):
        build_autoencoder({"pretrained": None})
