"""Where a store is begun, or found and continued: a store is only ever continued as what it was begun.

A changed model, option or set of inputs is refused with a list of what changed, because latents that were made in two
ways cannot be told apart afterwards. Of several processes that begin one store, the first to write a file decides.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from latentae.data.sources.table import ItemTable
from latentae.errors import DataError, RequestError
from latentae.files import TEMPORARY_SUFFIX, write_json
from latentae.store.configuration import configuration_difference, read_configuration
from latentae.store.plan import (
    Plan,
    PlanPart,
    class_clashes,
    column_difference,
    part_path,
    plan_difference,
    unmergeable,
)
from latentae.store.shard import read_rows

PART_OF_A_STORE = re.compile(
    rf"store\.json|plan(-\d+)?\.parquet|shards|quarantine\.parquet|.*{re.escape(TEMPORARY_SUFFIX)}"
)


def check_folder(store: Path) -> None:
    """Refuse to mix a store into a folder that holds other things."""
    if store.exists() and not store.is_dir():
        raise RequestError(f"{store} is a file; expected a folder for the store.")
    if store.is_dir() and not (store / "store.json").exists():
        others = [path.name for path in store.iterdir() if not PART_OF_A_STORE.fullmatch(path.name)]
        if others:
            raise RequestError(f"{store} is not a store and not empty (it has {others[0]}): choose another folder.")


def is_planned(store: Path) -> bool:
    """Whether there is a plan, and the options that it was made for are known."""
    return (store / "plan.parquet").exists() and (store / "store.json").exists()


def agree_on_plan(store: Path, part: PlanPart, number: int) -> Plan:
    """Write a part of a plan, and return the plan that now holds: another process may have been quicker."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # no folder can be made there, as below /proc
        raise RequestError(f"The folder {store} cannot be made ({error.strerror}): choose another one.") from error
    with contextlib.suppress(FileExistsError):
        part.save(part_path(store, number))
    return Plan.load(store)


def refuse_other_plan(store: Path, planned: Plan, draft: PlanPart, items: ItemTable) -> None:
    """Refuse a plan that is not what this request would make, where no description says what it was made for.

    Raises:
        RequestError: it is another one.
    """
    if planned.parts[0].fingerprint == draft.fingerprint or (store / "store.json").exists():
        return
    refuse_other_inputs(store, planned, items)
    raise RequestError(
        f"{store} has a plan that was made with other options, by a run that was cut short or has only begun: give the "
        f"same options, or delete {store / 'plan.parquet'} where none is running."
    )


def agree_on_store(store: Path, plan: Plan, asked: dict[str, Any], *, extend: bool = False) -> dict[str, Any]:
    """The store's own configuration, once it is sure that the request is for this very store; it is begun with
    ``asked`` where there is none.

    Raises:
        RequestError: it was begun with another configuration.
        DataError: its plan is not the one that it was begun with.
    """
    if not (store / "store.json").exists():
        with contextlib.suppress(FileExistsError):
            write_json(store / "store.json", asked, replace=False)
    stored = read_configuration(store)
    if stored["plan"]["fingerprint"] != plan.parts[0].fingerprint:
        raise DataError(f"{store / 'plan.parquet'} is not the plan that {store / 'store.json'} was written for.")
    if lines := configuration_difference(stored, asked, extend=extend):
        raise _refusal(f"{store} was begun with another configuration", lines, "Give the same options")
    return stored


def refuse_other_inputs(store: Path, planned: Plan, items: ItemTable) -> None:
    """Refuse inputs that are not those that were planned.

    Raises:
        RequestError: with what came and went.
    """
    difference = plan_difference(planned, items)
    if lines := difference.lines() or column_difference(planned, items):
        extend = ", add the new ones with --extend" if len(difference.new) and len(lines) == 1 else ""
        extended = " or, as the store was extended, give --extend or --as-planned" if len(planned.parts) > 1 else ""
        raise _refusal(f"{store} was planned for other inputs", lines, f"Restore the inputs{extend or extended}")


def new_inputs(store: Path, planned: Plan, items: ItemTable) -> ItemTable:
    """The inputs by which a store is to be extended; those that were planned stay as they are.

    Raises:
        RequestError: planned ones have another label now, or a column another type.
    """
    difference = plan_difference(planned, items)
    if lines := difference.relabelled_lines() or class_clashes(planned, items):
        remedy = (
            "Give them the labels that they had (a folder that is added must be sorted behind those of the plan, which "
            "are all there, if only empty; or list the inputs in a table with numbers as labels)"
        )
        raise _refusal(f"{store} cannot be extended by these inputs", lines, remedy)
    if lines := unmergeable(planned, items):
        remedy = "Give the columns the types that they had, or leave them out with --columns"
        raise _refusal(f"{store} cannot be extended by these inputs", lines, remedy)
    return difference.new


def refuse_changed_inputs(store: Path, planned: Plan, items: ItemTable, committed: set[int]) -> None:
    """Refuse to go on where an input was replaced after it had been encoded: its latents would be stale.

    That is told by the lengths, where the source knows them.
    """
    if items.sizes_are_guessed:
        return
    before, now = planned.read("key", "bytes"), items.table.select(["key", "bytes"])
    if before.column("bytes").equals(now.column("bytes")) and before.column("key").equals(now.column("key")):
        return
    now = now.rename_columns(["key", "now"])
    both = before.join(now, "key", join_type="inner")
    changed = both.filter(pc.not_equal(both.column("bytes"), both.column("now")))
    if not changed.num_rows:
        return
    sizes = dict(zip(changed.column("key").to_pylist(), changed.column("now").to_pylist()))
    lines = []
    for shard in planned.shards:
        if shard.index not in committed or not sizes.keys() & set(planned.items(shard).keys.to_pylist()):
            continue
        rows = read_rows(store, shard, ["key", "status", "bytes"])
        for key, status, size in zip(rows["key"], rows["status"], rows["bytes"]):
            if status == "ok" and size != sizes.get(key, size):
                lines.append(f"{key}: {size} bytes when it was encoded, {sizes[key]} now")
    if lines:
        raise _refusal(f"{store} holds latents of inputs that have changed since", lines, "Restore the inputs")


def _refusal(what: str, lines: list[str], remedy: str) -> RequestError:
    shown = "".join(f"\n  {line}" for line in lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    return RequestError(f"{what}:{shown}{more}\n{remedy}, or encode into another folder.")
