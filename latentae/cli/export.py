"""Save a trained autoencoder, or a latent diffusion with its autoencoder, as an ordinary diffusers folder; or write a
store of latents in the layout of another project's loader.

DC-AE is written as the stock class AutoencoderDC and stock autoencoders as what they are: the folder opens with
from_pretrained where latentae is not installed. A family that diffusers does not have opens with latentae.load; with
--with-code its code lies beside the weights in one file, and AutoModel.from_pretrained(DIR, trust_remote_code=True) of
diffusers opens it too. Weights are safetensors.

Training moves the latents, and with them the scaling factor that a diffusion model needs. --data measures it on images,
or of an autoencoder of videos on clips, as latent diffusion defines it: one over the standard deviation of samples of
the posterior (for DC-AE over their root mean square), with shift_factor or latents_mean and latents_std where the
model's configuration has them; a FourPlane has the latter, plane by plane and channel by channel. Leave --data out
where a denoiser is trained already, as for an encoder distilled into a teacher's latents: it needs the old scale.

A run that trained a denoiser becomes the folder of a pipeline, with the autoencoder of its latents as the vae:
latentae.ClassConditionalFlowPipeline for images, latentae.PlaneFlowPipeline for clips from planes, or by --pipeline dit
stock diffusers' DiTPipeline, where that can hold it (a DiT, at most 1000 classes, latents that were normalised by one
scale).

  latentae export runs/my-run exported/ --data photos/
  latentae export runs/my-diffusion pipeline/

--push-to-hub USER/NAME then sends DIR to the Hugging Face hub in one commit, and makes the repository, with --private a
private one; the token is that of HF_TOKEN or of 'hf auth login', the address that of HF_ENDPOINT.

  latentae export runs/my-run exported/ --data photos/ --push-to-hub me/my-vae --private

A store of latents, as encode writes it, needs --format; the loader of that project then opens DIR unmodified:

  lightningdit   shards of draws, unscaled, and of mirrored images (encode --flip); latents_stats.pt
  fastdit        imagenet256_features/ and imagenet256_labels/, a file each, normalised by the model's scale
  repa           vae-sd/, mean and standard deviation (encode --kind moments), and images/, read again where they were
                 when they were encoded, or from --images SRC
  edm2           a file each of mean and standard deviation (encode --kind moments), dataset.json
  mar            CLASS/NAME.npz, mean and log-variance of image and mirror image (encode --kind moments --flip)
  dcae           CLASS/NAME.npy, normalised by the model's scale
  webdataset     tars of .npy, .cls and .json with all columns
  parquet        for datasets.load_dataset and the Hugging Face hub, with a data set card

The formats before webdataset are for images of one size, and all of these but edm2 need a label for each. A store of
moments gives draws where a format wants latents, the same for the same --seed. DIR/export.json, written last, records
the model, its scale, what is applied and the pixels; keys.parquet says which key stands where, for formats without
names. Kill it and run it again: it goes on.

  latentae export latents/ for-lightningdit/ --format lightningdit
"""

import argparse
from typing import Any

