"""The pipeline of planes against our sampler and the autoencoder by hand: classes, given frames, folders, refusals."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

import latentae
from latentae.cli.main import main
from latentae.denoisers import create_denoiser, sample
from latentae.errors import RequestError
from latentae.loading import weights_hash
from latentae.loading.diffusion import LatentDiffusion, describe_diffusion
from latentae.nn.pixels import to_float
from latentae.nn.planes import PlaneLayout
from latentae.pipelines import PlaneFlowPipeline, flow_pipeline

LAYOUT = PlaneLayout(3, 2, 4, planes=2, channels=4)  # 5 frames of 8 x 16 pixels
BOTH = ("first", "both")


@pytest.fixture
def vae(randomise):
    return lambda **options: randomise(latentae.create("fourplane-endpoints-tiny", **options))


@pytest.fixture
def planes():
    """Makes a latent diffusion on planes with random weights and statistics."""

    def make(num_classes=3, layout=LAYOUT, labels=None, given=BOTH, **changes):
        denoiser = create_denoiser({"preset": "planes-tiny", "num_layers": 2}, layout, num_classes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.12 * torch.randn(parameter.shape, generator=generator))
        mean, std = torch.randn(2, layout.volume_channels, generator=generator)
        return LatentDiffusion(denoiser.eval(), mean, std.abs() + 0.5, labels=labels, given=given, **changes)

    return make


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def image(seed=0, height=8, width=16):
    return torch.randint(0, 256, (3, height, width), generator=seeded(seed), dtype=torch.uint8)


def noise(count=2):
    return torch.randn(count, *(LAYOUT.num_tokens, LAYOUT.channels), generator=seeded(9))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_clips_of_classes_are_those_of_our_sampler(planes, vae, guidance_scale):
    model = planes()
    pipe = flow_pipeline(model, vae())
    arguments = {"latents": noise(), "guidance_scale": guidance_scale, "num_inference_steps": 5}
    tokens = pipe([2, 0], output_type="latent", **arguments).frames
    expected = sample(model.denoiser, noise(), torch.tensor([2, 0]), steps=5, guidance_scale=guidance_scale)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-4)
    frames = pipe([2, 0], output_type="pt", **arguments).frames
    with torch.no_grad():
        pixels = pipe.vae.decode(model.denormalise(expected)).sample
    assert frames.shape == (2, 5, 3, 8, 16)
    torch.testing.assert_close(frames, (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_given_frame_keeps_its_plane_exactly(planes, vae, guidance_scale):
    model, autoencoder = planes(), vae()
    model.mean, model.std = 0.1 * model.mean, 0.1 * model.std  # so that frames differ by more than a little
    pipe = flow_pipeline(model, autoencoder)
    arguments = {"latents": noise(), "guidance_scale": guidance_scale, "num_inference_steps": 4}
    tokens = pipe([2, 0], image=image(), output_type="latent", **arguments).frames
    first, mean, std = LAYOUT.types == 0, LAYOUT.of_tokens(model.mean), LAYOUT.of_tokens(model.std)
    with torch.no_grad():
        plane = autoencoder.encode_frames(to_float(image())[None])
        clip = to_float(torch.stack([image(), *(image(i) for i in range(1, 5))], dim=1))[None]
        encoded = LAYOUT.split(autoencoder.encode(clip).latent_dist.mean)
    torch.testing.assert_close(plane, encoded["xy1"])  # of any clip that begins so
    known = (plane.flatten(2).transpose(1, 2) - mean[first]) / std[first]
    assert torch.equal(tokens[:, first], known.expand(2, -1, -1))
    raw = LAYOUT.split(LAYOUT.unpack(model.denormalise(tokens), "volume"))
    torch.testing.assert_close(raw["xy1"], plane.expand(2, -1, -1, -1), atol=1e-5, rtol=1e-5)

    all_known = torch.zeros_like(tokens)
    all_known[:, first] = known
    given = first.expand(2, -1)
    labels, options = torch.tensor([2, 0]), {"steps": 4, "guidance_scale": guidance_scale}
    expected = sample(model.denoiser, noise(), labels, known=all_known, given=given, **options)
    torch.testing.assert_close(tokens, expected, atol=5e-5, rtol=1e-4)
    other = pipe([2, 0], image=image(1), output_type="latent", **arguments).frames
    assert (other - tokens)[:, ~first].abs().max() > 1e-3  # what is drawn knows what is given


def test_interpolation_keeps_the_planes_of_both_ends(planes, vae):
    model, autoencoder = planes(), vae()
    pipe = flow_pipeline(model, autoencoder)
    clip = torch.stack([image(i) for i in range(5)], dim=1)
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(0)}
    tokens = pipe(image=clip[:, 0], last_image=clip[:, -1], **arguments).frames
    with torch.no_grad():
        encoded = model.normalise(autoencoder.encode(to_float(clip)[None]).latent_dist.mode())
    ends = LAYOUT.types < 2
    torch.testing.assert_close(tokens[:, ends], encoded[:, ends], atol=1e-4, rtol=1e-4)
    assert (tokens - encoded)[:, ~ends].abs().max() > 0.1


def test_frames_come_as_from_other_video_pipelines(planes, vae):
    pipe = flow_pipeline(planes(), vae())
    arguments = {"latents": noise(), "num_inference_steps": 2}
    pt, array, pil = (pipe([0, 1], output_type=kind, **arguments).frames for kind in ("pt", "np", "pil"))
    assert array.shape == (2, 5, 8, 16, 3)
    np.testing.assert_allclose(array, pt.permute(0, 1, 3, 4, 2).numpy())
    assert [len(clip) for clip in pil] == [5, 5]
    assert pil[1][4].size == (16, 8)
    np.testing.assert_array_equal(np.asarray(pil[1][4]), (array[1, 4] * 255).round().astype(np.uint8))
    assert pipe(return_dict=False, num_frames=5, num_inference_steps=1)[0][0][0].size == (16, 8)


def test_images_come_in_every_form(planes, vae):
    pipe = flow_pipeline(planes(), vae())
    pixels = image()
    array = pixels.permute(1, 2, 0).numpy()
    forms = [
        Image.fromarray(array), array, (array / 255).astype(np.float32), pixels, pixels / 255, (pixels / 255)[None],
        [Image.fromarray(array)], [pixels], Image.fromarray(array).convert("RGBA"),
    ]  # fmt: skip
    arguments = {"latents": noise(1), "num_inference_steps": 1, "output_type": "latent"}
    drawn = [pipe(image=form, **arguments).frames for form in forms]
    for tokens in drawn[1:]:
        torch.testing.assert_close(tokens, drawn[0], atol=1e-4, rtol=1e-4)


def test_every_clip_has_its_own_image_class_and_noise(planes, vae):
    pipe = flow_pipeline(planes(), vae())
    options = {"num_inference_steps": 2, "output_type": "latent"}
    four = pipe(
        [2, 0], image=[image(0), image(1)], num_videos=2, generator=[seeded(s) for s in range(4)], **options
    ).frames
    alone = pipe(0, image=image(1), generator=seeded(3), **options).frames
    torch.testing.assert_close(four[3:], alone, atol=1e-4, rtol=1e-4)
    without = pipe(image=[image(0), image(1)], num_videos=2, generator=seeded(0), **options).frames
    assert without.shape == (4, LAYOUT.num_tokens, 4)
    first = LAYOUT.types == 0
    assert torch.equal(without[0, first], without[1, first])
    torch.testing.assert_close(without[3, first], alone[0, first], atol=1e-4, rtol=1e-4)


def test_callbacks_cannot_change_what_is_given(planes, vae):
    pipe = flow_pipeline(planes(), vae())
    arguments = {"image": image(), "num_inference_steps": 2, "output_type": "latent", "latents": noise(1)}
    first = LAYOUT.types == 0
    zeroed = pipe(**arguments, callback_on_step_end=lambda p, i, t, x: {"latents": 0 * x["latents"]}).frames
    assert zeroed[:, ~first].abs().max() == 0
    assert torch.equal(zeroed[:, first], pipe(**arguments).frames[:, first])


def test_without_statistics_the_configuration_of_the_autoencoder_counts(planes, vae):
    model = planes()
    mean, std = model.mean.tolist(), model.std.tolist()
    configured = vae(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    pipe = PlaneFlowPipeline(
        model.denoiser.transformer, configured, FlowMatchEulerDiscreteScheduler(), given=list(BOTH)
    )
    arguments = {"image": image(), "latents": noise(1), "num_inference_steps": 2, "output_type": "pt"}
    expected = flow_pipeline(model, vae())(**arguments).frames
    torch.testing.assert_close(pipe(**arguments).frames, expected, atol=1e-4, rtol=1e-4)


def test_it_survives_saving(planes, vae, tmp_path, caplog):
    pipe = flow_pipeline(planes(labels={0: "run", 1: "walk", 2: "jump"}), vae())
    arguments = {"image": image(), "num_inference_steps": 2, "output_type": "np"}
    frames = pipe("walk", generator=seeded(0), **arguments).frames
    pipe.save_pretrained(tmp_path)
    index = DiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"] == "PlaneFlowPipeline"
    assert tuple(index["vae"]) == ("latentae", "FourPlane")
    assert tuple(index["transformer"]) == ("latentae", "PlaneTransformer")
    again = latentae.PlaneFlowPipeline.from_pretrained(tmp_path)
    assert not caplog.records
    assert again.layout == LAYOUT
    assert (again.num_classes, again.labels["jump"], again.clip_shape) == (3, 2, (5, 8, 16))
    np.testing.assert_array_equal(again("walk", generator=seeded(0), **arguments).frames, frames)
    half = PlaneFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert np.abs(half("walk", generator=seeded(0), **arguments).frames - frames).mean() < 0.03
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(pipe("walk", generator=seeded(0), **arguments).frames, frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": image(height=16)}, "image has 16 x 16 pixels in 3 channels, and the clips are 16 x 8 in 3: crop"),
        ({"image": image()[:1]}, "image has 16 x 8 pixels in 1 channels"),
        ({"image": image(), "last_image": image(width=8)}, "last_image has 8 x 8 pixels"),
        ({"image": "a.png"}, "image is no image, and no list of images"),
        ({"last_image": image()}, "interpolation, which needs the first frame as well: give image"),
        ({"num_frames": 9}, "draws clips of 5 frames, not 9"),
        ({"num_videos": 0}, "num_videos is a whole number"),
        ({"class_labels": [0, 1, 2], "image": [image(), image()]}, "2 images for 3 clips: give one for each, or one"),
        ({"class_labels": 3}, "no class 3: classes are 0 to 2"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 clips"),
        ({"latents": torch.zeros(1, 28, 3)}, r"\(1, 28, 3\); expected \(1, 34, 4\)"),
        ({"guidance_scale": 2.0}, "guidance_scale is for clips of a class"),
    ],
)
def test_one_sentence_for_what_cannot_be(planes, vae, arguments, message):
    with pytest.raises(RequestError, match=message) as caught:
        flow_pipeline(planes(), vae())(**arguments)
    assert "\n" not in str(caught.value)


def test_given_frames_need_endpoints_and_training(planes, vae):
    pipe = flow_pipeline(planes(), vae(time_weights="hat"))
    with pytest.raises(RequestError, match=r"time_weights endpoints, .* means over time \(hat\)"):
        pipe(image=image())
    pipe = flow_pipeline(planes(given=("first",)), vae())
    assert pipe(image=image(), num_inference_steps=1, output_type="latent").frames.shape == (1, 34, 4)
    with pytest.raises(RequestError, match=r"with the first and last frame given: train it with model\.given\.both"):
        pipe(image=image(), last_image=image())
    with pytest.raises(RequestError, match=r"with the first frame given: train it with model\.given\.first"):
        flow_pipeline(planes(given=()), vae())(image=image())


def test_components_that_do_not_fit(planes, vae, autoencoder):
    with pytest.raises(RequestError, match="draws planes, which this DCAE does not decode"):
        flow_pipeline(planes(), autoencoder("dc-ae-tiny"))
    with pytest.raises(RequestError, match="draws planes, which this FourPlane does not decode"):
        flow_pipeline(planes(), latentae.create("fourplane-tiny", spatial_planes=0))
    with pytest.raises(RequestError, match="2 spatial planes of 4 channels, the autoencoder decodes 1 of 4"):
        flow_pipeline(planes(), vae(spatial_planes=1))
    with pytest.raises(RequestError, match="a number for each of the 16 channels"):
        PlaneFlowPipeline(
            planes().denoiser.transformer, vae(), FlowMatchEulerDiscreteScheduler(), latents_mean=[0.0] * 4
        )


def test_a_run_is_exported_by_the_command(planes, vae, tmp_path, capsys):
    autoencoder = vae()
    autoencoder.save_pretrained(tmp_path / "vae")
    where = {"autoencoder": str(tmp_path / "vae"), "autoencoder_sha256": weights_hash(autoencoder)}
    model = planes(labels={0: "run", 1: "walk", 2: "jump"}, **where)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    weights = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    torch.save({"latentae_diffusion": describe_diffusion(model), "latentae_ema": weights}, checkpoint)

    command = ["export", str(tmp_path / "run"), str(tmp_path / "pipeline")]
    assert main([*command, "--pipeline", "dit"]) == 2
    assert "the denoiser is a PlaneTransformer: make the pipeline of latentae" in capsys.readouterr().err
    assert main(command) == 0
    assert "latentae.PlaneFlowPipeline.from_pretrained" in capsys.readouterr().out
    arguments = {"image": image(), "num_inference_steps": 2, "output_type": "np"}
    pipe = PlaneFlowPipeline.from_pretrained(tmp_path / "pipeline")
    frames = pipe("jump", generator=seeded(0), **arguments).frames
    expected = flow_pipeline(model, autoencoder)("jump", generator=seeded(0), **arguments).frames
    np.testing.assert_array_equal(frames, expected)

    card = (tmp_path / "pipeline/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "pipeline"))
    code = code.replace("guidance_scale", "num_inference_steps=1, guidance_scale").replace(
        "(image", "(num_inference_steps=1, image"
    )
    exec(compile(code, "card", "exec"), found := {})
    assert len(found["frames"]) == 5


def test_each_pipeline_names_the_other_for_the_others_denoiser(planes, vae):
    model, scheduler = planes(), FlowMatchEulerDiscreteScheduler()
    with pytest.raises(RequestError, match=r"draws clips: open this with latentae[.]PlaneFlowPipeline"):
        latentae.ClassConditionalFlowPipeline(model.denoiser.transformer, vae(), scheduler)
    transformer = create_denoiser({"preset": "dit-tiny"}, (4, 4, 4)).transformer
    with pytest.raises(RequestError, match=r"draws images: open this with latentae[.]ClassConditionalFlowPipeline"):
        PlaneFlowPipeline(transformer, vae(), scheduler)
