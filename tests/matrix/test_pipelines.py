"""Every family as the ``vae`` of every pipeline, and the sentence that a user gets where that cannot be."""

import pytest
import torch

import latentae
from latentae.errors import RequestError

pytestmark = pytest.mark.filterwarnings(
    "ignore:In CPU autocast:UserWarning",  # of Mochi
    "ignore:These latents are:UserWarning",  # denoisers of random weights give what they like
)


def test_a_pipeline_runs_honours_its_generator_and_is_saved(cell, matrix, tmp_path):
    row, family = cell
    facts = matrix.run_cell(row, family, str(tmp_path))
    for asked, came in facts.sizes:
        assert came == asked
    assert facts.finite
    assert facts.spread > 1e-3
    assert facts.same
    assert facts.differs
    assert facts.reloaded <= 1e-4
    assert facts.classes[0] == facts.classes[1]
    assert facts.works
    assert type(latentae.load(tmp_path)).__name__ == facts.classes[0]


def test_a_pairing_that_cannot_work_says_so_in_a_sentence(blocked, matrix):
    row, family = blocked
    obstacle = matrix.obstacle(row, family)
    vae = matrix.vae_of(row, family)
    kinds = (AttributeError, TypeError, ValueError, RuntimeError) if family == "AutoencoderKL" else RequestError
    with pytest.raises(kinds, match=None if family == "AutoencoderKL" else obstacle.match):
        run(matrix, row, vae)


def run(matrix, row, vae):
    pipeline, parts = matrix.build(row, vae)
    return matrix.pictures(row, pipeline, parts.call, 32, 64)


def row_of(matrix, name):
    return next(row for row in matrix.ROWS if row.name == name)


@pytest.mark.parametrize("family", ["DCAE", "FourPlane"])
def test_statistics_of_other_channels_are_refused_by_a_pipeline_with_a_number_of_its_own(matrix, family):
    vae = matrix.autoencoder(family, 8, statistics=True)
    with pytest.raises(RequestError, match=r"stable_diffusion_xl .* have 4 channels, and this \w+ has 8"):
        matrix.build(row_of(matrix, "StableDiffusionXL"), vae)
    assert len(vae.config.latents_mean) == 8  # others may read them


@pytest.mark.parametrize("name", ["Lumina", "Lumina2"])
def test_another_compression_than_that_of_the_pipeline_is_refused_before_it_gives_another_size(matrix, name):
    vae = matrix.autoencoder("FourPlane")  # f4
    with pytest.raises(RequestError, match="has 8 pixels a latent built in, and this FourPlane has 4"):
        run(matrix, row_of(matrix, name), vae)


def test_any_number_of_channels_without_statistics(matrix):
    vae = matrix.autoencoder("DCAE", 8)
    assert run(matrix, row_of(matrix, "StableDiffusionXL"), vae).shape == (1, 3, 32, 64)


@pytest.mark.parametrize("family", ["DCAE", "LiteVAE", "DiTo", "SWYCC"])
def test_pipelines_that_read_statistics_alone_ask_for_them(matrix, family):
    vae = matrix.autoencoder(family)
    with pytest.raises(RequestError, match="does not state: register_to_config"):
        matrix.build(row_of(matrix, "QwenImage"), vae)


@pytest.mark.parametrize("channels", [8, 3])
def test_a_denoiser_for_other_channels_is_named(matrix, channels):
    """Its latents come to ``decode`` of another autoencoder than it was made for."""
    made_for, given = matrix.autoencoder("LiteVAE", channels), matrix.autoencoder("LiteVAE", 4)
    row = row_of(matrix, "StableDiffusion")
    pipeline, parts = matrix.build(row, made_for)
    pipeline.register_modules(vae=given)
    with pytest.raises(RequestError, match=f"{channels} channels are another autoencoder's.* in_channels 4"):
        matrix.pictures(row, pipeline, parts.call, 32, 64)


NORMALISED = {
    "StableDiffusion": dict(scaling_factor=0.5),
    "StableDiffusionXL": dict(latents_mean=[0.5, 0.1, 0.0, -0.2], latents_std=[2.0, 1.0, 0.7, 3.0], scaling_factor=0.5),
    "StableDiffusion3": dict(scaling_factor=0.5, shift_factor=0.3),
    "Sana": dict(scaling_factor=0.5),
    "Wan": dict(latents_mean=[0.1 * i for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)]),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_pipeline_and_codec_take_latents_back_from_the_same_normalisation(matrix, name):
    row = row_of(matrix, name)
    vae = matrix.autoencoder("FourPlane" if row.video else "LiteVAE")
    vae.register_to_config(**NORMALISED[name])
    pipeline, parts = matrix.build(row, vae)

    def output(form):
        generator = torch.Generator().manual_seed(0)
        size = dict(height=32, width=64, num_inference_steps=2, generator=generator, output_type=form)
        return pipeline(**parts.call, **size)[0]

    latents, pictures = output("latent"), torch.as_tensor(output("pt"))
    decoded = (latentae.LatentCodec(vae).decode(latents) / 2 + 0.5).clamp(0, 1)
    decoded = decoded.transpose(1, 2) if row.video else decoded
    torch.testing.assert_close(decoded, pictures, atol=1e-5, rtol=0)
    vae.register_to_config(**({"latents_std": [5.0] * 16} if row.video else {"scaling_factor": 1.5}))
    assert not torch.allclose(torch.as_tensor(output("pt")), pictures, atol=1e-2)


def test_the_committed_table_is_that_of_this_code(matrix):
    """Its cells, not its figures: those are written by ``tools/pipeline_matrix.py``."""
    import json
    from pathlib import Path

    folder = Path(__file__).parents[2] / "tools" / "results"
    written = json.loads((folder / "pipelines.json").read_text())["cells"]
    expected = {
        (row.name, family): matrix.obstacle(row, family) is None
        for row in matrix.ROWS
        for family in (*matrix.FAMILIES, *matrix.STOCK)
    }
    assert {(cell["pipeline"], cell["family"]): cell["works"] for cell in written} == expected
    text = (folder / "pipelines.md").read_text()
    assert all(f"| {row.name} |" in text for row in matrix.ROWS)
