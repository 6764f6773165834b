"""Downloads of weight files for metrics, for those who ask (``bench --fetch-weights``)."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from latentae.bench.processes import is_alone
from latentae.console import Progress, say
from latentae.errors import MissingWeights, RequestError
from latentae.files import atomic_write
from latentae.weights import WEIGHT_FILES, find_weight_file, search_folders

TIMEOUT_SECONDS = 60
NEEDS = {"lpips_alex": "alexnet", "lpips_vgg": "vgg16", "dists": "vgg16", "rfvd": "i3d"}
OF_INCEPTION = ("rfid", "fid", "kid", "precision", "recall")


def fetch_weights(metrics: Iterable[str]) -> None:
    """Fetch what these metrics need and is nowhere yet.

    Raises:
        RequestError: see `fetch_weight_file`.
    """
    if not is_alone():
        raise RequestError("--fetch-weights is for one process: fetch before torchrun starts several.")
    files = {NEEDS.get(metric) or ("inception" if metric in OF_INCEPTION else None) for metric in metrics}
    for name in sorted(file for file in files if file):
        fetch_weight_file(name)


def fetch_weight_file(name: str) -> Path:
    """The path of a file of `WEIGHT_FILES`: where it is, or downloaded into the first of `search_folders`.

    What arrives is checked by its hash before it gets its name: a broken download leaves nothing.

    Raises:
        RequestError: it cannot be downloaded, or is not the published file.
    """
    try:
        return find_weight_file(name)
    except MissingWeights:
        pass
    wanted, folder = WEIGHT_FILES[name], search_folders()[0]
    target = folder / wanted.name
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Fetching {wanted.url} into {folder}.")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(wanted.url, timeout=TIMEOUT_SECONDS) as response, atomic_write(target) as stream:
            length = int(response.headers.get("Content-Length") or 0)
            with Progress(wanted.name, length or None, unit="bytes") as progress:
                while block := response.read(1 << 20):
                    digest.update(block)
                    stream.write(block)
                    progress.advance(len(block))
            if not digest.hexdigest().startswith(wanted.sha256_prefix):
                received = f"{progress.done:,} bytes" + (f" of {length:,}" if length else "")
                raise RequestError(
                    f"{wanted.url} gave {received} that are not the published file (their sha256 does not start with "
                    f"{wanted.sha256_prefix}): try again, or fetch it on another machine and copy it to {target}."
                )
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", None) or error
        raise RequestError(
            f"{wanted.url} cannot be fetched ({why}): fetch it on another machine and copy it to {target}."
        ) from error
    return target
