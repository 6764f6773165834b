"""The Fréchet distance against closed forms, a float64 matrix square root, torchmetrics and torch-fidelity."""

from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

from latentae.errors import MissingWeights, RequestError
from latentae.files import sha256_file
from latentae.metrics.frechet import FrechetDistance, FrechetInceptionDistance, frechet_distance
from latentae.weights import WEIGHT_FILES


class TinyFeatures(torch.nn.Module):
    """A random convolution from uint8 pixels to 24 features."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, 24, 5, stride=3)

    def forward(self, images):
        return self.convolution(images.float() / 128 - 1).relu().mean((2, 3))


class ImageList(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def images(count, size=32, seed=0, blur=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    pixels = pixels + 20 * torch.randn(count, 3, size, size, generator=generator)
    if blur:
        pixels = torch.nn.functional.avg_pool2d(pixels, blur, 1, blur // 2)
    return pixels.clamp(0, 255).to(torch.uint8)


def moments(features):
    return len(features), features.mean(0), torch.cov(features.T)


def test_gaussians_with_commuting_covariances_have_a_closed_form():
    a, b = torch.rand(2, 40, dtype=torch.float64) + 0.1
    mean = torch.randn(40, dtype=torch.float64)
    distance = frechet_distance((1000, mean, torch.diag(a)), (1000, torch.zeros_like(mean), torch.diag(b)))
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("count", [20, 60, 400])  # fewer images than features, about as many, more
def test_the_trace_is_that_of_the_matrix_square_root(count):
    generator = torch.Generator().manual_seed(count)
    mixing = torch.randn(50, 50, dtype=torch.float64, generator=generator)
    one = torch.randn(count, 50, dtype=torch.float64, generator=generator) @ mixing
    two = one + 0.3 * torch.randn(count, 50, dtype=torch.float64, generator=generator)
    (_, mean_1, c1), (_, mean_2, c2) = moments(one), moments(two)
    eigenvalues = np.linalg.eigvals((c1 @ c2).numpy()).astype(complex)
    trace = np.sqrt(eigenvalues).real.sum() if count < 60 else sqrtm((c1 @ c2).numpy()).real.trace()
    expected = (mean_1 - mean_2).square().sum() + c1.trace() + c2.trace() - 2 * trace
    assert frechet_distance(moments(one), moments(two)) == pytest.approx(
        expected.item(), rel=1e-6 if count >= 60 else 1e-4
    )


@pytest.mark.parametrize("count", [3, 8, 13, 60])
def test_from_equal_statistics_it_is_that_of_50_digits(count):
    """With fewer images than features too, where the eigenvalues of C1 C2 are useless in float64."""
    generator = torch.Generator().manual_seed(count)
    scale = torch.logspace(1, -4, 12, dtype=torch.float64)
    one = torch.randn(count, 12, dtype=torch.float64, generator=generator) * scale
    two = one + 0.02 * scale * torch.randn(count, 12, dtype=torch.float64, generator=generator)
    statistics = moments(one), moments(two)
    with mpmath.workdps(50):
        (_, mean_1, c1), (_, mean_2, c2) = statistics
        c1, c2 = (mpmath.matrix(c.tolist()) for c in (c1, c2))
        values, vectors = mpmath.eigsy(c1)
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        product = root * c2 * root
        cross = sum(mpmath.sqrt(max(value, 0)) for value in mpmath.eigsy((product + product.T) / 2, eigvals_only=True))
        squares = mpmath.fsum(mpmath.mpf(d) ** 2 for d in (mean_1 - mean_2).tolist())
        expected = float(squares + sum(c1[i, i] + c2[i, i] for i in range(12)) - 2 * cross)
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-6)
    assert 1e-4 < expected < 1e-2 * float(sum(c1[i, i] for i in range(12)))  # a small difference of large traces


@pytest.mark.slow
def test_from_equal_statistics_it_is_that_of_torch_fidelity():
    """2048 features of 2500 images, in float64 there too."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0.25, -2.5, 2048, dtype=torch.float64)
    one = torch.randn(2500, 2048, dtype=torch.float64, generator=generator) * scale
    two = one + 0.05 * scale * torch.randn(2500, 2048, dtype=torch.float64, generator=generator)
    statistics = moments(one), moments(two)
    theirs = [{"mu": mean.numpy(), "sigma": covariance.numpy()} for _, mean, covariance in statistics]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1


