"""Where a store is begun, or found and continued: a store is only ever continued as what it was begun.

A changed model, option or set of inputs is refused with a list of what changed, because latents that were made in two
ways cannot be told apart afterwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentae.data.sources import Item
from latentae.errors import DataError, RequestError
from latentae.files import TEMPORARY_SUFFIX, write_json
from latentae.store.configuration import configuration_difference, read_configuration
from latentae.store.plan import Plan, plan_difference
from latentae.store.shard import read_rows

PARTS_OF_A_STORE = {"store.json", "plan.parquet", "shards", "quarantine.parquet"}


def check_folder(store: Path) -> None:
    """Refuse to mix a store into a folder that holds other things."""
    if store.exists() and not store.is_dir():
        raise RequestError(f"{store} is a file; expected a folder for the store.")
    if store.is_dir() and not (store / "store.json").exists():
        others = [p.name for p in store.iterdir() if p.name not in PARTS_OF_A_STORE and p.suffix != TEMPORARY_SUFFIX]
        if others:
            raise RequestError(f"{store} is not a store and not empty (it has {others[0]}): choose another folder.")


def begin_store(store: Path, plan: Plan, configuration: dict[str, Any]) -> None:
    """Make the folder a store: ``store.json`` comes last, so where it stands there is a plan too."""
    store.mkdir(parents=True, exist_ok=True)
    plan.save(store / "plan.parquet")
    write_json(store / "store.json", configuration)


def continue_store(store: Path, planned: Plan, items: Sequence[Item], asked: dict[str, Any]) -> dict[str, Any]:
    """The store's own configuration, once it is sure that the request is for this very store."""
    stored = read_configuration(store)
    if stored["plan"]["fingerprint"] != planned.fingerprint:
        raise DataError(f"{store / 'plan.parquet'} is not the plan that {store / 'store.json'} was written for.")
    if lines := configuration_difference(stored, asked):
        raise _refusal(f"{store} was begun with another configuration", lines, "Give the same options")
    if lines := plan_difference(planned, items):
        raise _refusal(f"{store} was planned for other inputs", lines, "Restore the inputs")
    return stored


def refuse_changed_inputs(store: Path, planned: Plan, plan: Plan, committed: set[int]) -> None:
    """Refuse to go on where an input was replaced after it had been encoded: its latents would be stale."""
    lines = []
    for before, now in zip(planned.shards, plan.shards):
        changed = {i.key: i.size for b, i in zip(before.items, now.items) if b.size != i.size}
        if not changed or now.index not in committed:
            continue
        rows = read_rows(store, now, ["key", "status", "bytes"])
        for key, status, size in zip(rows["key"], rows["status"], rows["bytes"]):
            if status == "ok" and size != changed.get(key, size):
                lines.append(f"{key}: {size} bytes when it was encoded, {changed[key]} now")
    if lines:
        raise _refusal(f"{store} holds latents of inputs that have changed since", lines, "Restore the inputs")


def _refusal(what: str, lines: list[str], remedy: str) -> RequestError:
    shown = "".join(f"\n  {line}" for line in lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    return RequestError(f"{what}:{shown}{more}\n{remedy}, or encode into another folder.")
