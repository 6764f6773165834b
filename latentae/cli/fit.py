"""Train an autoencoder, or a denoiser of its latents, from a recipe. The same command again continues the run."""

import importlib.util

from latentae.errors import MissingExtra

SUMMARY = "train an autoencoder or a denoiser from a recipe; the same command again resumes"

HELP = """usage: latentae fit --config RECIPE [--run_dir DIR] [--data.path FOLDER] [OPTIONS]

Train an autoencoder, or a denoiser of its latents, from a recipe. The same command again continues the run in DIR.

  latentae fit --config demo --run_dir runs/mine --data.path photos --trainer.max_steps 1000

what to train
  --config RECIPE             a YAML file, or the name of a shipped recipe: demo, sd-vae-f8c4, dcae/f32c32-phase1,
                              -phase2, -phase3, and so for dcae/f64c128 and dcae/f128c512; eq-vae/finetune-kl, -vq;
                              litevae/b-f8c12-128, -256, litevae/distill-f8c4; dito/b-f8c4, l-, xl-, b-f8c4-lpips,
                              dito/distill-one-step, dito/onto-sd-vae-phase1, -phase2, glpto/b-f8c4, swycc/f8c4;
                              videos: fourplane/tiny, fourplane/t4f8c8;
                              latent diffusion: diffusion/tiny, diffusion/dit-f8p2, -f32p1, -f64p1; of videos
                              diffusion/planes, diffusion/planes-tiny; given more than once, later ones change
                              earlier ones, and options change them all; 'latentae stages' runs several
  --run_dir DIR               where checkpoints, samples, TensorBoard logs and config.yaml go (default runs/RECIPE)
  --fork                      continue DIR although the configuration has changed since it was started

options of a recipe, each also a key of its YAML
  --data.path FOLDER          images to train on; --data.val_path FOLDER others to validate on: a folder, a tar or
                              parquet file, a folder or {000..099} pattern of them, or a csv, tsv or jsonl
  --data.max_bad SHARE        broken images are named, counted and replaced; more than this share of all (default
                              0.01) stops the run. Images smaller than the crop are enlarged
  --data.size N               side of the random crops        --data.batch_size N   per device
  --data.val_sizes [256,512]  sides to validate on, each logged by itself (default: data.size)
  --data.workers N            processes that decode
  --data.frames T             clips of T frames instead of images; --data.fps F and --data.stride N choose them; path is
                              then a folder of videos or of folders of frames, and the model one of videos
  --trainer.max_steps N       length of the training          --trainer.precision   32-true or bf16-mixed
  --trainer.devices N         GPUs or processes               --trainer.val_check_interval N   in batches
  --model.autoencoder.preset NAME        what to build ('latentae presets' lists all), or .pretrained FOLDER or hub id
                                         or .diffusers CLASS, such as AutoencoderKL, with its arguments
  --model.autoencoder.init_from RUN      start from the averaged weights of an earlier stage
  --model.autoencoder.inflate MODEL      a preset of FourPlane begins with the weights of an AutoencoderKL
  --model.autoencoder.padding_mode reflect  convolutions reflect their borders, against artefacts in corners
  --model.objective.TERM.weight W        terms by the names in the recipe; --model.objective.NAME CLASS adds one,
                                         --model.objective.NAME null leaves one out, such as lpips
  --model.adversary.weight W             --model.adversary.start_step N     --model.adversary null trains without
  --model.trainable [PREFIX,...]         train these parts only, such as [decoder]
  --model.schedule.kind KIND             constant, cosine or step (.milestones [N,...], .decay F), after .warmup_steps N
  --model.latent_transforms+=Equivariance  EQ-VAE on any recipe; also ScaleOnly, LatentNoise, and ChannelPrefix
                                         (DC-AE 1.5); .NAME VALUE after it sets an argument of the last one
  --model.denoising.times CLASS          of diffusion decoders: UniformTimes, LogitNormalTimes or CosineTimes;
                                         --model.denoising.val_steps N     of samples in validation
  --model.compile true                   torch.compile    --model.term_gradients_every N   who pulls how hard, logged
  --model.optimizer.lr LR                --model.ema DECAY    --model.accumulate N    --model.gradient_clip NORM
  --checkpoint.every_steps N             --images.count N     --seed_everything N

of latent diffusion
  --data.path STORE           latents that 'latentae encode' wrote, or images, which --model.codec MODEL encodes on the
                              fly; --data.flip true mirrors half of the images; with --data.frames T clips
  --model.denoiser.preset NAME           dit-tiny, dit-s, dit-b, dit-l, dit-xl, pixart-xl, sana-600m …, or .class_name
                                         CLASS of diffusers; .patch_size N and the other arguments of the class
  --model.given.first SHARE, .both SHARE of samples that are given the first frame, or the first and the last, where
                              the autoencoder is of planes with time_weights endpoints
  --model.num_classes N       1 trains without classes (default: those of the data)   --model.label_dropping SHARE
  --model.normalisation model the autoencoder's own scale instead of mean 0 and standard deviation 1 in each channel
  --model.times.class_path LogitNormalTimes   --model.gradient_checkpointing true
  --images.steps N            of the samples in the pictures  --images.guidance_scale G

  --trainer.devices 8 --trainer.num_nodes 2   more machines: the same command on each, started by SLURM or torchrun
  --trainer.logger WandbLogger --trainer.logger.project NAME   Weights & Biases instead of TensorBoard

  --print_config              show the whole configuration and stop
  --help-all                  every option of Lightning's Trainer and of the classes above

The run folder of an autoencoder is a model: latentae encode PHOTOS OUT --model runs/mine. A killed or
terminated run loses the steps since its last checkpoint at most; exit codes are those of 'latentae --help'.
"""


def print_help() -> None:
    print(HELP, end="")


def run_argv(argv: list[str]) -> int:
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise MissingExtra("Training", "train")
    from latentae.training.cli import fit_command

    return fit_command(argv)
