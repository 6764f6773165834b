"""List every named configuration: compression, latent channels, parameters of both halves, where it comes from."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print the configuration of this preset instead of the list")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    from latentae.console import format_table
    from latentae.families.presets import describe, find_preset, presets

    if args.name:
        preset = find_preset(args.name)
        print(
            json.dumps(
                {"name": preset.name, "family": preset.family, "hub_id": preset.hub_id, **preset.config}, indent=2
            )
        )
        return 0
    rows = [describe(name) for name in presets()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = []
    for r in rows:
        parameters = [f"{r[f'{half}_millions']:.2f}" for half in ("encoder", "decoder")]
        table.append([r["name"], f"f{r['ratio']}c{r['channels']}", *parameters, r["source"], r["hub_id"] or ""])
    print(format_table(["preset", "latents", "encoder M", "decoder M", "source", "weights"], table))
    return 0
