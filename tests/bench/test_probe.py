"""The probe on codecs whose latents are known: cosine coefficients of blocks."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import IdentityDistribution
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

from latentae.bench import latent_space
from latentae.bench import probe as probe_module
from latentae.bench.images import ImageSet
from latentae.bench.latent_space import LatentSpace, named, split_images
from latentae.bench.merging import merge_results
from latentae.bench.probe import Prober, ProbeSettings, probe, summarise_runs
from latentae.bench.probe_report import probe_header, probe_rows, samples_sheet, summarise_probes
from latentae.bench.probing import probe_models
from latentae.bench.run import bench
from latentae.cli import main as cli
from latentae.codec import LatentCodec
from latentae.data.samples import dead_leaves
from latentae.data.sources import open_source
from latentae.errors import DataError, RequestError
from latentae.metrics.frechet import FrechetDistance
from latentae.metrics.spectrum import cosine_matrix

TINY = ProbeSettings(steps=2, tokens_per_step=64, samples=4, sampling_steps=2)
SECONDS = ("seconds", "denoise_seconds", "decode_seconds")


class Blocks(torch.nn.Module):
    """The three coarsest cosine coefficients of blocks, for each colour; ``mix`` changes the nine channels."""

    def __init__(self, side=8, mix=None, shift=0.0):
        super().__init__()
        rows = cosine_matrix(side)
        basis = torch.stack([torch.outer(rows[i], rows[j]) for i, j in ((0, 0), (0, 1), (1, 0))])[:, None]
        self.basis = torch.nn.Parameter(basis.repeat(3, 1, 1, 1).float())  # (9, 1, side, side)
        self.mix = torch.eye(9) if mix is None else mix
        self.shift = shift
        self.config = {"latent_channels": 9, "spatial_compression_ratio": side}

    def encode(self, x):
        z = torch.nn.functional.conv2d(x, self.basis, stride=self.basis.shape[-1], groups=3)
        return SimpleNamespace(
            latent_dist=IdentityDistribution(torch.einsum("ij,bjhw->bihw", self.mix, z) + self.shift)
        )

    def decode(self, z):
        z = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(self.mix), z - self.shift)
        x = torch.nn.functional.conv_transpose2d(z, self.basis, stride=self.basis.shape[-1], groups=3)
        return SimpleNamespace(sample=x)


@pytest.fixture(scope="module")
def leaves():
    """Pictures to train on and held out, uint8 (48, 3, 32, 32) and (12, 3, 32, 32)."""
    images = torch.from_numpy(np.stack([dead_leaves(i, 32) for i in range(60)])).permute(0, 3, 1, 2)
    return images[:48], images[48:]


@pytest.fixture(scope="module")
def leaves_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaves")
    for i in range(70):
        Image.fromarray(dead_leaves(i, 32)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def space_of(autoencoder, images):
    return LatentSpace(LatentCodec(autoencoder), named(images[0], "a"), named(images[1], "b"))


def without_seconds(figures):
    if isinstance(figures, dict):
        return {name: without_seconds(value) for name, value in figures.items() if name not in SECONDS}
    return figures


class Listed:
    """A source of names only."""

    def __init__(self, keys):
        self.keys = keys

    def items(self):
        return [SimpleNamespace(key=key) for key in self.keys]


def halves(keys, limit=None):
    source = Listed(keys)
    found = split_images(ImageSet(source, source.items(), 32, 4, 1), limit)
    return tuple({item.key for item in half.items} for half in found)


def test_an_image_is_held_out_by_its_name_alone():
    keys = [f"folder/{i}.png" for i in range(1000)]
    train, held_out = halves(keys)
    assert not train & held_out
    assert train | held_out == set(keys)
    assert 0.16 < len(held_out) / 1000 < 0.24
    fewer_train, fewer_held_out = halves(keys[500:][::-1])
    assert fewer_train <= train
    assert fewer_held_out <= held_out
    limited, same = halves(keys, limit=100)
    assert len(limited) == 100
    assert limited <= train
    assert same == held_out
    assert len(halves([str(i) for i in range(4000)])[1]) == 512
    with pytest.raises(RequestError, match="at least 32 images to train on and 8 held out, here are"):
        halves(keys[:30])


def test_the_tolerated_noise_is_what_costs_a_tenth_of_a_decibel(leaves):
    """The transform is orthonormal: noise σ on whitened latents adds σ² times the variances of the channels."""
    space = space_of(Blocks(), leaves)
    found = space.tolerated_noise()
    originals = leaves[1].double() / 127.5 - 1
    codec = LatentCodec(Blocks())
    error = (codec.reconstruct(leaves[1]).double() - originals).square().mean((1, 2, 3))
    assert found["psnr"] == pytest.approx((10 * (4 / error).log10()).mean().item(), abs=0.05)
    added = found["noise"] ** 2 * space.whitening.variances.sum().item() / 192  # numbers in a block
    lost = (10 * ((error + added) / error).log10()).mean().item()
    assert lost == pytest.approx(0.1, rel=0.15)  # clipped and rounded there, not here


def test_latents_of_another_scale_and_rotation_have_the_same_probe(leaves):
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0))).Q
    one, other = (
        probe(LatentCodec(autoencoder), *leaves, TINY) for autoencoder in (Blocks(), Blocks(mix=30 * turn, shift=5.0))
    )
    assert one["rate"]["bits_per_pixel"] == pytest.approx(other["rate"]["bits_per_pixel"], rel=1e-3)
    assert one["rate"]["noise"] == pytest.approx(other["rate"]["noise"], rel=1e-2)
    np.testing.assert_allclose(one["loss_by_time"], other["loss_by_time"], rtol=1e-3)
    for name, distance in one["sliced_wasserstein"].items():
        assert distance["mean"] == pytest.approx(other["sliced_wasserstein"][name]["mean"], rel=1e-2, abs=1e-3)


def test_the_same_seed_gives_the_same_figures_and_another_one_others(leaves):
    first, again = (probe(LatentCodec(Blocks()), *leaves, TINY) for _ in range(2))
    assert without_seconds(first) == without_seconds(again)
    json.dumps(first, allow_nan=False)
    other = probe(LatentCodec(Blocks()), *leaves, TINY, seed=1)
    assert other["sliced_wasserstein"]["samples"] != first["sliced_wasserstein"]["samples"]
    assert other["sliced_wasserstein"]["train"] == first["sliced_wasserstein"]["train"]


def test_it_learns_from_the_training_images_only(leaves, monkeypatch):
    seen = []
    errors = probe_module.velocity_errors

    def watched(denoiser, clean, t, noise):
        if torch.is_grad_enabled():
            seen.append(clean)
        return errors(denoiser, clean, t, noise)

    monkeypatch.setattr(probe_module, "velocity_errors", watched)
    space = space_of(Blocks(), leaves)
    settings = ProbeSettings(steps=40, tokens_per_step=256, samples=4, sampling_steps=2)
    figures = Prober(space, settings).run().figures
    learnt = {clean.numpy().tobytes() for batch in seen for clean in batch}
    assert learnt <= {clean.numpy().tobytes() for clean in space.train}
    assert not learnt & {clean.numpy().tobytes() for clean in space.held_out}
    assert len(seen) == 40
    assert len(seen[0]) == 16
    start = Prober(space, ProbeSettings(steps=1, tokens_per_step=16, samples=1, sampling_steps=1)).run().figures
    assert start["loss"] == pytest.approx(2, rel=0.1)  # variances of latents and noise, as it begins with nothing
    assert figures["loss"] < 0.95 * start["loss"]
    assert figures["loss"] == pytest.approx(sum(figures["loss_by_time"]) / 10)
    rate = figures["rate"]
    assert rate["bits_per_pixel"] < start["rate"]["bits_per_pixel"]
    # the channels are white on the training images: half a logarithm for each number, about
    expected = 9 / 64 * 0.5 * math.log2(1 + rate["noise"] ** -2)
    assert rate["gaussian_bits_per_pixel"] == pytest.approx(expected, rel=0.1)
    assert rate["spectral_gaussian_bits_per_pixel"] < rate["gaussian_bits_per_pixel"]


def test_reference_rows_and_cost(leaves):
    train, held_out = leaves
    space = space_of(Blocks(), leaves)
    prober = Prober(space, TINY)
    probed = prober.run()
    assert probed.samples.shape == (4, 3, 32, 32)
    assert probed.samples.dtype == torch.uint8
    distances = probed.figures["sliced_wasserstein"]
    reconstructions = torch.floor(LatentCodec(Blocks()).reconstruct(held_out) * 127.5 + 128).clamp(0, 255).byte()
    assert distances["reconstructions"] == pytest.approx(prober.distance(reconstructions), abs=1e-3)
    assert distances["train"] == prober.distance(train[:4])
    assert distances["samples_to_reconstructions"] == prober.distance(probed.samples, space.reconstructions)
    assert distances["train"]["2 px"] < distances["reconstructions"]["2 px"]  # which have next to no details
    cost, training = probed.figures["cost"], probed.figures["training"]
    assert training["images_per_step"] == 4
    assert 2e6 < training["parameters"] < 5e6
    # 6 FLOPs for each parameter that every token meets: 6 blocks of 12 width² of 192, and the ends of the network
    assert training["gflop_per_step"] == pytest.approx(6 * 64 * 6 * 12 * 192**2 / 1e9, rel=0.3)
    assert cost["decode_gflop"] == pytest.approx(2 * (9 * 64 + 9 * 9) * 16 / 1e9)  # blocks and mix


def test_a_step_costs_about_the_same_at_every_ratio():
    images = torch.from_numpy(np.stack([dead_leaves(i, 64) for i in range(44)])).permute(0, 3, 1, 2)
    figures = [
        probe(LatentCodec(Blocks(side)), images[:34], images[34:], ProbeSettings(1, 256, 1, 1))["training"]
        for side in (8, 16)
    ]
    assert [one["images_per_step"] for one in figures] == [4, 16]
    assert figures[0]["gflop_per_step"] == pytest.approx(figures[1]["gflop_per_step"], rel=0.1)


def test_gfid_is_there_with_the_weights_and_else_the_reason(leaves, monkeypatch):
    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, images):
            x = images.float() / 255
            return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    class Tiny(FrechetDistance):
        def __init__(self, keep_originals=False):
            super().__init__(Features(), 6, keep_originals)

    assert "inception" in probe(LatentCodec(Blocks()), *leaves, TINY)["frechet"]["skipped"]
    monkeypatch.setattr(probe_module, "FrechetInceptionDistance", Tiny)
    probed = Prober(space_of(Blocks(), leaves), TINY).run()
    theirs = TorchmetricsFID(feature=Features().requires_grad_(False), input_img_size=(3, 32, 32))
    theirs.update(leaves[1], real=True)
    theirs.update(probed.samples, real=False)
    assert probed.figures["frechet"]["samples"] == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert probed.figures["frechet"].keys() == {"samples", "reconstructions", "train"}
    models = [{"name": "x", "probe": None, "spatial_ratio": 8, "temporal_ratio": 1, "latent_channels": 9}]
    models[0]["probe"] = {
        "settings": TINY.describe(),
        "runs": [probed.figures],
        "summary": summarise_runs([probed.figures]),
    }
    assert "gFID of 4" in probe_header(models)
    assert len(probe_header(models)) == len(probe_rows(models)[0]) == len(probe_rows(models)[1])


def test_seeds_are_summed_up(leaves):
    runs = [probe(LatentCodec(Blocks()), *leaves, TINY, seed=seed) for seed in range(3)]
    values = [run["sliced_wasserstein"]["samples"]["mean"] for run in runs]
    summary = summarise_runs(runs)
    assert summary["sliced_wasserstein"]["mean"] == pytest.approx(np.mean(values))
    assert summary["sliced_wasserstein"]["spread"] == pytest.approx(np.std(values, ddof=1))
    assert summary["gfid"] == {"mean": None, "spread": None}


def test_a_decoder_that_ignores_its_latents_has_no_rate(leaves):
    class Deaf(Blocks):
        def decode(self, z):
            return SimpleNamespace(sample=super().decode(0 * z).sample)

    rate = probe(LatentCodec(Deaf()), *leaves, TINY)["rate"]
    assert rate["bits_per_pixel"] is None
    assert "hardly depends" in rate["reason"]


def test_discrete_latents_are_modelled_before_they_are_codes(leaves):
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
    )
    space = space_of(model, leaves)
    figures = Prober(space, TINY).run().figures
    assert figures["latent_shape"] == [4, 4, 4]
    raw = space.codec.denormalise(space.whitening.undo(space.held_out))
    codes = model.quantize(raw)[0]
    assert (raw - codes).abs().mean() > 0.01
    snapped = model.decode(codes, force_not_quantize=True).sample
    decoded = space.decode(space.held_out, space.held_out_names).float()
    assert (decoded - (snapped.clamp(-1, 1) * 127.5 + 127.5)).abs().max() < 1


def test_what_cannot_be_probed_is_one_sentence(leaves, leaves_folder):
    class Broken(Blocks):
        def encode(self, x):
            z = super().encode(x).latent_dist.mode()
            z[3, 0, 0, 0] = math.nan
            return SimpleNamespace(latent_dist=IdentityDistribution(z))

    class Tokens(Blocks):
        def encode(self, x):
            return SimpleNamespace(latent_dist=IdentityDistribution(super().encode(x).latent_dist.mode().flatten(2)))

    class Overflowing(Blocks):
        def decode(self, z):
            return SimpleNamespace(sample=super().decode(z).sample / 0)

    with pytest.raises(DataError, match="latents of held-out image 3 hold NaN"):
        probe(LatentCodec(Broken()), *leaves, TINY)
    with pytest.raises(RequestError, match=r"latents of shape \(9, 16\).*leave it out"):
        probe(LatentCodec(Tokens()), *leaves, TINY)
    with pytest.raises(DataError, match="decodes to NaN or infinity"):
        probe(LatentCodec(Overflowing()), *leaves, TINY)
    with pytest.raises(RequestError, match="uint8 images"):
        probe(LatentCodec(Blocks()), leaves[0].float(), leaves[1], TINY)
    with pytest.raises(RequestError, match="here are 31 and 12"):
        probe(LatentCodec(Blocks()), leaves[0][:31], leaves[1], TINY)
    with pytest.raises(RequestError, match="got no images"):
        probe(LatentCodec(Blocks()), leaves[0][:0], leaves[1], TINY)
    with pytest.raises(RequestError, match="steps=0: a probe needs at least 1"):
        ProbeSettings(steps=0)
    with pytest.raises(RequestError, match="size=16: it must be at least 32"):
        probe_models(leaves_folder, [Blocks()], size=16)
    with pytest.raises(RequestError, match="jpeg:75 has no latents"):
        probe_models(leaves_folder, ["jpeg:75"], size=32)
    video = torch.nn.Module()
    video.encoder = torch.nn.Conv3d(3, 4, 1)
    video.encode = video.decode = lambda x: x
    video.config = {"latent_channels": 4, "spatial_compression_ratio": 8}
    with pytest.raises(RequestError, match="moving is a video autoencoder"):
        probe_models(leaves_folder, [("moving", video)], size=32)
    with pytest.raises(RequestError, match="video autoencoder"):
        probe(LatentCodec(video), *leaves, TINY)


def test_models_of_one_command_see_the_same_images(leaves_folder, tmp_path):
    models = [("blocks", Blocks()), ("coarse", Blocks(16))]
    results = probe_models(leaves_folder, models, out=tmp_path / "out", size=32, settings=TINY)
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert written == results
    assert results["images"]["train"]["count"] + results["images"]["held_out"]["count"] == 70
    first, second = (model["probe"]["runs"][0] for model in results["models"])
    assert first["sliced_wasserstein"]["train"] == second["sliced_wasserstein"]["train"]
    assert first["latent_shape"] == [9, 4, 4]
    assert second["latent_shape"] == [9, 2, 2]
    with Image.open(tmp_path / "out" / "probe.png") as sheet:
        assert sheet.size == (8 * 33 - 1, 3 * 46 - 1)
        row = np.asarray(sheet)[13 : 13 + 32, 33 : 33 + 32]
    _, held_out = split_images(images := ImageSet(source := open_source(leaves_folder), source.items(), 32, 8, 1))
    assert images.size == 32
    pixels = next(held_out.batches()).pixels[1]
    np.testing.assert_array_equal(row, pixels.permute(1, 2, 0).numpy())
    table = summarise_probes(results["models"])
    assert "training images, for reference" in table
    assert "Experimental" in table


def test_the_sheet_of_few_samples():
    sheet = samples_sheet([("a", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), ("b", torch.zeros(1, 3, 8, 8).byte())])
    assert sheet.size == (17, 43)


def test_a_benchmark_probes_too(leaves_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_space, "BISECTIONS", 2)

    class Broken(Blocks):
        def decode(self, z):
            return SimpleNamespace(sample=super().decode(z).sample if len(z) > 4 else super().decode(z).sample / 0)

    options = dict(size=32, speed=False, rate_images=0, probe=TINY, batch_size=8)
    models = [("blocks", Blocks()), "jpeg:50", ("broken", Broken())]
    results = bench(leaves_folder, models, out=tmp_path / "out", **options)
    alone = probe_models(leaves_folder, [("blocks", Blocks())], size=32, settings=TINY)
    found = results["models"][0]["probe"]
    expected = alone["models"][0]["probe"]["runs"][0]
    assert without_seconds(found["runs"][0]) == without_seconds(expected)
    assert results["models"][1]["probe"] is None
    assert results["models"][2]["probe"] is None
    assert "NaN" in results["models"][2]["skipped"]["probe"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How easy the latents are to model" in page
    assert "blocks: held-out images, and what was generated" in page
    (tmp_path / "few").mkdir()
    for path in list(leaves_folder.iterdir())[:9]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RequestError, match="A probe needs at least 32"):
        bench(tmp_path / "few", [Blocks()], **options)
    plain = bench(leaves_folder, [("coarse", Blocks(16))], out=tmp_path / "plain", **{**options, "probe": None})
    assert plain["models"][0]["probe"] is None
    assert "How easy the latents" not in (tmp_path / "plain" / "report.html").read_text()
    merge_results([tmp_path / "out", tmp_path / "plain"], out=tmp_path / "both")
    assert "How easy the latents are to model" in (tmp_path / "both" / "report.html").read_text()


def test_the_command(leaves_folder, tmp_path, capsys):
    settings = ["--steps", "2", "--tokens-per-step", "64", "--samples", "4", "--sampling-steps", "2", "--size", "32"]
    argv = ["probe", "a=dc-ae-tiny", "--model", "b=litevae-tiny", "--data", str(leaves_folder), *settings]
    assert cli.main([*argv, "--out", str(tmp_path / "out"), "--seeds", "2"]) == 0
    captured = capsys.readouterr()
    assert "±" in captured.out
    assert "encoding" in captured.err
    results = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [model["name"] for model in results["models"]] == ["a", "b"]
    assert [run["seed"] for run in results["models"][0]["probe"]["runs"]] == [0, 1]
    assert cli.main(["probe", "dc-ae-tiny", "--data", "samples", "--limit", "40", *settings, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["images"]["source"] == "samples"
    assert results["images"]["train"]["count"] <= 40
    assert cli.main(["probe", "jpeg:75", "--data", str(leaves_folder)]) == 2
    assert cli.main(["bench", str(leaves_folder), "--model", "dc-ae-tiny", "--probe-steps", "3"]) == 2
    assert "add --probe" in capsys.readouterr().err