@pytest.mark.parametrize("count", [10, 300])
def test_a_set_has_no_distance_to_itself(count):
    features = torch.randn(count, 30, dtype=torch.float64)
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-10)


def test_streaming_equals_all_at_once_and_torchmetrics():
    originals, reconstructions = images(96), images(96, blur=3)
    ours = FrechetDistance(TinyFeatures(), 24)
    for batch in originals.split(17):
        ours.update(batch, original=True)
    for batch in reconstructions.split(40):
        ours.update(batch, original=False)
    theirs = TorchmetricsFID(feature=TinyFeatures().requires_grad_(False), input_img_size=(3, 32, 32))
    theirs.update(originals, real=True)
    theirs.update(reconstructions, real=False)
    network = TinyFeatures()
    with torch.no_grad():
        at_once = frechet_distance(moments(network(originals).double()), moments(network(reconstructions).double()))
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert ours.compute().item() == pytest.approx(at_once, rel=1e-5)  # float32 features
    assert ours.compute().item() > 0.001


def test_parts_merge_into_the_whole():
    originals, reconstructions = images(40), images(40, blur=3)
    whole, part, other = (FrechetDistance(TinyFeatures(), 24) for _ in range(3))
    for metric, chosen in ((whole, slice(None)), (part, slice(11)), (other, slice(11, None))):
        metric.update(originals[chosen], original=True)
        metric.update(reconstructions[chosen], original=False)
    part.merge_state(other)
    assert part.compute().item() == pytest.approx(whole.compute().item(), rel=1e-9)


def test_originals_can_be_kept_for_the_next_model():
    originals, reconstructions = images(40), images(40, blur=3)
    metric = FrechetDistance(TinyFeatures(), 24, keep_originals=True)
    metric.update(originals, original=True)
    metric.update(images(40, seed=5), original=False)
    other_model = metric.compute().item()
    metric.reset()
    metric.update(reconstructions, original=False)
    fresh = FrechetDistance(TinyFeatures(), 24)
    fresh.update(originals, original=True)
    fresh.update(reconstructions, original=False)
    assert metric.compute().item() == fresh.compute().item() != other_model


def test_autocast_and_casts_change_nothing():
    metric = FrechetDistance(TinyFeatures(), 24).to(torch.bfloat16)
    plain = FrechetDistance(TinyFeatures(), 24)
    for original in (True, False):
        batch = images(30, seed=int(original))
        plain.update(batch, original=original)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metric.update(batch, original=original)
    assert metric.compute().item() == plain.compute().item()
    assert not metric.state_dict()


