"""``results.json``: written whole or not at all, read back, and summed up as a plain table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentae.bench.quality import METRICS, ROWS
from latentae.console import format_table, three_figures
from latentae.errors import RequestError
from latentae.files import read_json, write_json

SCHEMA = 1
FEWER_DIGITS = {"psnr": 2, "difference_psnr": 2, "flicker": 3, "rfvd": 2, "rfid": 3, "fid": 3, "kid": 6}
DIGITS = {name: FEWER_DIGITS.get(name, 4) for name in METRICS}
LABELS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "gmsd": "GMSD",
    "haarpsi": "HaarPSI",
    "difference_psnr": "difference PSNR",
    "flicker": "flicker",
    "rfvd": "rFVD",
    "lpips_alex": "LPIPS alex",
    "lpips_vgg": "LPIPS vgg",
    "rfid": "rFID",
    "fid": "FID",
    "dists": "DISTS",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
}


def write_results(results: dict[str, Any], folder: Path | str) -> Path:
    """Write ``results.json`` into a folder and return its path."""
    path = Path(folder) / "results.json"
    write_json(path, results)
    return path


def read_results(path: Path | str) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Args:
        path: the file or its folder.

    Raises:
        RequestError: it is of another schema.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    results = read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise RequestError(f"{path} is no results.json of this version of latentae (schema {SCHEMA}).")
    return results


def measured_metrics(results: dict[str, Any]) -> list[str]:
    """The metrics that at least one model has a value for, in the order of `METRICS`; PSNR where it is infinite."""
    models = results["models"]
    return [
        name
        for name in METRICS
        if any(m["metrics"].get(name) is not None or (name == "psnr" and m.get("identical")) for m in models)
    ]


def unit_of(results: dict[str, Any]) -> str:
    """What was measured: ``images`` or ``clips``."""
    return "clips" if "frames" in results["protocol"] else "images"


def rows_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each image or clip."""
    return next((model[name] for name in ROWS.values() if name in model), [])


def extent(protocol: dict[str, Any]) -> str:
    """Of what size images or clips were measured, such as ``17 frames at 128 px``."""
    frames = protocol.get("frames")
    of_frames = f"{frames} frame{'s' * (frames != 1)} at " if frames else ""
    return f"{of_frames}{protocol['size']} px"


def row_name(model: dict[str, Any]) -> str:
    """The name of a model, and where some images could not be measured, of how many its figures are."""
    lacking = len(model.get("failed", []))
    unit = "clips" if ROWS["clips"] in model else "images"
    of = f", {model['images']:,} of {model['images'] + lacking:,} {unit}" if lacking else ""
    return model["name"] + of


def steps_label(model: dict[str, Any]) -> str:
    """How a model's decoder samples, such as ``4 steps``; empty if it does not."""
    steps = (model.get("decoding") or {}).get("steps")
    return "" if steps is None else f"{steps} step{'s' * (steps != 1)}"


def shape_label(model: dict[str, Any]) -> str:
    """The field's shorthand, such as f32c32, or t4f8c16 with time; planes in the words of their model."""
    if model["spatial_ratio"] is None:  # a file
        return "–"
    if "compression" in model:
        return model["compression"]
    time = f"t{model['temporal_ratio']}" if model["temporal_ratio"] > 1 else ""
    return f"{time}f{model['spatial_ratio']}c{model['latent_channels']}"


