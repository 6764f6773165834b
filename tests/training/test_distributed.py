"""Two real processes over gloo give the weights of one process with the doubled batch.

What it takes: positions of samples and the noise of the posterior are those of all ranks together; the discriminator is
a part of the LightningModule, so that DDP averages the gradients of both backward passes; and
``find_unused_parameters``, because each of the two passes uses one network only. Lightning prepares DDP's reducer anew
before each ``manual_backward``, so manual optimisation needs nothing else.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import latentae
from latentae.objectives import (
    KL,
    L1,
    L2,
    ChannelPrefix,
    Denoising,
    Equivariance,
    FlowMatching,
    Initial,
    LatentNoise,
    LogitNormalTimes,
    NoiseSynchronization,
)
from latentae.training.diffusion import LatentDiffusionModule
from latentae.training.distillation import StepDistillation
from latentae.training.latent_data import LatentData

STEPS = 4
ADVERSARY = {"start_step": 1, "adaptive": True, "lecam": 0.01, "r1": 0.1, "r1_every": 2}
# precision, and the largest difference relative to the norm of a tensor
CASES = {
    "gan": ("64-true", 1e-10),
    "kl": ("64-true", 1e-10),
    "prefix": ("64-true", 1e-10),
    "equivariance": ("64-true", 1e-10),
    "codebook": ("64-true", 1e-10),
    "diffusion": ("64-true", 1e-10),
    "two decoders": ("64-true", 1e-10),
    "one step": ("64-true", 1e-10),
    "latents": ("64-true", 1e-10),
    "float32": ("32-true", 1e-5),
}


def build(name, runs):
    if name == "latents":  # sampled from a posterior, normalised as the ranks measure together
        codec = latentae.create("litevae-tiny").double()
        denoiser = {"preset": "dit-tiny", "num_layers": 1}
        return LatentDiffusionModule(denoiser, codec, accumulate=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    if name == "kl":
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        stock = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
        return runs.make_module(autoencoder=stock, objective={"l1": L1(), "kl": KL(1e-2)}, accumulate=2)
    if name == "prefix":
        structured = latentae.create("dc-ae-tiny", decoder_in_shortcut=False, encoder_out_shortcut=False)
        return runs.make_module(autoencoder=structured, latent_transforms=[ChannelPrefix([2, 4, 8], always_full=True)])
    if name == "codebook":  # more codes than latents, so that codes are placed and revived in every step
        discrete = latentae.create("dc-ae-tiny", quantizer={"kind": "vq", "codes": 100, "decay": 0.8})
        return runs.make_module(autoencoder=discrete, latent_transforms=[Equivariance(0.6)])
    if name == "diffusion":
        dito = latentae.create("dito-tiny", latent_regularizer="kl")
        objective = {"flow": FlowMatching(), "kl": KL(1e-3)}
        return runs.make_module(
            runs.make_adversary(**ADVERSARY),
            autoencoder=dito,
            objective=objective,
            latent_transforms=[NoiseSynchronization(0.5)],
        )
    if name == "two decoders":
        objective = {"flow": FlowMatching(weighting="sigmoid"), "initial": Initial(L2())}
        swycc = latentae.create("swycc-tiny")
        return runs.make_module(
            autoencoder=swycc, objective=objective, denoising=Denoising(LogitNormalTimes()), accumulate=2
        )
    if name == "one step":
        student, teacher = latentae.create("dito-tiny"), latentae.create("dito-tiny", seed=1)
        teacher.encoder.load_state_dict(student.encoder.state_dict())
        distillation = StepDistillation(teacher, steps=2)
        distillation.teacher.double()
        return runs.make_module(
            autoencoder=student, objective={"flow": FlowMatching()}, denoising=distillation, trainable=["decoder"]
        )
    if name == "equivariance":
        transforms = [Equivariance(0.6, 0.3, scales=(0.5, 1.0)), LatentNoise(0.3, "interpolated", prob=0.5)]
        return runs.make_module(runs.make_adversary(lecam=0.01), latent_transforms=transforms)
    return runs.make_module(runs.make_adversary(**ADVERSARY))


def train_all(folder, out, world_size, runs):
    """Every case on this rank, four images a step in all."""
    torch.set_num_threads(1)
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"} if world_size > 1 else {}
    for name, (precision, _) in CASES.items():
        module = build(name, runs)
        data = runs.make_data(folder, batch_size=4 // world_size)
        if name == "latents":
            data = LatentData(str(folder), size=32, batch_size=4 // world_size, workers=0, flip=True)
        runs.fit(module, data, out / name, STEPS, precision=precision, **options)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folders of the cases, of one process and of two."""
    out = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    processes = []
    for rank, world_size, name in [(0, 2, "two"), (1, 2, "two"), (0, 1, "one")]:
        own = {**environment, "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if world_size == 1:
            own = dict(os.environ)
        command = [sys.executable, __file__, str(folder), str(out / name), str(world_size)]
        processes.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_with_the_doubled_batch(trained, case):
    one, two = (
        torch.load(trained / count / case / "checkpoints/last.ckpt", weights_only=True) for count in ("one", "two")
    )
    assert one["latentae_progress"] == two["latentae_progress"]
    assert one["global_step"] == two["global_step"] == STEPS
    for key in ("state_dict", "latentae_ema"):
        assert one[key].keys() == two[key].keys()
        for name, expected in one[key].items():
            if name.endswith("running_logits") or expected.ndim:
                difference = (expected - two[key][name]).norm() / expected.norm().clamp_min(1e-12)
                assert difference <= CASES[case][1], f"{name} differs by {difference:.2g} of its norm"


@pytest.mark.slow
def test_the_cases_do_train_what_they_are_about(trained):
    """Networks that never moved would be equal as well."""
    after = torch.load(trained / "two/gan/checkpoints/last.ckpt", weights_only=True)
    for prefix in ("autoencoder.decoder.conv_out.", "adversary.discriminator."):
        steps = [s["step"] for optimizer in after["optimizer_states"] for s in optimizer["state"].values()]
        assert any(name.startswith(prefix) for name in after["state_dict"])
    assert max(steps) == STEPS


@pytest.mark.gpu
def test_batch_norm_is_synchronised():
    """One SyncBatchNorm step on half of a batch in each of two processes equals BatchNorm on the whole batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL takes one process for each")
    torch.multiprocessing.spawn(_synchronised_batch_norm, (free_port(),), nprocs=2)


def _synchronised_batch_norm(rank, port):
    torch.distributed.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    norm = latentae.create("dc-ae-tiny", decoder_norm_types=("batch_norm",) * 2 + ("rms_norm",) * 2).train().cuda()
    latents = torch.randn(4, 8, 4, 4, device="cuda")
    expected = norm.decode(latents).sample.chunk(2)[rank]
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    torch.testing.assert_close(synchronised.decode(latents.chunk(2)[rank]).sample, expected, rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import conftest

    train_all(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), conftest)