FORMATS = ("lightningdit", "fastdit", "repa", "edm2", "mar", "dcae", "webdataset", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, model folder, hub id, or a store")
    parser.add_argument("folder", metavar="DIR", help="where to write; must be new or empty")
    parser.add_argument("--format", choices=FORMATS, metavar="NAME", help="of a store: see above")
    parser.add_argument("--images", metavar="SRC", help="the pictures of the store, for --format repa")
    parser.add_argument("--seed", type=int, help="of draws from a store of moments (default: 0)")
    parser.add_argument("--partial", action="store_true", help="take what is there of a store that is not complete")
    parser.add_argument("--pipeline", choices=("flow", "dit"), help="of a denoiser (default: flow)")
    parser.add_argument("--vae", metavar="MODEL", help="autoencoder of a denoiser (default: that of its training)")
    parser.add_argument("--with-code", action="store_true", help="add the code of a family that diffusers has not")
    parser.add_argument("--data", metavar="FOLDER", help="images or clips on which to measure the latents' scale")
    parser.add_argument("--size", type=int, default=256, help="side of their centre crops (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="frames of each clip (default: a window of the model, else 17)")
    parser.add_argument("--fps", type=float, help="frames per second of the clips (default: their own)")
    parser.add_argument("--limit", type=int, default=5000, help="images or clips at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images or clips at a time (default: %(default)s)")
    parser.add_argument("--device", help="where to measure, such as cuda (default: the CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in DIR")
    parser.add_argument("--random-weights", action="store_true", help="allow a preset without published weights here")
    parser.add_argument("--push-to-hub", metavar="REPO", help="send DIR to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="the repository, if it is made, is not public")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from latentae.errors import RequestError
    from latentae.loading.diffusion import is_diffusion_run
    from latentae.loading.hub import check_upload, push_folder

    folder = Path(args.folder)
    if (Path(args.model) / "store.json").is_file():
        return _export_store(args)
    for_stores = {"--format": args.format, "--images": args.images, "--seed": args.seed, "--partial": args.partial}
    if given := [option for option, value in for_stores.items() if value not in (None, False)]:
        raise RequestError(f"{given[0]} is for a store of latents; {args.model} is none: it has no store.json.")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise RequestError(f"{folder} is not empty: choose another folder, or replace what is there with --overwrite.")
    if args.private and args.push_to_hub is None:
        raise RequestError("--private is for a repository of the hub: name it by --push-to-hub USER/NAME.")
    if args.push_to_hub is not None:
        check_upload(args.push_to_hub)
    if is_diffusion_run(args.model):
        _export_diffusion(args)
    else:
        _export_autoencoder(args)
    if args.push_to_hub is not None:
        print(f"{args.folder}: sent to {push_folder(folder, args.push_to_hub, private=args.private)}")
    return 0


def _export_autoencoder(args: argparse.Namespace) -> None:
    import diffusers

    from latentae.console import say
    from latentae.errors import RequestError
    from latentae.loading import export, load_model
    from latentae.nn.padding import padding_mode

    folder = args.folder
    if args.pipeline or args.vae:
        raise RequestError(f"--pipeline and --vae are for a run that trained a denoiser; {args.model} is none.")
    model = load_model(args.model, random_weights=args.random_weights)
    if args.data is not None:
        for name, (before, after) in refresh_normalisation(model, _measure(model, args)).items():
            print(f"{name}: {_brief(before)} -> {_brief(after)}")
        say(
            "warning: a denoiser that was trained on the old scale needs the old scale, which is also that of a "
            "distillation's teacher: to keep it, export without --data."
        )
    name = export(model, folder, with_code=args.with_code)
    if padding_mode(model) != "zeros":
        print(f"{folder}: latentae.load({folder!r}) opens it; stock diffusers cannot know its reflect padding")
    elif hasattr(diffusers, name):
        print(f"{folder}: diffusers.{name}.from_pretrained({folder!r}) opens it")
    elif args.with_code:
        print(f"{folder}: diffusers.AutoModel.from_pretrained({folder!r}, trust_remote_code=True) opens it")
    else:
        print(f"{folder}: latentae.load({folder!r}) opens it; --with-code adds what diffusers alone would need")


def _export_store(args: argparse.Namespace) -> int:
    from latentae.console import say
    from latentae.errors import RequestError
    from latentae.store.formats import export_store

    for_models = ("pipeline", "vae", "with_code", "data", "overwrite", "random_weights", "push_to_hub", "private")
    if given := [name for name in for_models if getattr(args, name)]:
        raise RequestError(f"--{given[0].replace('_', '-')} is for models; {args.model} is a store of latents.")
    if args.format is None:
        raise RequestError(f"{args.model} is a store of latents: say by --format whose loader is to open it.")
    options = {"images": args.images, "seed": args.seed or 0, "partial": args.partial}
    summary = export_store(args.model, args.folder, args.format, **options)
    missing = f", {summary.missing} inputs have none" if summary.missing else ""
    print(f"{args.folder}: {summary.entries} entries as {args.format}{missing}; export.json says what they are")
    if summary.note:
        say(f"note: {summary.note}")
    return 0


def _export_diffusion(args: argparse.Namespace) -> None:
    from latentae.console import say
    from latentae.errors import MissingWeights, RequestError
    from latentae.loading import load_model, weights_hash
    from latentae.loading.diffusion import load_diffusion
    from latentae.pipelines import export_pipeline

    if args.data is not None or args.with_code:
        raise RequestError("--data and --with-code are for an autoencoder on its own; export that one first.")
    diffusion = load_diffusion(args.model)
    source = args.vae or diffusion.autoencoder
    if source is None:
        raise RequestError(f"{args.model} was trained without an autoencoder: name that of its latents by --vae.")
    try:
        autoencoder = load_model(source, random_weights=args.random_weights)
    except MissingWeights as error:
        if args.vae:
            raise
        raise MissingWeights(f"{error} It is the autoencoder of this run: say by --vae where it is now.") from error
    if diffusion.autoencoder_sha256 is None:
        say(f"warning: the run does not know the weights of its autoencoder, so {source} is taken on trust.")
    elif (found := weights_hash(autoencoder)) != diffusion.autoencoder_sha256:
        raise RequestError(
            f"{source} is not the autoencoder whose latents the denoiser learnt: its weights have sha256 "
            f"{found[:12]}…, those had {diffusion.autoencoder_sha256[:12]}…; name the right one by --vae."
        )
    name, needs_latentae = export_pipeline(diffusion, autoencoder, args.folder, args.pipeline or "flow")
    if name == "DiTPipeline":
        before = "after 'import latentae', " if needs_latentae else ""
        print(f"{args.folder}: {before}diffusers.DiTPipeline.from_pretrained({args.folder!r}) opens it")
    else:
        print(f"{args.folder}: latentae.{name}.from_pretrained({args.folder!r}) opens it")


def _measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Mean and standard deviation of raw latents, drawn from the posterior with a fixed seed."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from latentae.bench.latents import LatentStatistics
    from latentae.codec import LatentCodec
    from latentae.console import Progress
    from latentae.errors import DataError, RequestError
    from latentae.nn.pixels import to_float

    codec = LatentCodec(model, device=args.device)
    if args.size < 1 or args.size % codec.spatial_ratio:
        raise RequestError(f"--size must be a multiple of the compression, {codec.spatial_ratio}; got {args.size}.")
    if args.limit < 1 or args.batch_size < 1:
        raise RequestError("--limit and --batch-size must be at least 1.")
    dataset = _measured_on(codec, args)
    chosen = Subset(dataset, range(min(args.limit, len(dataset))))
    statistics = LatentStatistics()
    generator = torch.Generator(codec.device).manual_seed(0)
    with Progress("measuring latents", len(chosen)) as progress, torch.no_grad():
        for batch in DataLoader(chosen, args.batch_size):
            statistics.add(codec.posterior(to_float(batch["pixels"])).sample(generator))
            progress.advance(len(batch["pixels"]))
    model.to("cpu")
    results = statistics.results()
    if not results.get("overall_std"):
        raise DataError("The latents are constant or not finite on these images, so no scaling factor follows.")
    return results


def _measured_on(codec: Any, args: argparse.Namespace) -> Any:
    """Centre crops of the images, or of the beginnings of the clips, of ``--data``."""
    from latentae.codec import fitting_frames
    from latentae.data.clip_dataset import ClipDataset
    from latentae.data.clips import ClipSource
    from latentae.data.images import ImageDataset
    from latentae.data.sources import open_source
    from latentae.errors import RequestError

    if not codec.is_video:
        if args.frames is not None or args.fps is not None:
            raise RequestError("--frames and --fps choose frames of clips, and this autoencoder is for images.")
        return ImageDataset(open_source(args.data), size=args.size, augment=False)
    frames = codec.autoencoder.config.get("window_frames") or 17
    frames = frames if args.frames is None else args.frames
    fitting = fitting_frames(codec.autoencoder, max(frames, 2))
    if fitting != frames:
        raise RequestError(f"--frames {frames} does not fit the autoencoder, or is no clip: use {fitting}.")
    return ClipDataset(ClipSource(args.data), frames=frames, fps=args.fps, size=args.size, augment=False)


def refresh_normalisation(model: Any, measured: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Put measured statistics into a model's configuration, by the rule that its class has.

    Per-channel statistics where it has them, and of FourPlane, whose planes are means over different axes; else a shift
    and one over the standard deviation where it has a shift; else one over the standard deviation, or for DC-AE, by its
    authors' definition, one over the root mean square.

    Returns:
        The old and the new value by name.

    Raises:
        RequestError: the configuration has none of these.
    """
    from latentae.errors import RequestError

    config = model.config
    mean, std = measured["overall_mean"], measured["overall_std"]
    if type(model).__name__ == "FourPlane":
        # each plane is constant along the axis that it lacks, so a mean over the volume is one over the plane
        new = {"latents_mean": measured["mean"], "latents_std": measured["std"], "scaling_factor": 1.0}
    elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
        # normalised latents are (z - mean) * scaling_factor / std
        new = {"latents_mean": measured["mean"], "latents_std": measured["std"]}
        if len(config["latents_mean"]) != len(measured["mean"]):
            raise RequestError(
                f"{type(model).__name__} keeps {len(config['latents_mean'])} means and its latents have "
                f"{len(measured['mean'])} channels, so --data cannot measure them: leave it out."
            )
    elif "scaling_factor" not in type(model)._get_init_keys(type(model)):
        raise RequestError(f"{type(model).__name__} keeps no scaling factor that --data could measure: leave it out.")
    elif type(model).__name__ in ("DCAE", "AutoencoderDC"):
        new = {"scaling_factor": (mean**2 + std**2) ** -0.5}
    elif config.get("shift_factor"):
        new = {"shift_factor": mean, "scaling_factor": 1 / std}
    else:
        new = {"scaling_factor": 1 / std}
    changes = {name: (config[name], value) for name, value in new.items()}
    model.register_to_config(**new)
    return changes


def _brief(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (int, float)):
        return f"{value:.5g}"
    values = [f"{v:.3g}" for v in value]
    return f"[{', '.join(values[:4])}{', …' if len(values) > 4 else ''}]"
