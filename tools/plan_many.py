"""A plan of ten million inputs: made, resumed, extended, opened by a job and summarised, with time and memory.

    python tools/plan_many.py [--inputs 10000000] [--json FILE]

The inputs come from a csv of that many paths in 1,000 classes with a caption each, which names no files that exist: a
plan of one shape needs none. Every step is a process of its own, so that its peak of resident memory is its own. For
the summary every shard is given a marker, rows and latents of one number, as if it had been encoded.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import latentae
from latentae.console import format_table, say
from latentae.store.planning import Planned, Request, open_request, plan_store

SHARD_SIZE = 1000


def write_manifest(path: Path, inputs: int, first: int = 0) -> None:
    with path.open("w") as stream:
        stream.write("path,label,caption\n")
        for number in range(first, first + inputs):
            label = number % 1000
            stream.write(f"train/n{label:08d}/n{label:08d}_{number:08d}.JPEG,{label},a photo of thing {label}\n")


def planned(folder: Path, manifest: str, **options: Any) -> Planned:
    model = latentae.create("dc-ae-tiny")
    request = Request(folder / manifest, folder / "store", model, shard_size=SHARD_SIZE, **options)
    return plan_store(open_request(request))


def make(folder: Path) -> str:
    return f"{planned(folder, 'inputs.csv').plan.inputs} inputs"


def resume(folder: Path) -> str:
    found = planned(folder, "inputs.csv")
    return f"{len(found.plan.shards)} shards, {len(found.committed)} done"


def as_job(folder: Path) -> str:
    """One of many jobs: it goes by the plan, and reads its first shard of it."""
    found = planned(folder, "inputs.csv", as_planned=True)
    return f"{len(found.plan.items(found.plan.shards[-1]))} inputs of the last shard"


def extend(folder: Path) -> str:
    return f"{planned(folder, 'more.csv', extend=True).new} new"


def publish_all(folder: Path) -> str:
    """Not measured for its own sake: what the summary reads."""
    from latentae.store.shard import Sample, publish

    found = planned(folder, "inputs.csv", as_planned=True)
    (folder / "store/shards").mkdir(exist_ok=True)
    zero = torch.zeros(1, 1, 1)
    for shard in found.plan.shards:
        samples = [Sample(item, latents=zero) for item in found.plan.items(shard)]
        publish(
            folder / "store", shard, samples, tensor="latents", carried=found.plan.carried,
            fingerprint=found.fingerprint, batch_size=16,
        )  # fmt: skip
    return f"{len(found.plan.shards)} shards"


def summarise(folder: Path) -> str:
    described = latentae.LatentStore(folder / "store").describe()
    return f"{described['encoded']} encoded"


STEPS: dict[str, Callable[[Path], str]] = {
    "plan": make,
    "resume": resume,
    "open as one job": as_job,
    "extend by 1,000": extend,
    "publish": publish_all,
    "summarise": summarise,
}


def _measured(step: str, folder: Path) -> tuple[float, float, str]:
    torch.set_num_threads(1)
    latentae.create("dc-ae-tiny")  # imports are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    said = STEPS[step](folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (peak - before) / 2**20, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("writing the manifest …")
        write_manifest(folder / "inputs.csv", args.inputs)
        write_manifest(folder / "more.csv", 1000, first=args.inputs)
        for step in STEPS:
            say(f"{step} …")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak, said = pool.apply(_measured, (step, folder))
            rows.append([step, seconds, peak, said])
            results[step] = {"seconds": seconds, "peak_gib": peak, "result": said}
        size = sum(path.stat().st_size for path in (folder / "store").glob("plan*.parquet"))
    print(format_table(["step", "seconds", "GiB beside imports", "result"], rows))
    worst = max(result["peak_gib"] for result in results.values())
    took = results["plan"]["seconds"]
    print(f"{args.inputs} inputs: planned in {took:.0f} s, at most {worst:.1f} GiB, plan of {size / 2**20:.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps({"inputs": args.inputs, "plan_bytes": size, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
