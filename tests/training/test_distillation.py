"""A LiteVAE encoder distilled into the latents of a stock autoencoder: what is learnt, kept, saved and refused."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import latentae
from latentae.cli.main import main
from latentae.errors import RequestError
from latentae.objectives import L1, Step
from latentae.training.distillation import LatentDistillation
from latentae.training.start import build_autoencoder

WIDTHS = (8, 16, 16, 16)


def make_kl(**options):
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
            "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
            "block_out_channels": WIDTHS,
            "norm_num_groups": 4,
            "latent_channels": 4,
            **options,
        }
    ).eval()


def held_out():
    """Smooth images of other frequencies than those of the training folder, (4, 3, 64, 64)."""
    y, x = np.mgrid[:64, :64]
    images = [[np.sin(x / (4.5 + i) + y / (7.5 + c) + i + 0.5) for c in range(3)] for i in range(4)]
    return torch.tensor(np.array(images), dtype=torch.float32) * 0.94


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """An AutoencoderKL that has learnt to reconstruct a little, so that its latents say something, with its scale."""
    torch.manual_seed(0)
    teacher = make_kl().train()
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for _ in range(60):
        wave = torch.rand(4, 3, 4, 1, 1, generator=generator)
        pixels = torch.sin(x / (4 + 5 * wave[:, :, 0]) + y / (6 + 4 * wave[:, :, 1]) + 6 * wave[:, :, 2])
        loss = (teacher(pixels).sample - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher.eval()
    with torch.no_grad():
        posterior = teacher.encode(held_out()).latent_dist
    teacher.register_to_config(scaling_factor=1 / posterior.mode().std().item(), shift_factor=0.1)
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder):
    return AutoencoderKL.from_pretrained(teacher_folder).eval()


def latent_error(student, teacher):
    """The held-out squared error of posterior means in the teacher's normalised latents, by the stock classes alone."""
    with torch.no_grad():
        got, wanted = (model.encode(held_out()).latent_dist.mode() for model in (student, teacher))
    return ((got - wanted) * teacher.config.scaling_factor).square().mean().item()


