"""Plots: axes against their definition, and which figures of results stand where."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.bench.plots import Axis, cost_quality, latent_structure, legend, looks, noise_robustness, rate_distortion

NUMBERS = st.floats(1e-4, 1e6)


def autoencoder(name, **figures):
    return {
        "name": name,
        "class": "AutoencoderKL",
        "latents": {},
        "parameters": {"total": 10},
        "metrics": {},
        "gmac": {},
        "speed": None,
        **figures,
    }


def codec(name, bits, psnr):
    rate = {"bits_per_pixel": bits, "psnr": psnr}
    format = name.split(":")[0].upper()
    return {
        "name": name,
        "class": format,
        "latents": {},
        "parameters": {},
        "metrics": {"psnr": psnr},
        "gmac": {},
        "speed": None,
        "rate": rate,
    }


CURVE = [
    {"step": 1.0, "bits_per_pixel": 0.1, "psnr": 20.0},
    {"step": 0.5, "bits_per_pixel": 0.4, "psnr": 24.0},
    {"step": 0.25, "bits_per_pixel": 1.6, "psnr": 24.05},
]
WITH_CURVE = autoencoder("ours", rate={**CURVE[1], "curve": CURVE, "within": True, "images": 3})


@given(st.lists(NUMBERS, min_size=1, max_size=6), st.booleans())
def test_an_axis_holds_its_values_and_has_round_ticks(values, logarithmic):
    axis = Axis.around(values, "", 50, 350, logarithmic)
    places = [axis.at(value) for value in values]
    assert all(50 < place < 350 for place in places)
    assert [place for _, place in sorted(zip(values, places))] == sorted(places)
    ticks = [(at, float(text.replace(",", ""))) for at, text in axis.ticks]
    assert 1 <= len(ticks) <= 7
    for at, value in ticks:
        assert at == pytest.approx(axis.at(value), abs=0.1)
        assert 50 <= at <= 350
    assert [at for at, _ in ticks] == sorted({at for at, _ in ticks})
    if logarithmic:
        assert all(f"{value:e}"[0] in "125" for _, value in ticks)
    elif len(ticks) > 2:
        steps = [b[1] - a[1] for a, b in itertools.pairwise(ticks)]
        assert steps == pytest.approx([steps[0]] * len(steps))


def test_distances_on_a_logarithmic_axis_are_ratios():
    axis = Axis.around([0.1, 10.0], "", 0, 1000, True)
    assert axis.at(1.0) == pytest.approx(500, abs=0.1)
    assert axis.at(0.2) - axis.at(0.1) == pytest.approx(axis.at(10) - axis.at(5), abs=0.2)
    assert (axis.at(10) - axis.at(0.1)) / 1000 == pytest.approx(1 / 1.12, abs=1e-3)
    assert math.isclose(axis.low * axis.high, 1.0)


def test_a_rate_is_a_line_with_its_chosen_step():
    plot = rate_distortion([WITH_CURVE])
    (series,) = plot.series
    assert [(p.x, p.y, p.chosen) for p in series.points] == [(0.1, 20.0, False), (0.4, 24.0, True), (1.6, 24.05, False)]
    assert "1/4 of their std" in series.points[2].text
    line = [tuple(map(float, pair.split(","))) for pair in plot.line(series).split()]
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert line[0][1] > line[1][1]  # SVG counts downwards
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)  # four times as many bits each


def test_qualities_of_one_format_are_joined_and_grey():
    models = [codec("jpeg:90", 2.0, 34.0), WITH_CURVE, codec("webp:50", 0.5, 31.0), codec("jpeg:10", 0.3, 26.0)]
    plot = rate_distortion(models)
    assert [series.name for series in plot.series] == ["JPEG", "ours", "WEBP"]
    assert [(p.x, p.y) for p in plot.series[0].points] == [(0.3, 26.0), (2.0, 34.0)]
    assert all(point.chosen for point in plot.series[0].points)
    assert [series.look.hue is None for series in plot.series] == [True, False, True]


def test_a_model_called_like_a_codec_is_none():
    plot = rate_distortion([autoencoder("jpeg:mine", rate=CURVE[0]), codec("jpeg:10", 0.3, 26.0)])
    assert [(series.name, len(series.points)) for series in plot.series] == [("jpeg:mine", 1), ("JPEG", 1)]


def test_what_was_not_measured_is_not_drawn():
    models = [
        autoencoder("a"),
        autoencoder("b", rate=None, noise_robustness=None),
        autoencoder("c", rate={"psnr": 3.0}),
    ]
    models.append(autoencoder("d", rate={"bits_per_pixel": 0.0, "psnr": 9.0}))  # constant latents have no logarithm
    models.append(autoencoder("e", rate={"bits_per_pixel": 0.5, "psnr": None}))
    assert rate_distortion(models) is None
    assert noise_robustness(models) is None
    assert cost_quality(models) == []
    assert latent_structure(models) == []


def test_spectra_stand_on_a_logarithmic_scale_with_the_level_of_white_noise():
    spectrum = {"frequency": [0.1, 0.5, 1.0, 1.4], "density": [100.0, 1.0, 0.001, None]}
    correlation = {"1": 0.9, "2": 0.5, "4": None, "8": -0.1}
    model = autoencoder("a", latents={"spectrum": spectrum, "spatial_correlation": correlation})
    energy, correlated = latent_structure([autoencoder("b"), model])
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in energy.line(energy.series[0]).split())
    assert (y1 - y0) / 2 == pytest.approx((y2 - y1) / 3, abs=0.1)  # two decades down, then three
    assert (x1 - x0) / 0.4 == pytest.approx((x2 - x1) / 0.5, abs=0.5)
    assert energy.y.at(energy.level) == pytest.approx(y1, abs=0.1)
    assert [(p.x, p.y) for p in correlated.series[0].points] == [(1, 0.9), (2, 0.5), (8, -0.1)]
    assert correlated.y.low < correlated.level == 0 < correlated.y.high


def test_cost_is_the_sum_of_both_halves():
    def model(name, work, rates, psnr, rfid):
        speed = dict(zip(("encode", "decode"), ({"images_per_second": rate} for rate in rates)))
        gmac = {"encode": work, "decode": 2 * work}
        return autoencoder(name, gmac=gmac, speed=speed, metrics={"psnr": psnr, "rfid": rfid})

    models = [model("a", 1.0, (10, 40), 30.0, 0.5), model("b", 4.0, (100, 100), 20.0, 8.0), codec("jpeg:9", 1.0, 9.0)]
    plots = cost_quality(models)
    assert [plot.title for plot in plots] == ["PSNR over GMAC", "PSNR over time", "rFID over GMAC", "rFID over time"]
    points = [[(p.x, p.y) for series in plot.series for p in series.points] for plot in plots]
    assert points[0] == [(3.0, 30.0), (12.0, 20.0)]
    assert points[3] == [(pytest.approx(125.0), 0.5), (pytest.approx(20.0), 8.0)]
    for plot in plots:
        good, bad = plot.series
        assert plot.y.at(good.points[0].y) < plot.y.at(bad.points[0].y)  # better is higher, of rFID as well
    models[1]["gmac"], models[1]["speed"] = {"reason": "cannot be counted"}, None
    assert cost_quality(models) == []  # nothing to compare with


def test_a_model_looks_the_same_everywhere():
    models = [WITH_CURVE, *(autoencoder(f"m{i}", rate=CURVE[i % 3]) for i in range(7)), codec("avif:50", 1.0, 30.0)]
    for model in models[:-1]:
        model["noise_robustness"] = {"curve": [{"noise": 0.1, "psnr": 20.0}, {"noise": 0.8, "psnr": 10.0}]}
    rate, noise = rate_distortion(models), noise_robustness(models)
    expected = looks(models)
    assert {series.name: series.look for series in rate.series} == expected
    assert all(series.look == expected[series.name] for series in noise.series)
    assert len(set(expected.values())) == 9
    assert [series.name for series in legend([rate, noise])] == [series.name for series in rate.series]