def format_metric(name: str, value: float | None) -> str:
    """A figure with as many digits as its metric deserves; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{DIGITS[name]}f}"


COST_HEADER = ("model", "half", "parameters, M", "GMAC", "ms / batch", "peak memory, GiB")


def cost_rows(results: dict[str, Any]) -> list[list[str]]:
    """What the encoder and the decoder of every model cost, each in a row: the columns of `COST_HEADER`."""
    rows = []
    reference = results.get("reference_cost")
    for model in [*results["models"], *([reference] if reference else [])]:
        tasks = [("encode", "encoder"), ("decode", "decoder")]
        if "decode_step" in model["gmac"]:
            tasks.append(("decode_step", "one of its steps"))
        for task, half in tasks:
            speed = model["speed"].get(task, {}) if model["speed"] else {}
            figures = [
                (model["parameters"].get(half), 1e-6),
                (model["gmac"].get(task), 1),
                (speed.get("seconds_per_batch"), 1e3),
                (speed.get("peak_memory_bytes"), 2**-30),
            ]
            if task == "decode" and model.get("decoding"):
                half += f", {steps_label(model)}"
            rows.append(
                [model["name"], half, *("–" if value is None else three_figures(value * k) for value, k in figures)]
            )
    return rows


GRID_HEADER = ("model", "size", "dtype", "", "encode, ms / batch", "decode, ms / batch", "peak memory, GiB")


def grid_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Speed under other conditions: the columns of `GRID_HEADER`."""
    rows = []
    for model in models:
        for row in model.get("speed_grid") or []:
            halves = [row.get(half) or {} for half in ("encode", "decode")]
            seconds = [half.get("seconds_per_batch") for half in halves]
            memory = max((half["peak_memory_bytes"] for half in halves if half.get("peak_memory_bytes")), default=None)
            figures = [*((value, 1e3) for value in seconds), (memory, 2**-30)]
            rows.append(
                [
                    *(model["name"], str(row["size"]), row["dtype"], "compiled" if row["compiled"] else "eager"),
                    *("–" if value is None else three_figures(value * k) for value, k in figures),
                ]
            )
    return rows


def cost_conditions(results: dict[str, Any]) -> str:
    """Under which conditions the figures of `cost_rows` were taken."""
    one = unit_of(results).removesuffix("s")
    text = f"GMAC: multiply-accumulates of one {one} of {extent(results['protocol'])}"
    if any(model.get("decoding") for model in results["models"]):
        text += ", of all steps where a decoder samples"
    speed = next((model["speed"] for model in results["models"] if model["speed"]), None)
    if speed is None:
        return text + "; speed was not measured."
    threads = f", {speed['threads']} threads" if speed["threads"] else ""
    return (
        f"{text}; ms: median for a batch of {speed['batch_size']} {one}{'s' * (speed['batch_size'] != 1)} at "
        f"{speed['size']} px, {speed['dtype']}, "
        f"{speed['device']}{threads}; memory: {speed['memory_is']}."
    )


RATE_HEADER = ("model", "floats / pixel", "bits / pixel", "PSNR with as many", "rounded to")


def rate_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How large latents and files are: the columns of `RATE_HEADER`."""
    rows = []
    for model in models:
        rate = model.get("rate") or {}
        floats, bits = model["floats_per_pixel"], rate.get("bits_per_pixel")
        step = f"1/{1 / rate['step']:.0f} of a channel's std" if "step" in rate else "–"
        rows.append(
            [
                model["name"],
                "–" if floats is None else f"{floats:.4g}",
                "–" if bits is None else three_figures(bits),
                format_metric("psnr", rate.get("psnr")),
                f"{rate['codes']} codes" if "codes" in rate else step,
            ]
        )
    return rows


def rate_conditions(models: Sequence[dict[str, Any]]) -> str:
    """What the figures of `rate_rows` are."""
    rates = [model["rate"] for model in models if model.get("rate")]
    what = ["empirical entropy of latents, channel by channel, rounded as coarsely as costs at most 0.1 dB"]
    what = what if any("step" in rate for rate in rates) else []
    what += ["the names of codes"] if any("codes" in rate for rate in rates) else []
    what += ["all bytes of files"] if any(not {"step", "codes"} & rate.keys() for rate in rates) else []
    return f"bits: {'; '.join(what)}; bits and PSNR of {rated_images(models)}."


def rated_images(models: Sequence[dict[str, Any]]) -> str:
    """Of which images the rates are; nothing if there are none."""
    counts = {model["rate"]["images"] for model in models if (model.get("rate") or {}).get("images")}
    unit = "clips" if any(ROWS["clips"] in model for model in models) else "images"
    return f"the first {' to '.join(f'{n:,}' for n in sorted({min(counts), max(counts)}))} {unit}" if counts else ""


DIAGNOSTICS_HEADER = (
    "model",
    "energy from half Nyquist on",
    "correlation of neighbours",
    "effective rank",
    "intrinsic dimension",
    "KL, nats / element",
)


def diagnostics_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the latents of every model are like: the columns of `DIAGNOSTICS_HEADER`."""
    rows = []
    for model in models:
        latents = model["latents"]
        share = (latents.get("spectrum") or {}).get("high_frequency_share")
        near = (latents.get("spatial_correlation") or {}).get("1")
        rank, kl = latents.get("effective_rank"), (latents.get("kl") or {}).get("kl")
        dimension = latents.get("intrinsic_dimension") or {}
        rows.append(
            [
                model["name"],
                "–" if share is None else f"{share:.1%}",
                "–" if near is None else f"{near:.2f}",
                "–" if rank is None else f"{rank:.1f} of {model['latent_channels']}",
                "–" if dimension.get("two_nn") is None else f"{dimension['two_nn']:.1f} ({dimension['points']} points)",
                "–" if kl is None else f"{kl:.3g}",
            ]
        )
    return rows