def images(vae, image=None):
    """What a Stable Diffusion pipeline of random weights makes with a vae."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    cls = StableDiffusionPipeline if image is None else diffusers.StableDiffusionImg2ImgPipeline
    pipeline = cls(vae=vae, unet=unet.eval(), scheduler=DDIMScheduler(), requires_safety_checker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.zeros(1, 4, 8)
    size = {"height": 32, "width": 32} if image is None else {"image": image, "strength": 0.5}
    return pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=prompt, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0), **size,
    ).images  # fmt: skip


def distil(runs, folder, run_dir, teacher_folder, steps, **options):
    module = runs.module(
        autoencoder={"preset": "litevae-tiny", "decoder_of": str(teacher_folder)},
        objective={"latents": LatentDistillation(str(teacher_folder))},
        trainable=["encoder"],
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0),
        ema=0.95,
        **options,
    )
    steps = runs.fit(module, runs.data(folder, size=64, batch_size=4, dead_leaves=0.0), run_dir, steps)
    return module, steps


def test_the_student_learns_the_latents_and_keeps_the_denoiser(
    runs, folder, tmp_path, teacher_folder, teacher, monkeypatch
):
    decoded = []
    plain = latentae.LiteVAE.decode
    monkeypatch.setattr(latentae.LiteVAE, "decode", lambda self, z: decoded.append(len(z)) or plain(self, z))
    module, steps = distil(runs, folder, tmp_path / "run", teacher_folder, 150)
    monkeypatch.undo()
    assert not decoded, "no term looks at pixels, so no step decodes"
    assert set(steps[1]) == {"loss", "latents", "gradient_norm"}

    student = latentae.load(tmp_path / "run")
    untrained = build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(teacher_folder)})
    before, after = latent_error(untrained, teacher), latent_error(student, teacher)
    assert after < before / 20, f"{before} -> {after}"

    # the decoder is the teacher's, bit for bit, in the run and in its export; so is the scale of the latents
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    exported = latentae.load(tmp_path / "out")
    for model in (student, exported, latentae.LiteVAE.from_pretrained(tmp_path / "out")):
        for part in ("decoder", "post_quant_conv"):
            ours, theirs = (getattr(m, part).state_dict() for m in (model, teacher))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert model.config.scaling_factor == teacher.config.scaling_factor
        assert model.config.shift_factor == teacher.config.shift_factor

    # text to image is untouched; image to image moves towards the teacher's
    assert torch.equal(images(exported), images(teacher))
    photo = held_out()[:1] / 2 + 0.5
    far, near = ((images(model, photo) - images(teacher, photo)).abs().mean() for model in (untrained, exported))
    assert near < far / 2

    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(name.startswith("autoencoder.") for name in checkpoint["state_dict"]), "no weights of the teacher"
    assert not any(p.requires_grad for p in module.objective["latents"].teacher.autoencoder.parameters())


def test_a_resumed_distillation_is_the_uninterrupted_one(runs, folder, tmp_path, teacher_folder):
    _, straight = distil(runs, folder, tmp_path / "straight", teacher_folder, 4)
    distil(runs, folder, tmp_path / "resumed", teacher_folder, 2)
    _, resumed = distil(runs, folder, tmp_path / "resumed", teacher_folder, 4)
    assert {step: straight[step] for step in resumed} == resumed


def test_pixel_terms_reach_the_encoder_through_the_frozen_decoder(runs, folder, tmp_path, teacher_folder, teacher):
    module = runs.module(
        runs.adversary(weight=0.1),
        autoencoder={"preset": "litevae-tiny", "decoder_of": str(teacher_folder)},
        objective={"latents": LatentDistillation(teacher, weight=0.0), "l1": L1()},
        trainable=["encoder"],
    )
    before = module.autoencoder.encoder.aggregator.conv_out.weight.clone()
    steps = runs.fit(module, runs.data(folder), tmp_path, 2)
    assert set(steps[1]) >= {"l1", "latents", "adversarial"}
    assert not torch.equal(module.autoencoder.encoder.aggregator.conv_out.weight, before)
    theirs = teacher.decoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in module.autoencoder.decoder.state_dict().items())


def test_the_value_is_the_wasserstein_distance_in_normalised_latents(teacher):
    student = make_kl()
    pixels = held_out()
    with torch.no_grad():
        value = LatentDistillation(teacher)(Step(pixels, pixels.new_empty(0), student.encode(pixels).latent_dist))
        a, b = (model.encode(pixels).latent_dist for model in (student, teacher))
    mean, spread = (a.mean - b.mean).double().numpy(), (a.std - b.std).double().numpy()
    expected = (mean**2 + spread**2).mean() * teacher.config.scaling_factor**2
    assert value.item() == pytest.approx(expected, rel=1e-5)
    own = LatentDistillation(teacher)(Step(pixels, pixels.new_empty(0), teacher.encode(pixels).latent_dist))
    assert own.item() == 0

    teacher.register_to_config(latents_mean=[0.5, 0.0, 1.0, -1.0], latents_std=[0.5, 1.0, 2.0, 4.0], scaling_factor=2.0)
    value = LatentDistillation(teacher)(Step(pixels, pixels.new_empty(0), student.encode(pixels).latent_dist))
    per_channel = (mean**2 + spread**2).mean(axis=(0, 2, 3)) * (2 / np.array([0.5, 1, 2, 4])) ** 2
    assert value.item() == pytest.approx(per_channel.mean(), rel=1e-5)


def test_the_teacher_sees_what_was_encoded_and_no_gradient_reaches_it(teacher):
    pixels = held_out()
    term = LatentDistillation(teacher)
    step = Step(pixels.flip(-1), pixels.new_empty(0), teacher.encode(pixels).latent_dist, encoded=pixels)
    assert term(step).item() == 0, "a latent transform changes the target, not what was encoded"
    student = make_kl()
    term(Step(pixels, pixels.new_empty(0), student.encode(pixels).latent_dist)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.encoder.conv_in.weight.grad.abs().max() > 0
    assert not teacher.training
    half = LatentDistillation(make_kl(), precision="bfloat16")
    assert half.teacher.dtype == torch.bfloat16
    assert half(Step(pixels, pixels.new_empty(0), student.encode(pixels).latent_dist)).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"use_post_quant_conv": False, "mid_block_add_attention": False}])
def test_the_preset_takes_channels_levels_and_scale_from_the_teacher(options, tmp_path):
    options = {**options, "latent_channels": 6, "scaling_factor": 0.3611, "shift_factor": 0.1159, "layers_per_block": 2}
    widths = {"block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3}
    teacher = make_kl(**options, **widths, up_block_types=("UpDecoderBlock2D",) * 3)
    teacher.save_pretrained(tmp_path)
    student = build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path)}, seed=1)
    assert student.latent_shape((1, 3, 64, 64)) == (1, 6, 16, 16)
    z = torch.randn(1, 6, 4, 4)
    with torch.no_grad():
        assert torch.equal(student.decode(z).sample, teacher.decode(z).sample)
    assert (student.config.scaling_factor, student.config.shift_factor) == (0.3611, 0.1159)

    assert student.config.force_upcast == teacher.config.force_upcast

    student.save_pretrained(tmp_path / "student")  # a LiteVAE is a teacher too
    again = build_autoencoder(
        {"preset": "litevae-tiny", "extractor_channels": 4, "decoder_of": str(tmp_path / "student")}
    )
    with torch.no_grad():
        assert torch.equal(again.decode(z).sample, teacher.decode(z).sample)
    assert again.config.extractor_channels == 4


def test_the_decoder_of_an_autoencoder_tiny(runs, folder, tmp_path):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (2, 1, 2, 1)}
    teacher = diffusers.AutoencoderTiny(**widths, **blocks).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    _, steps = distil(runs, folder, tmp_path / "run", tmp_path / "teacher", 30)
    student = latentae.load(tmp_path / "run")
    assert steps[30]["latents"] < steps[1]["latents"] / 3
    theirs = teacher.decoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in student.decoder.state_dict().items())
    assert torch.equal(images(student), images(teacher))
    assert (student.config.scaling_factor, student.config.shift_factor) == (1.0, 0.0)
    with torch.no_grad():
        spread = student.encode(held_out()).latent_dist.std
    assert spread.max() < 0.5, "a deterministic teacher takes the noise away"

    uneven = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (16, 8, 8, 8)}
    diffusers.AutoencoderTiny(**uneven, **blocks).save_pretrained(tmp_path / "uneven")
    with pytest.raises(RequestError, match=r"decoder widths \[16, 8, 8, 8\]; an AutoencoderTiny can only"):
        build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path / "uneven")})
    diffusers.AutoencoderTiny(**widths, **blocks, upsample_fn="bilinear").save_pretrained(tmp_path / "bilinear")
    with pytest.raises(RequestError, match="relu and bilinear upsampling by 2"):
        build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path / "bilinear")})


def test_what_does_not_fit_is_refused_in_a_sentence(teacher_folder, teacher, tmp_path, runs, folder):
    teacher_name = str(teacher_folder)
    with pytest.raises(RequestError, match="latent_channels is 3, but 4 in decoder_of"):
        build_autoencoder({"preset": "litevae-tiny", "latent_channels": 3, "decoder_of": teacher_name})
    with pytest.raises(RequestError, match="needs a preset of LiteVAE"):
        build_autoencoder({"preset": "dc-ae-tiny", "decoder_of": teacher_name})
    with pytest.raises(RequestError, match="did you mean decoder_of"):
        build_autoencoder({"preset": "litevae-tiny", "decoder_off": teacher_name})
    latentae.create("dc-ae-tiny").save_pretrained(tmp_path / "dcae")
    with pytest.raises(RequestError, match="of the class DCAE"):
        build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path / "dcae")})
    attention = ("UpDecoderBlock2D",) * 3 + ("AttnUpDecoderBlock2D",)
    make_kl(up_block_types=attention).save_pretrained(tmp_path / "attention")
    with pytest.raises(RequestError, match="a decoder of AttnUpDecoderBlock2D, UpDecoderBlock2D"):
        build_autoencoder({"preset": "litevae-tiny", "decoder_of": str(tmp_path / "attention")})

    pixels = held_out()
    other = latentae.create("dc-ae-tiny").encode(pixels).latent_dist
    with pytest.raises(RequestError, match="compression and latent channels must agree"):
        LatentDistillation(teacher)(Step(pixels, pixels.new_empty(0), other))
    video = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]
    )
    with pytest.raises(RequestError, match="is for video"):
        LatentDistillation(video)
    with pytest.raises(RequestError, match=r"model\.trainable trains nothing"):
        distil(runs, folder, tmp_path / "run", teacher_folder, 1, term_gradients_every=1)


def test_the_recipe_runs_with_another_teacher(folder, tmp_path, teacher_folder, capsys):
    assert (
        main(
            [
                "fit", "--config", "litevae/distill-f8c4", "--run_dir", str(tmp_path / "run"),
                "--model.autoencoder", f"{{preset: litevae-tiny, decoder_of: {teacher_folder}}}",
                "--model.objective.latents.teacher", str(teacher_folder),
                "--data.path", str(folder), "--data.size", "32", "--data.batch_size", "2", "--data.workers", "0",
                "--data.val_fraction", "0.3", "--trainer.max_steps", "2", "--trainer.precision", "32-true",
                "--trainer.accelerator", "cpu", "--trainer.logger", "false",
            ]
        )
        == 0
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "latents" in printed
    assert "psnr" in printed
    student = latentae.load(tmp_path / "run")
    assert torch.equal(
        student.decoder.conv_in.weight, AutoencoderKL.from_pretrained(teacher_folder).decoder.conv_in.weight
    )