def test_floats_and_single_images_are_refused():
    metric = FrechetDistance(TinyFeatures(), 24)
    with pytest.raises(RequestError, match="expected uint8"):
        metric.update(torch.rand(2, 3, 32, 32), original=True)
    metric.update(images(1), original=True)
    metric.update(images(5), original=False)
    with pytest.raises(RequestError, match="at least two images"):
        metric.compute()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Inception under the published name and in the published format."""
    folder = tmp_path_factory.mktemp("weights")
    path = folder / WEIGHT_FILES["inception"].name
    with torch.random.fork_rng(), torch.device("meta"):
        keys = _inception_on_meta().state_dict()
    generator = torch.Generator().manual_seed(0)
    torch.save({name: _random_like(name, tensor, generator) for name, tensor in keys.items()}, path)
    return folder


@pytest.fixture
def published(folder, monkeypatch):
    """The random file passes for the published one, so that the real way of loading it is what is tested."""
    path = folder / WEIGHT_FILES["inception"].name
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(folder))
    accepted = replace(WEIGHT_FILES["inception"], sha256_prefix=sha256_file(path)[:8])
    monkeypatch.setitem(WEIGHT_FILES, "inception", accepted)
    return path


@pytest.mark.slow
def test_end_to_end_it_is_torch_fidelity(published):
    originals, reconstructions = images(6, size=96), images(6, size=96, blur=5)
    metric = FrechetInceptionDistance()
    metric.update(originals, original=True)
    metric.update(reconstructions, original=False)
    theirs = torch_fidelity.calculate_metrics(
        input1=ImageList(reconstructions),
        input2=ImageList(originals),
        fid=True,
        cuda=False,
        verbose=False,
        batch_size=8,
        feature_extractor_weights_path=str(published),
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    assert metric.published
    assert metric.compute().item() == pytest.approx(theirs, rel=1e-4)
    assert theirs > 0.01


def test_a_file_given_by_hand_is_not_called_published(folder):
    assert not FrechetInceptionDistance(weights=folder / WEIGHT_FILES["inception"].name).published


def test_an_unpublished_file_of_that_name_is_refused(folder, monkeypatch):
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(folder))
    with pytest.raises(RequestError, match="not the published file"):
        FrechetInceptionDistance()


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"code": pytest.approx}, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match="could run code"):
        FrechetInceptionDistance(weights=tmp_path / "weights.pth")


def test_another_network_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match="not a state dict of torch-fidelity's Inception"):
        FrechetInceptionDistance(weights=tmp_path / "weights.pth")


def test_a_missing_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"weights-inception-2015-12-05-6726825d\.pth.*curl"):
        FrechetInceptionDistance()


def _inception_on_meta():
    """torch-fidelity's network without weights; its constructor insists on loading a file, so loading is skipped."""

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *arguments, **options):
            return None

    import io

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return WithoutWeights("inception", ["2048"], feature_extractor_weights_path=empty)


def _random_like(name, tensor, generator):
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith(("running_var", "bn.weight")):
        return torch.ones(tensor.shape)
    if name.endswith(("bias", "running_mean")):
        return torch.zeros(tensor.shape)
    fan_in = tensor[0].numel()
    return torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_half_pixels_the_features_are_those_of_pytorch_fid(published, tmp_path, monkeypatch):
    """clean-fid has pytorch-fid's network and scale, and finds the file under pytorch-fid's name.

    Enlarging with Pillow's bilinear filter is what pytorch-fid's resize is, half-pixel centres included.
    """
    from cleanfid.inception_pytorch import InceptionV3

    checkpoints = tmp_path / "hub/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "pt_inception-2015-12-05-6726825d.pth").symlink_to(published)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = InceptionV3([3], resize_input=False, normalize_input=True).eval()
    pictures = images(2, size=96)
    planes = [Image.fromarray(plane.float().numpy()) for plane in pictures.flatten(0, 1)]
    large = np.stack([np.asarray(plane.resize((299, 299), Image.Resampling.BILINEAR)) for plane in planes])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(large).view(2, 3, 299, 299) / 255)[0].flatten(1)
    metric = FrechetInceptionDistance(resize="half-pixel")
    spread = expected.std()
    torch.testing.assert_close(metric.features(pictures), expected.double(), rtol=0, atol=1e-3 * spread.item())
    floats = pictures.float() / 127.5 - 1
    torch.testing.assert_close(metric.features(floats), expected.double(), rtol=0, atol=1e-3 * spread.item())
    tensorflow = FrechetInceptionDistance().features(pictures)
    assert (tensorflow - expected).abs().max() > 3e-3 * spread
    exact = FrechetInceptionDistance(precision=torch.float64).features(pictures)
    assert 0 < (exact - tensorflow).abs().max() < 1e-3 * spread