def summarise(results: dict[str, Any]) -> str:
    """The table for the terminal with the protocol at its foot."""
    metrics = measured_metrics(results)
    with_speed = any(model["speed"] for model in results["models"])
    sampled = [model["decoding"] for model in results["models"] if model.get("decoding")]
    header = ["model", "latents", *(["decoder"] if sampled else []), *(LABELS[name] for name in metrics)]
    per_second = "clips/s" if unit_of(results) == "clips" else "img/s"
    header += [f"encode {per_second}", f"decode {per_second}"] if with_speed else []
    rows = []
    for model in results["models"]:
        row = [row_name(model), shape_label(model), *([steps_label(model) or "–"] if sampled else [])]
        row += [format_metric(name, model["metrics"].get(name)) for name in metrics]
        if with_speed:
            speed = model["speed"]
            row += [three_figures(speed[half]["images_per_second"]) if speed else "–" for half in ("encode", "decode")]
        rows.append(row)
    for baseline in results["baselines"]:
        row = [
            baseline["name"],
            "–",
            *(["–"] if sampled else []),
            *(format_metric(name, baseline.get(name)) for name in metrics),
        ]
        rows.append(row + ["–"] * (len(header) - len(row)))
    parts = {part["protocol_sha256"]: part for part in results.get("merged") or [results]}
    foot = [line for part in parts.values() for line in _protocol_lines(part, metrics)]
    if len(parts) > 1:
        foot.append(f"These are {len(parts)} protocols: figures of one do not compare with figures of another.")
    if sampled:
        foot.append(f"  decoders that sample: from noise seeded by {sampled[0]['seed']} and the image's name")
    for model in results["models"]:
        between = model["latents"].get("interpolation") or {}
        if between.get("ifid") is not None:
            foot.append(f"  iFID of {model['name']}: {between['ifid']:.3g}, of {between['images']} images")
    versions = [part["versions"] for part in parts.values()]
    lines = ["versions: " + ", ".join(f"{name} {number}" for name, number in one.items() if number) for one in versions]
    foot += dict.fromkeys(lines)
    cost = [format_table(list(COST_HEADER), cost_rows(results)), cost_conditions(results)]
    if grid := grid_rows(results["models"]):
        cost += ["", format_table(list(GRID_HEADER), grid)]
    latents = format_table(list(DIAGNOSTICS_HEADER), diagnostics_rows(results["models"]))
    models = [model for model in results["models"] if model.get("rate")]
    size = [format_table(list(RATE_HEADER), rate_rows(models)), rate_conditions(models), ""] if models else []
    return "\n".join([format_table(header, rows), "", *size, *cost, "", latents, "", *foot])


def _protocol_lines(part: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    protocol = part["protocol"]
    shown = ["fps", "stride", "start", "crop", "range", "encode", "dtype", "quantisation", *metrics, "remark"]
    return [
        f"protocol {protocol['preset']} ({protocol['of']}), {part['protocol_sha256'][:12]}: {protocol['images']} "
        f"{'clips' if 'frames' in protocol else 'images'} of {extent(protocol)}",
        *(f"  {name}: {protocol[name]}" for name in shown if protocol.get(name) is not None),
    ]
