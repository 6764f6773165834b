"""Hash the shards of a store and its plan again, and say which are not what was written.

  latentae verify latents/
  latentae verify latents/ --inputs

With --inputs every input that was encoded is read again as well, and its hash is compared with the one in its row: an
image that was replaced since has latents that are not its own. Exit code 3 where anything is wrong.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("--inputs", action="store_true", help="also read the inputs again, from where they were")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read (default 4)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    import json

    from latentae.errors import DataError
    from latentae.store.verification import verify_store

    found = verify_store(args.store, inputs=args.inputs, workers=args.workers)
    if args.json:
        print(json.dumps(found.to_dict()))
    else:
        for problem in found.problems:
            print(problem)
        inputs = f" and {found.inputs} inputs" if args.inputs else ""
        left = f"; {found.shards_left} shards are not encoded yet" if found.shards_left else ""
        print(f"{args.store}: {found.shards} shards{inputs} read, {len(found.problems)} problems{left}")
    if found.problems:
        raise DataError(f"{len(found.problems)} files are not what was written; the first: {found.problems[0]}")
    return 0
