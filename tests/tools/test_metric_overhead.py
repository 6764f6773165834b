"""The overhead is that of the metrics that the benchmark measures without weights."""

import pytest


def test_shares_are_of_the_seconds_of_the_model_and_of_the_metrics(tool):
    found = tool("metric_overhead").measure("dc-ae-tiny", images=3, size=64, batch=2, device="cpu", dtype="float32")
    seconds = found["seconds_per_image"]
    assert list(seconds) == ["model", "psnr", "ssim", "gmsd", "haarpsi"]  # MS-SSIM needs 161 pixels
    assert min(seconds.values()) > 0
    expected = (seconds["psnr"] + seconds["ssim"]) / (seconds["psnr"] + seconds["ssim"] + seconds["model"])
    assert found["shares"]["psnr and ssim"] == pytest.approx(expected)
    assert found["shares"]["psnr and ssim"] < found["shares"]["all"] < 1
