"""Run a pickled job on an engine, in a process that tests can kill: python run_engine.py JOB (local|ray)."""

import pickle
import signal
import sys
from pathlib import Path

from latentae.cli.main import _terminate
from latentae.store.engines import run_local, run_ray


def main(path: str, engine: str) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    job = pickle.loads(Path(path).read_bytes())
    shards = [shard.index for shard in job.plan.shards]
    if engine == "local":
        reports = run_local(job, shards, processes=2, devices=["cpu"], advance=lambda inputs, bad: None)
    else:
        reports = run_ray(job, shards, address=None, processes=2, advance=lambda inputs, bad: None)
    print("running", flush=True)
    try:
        for report in reports:
            print(report.shard, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
