"""The whole package in a few minutes on a CPU, offline: train a small DC-AE (f8, 16 channels) on photos that ship with
scikit-image and on generated dead leaves, encode held-out photos to a store of latents, decode them, benchmark the
model beside two linear codes of the same photos, and run it as the vae of a diffusers pipeline.

  latentae demo --out demo

Leaves in the folder: report.html, results.json, panel.png, run/ (the training), model/ (opens in stock diffusers),
latents/ (the store), decoded/, photos/ and pipeline/. The same command again goes on where it was stopped.
"""

import argparse
from typing import Any

SIZE = 256
PATCH, CHANNELS = 8, 16  # of the model, f8c16, and of the linear codes that it is compared with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="where everything goes (default: demo)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: those of the recipe)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: all cores)")


def run(args: argparse.Namespace) -> int:
    import time
    from pathlib import Path

    import torch
    from PIL import Image

    from latentae.bench.baselines import block_mean_baseline, pca_baseline
    from latentae.bench.report import Section
    from latentae.bench.run import bench
    from latentae.cli.main import run_command
    from latentae.codec import LatentCodec
    from latentae.console import format_table, say
    from latentae.data.samples import PHOTO_CREDITS, photos
    from latentae.data.transforms import adm_center_crop, to_tensor
    from latentae.data.visual import panel
    from latentae.errors import RequestError
    from latentae.files import write_json
    from latentae.loading import export, load
    from latentae.store.decode import decode_store
    from latentae.store.encode import encode_dataset
    from latentae.store.reader import LatentStore

    if args.steps is not None and args.steps < 1:
        raise RequestError(f"--steps {args.steps}: expected at least 1.")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(args.out)
    held_out = out / "photos"
    held_out.mkdir(parents=True, exist_ok=True)
    for name, image in photos("held_out").items():
        Image.fromarray(image).save(held_out / f"{name}.png")

    say("1/5 train")
    started = time.monotonic()
    steps = ["--trainer.max_steps", str(args.steps)] if args.steps else []
    command = ["--config", "demo", "--run_dir", str(out / "run"), "--data.val_path", str(held_out), *steps]
    begun = (out / "run").exists()
    try:
        run_command("fit", command)
    except RequestError as error:
        if begun:
            raise RequestError(f"{out} holds a demo with other settings: choose another --out. ({error})") from error
        raise
    trained = time.monotonic() - started

    say("2/5 encode held-out photos to a store, and decode it")
    model = load(out / "run")
    encode_dataset(held_out, out / "latents", model, size=SIZE)
    decode_store(out / "latents", out / "decoded", model)
    statistics = LatentStore(out / "latents").statistics()
    mean_square = (statistics.mean**2 + statistics.std**2).mean().item()
    model.register_to_config(scaling_factor=mean_square**-0.5)

    say("3/5 save as a diffusers folder")
    stock = export(model, out / "model")

    say("4/5 run as the vae of a diffusers pipeline")
    denoised = run_pipeline(load(out / "model"), adm_center_crop(photos("held_out")["chelsea"], SIZE), out / "pipeline")

    say("5/5 benchmark")
    crops = [adm_center_crop(image, SIZE) for image in photos("held_out").values()]
    baselines = [
        block_mean_baseline(crops, PATCH),
        pca_baseline(list(photos("train").values()), crops, PATCH, CHANNELS),
    ]
    credits = "; ".join(f"{name}: {' / '.join(PHOTO_CREDITS[name])}" for name in photos("held_out"))
    sections = [
        Section(
            "As the vae of a diffusers pipeline",
            "StableDiffusionImg2ImgPipeline with this autoencoder and a denoiser of random weights: it shows that the "
            "parts fit, not what a trained denoiser would draw.",
            images=[("photo in", crops[list(photos("held_out")).index("chelsea")]), ("pipeline out", denoised)],
        ),
        Section("Photos", f"Held out from training. {credits}."),
    ]
    codec = LatentCodec(load(out / "model"))
    pixels = torch.stack([to_tensor(crop) for crop in crops])
    latents = codec.encode(pixels)
    Image.fromarray(panel(pixels, codec.decode(latents), latents.tensor)).save(out / "panel.png")
    results = bench(
        held_out,
        [("demo", out / "model")],
        out=out,
        size=SIZE,
        baselines=[baseline.row() for baseline in baselines],
        extra_sections=sections,
    )
    psnr = results["models"][0]["metrics"]["psnr"]
    block_mean, pca = (baseline.psnr for baseline in baselines)
    results["demo"] = {
        "psnr": psnr,
        "baseline_psnr": {"block_mean": block_mean, "pca": pca},
        "training_seconds": trained,
        "stock_class": stock,
        "pipeline": "StableDiffusionImg2ImgPipeline, denoiser with random weights",
    }
    write_json(out / "results.json", results)

    rows = [["block mean 8 x 8 (3 numbers a block)", block_mean], [f"PCA 8 x 8 ({CHANNELS} numbers)", pca]]
    print(
        format_table(["held-out photos, 256 px", "PSNR dB"], [*rows, [f"this DC-AE f8c16 ({CHANNELS} numbers)", psnr]])
    )
    print(f"{psnr - block_mean:+.2f} dB against the block mean, {psnr - pca:+.2f} dB against PCA")
    print(f"open {out / 'report.html'}; {out / 'model'} opens with diffusers.{stock}.from_pretrained")
    return 0


def run_pipeline(vae: Any, photo: Any, folder: Any) -> Any:
    """Send ``photo`` through image-to-image diffusion with a random denoiser; saves and returns the picture."""
    import diffusers
    import numpy as np
    import torch
    from PIL import Image

    torch.manual_seed(0)
    channels = vae.config.latent_channels
    stock: Any = diffusers
    unet = stock.UNet2DConditionModel(
        sample_size=64,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        layers_per_block=1,
    )
    pipeline = stock.StableDiffusionImg2ImgPipeline(
        vae=vae,
        unet=unet.eval(),
        scheduler=stock.DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.zeros(1, 1, 8)
    image = pipeline(
        image=Image.fromarray(photo),
        prompt_embeds=prompt,
        negative_prompt_embeds=prompt,
        strength=0.04,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    pipeline.save_pretrained(folder)
    image.save(f"{folder}/picture.png")
    return np.asarray(image)
