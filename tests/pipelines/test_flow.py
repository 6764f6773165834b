"""The pipeline against the stock scheduler and the stock decoder by hand, for every kind of its components."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import latentae
from latentae.denoisers import sample
from latentae.errors import RequestError
from latentae.nn.padding import set_padding_mode
from latentae.pipelines import ClassConditionalFlowPipeline, flow_pipeline

VAES = (
    *("dc-ae-tiny", "litevae-tiny", "dito-tiny"),
    *("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "AutoencoderKLWan"),
)
KINDS = ("dit-tiny", "pixart-tiny", "sana-tiny")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def by_hand(diffusion, noise, labels, steps, guidance_scale):
    """Diffusers' transformer and scheduler, as their users write it."""
    denoiser, scheduler = diffusion.denoiser, FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    latents = noise

    def velocity(t, labels):
        labels = torch.tensor(labels)
        told = (
            {"class_labels": labels}
            if denoiser.class_embedder is None
            else {"encoder_hidden_states": denoiser.class_embedder.table.weight[labels][:, None]}
        )
        return denoiser.transformer(latents, timestep=t.expand(len(latents)), **told).sample

    with torch.no_grad():
        for t in scheduler.timesteps:
            none = velocity(t, [denoiser.num_classes] * len(noise))
            guided = none + guidance_scale * (velocity(t, labels) - none)
            latents = scheduler.step(guided, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_it_is_the_stock_scheduler_by_hand_and_our_sampler(kind, guidance_scale, diffusion, autoencoder):
    model = diffusion(kind)
    pipe = flow_pipeline(model, autoencoder("AutoencoderKL"))
    noise = torch.randn(3, 4, 4, 4)
    arguments = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    latents = pipe([2, 0, 1], latents=noise, output_type="latent", **arguments).images
    expected = by_hand(model, noise, [2, 0, 1], 6, guidance_scale)
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-4)
    ours = sample(model.denoiser, noise, torch.tensor([2, 0, 1]), steps=6, guidance_scale=guidance_scale)
    torch.testing.assert_close(latents, ours, atol=2e-5, rtol=1e-4)
    assert (latents - noise).abs().max() > 0.1
    images = pipe([2, 0, 1], latents=noise, output_type="pt", **arguments).images
    with torch.no_grad():
        raw = expected * model.std.view(4, 1, 1) + model.mean.view(4, 1, 1)
        pixels = pipe.vae.decode(raw).sample
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_no_class_is_the_null_label(diffusion, autoencoder):
    model = diffusion("pixart-tiny")
    pipe = flow_pipeline(model, autoencoder("AutoencoderKL"))
    noise = torch.randn(2, 4, 4, 4)
    latents = pipe(num_images=2, latents=noise, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(latents, sample(model.denoiser, noise, steps=3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VAES)
def test_every_autoencoder_decodes_and_survives_saving(name, diffusion, autoencoder, tmp_path):
    vae = autoencoder(name)
    channels = latentae.LatentCodec(vae).latent_channels
    pipe = flow_pipeline(diffusion(channels=channels), vae)

    def draw(pipe):
        generators = [seeded(5), seeded(6)]
        return pipe([0, 1], generator=generators, num_inference_steps=2, output_type="np").images

    images = draw(pipe)
    side = 4 * latentae.LatentCodec(vae).spatial_ratio
    assert images.shape == (2, side, side, 3)
    assert np.ptp(images) > 0
    pipe.save_pretrained(tmp_path)
    again = latentae.ClassConditionalFlowPipeline.from_pretrained(tmp_path)
    assert type(again.vae) is type(vae)
    np.testing.assert_array_equal(draw(again), images)


@pytest.mark.parametrize("kind", KINDS)
def test_every_transformer_survives_saving_with_names_and_sizes(kind, diffusion, autoencoder, tmp_path, caplog):
    size = (4, 4) if kind == "dit-tiny" else (2, 4)
    pipe = flow_pipeline(diffusion(kind, size=size, labels={0: "a", 1: "b", 2: "c"}), autoencoder("AutoencoderKL"))
    images = pipe("b", generator=seeded(0), num_inference_steps=2).images
    assert images[0].size == (4 * size[1], 4 * size[0])
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalFlowPipeline.from_pretrained(tmp_path)
    assert not caplog.records  # such as of unexpected types
    assert again.labels == {"a": 0, "b": 1, "c": 2}
    assert again.num_classes == 3
    assert again.config["latents_std"] == pipe.config["latents_std"]
    assert again("b", generator=seeded(0), num_inference_steps=2).images == images
    half = ClassConditionalFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    drawn = half("b", generator=seeded(0), num_inference_steps=2, output_type="np").images[0]
    assert np.abs(drawn - np.asarray(images[0]) / 255).mean() < 0.03


def test_components_are_saved_as_what_opens_them(diffusion, autoencoder, tmp_path):
    pipe = flow_pipeline(diffusion("sana-tiny", channels=8), autoencoder("dc-ae-tiny"))
    pipe.save_pretrained(tmp_path)
    index = DiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"] == "ClassConditionalFlowPipeline"
    assert tuple(index["vae"]) == ("latentae", "DCAE")
    assert tuple(index["class_embedder"]) == ("latentae", "ClassEmbedder")
    assert tuple(index["transformer"]) == ("diffusers", "SanaTransformer2DModel")
    assert type(latentae.load(tmp_path)).__name__ == "DCAE"


def test_an_image_has_its_own_seed_at_any_place(diffusion, autoencoder):
    pipe = flow_pipeline(diffusion(channels=autoencoder("dito-tiny").latent_channels), autoencoder("dito-tiny"))
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    batch = pipe([0, 1, 2], generator=[seeded(i) for i in range(3)], **arguments).images
    for i in range(3):
        alone = pipe(i, generator=seeded(i), **arguments).images
        torch.testing.assert_close(alone[0], batch[i], atol=1e-4, rtol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.01


def test_the_generator_goes_on_in_a_decoder_that_samples(diffusion, autoencoder):
    vae = autoencoder("dito-tiny")
    model = diffusion(channels=vae.latent_channels)
    pipe = flow_pipeline(model, vae)
    images = pipe(1, generator=seeded(3), num_inference_steps=2, output_type="pt").images
    generator = seeded(3)
    noise = torch.randn(1, vae.latent_channels, 4, 4, generator=generator)
    latents = by_hand(model, noise, [1], 2, 4.0)
    with torch.no_grad():
        raw = model.denormalise(latents)
        expected = (vae.decode(raw, generator=generator).sample / 2 + 0.5).clamp(0, 1)
        other = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert (images - other).abs().max() > 0.01


def test_several_images_of_a_class_stand_together(diffusion, autoencoder):
    pipe = flow_pipeline(diffusion(), autoencoder("AutoencoderKL"))
    noise = torch.randn(4, 4, 4, 4)
    two = pipe(torch.tensor([2, 0]), num_images=2, latents=noise, num_inference_steps=2, output_type="latent").images
    four = pipe([2, 2, 0, 0], latents=noise, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(two, four)


def test_without_statistics_the_configuration_of_the_autoencoder_counts(diffusion, autoencoder):
    model, vae = diffusion(), autoencoder("AutoencoderKL")
    pipe = ClassConditionalFlowPipeline(model.denoiser.transformer, vae, FlowMatchEulerDiscreteScheduler())
    noise = torch.randn(1, 4, 4, 4)
    images = pipe(0, latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    with torch.no_grad():
        pixels = vae.decode(by_hand(model, noise, [0], 2, 1.0) / 0.5 + 0.1).sample
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_classes_have_names(diffusion, autoencoder):
    labels = {0: "tabby, cat", 1: "crane, bird", 2: "crane, machine"}
    pipe = flow_pipeline(diffusion(labels=labels), autoencoder("AutoencoderKL"))
    assert pipe.get_label_ids(["cat", "crane, machine", "tabby, cat", "bird"]) == [0, 2, 0, 1]
    assert pipe.get_label_ids("tabby") == [0]
    assert "crane" not in pipe.labels
    assert pipe.labels["machine"] == 2
    with pytest.raises(RequestError, match="'crane' is the name of classes 1 and 2"):
        pipe("crane")
    with pytest.raises(RequestError, match="no class 'machin'; did you mean 'machine'"):
        pipe("machin")


def test_callbacks_see_change_and_stop(diffusion, autoencoder):
    pipe = flow_pipeline(diffusion(), autoencoder("AutoencoderKL"))
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, round(float(timestep))))
        pipeline._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    arguments = {"num_inference_steps": 5, "output_type": "latent", "callback_on_step_end": callback}
    assert pipe(0, **arguments).images.abs().max() == 0
    assert seen == [(0, 1000), (1, 800), (2, 600)]
    assert pipe(0, num_inference_steps=1, return_dict=False, output_type="pt")[0].shape == (1, 3, 16, 16)


def test_other_flow_schedulers_come_to_the_same(diffusion, autoencoder):
    pipe = flow_pipeline(diffusion(), autoencoder("AutoencoderKL"))
    noise = torch.randn(2, 4, 4, 4)
    arguments = {"latents": noise, "num_inference_steps": 100, "output_type": "latent"}
    euler = pipe([0, 1], **arguments).images
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert (pipe([0, 1], **arguments).images - euler).std() < 0.02 * (euler - noise).std()
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(RequestError, match="is not for flows"):
        pipe(0)


def test_weights_may_be_elsewhere_until_they_are_needed(diffusion, autoencoder):
    pipe = flow_pipeline(diffusion("sana-tiny"), autoencoder("AutoencoderKL"))
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = pipe(1, generator=seeded(0), **arguments).images
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(pipe(1, generator=seeded(0), **arguments).images, images)
    pipe.vae._hf_hook.execution_device = torch.device("meta")
    assert latentae.LatentCodec(pipe.vae).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_to_a_device(how, diffusion, autoencoder):
    pipe = flow_pipeline(diffusion("sana-tiny"), autoencoder("AutoencoderKL"))
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = pipe(1, generator=seeded(0), **arguments).images
    getattr(pipe, how)()
    np.testing.assert_allclose(pipe(1, generator=seeded(0), **arguments).images, images, atol=0.02)
    assert next(pipe.vae.parameters()).device.type in ("cpu", "meta")


def test_reflect_padding_comes_back(diffusion, autoencoder, tmp_path):
    vae = autoencoder("AutoencoderKL")
    pipe = flow_pipeline(diffusion(), vae)
    zeros = pipe(0, generator=seeded(0), num_inference_steps=1, output_type="np").images
    set_padding_mode(vae, "reflect")
    images = pipe(0, generator=seeded(0), num_inference_steps=1, output_type="np").images
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalFlowPipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(0, generator=seeded(0), num_inference_steps=1, output_type="np").images, images)
    assert np.abs(images - zeros).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, "no class 3: classes are 0 to 2"),
        ({"class_labels": [0, -1]}, "no class -1"),
        ({"class_labels": 0.5}, "no class 0.5"),
        ({"class_labels": True}, "no class True"),
        ({"class_labels": "dog"}, "has no names, give a number"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": 0, "num_images": 0}, "num_images is a whole number"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps is a whole number"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type 'jpeg' is unknown; expected pil, np, pt, latent"),
        ({"class_labels": 0, "latents": torch.zeros(1, 4, 4, 5)}, r"\(1, 4, 4, 5\); expected \(1, 4, 4, 4\)"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"guidance_scale": 2.0}, "guidance_scale is for images of a class"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale is a finite number, not nan"),
        ({"class_labels": 0, "guidance_scale": "4"}, "guidance_scale is a finite number, not '4'"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["noise"]}, "not .'noise'."),
    ],
)
def test_one_sentence_for_what_cannot_be(arguments, message, diffusion, autoencoder):
    with pytest.raises(RequestError, match=message):
        flow_pipeline(diffusion(), autoencoder("AutoencoderKL"))(**arguments)


