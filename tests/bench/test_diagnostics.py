"""The panel of latent diagnostics: figures of the model's own latents, in results, report and terminal."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import nn

import latentae
from latentae.bench.diagnostics import LatentDiagnostics
from latentae.bench.results import read_results, summarise
from latentae.bench.run import bench
from latentae.cli.main import main
from latentae.data.transforms import adm_center_crop
from latentae.metrics.intrinsic_dimension import two_nn
from latentae.nn.pixels import to_float

HOSTILE_NAME = "<script>alert(1)</script>\"'&"


@pytest.fixture(autouse=True)
def _no_weight_files(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)


@pytest.fixture
def tiny_kl():
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=1.0,
    ).eval()


class BlockMean(nn.Module):
    """Deterministic; the latents of the darkest images may be anything."""

    def __init__(self, change=lambda latents: latents):
        super().__init__()
        self.change, self.weight = change, nn.Parameter(torch.zeros(1))
        self.config = {"spatial_compression_ratio": 4, "latent_channels": 3}

    def encode(self, pixels):
        return self.change(nn.functional.avg_pool2d(pixels, 4))

    def decode(self, latents):
        return nn.functional.interpolate(latents, scale_factor=4)


def crops(folder, model, size):
    for row in model["per_image"]:
        image = adm_center_crop(np.asarray(Image.open(folder / row["key"]).convert("RGB")), size)
        yield to_float(torch.from_numpy(image).permute(2, 0, 1)[None])


def test_the_figures_are_those_of_the_raw_latents(photo_folder, tiny_kl):
    model = bench(photo_folder, [tiny_kl], size=48, batch_size=4, speed=False)["models"][0]
    with torch.no_grad():
        posteriors = [tiny_kl.encode(pixels).latent_dist for pixels in crops(photo_folder, model, 48)]
    z = torch.cat([posterior.mode() for posterior in posteriors]).double().numpy()
    latents = model["latents"]

    energy = (scipy.fft.dctn(z, axes=(2, 3), norm="ortho") ** 2).sum(0)  # (4, 24, 24)
    energy[:, 0, 0] = 0
    radius = np.hypot(*np.meshgrid(*[np.arange(24) / 24] * 2))
    shares = energy[:, radius >= 0.5].sum(1) / energy.sum((1, 2))
    assert latents["spectrum"]["high_frequency_share"] == pytest.approx(shares.mean(), rel=1e-4)
    assert sum(latents["spectrum"]["energy"]) == pytest.approx(1)

    values = np.linalg.eigvalsh(np.cov(z.transpose(1, 0, 2, 3).reshape(4, -1)))
    entropy = -sum(p * math.log(p) for p in values / values.sum())
    assert latents["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-4)
    kl = sum(posterior.kl().item() for posterior in posteriors) / z.size
    assert latents["kl"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert len(latents["kl"]["per_channel"]) == len(latents["kl"]["aggregate_per_channel"]) == 4
    assert latents["intrinsic_dimension"] == {"two_nn": None, "points": 6}  # too few


def test_the_intrinsic_dimension_is_of_whole_latents_and_of_no_batch_size():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.random((400, 3)) @ rng.standard_normal((3, 64))).float().view(400, 4, 4, 4)
    found = []
    for batch in (7, 400):
        diagnostics = LatentDiagnostics()
        for some in z.split(batch):
            diagnostics.add(some, None)
        found.append(diagnostics.results()["intrinsic_dimension"])
    assert found[0] == found[1]
    assert found[0]["points"] == 400
    assert found[0]["two_nn"] == pytest.approx(two_nn(z.flatten(1)), rel=1e-9)


def test_large_latents_leave_fewer_points(monkeypatch):
    monkeypatch.setattr("latentae.bench.diagnostics.MOST_BYTES", 4 * 64 * 30)
    diagnostics = LatentDiagnostics()
    diagnostics.add(torch.randn(50, 4, 4, 4), None)
    assert diagnostics.results()["intrinsic_dimension"]["points"] == 30


def test_a_deterministic_encoder_has_no_kl_and_broken_latents_stay_out(photo_folder, tmp_path):
    def poison(latents):
        return torch.where(latents.mean((1, 2, 3), keepdim=True) < threshold, torch.nan, latents)

    whole = bench(photo_folder, [BlockMean()], size=40, speed=False)["models"][0]
    darkest, next_darkest = sorted(pixels.mean().item() for pixels in crops(photo_folder, whole, 40))[:2]
    threshold = (darkest + next_darkest) / 2
    results = bench(photo_folder, [BlockMean(poison)], out=tmp_path / "out", size=40, speed=False)
    assert results["models"][0]["latents"]["intrinsic_dimension"]["points"] == 5
    assert whole["latents"]["kl"] is None
    assert whole["latents"]["effective_rank"] >= 1
    nothing = bench(photo_folder, [BlockMean(lambda z: z * torch.nan)], size=40, speed=False)["models"][0]["latents"]
    assert nothing["effective_rank"] is None
    assert nothing["spectrum"] is None


def test_latents_without_a_grid_have_no_spectrum():
    diagnostics = LatentDiagnostics()
    diagnostics.add(torch.randn(4, 8, 32), None)
    results = diagnostics.results()
    assert results["spectrum"] is None
    assert 7 < results["effective_rank"] < 8


def test_the_panel_stands_in_report_and_terminal(photo_folder, tmp_path, tiny_kl, capsys):
    models = [("kl", tiny_kl), (HOSTILE_NAME, BlockMean())]
    results = bench(photo_folder, models, out=tmp_path / "out", size=48, speed=False)
    page = (tmp_path / "out/report.html").read_text()
    assert "What the latents are like" in page
    for plot in ("Spectrum of the latents", "Correlation of neighbours"):
        assert page.split(f'aria-label="{plot}"')[1].split("</svg>")[0].count("<polyline") == 2
    assert HOSTILE_NAME not in page
    first, second = (model["latents"] for model in results["models"])
    assert f"{first['effective_rank']:.1f} of 4" in page
    assert f"{second['spectrum']['high_frequency_share']:.1%}" in page
    table = summarise(results)
    assert "effective rank" in table
    assert f"{first['kl']['kl']:.3g}" in table


def test_the_command_writes_it(photo_folder, tmp_path, capsys):
    options = ["--size", "64", "--limit", "3", "--no-speed", "--out", str(tmp_path / "out")]
    assert main(["bench", str(photo_folder), "--model", "litevae-tiny", *options]) == 0
    assert "energy from half Nyquist on" in capsys.readouterr().out
    latents = read_results(tmp_path / "out")["models"][0]["latents"]
    assert latents.keys() >= {"spectrum", "effective_rank", "intrinsic_dimension", "kl"}
    assert latents["kl"]["kl"] > 0


def test_discrete_latents_say_their_bits_and_how_much_of_the_codebook_is_used(photo_folder, tmp_path, tiny_kl):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    stock = VQModel(**blocks, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3, num_vq_embeddings=32)
    ours = latentae.create("dc-ae-tiny", latent_channels=4, quantizer={"kind": "fsq", "levels": [3, 4, 5, 3]})
    models = [("stock", stock.eval()), ("ours", ours), ("kl", tiny_kl)]
    results = bench(photo_folder, models, size=64, speed=False, out=tmp_path, batch_size=4)
    of_stock, of_ours, of_kl = (model["latents"]["codebook"] for model in results["models"])
    assert of_kl is None
    pixels = torch.cat(list(crops(photo_folder, results["models"][0], 64)))
    with torch.no_grad():
        indices = stock.quantize(stock.encode(pixels).latents)[2][2]
        counts = torch.bincount(indices, minlength=32)
        assert of_stock == {
            "codes": 32,
            "used": (counts > 0).double().mean().item(),
            "perplexity": pytest.approx(np.exp(scipy.stats.entropy(counts.numpy()))),
        }
        assert of_ours["used"] == ours.indices_of(ours.encode(pixels).latent_dist.mode()).unique().numel() / 180
    page = (tmp_path / "report.html").read_text()
    assert "Codebooks" in page
    for cell in ("<td>5</td>", "<td>1.25</td>", f"<td>{of_stock['used']:.1%}</td>"):  # 5 bits for 2 x 2 pixels
        assert cell in page
