"""The plots of the report: points and lines in the coordinates of a small SVG, which a template draws.

Every model has the same colour and mark in all plots; classical codecs are grey and stand by their format.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from latentae.bench.codecs import FORMATS
from latentae.bench.quality import ROWS
from latentae.bench.results import LABELS, format_metric
from latentae.console import three_figures

FRAME = {"width": 400, "height": 280, "left": 52, "right": 388, "top": 12, "bottom": 236}
MARGIN = 0.06  # of an axis, beyond the outermost points
MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "diamond": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "triangle": "M0 -5l5.2 9h-10.4z",
}


@dataclass(frozen=True)
class Point:
    """A figure over another; ``text`` says both, and ``chosen`` points stand out among those of a line."""

    x: float
    y: float
    text: str
    chosen: bool = True


@dataclass(frozen=True)
class Look:
    """How a model looks in every plot: the hue in degrees, grey for None, and the mark."""

    hue: int | None
    mark: str


@dataclass(frozen=True)
class Series:
    name: str
    look: Look
    points: Sequence[Point]  # joined in this order


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on the way from ``start`` to ``end``, in units of the drawing."""

    label: str
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def around(cls, values: Sequence[float], label: str, start: float, end: float, logarithmic: bool = False) -> "Axis":
        """The axis that holds all values, with a margin; one value alone has room as well."""
        low, high = min(values), max(values)
        if logarithmic:
            middle, half = math.log10(low * high) / 2, max(math.log10(high / low) * (0.5 + MARGIN), 0.4)
            return cls(label, 10 ** (middle - half), 10 ** (middle + half), start, end, True)
        half = max((high - low) * (0.5 + MARGIN), abs(high) * 0.01, 1e-9)
        middle = (low + high) / 2
        return cls(label, middle - half, middle + half, start, end)

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where round values stand, at most seven, and what they are called."""
        values = self._round_powers() if self.logarithmic else self._round_steps()
        return [(self.at(value), f"{value:,.10g}") for value in values]

    def _round_steps(self) -> list[float]:
        step = next(s for s in _round_numbers((self.high - self.low) / 6) if s >= (self.high - self.low) / 6)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(step * i, 10) for i in range(first, last + 1)]

    def _round_powers(self) -> list[float]:
        values = [v for v in _round_numbers(self.low) if self.low <= v <= self.high]
        if len(values) > 7:
            values = [v for v in values if math.log10(v).is_integer()]
        return values[:: -(-len(values) // 7)]


def _round_numbers(around: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from below a number on."""
    first = math.floor(math.log10(around))
    return [digit * 10.0**power for power in range(first, first + 14) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Plot:
    """Series over two axes."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    level: float | None = None  # of y, marked across

    @classmethod
    def of(
        cls,
        title: str,
        series: Sequence[Series],
        x: str,
        y: str,
        *,
        logarithmic: str = "",
        downwards: bool = False,
        level: float | None = None,
    ) -> "Plot":
        """Place series on axes called ``x`` and ``y``, which may point down; one may be ``logarithmic``, x or y."""
        points = [point for one in series for point in one.points]
        levels = [] if level is None else [level]
        vertical = (FRAME["top"], FRAME["bottom"]) if downwards else (FRAME["bottom"], FRAME["top"])
        return cls(
            title,
            Axis.around([p.x for p in points], x, FRAME["left"], FRAME["right"], logarithmic == "x"),
            Axis.around([p.y for p in points] + levels, y, *vertical, logarithmic == "y"),
            series,
            level,
        )

    def line(self, series: Series) -> str:
        """The points of a polyline."""
        return " ".join(f"{self.x.at(point.x)},{self.y.at(point.y)}" for point in series.points)


def legend(plots: Sequence[Plot]) -> list[Series]:
    """One series of each name, in the order of their first plots."""
    return list({series.name: series for plot in plots for series in plot.series}.values())


def is_reference(model: dict[str, Any]) -> bool:
    """Whether it is a classical codec, a point of reference and no contestant."""
    return model["class"].lower() in FORMATS


def looks(models: Sequence[dict[str, Any]]) -> dict[str, Look]:
    """How every model looks, and every format of classical codecs, by name."""
    marks, found = list(MARKS), {}
    contestants = [model["name"] for model in models if not is_reference(model)]
    for i, name in enumerate(contestants):
        found[name] = Look(round(235 + 137.5 * i) % 360, marks[i % len(marks)])  # the golden angle: neighbours differ
    references = dict.fromkeys(_group(model) for model in models if is_reference(model))
    return found | {name: Look(None, marks[(i + 1) % len(marks)]) for i, name in enumerate(references)}


def rate_distortion(models: Sequence[dict[str, Any]]) -> Plot | None:
    """PSNR over bits per pixel: a line for each autoencoder and each format of classical codecs; None without rates."""
    of_models = looks(models)
    points: dict[str, list[Point]] = {}
    for model in models:
        rate = model.get("rate") or {}
        curve = rate.get("curve") or [rate]
        for entry in curve:
            bits, quality = entry.get("bits_per_pixel"), entry.get("psnr")
            if not bits or quality is None:
                continue
            step = f", latents rounded to {_fraction(entry['step'])} of their std" if entry.get("step") else ""
            text = f"{model['name']}: {three_figures(bits)} bits per pixel, {quality:.2f} dB{step}"
            chosen = len(curve) == 1 or entry.get("step") == rate.get("step")
            points.setdefault(_group(model), []).append(Point(bits, quality, text, chosen))
    series = [Series(name, of_models[name], sorted(found, key=lambda p: p.x)) for name, found in points.items()]
    if not series:
        return None
    return Plot.of("Rate and distortion", series, "bits per pixel", "PSNR, dB", logarithmic="x")


def cost_quality(models: Sequence[dict[str, Any]]) -> list[Plot]:
    """PSNR, and rFID or rFVD where it was measured, over arithmetic and over time; each needs two models to compare."""
    of_models = looks(models)
    plots = []
    one = "clip" if any(ROWS["clips"] in model for model in models) else "image"
    for metric, unit in (("psnr", ", dB"), ("rfid", ", lower is better"), ("rfvd", ", lower is better")):
        for cost, label in ((_gmac, f"GMAC per {one}"), (_milliseconds, f"ms per {one}")):
            series = []
            for model in models:
                price, quality = cost(model), (model.get("metrics") or {}).get(metric)
                if not price or quality is None or is_reference(model):
                    continue
                figure = f"{LABELS[metric]} {format_metric(metric, quality)}"
                text = f"{model['name']}: {figure}, {three_figures(price)} {label}"
                series.append(Series(model["name"], of_models[model["name"]], [Point(price, quality, text)]))
            if len(series) < 2:
                continue
            name = LABELS[metric]
            axes = (f"{label}, encode + decode", f"{name}{unit}")
            title = f"{name} over {label.split()[0].replace('ms', 'time')}"
            plots.append(Plot.of(title, series, *axes, logarithmic="x", downwards=metric != "psnr"))
    return plots


def noise_robustness(models: Sequence[dict[str, Any]]) -> Plot | None:
    """PSNR of what is decoded from noisy latents; None where it was not measured."""
    curves = [[(p["noise"], p["psnr"]) for p in (m.get("noise_robustness") or {}).get("curve", [])] for m in models]
    series = _lines(models, curves, lambda noise, quality: f"{quality:.2f} dB at noise of {noise:g} std")
    axes = ("std of the noise / std of the channel", "PSNR, dB")
    return Plot.of("Noise in the latents", series, *axes) if series else None


def latent_structure(models: Sequence[dict[str, Any]]) -> list[Plot]:
    """Energy of latents over spatial frequency, and how alike neighbours are, as far as they were measured."""
    spectra = [model["latents"].get("spectrum") or {"frequency": [], "density": []} for model in models]
    curves = [list(zip(spectrum["frequency"], spectrum["density"])) for spectrum in spectra]
    alike = [model["latents"].get("spatial_correlation") or {} for model in models]
    lags = [[(float(lag), value) for lag, value in correlation.items()] for correlation in alike]
    energy = _lines(models, curves, lambda frequency, density: f"{density:.3g} at {frequency:.2f} of Nyquist", log=True)
    correlated = _lines(models, lags, lambda lag, value: f"{value:.3f} at {lag:g} positions")
    plots = []
    if energy:
        axes = ("radial frequency / Nyquist frequency", "energy density")
        plots.append(Plot.of("Spectrum of the latents", energy, *axes, logarithmic="y", level=1.0))
    if correlated:
        axes = ("positions apart", "correlation")
        plots.append(Plot.of("Correlation of neighbours", correlated, *axes, logarithmic="x", level=0.0))
    return plots


def _lines(
    models: Sequence[dict[str, Any]],
    curves: Sequence[Sequence[tuple[float, float | None]]],
    text: Callable[[float, float], str],
    log: bool = False,
) -> list[Series]:
    """A line for each model whose curve has values, positive ones where their logarithm is drawn."""
    of_models = looks(models)
    series = []
    for model, curve in zip(models, curves):
        usable = [(x, y) for x, y in curve if y is not None and (y > 0 or not log)]
        points = [Point(x, y, f"{model['name']}: {text(x, y)}", chosen=False) for x, y in usable]
        if points:
            series.append(Series(model["name"], of_models[_group(model)], points))
    return series


def _group(model: dict[str, Any]) -> str:
    """The series of a model: qualities of one classical format stand together."""
    return model["class"] if is_reference(model) else model["name"]


def _gmac(model: dict[str, Any]) -> float | None:
    gmac = model.get("gmac") or {}
    return gmac["encode"] + gmac["decode"] if {"encode", "decode"} <= gmac.keys() else None


def _milliseconds(model: dict[str, Any]) -> float | None:
    speed = model.get("speed")
    return sum(1e3 / speed[half]["images_per_second"] for half in ("encode", "decode")) if speed else None


def _fraction(step: float) -> str:
    return str(Fraction(step).limit_denominator(1000))