def test_components_that_do_not_fit(diffusion, autoencoder):
    model, vae = diffusion(), autoencoder("AutoencoderKL")
    with pytest.raises(RequestError, match="latents of 4 channels, DCAE decodes 8"):
        flow_pipeline(model, autoencoder("dc-ae-tiny"))
    with pytest.raises(RequestError, match="knows no classes"):
        flow_pipeline(diffusion(num_classes=1), vae)(guidance_scale=4.0)
    sana = diffusion("sana-tiny").denoiser
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(RequestError, match="SanaTransformer2DModel needs a class_embedder"):
        ClassConditionalFlowPipeline(sana.transformer, vae, scheduler)
    with pytest.raises(RequestError, match="takes no class_embedder"):
        ClassConditionalFlowPipeline(model.denoiser.transformer, vae, scheduler, sana.class_embedder)
    with pytest.raises(RequestError, match="a number for each of the 4 channels"):
        ClassConditionalFlowPipeline(model.denoiser.transformer, vae, scheduler, latents_mean=[0.0] * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_unconditional_models_are_asked_for_nothing(kind, diffusion, autoencoder):
    model = diffusion(kind, num_classes=1)
    pipe = flow_pipeline(model, autoencoder("AutoencoderKL"))
    noise = torch.randn(2, 4, 4, 4)
    latents = pipe(num_images=2, latents=noise, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(latents, by_hand(model, noise, [0, 0], 3, 1.0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents, sample(model.denoiser, noise, steps=3), atol=1e-5, rtol=1e-4)
    arguments = {"latents": noise, "num_inference_steps": 3, "output_type": "latent"}
    torch.testing.assert_close(pipe([0, 0], **arguments).images, latents)
