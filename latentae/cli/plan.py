"""Decide which input goes into which shard of a store, before anything is encoded.

  latentae plan s3://bucket/photos latents/ --model runs/my-run --size 256 --dry-run
  latentae plan s3://bucket/photos latents/ --model runs/my-run --size 256
  latentae encode s3://bucket/photos latents/ --model runs/my-run --size 256 --shard-index 0 --shard-count 64

A plan lists the inputs once, so that jobs on many machines need not: 'encode' makes one by itself where there is none.
It is latents/plan.parquet: key, address, size, label and carried columns of every input, by shards; of several
processes that plan one store at once, the first to finish decides, and all others go by its plan.

--dry-run writes nothing: it lists the inputs, encodes a few, and says what disk and time the whole will take.
--extend adds inputs that are not in the plan as new shards behind the others.
"""

import argparse
from typing import Any

from latentae.cli.encode import add_planning_arguments, planning_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="of the measurement (default as in encode)")


def run(args: argparse.Namespace) -> int:
    import json

    from latentae.store.planning import Request, open_request, plan_store

    device = args.device.split(",")[0] if args.device else None
    request = Request(
        args.src,
        args.dst,
        args.model,
        device=device,
        **{**planning_options(args), "workers": args.workers or 2},
    )
    if args.dry_run:
        return dry_run(request, args.batch_size, as_json=args.json)
    planned = plan_store(open_request(request))
    facts = {
        "store": str(args.dst),
        "inputs": planned.plan.inputs,
        "shards": len(planned.plan.shards),
        "new": planned.new,
        "fingerprint": planned.plan.fingerprint,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        new = f", {planned.new} of them new" if planned.new else ""
        print(f"{args.dst}: {planned.plan.inputs} inputs{new} in {len(planned.plan.shards)} shards")
    return 0


def dry_run(request: Any, batch_size: int | None, *, as_json: bool, processes: int = 1) -> int:
    """Print what encoding would take."""
    import json

    from latentae.store.estimate import estimate
    from latentae.store.planning import open_request

    found = estimate(open_request(request), batch_size)
    if as_json:
        print(json.dumps(found.to_dict()))
        return 0
    seconds = found.seconds / processes
    shapes = f" of {found.shapes} shapes" if found.shapes > 1 else ""
    print(f"{found.inputs} {found.unit} in {found.shards} shards{shapes}; nothing was written")
    short = "" if found.bytes < found.free_bytes else ": NOT ENOUGH"
    print(f"disk: about {_bytes(found.bytes)}, {_bytes(found.free_bytes)} are free{short}")
    rates = f"loads {found.loading_rate:.1f}, the model takes {found.model_rate:.1f} {found.unit}/s"
    print(f"time: about {_duration(seconds)} in {_number(processes)} (each {rates}; batch size {found.batch_size})")
    return 0


def _number(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    for limit, unit, length in ((120, "seconds", 1), (7200, "minutes", 60), (172800, "hours", 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
