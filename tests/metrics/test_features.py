"""KID, precision and recall against torch-fidelity's, and the draw of the sample they are computed of."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_poly, kid_features_to_metric, mmd2
from torch_fidelity.metric_prc import prc_features_to_metric

from latentae.errors import RequestError
from latentae.metrics import features as module
from latentae.metrics.features import FeatureSample

DIMENSION = 16


def two_sets(count, other_count, shift=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIMENSION, DIMENSION, generator=generator)
    originals = torch.randn(count, DIMENSION, generator=generator) @ mixing
    others = torch.randn(other_count, DIMENSION, generator=generator) @ mixing
    return originals, 0.8 * others + shift


def filled(originals, reconstructions, names, other_names, **options):
    sample = FeatureSample(DIMENSION, **options)
    sample.update(originals, names, original=True)
    sample.update(reconstructions, other_names, original=False)
    return sample


def names(count, word="image"):
    return [f"{word}{i}" for i in range(count)]


def torch_fidelity_kid(reconstructions, originals, subsets=1, subset_size=None):
    options = dict(kid_subsets=subsets, kid_subset_size=subset_size or len(originals), rng_seed=1, verbose=False)
    options |= dict(kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    return kid_features_to_metric(reconstructions.double(), originals.double(), **options)


@pytest.mark.parametrize("rows_at_a_time", [1024, 7])
def test_kid_of_unrelated_sets_is_that_of_torch_fidelity(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    originals, others = two_sets(60, 60)
    ours = filled(originals, others, names(60), names(60, "other")).compute()["kid"].item()
    theirs = torch_fidelity_kid(others, originals)["kernel_inception_distance_mean"]
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert theirs > 0.01


def test_subsets_of_torch_fidelity_estimate_it():
    originals, others = two_sets(400, 400)
    ours = filled(originals, others, names(400), names(400, "other")).compute()["kid"].item()
    theirs = torch_fidelity_kid(others, originals, subsets=300, subset_size=50)
    error = theirs["kernel_inception_distance_std"] / np.sqrt(300)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], abs=4 * error)


def test_a_reconstruction_is_not_compared_with_its_own_original():
    """torch-fidelity's u-statistic leaves these pairs out, where the two lists have one order."""
    originals, noise = two_sets(50, 50, shift=0)
    reconstructions = originals + 0.3 * noise
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    kernel = [
        kernel_poly(a.double().numpy(), b.double().numpy(), kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
        for a, b in ((originals, originals), (originals, reconstructions), (reconstructions, reconstructions))
    ]
    sample = filled(originals, reconstructions[order], names(50), [names(50)[i] for i in order])
    ours = sample.compute()["kid"].item()
    assert ours == pytest.approx(mmd2(*kernel, mmd_est="u-statistic"), rel=1e-9)
    assert mmd2(*kernel, mmd_est="unbiased") < ours - 0.1  # what the pairs would do
    assert filled(originals, originals, names(50), names(50)).compute()["kid"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows_at_a_time", [1024, 9])
@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0])
def test_precision_and_recall_are_those_of_torch_fidelity(shift, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    originals, others = two_sets(80, 50, shift)
    ours = filled(originals, others, names(80), names(50)).compute()
    theirs = prc_features_to_metric(
        others.double(), originals.double(), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert ours["precision"].item() == pytest.approx(theirs["precision"], abs=1e-6)  # theirs are float32 means
    assert ours["recall"].item() == pytest.approx(theirs["recall"], abs=1e-6)
    assert (theirs["precision"], theirs["recall"]) != (1, 1)


def test_equal_sets_have_precision_and_recall_of_one():
    originals, _ = two_sets(30, 30)
    figures = filled(originals, originals, names(30), names(30)).compute()
    assert figures["precision"].item() == figures["recall"].item() == 1


def test_the_sample_is_drawn_by_name_and_bounded():
    """Whatever the order and the batches are: the names with the lowest hashes."""
    originals, others = two_sets(90, 90)
    lowest = sorted(names(90), key=lambda name: hashlib.sha256(f"0\0{name}".encode()).digest())[:20]
    chosen = [names(90).index(name) for name in lowest]
    expected = filled(originals[chosen], others[chosen], lowest, lowest).compute()
    for seed, batch in ((1, 1), (2, 13), (3, 90)):
        order = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
        sample = FeatureSample(DIMENSION, size=20)
        for part in order.split(batch):
            part_names = [names(90)[i] for i in part]
            sample.update(originals[part], part_names, original=True)
            sample.update(others[part], part_names, original=False)
            assert max(sum(map(len, sample.features_original)), sum(map(len, sample.features_reconstruction))) < 60
        assert sample.counts() == (20, 20)
        assert {k: v.item() for k, v in sample.compute().items()} == {k: v.item() for k, v in expected.items()}
    assert filled(originals, others, names(90), names(90), size=20, seed=1).compute() != expected


def test_parts_merge_into_the_whole():
    originals, others = two_sets(70, 70)
    whole = filled(originals, others, names(70), names(70), size=40).compute()
    parts = slice(0, 30), slice(30, 70)
    part, other = (filled(originals[p], others[p], names(70)[p], names(70)[p], size=40) for p in parts)
    part.merge_state(other)
    assert part.counts() == (40, 40)
    assert {k: v.item() for k, v in part.compute().items()} == {k: v.item() for k, v in whole.items()}


PROCESS = """
import json, sys, torch
from pathlib import Path
from latentae.metrics.features import FeatureSample

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
originals, others, names = torch.load(folder / "data.pt")
part = [slice(0, 30), slice(30, 70)][rank]
sample = FeatureSample(originals.shape[1], size=40)
sample.update(originals[part], names[part], original=True)
sample.update(others[part], names[part], original=False)
figures = {name: value.item() for name, value in sample.compute().items()}
(folder / f"{rank}.json").write_text(json.dumps(figures))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_uneven_shares_give_what_one_gives(tmp_path):
    originals, others = two_sets(70, 70)
    torch.save((originals, others, names(70)), tmp_path / "data.pt")
    commands = [[sys.executable, "-c", PROCESS, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    whole = filled(originals, others, names(70), names(70), size=40).compute()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {k: v.item() for k, v in whole.items()}


def test_an_image_that_came_twice_counts_once():
    originals, others = two_sets(20, 20)
    once = filled(originals, others, names(20), names(20))
    twice = filled(originals, others, names(20), names(20))
    twice.update(originals[:5], names(5), original=True)
    assert twice.counts() == (20, 20)
    assert twice.compute() == once.compute()


def test_originals_can_be_kept_for_the_next_model():
    originals, others = two_sets(20, 20)
    sample = filled(originals, originals + 1, names(20), names(20), keep_originals=True)
    sample.compute()
    sample.reset()
    assert sample.counts() == (20, 0)
    sample.update(others, names(20), original=False)
    assert sample.compute() == filled(originals, others, names(20), names(20)).compute()


def test_too_few_images_and_wrong_shapes_are_refused():
    originals, others = two_sets(20, 3)
    with pytest.raises(RequestError, match="at least 4 images on each side, got 20 and 3"):
        filled(originals, others, names(20), names(3)).compute()
    with pytest.raises(RequestError, match=r"got shape \(3, 16\) for 2 images"):
        FeatureSample(DIMENSION).update(others, names(2), original=True)
