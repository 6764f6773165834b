"""The comparison with torch-fidelity compares equal values."""

import pytest


@pytest.mark.slow
def test_both_sides_measure_the_same_files(tool, tmp_path):
    found = tool("compare_fid").compare(tmp_path, images=5, size=64, batch=3, runs=1, weights=None)
    assert found["relative_difference"] < 1e-4
    assert abs(found["relative_to_features"]["latentae"]) < 1e-9
    assert min(found["values"].values()) > 0.01
    assert found["speedup"] > 0
    assert len(list((tmp_path / "originals").iterdir())) == len(list((tmp_path / "reconstructions").iterdir())) == 5
