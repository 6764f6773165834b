import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.data.sources import Item
from latentae.data.sources.table import ItemTable
from latentae.errors import DataError, RequestError
from latentae.store.plan import Plan, make_plan, part_path, plan_difference


def items_named(keys, labels=None, columns=None):
    return ItemTable.of(
        Item(key, f"file:///{key}", 10 + i, labels and labels[i], columns[i] if columns else {})
        for i, key in enumerate(keys)
    )


def planned(items, shapes, shard_size):
    return Plan([make_plan(items, shapes, shard_size)])


@given(
    keys=st.lists(st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()), unique=True, min_size=1),
    shapes=st.lists(st.sampled_from([(8, 8), (8, 16), (16, 8)]), min_size=1),
    shard_size=st.integers(1, 7),
)
def test_shards_part_the_inputs_and_are_of_one_shape(keys, shapes, shard_size):
    items = items_named(sorted(keys))
    shape_of = {item.key: shapes[i % len(shapes)] for i, item in enumerate(items)}
    plan = planned(items, np.array([shape_of[item.key] for item in items]), shard_size)
    assert sorted(plan.read("key").column(0).to_pylist()) == sorted(keys)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    for shard in plan.shards:
        members = list(plan.items(shard))
        assert 1 <= len(members) == shard.inputs <= shard_size
        assert {shape_of[item.key] for item in members} == {shard.shape}
        assert [item.key for item in members] == sorted(item.key for item in members)


@pytest.mark.parametrize("shapes", [(8, 8), np.array([(8, 8), (8, 16), (8, 8)])], ids=["one", "several"])
def test_a_plan_survives_its_file(shapes, tmp_path):
    columns = [{"caption": "a cat", "score": 0.5}, {"caption": None}, {"caption": "ü"}]
    items = items_named(["a.png", "b/ü.png", "c.png"], labels=[0, None, 3], columns=columns)
    plan = planned(items, shapes, 2)
    plan.parts[0].save(part_path(tmp_path, 0))
    loaded = Plan.load(tmp_path)
    assert loaded.shards == plan.shards
    assert loaded.fingerprint == plan.fingerprint
    assert [list(loaded.items(shard)) for shard in loaded.shards] == [list(plan.items(shard)) for shard in plan.shards]
    assert pickle.loads(pickle.dumps(loaded)).items(loaded.shards[1])[0] == plan.items(plan.shards[1])[0]
    assert list(loaded.carried) == ["caption", "score"]
    table = pyarrow.parquet.read_table(tmp_path / "plan.parquet").to_pydict()
    assert table["shard"] == [0, 0, 1]
    assert table["pixel_height"] == [8, 8, 8]
    with pytest.raises(FileExistsError):  # the first plan holds
        plan.parts[0].save(part_path(tmp_path, 0))


def test_the_fingerprint_is_of_what_is_encoded_not_of_where_it_lies():
    items = items_named(["a", "b", "c"])
    moved = ItemTable.of(Item(item.key, "s3://elsewhere/" + item.key, 7, item.label) for item in items)
    fingerprint = planned(items, (8, 8), 2).fingerprint
    assert planned(moved, (8, 8), 2).fingerprint == fingerprint
    others = [
        planned(items, (8, 8), 3),
        planned(items, (8, 16), 2),
        planned(items[:2], (8, 8), 2),
        planned(items_named(["a", "b", "c"], [1, 1, 2]), (8, 8), 2),
        planned(items_named(["a", "b", "c"], [None, None, 0]), (8, 8), 2),
        planned(items_named(["a", "bc", ""]), (8, 8), 2),
        planned(items_named(["a", "b", "c"], columns=[{"caption": x} for x in "xyz"]), (8, 8), 2),
        planned(items_named(["a", "b", "c"], columns=[{"caption": x} for x in ("xy", "", "z")]), (8, 8), 2),
    ]
    assert len({fingerprint, *(plan.fingerprint for plan in others)}) == len(others) + 1


def test_an_extension_comes_after_and_is_of_one_plan_only(tmp_path):
    base = planned(items_named(["a", "b", "c"]), (8, 8), 2)
    base.parts[0].save(part_path(tmp_path, 0))
    part = make_plan(items_named(["aa", "d"]), (8, 8), 2, extends=base)
    part.save(part_path(tmp_path, 1))
    plan = Plan.load(tmp_path)
    assert plan.shards[:2] == base.shards
    assert [shard.index for shard in plan.shards] == [0, 1, 2]
    assert plan.inputs == 5
    assert plan.items(plan.shards[2]).keys.to_pylist() == ["aa", "d"]
    assert plan.fingerprint != base.fingerprint

    other = planned(items_named(["x"]), (8, 8), 2)
    part_path(tmp_path, 0).unlink()
    other.parts[0].save(part_path(tmp_path, 0))
    with pytest.raises(DataError, match="extends another plan"):
        Plan.load(tmp_path)


def test_moved_inputs_are_read_from_where_they_lie_now():
    items = items_named(["a", "b", "c", "d"], columns=[{"caption": x} for x in "abcd"])
    plan = planned(items, np.array([(8, 16), (8, 8), (8, 16), (8, 8)]), 3)
    moved = ItemTable.of(Item(key, f"s3://{key}", 5) for key in "abcd")
    relocated = plan.relocated(moved)
    assert relocated.shards == plan.shards
    found = [item for shard in relocated.shards for item in relocated.items(shard)]
    assert [item.key for item in found] == ["b", "d", "a", "c"]
    assert all(item.uri == f"s3://{item.key}" and item.columns["caption"] == item.key for item in found)


def test_two_inputs_of_one_key_are_refused_with_both_places():
    items = ItemTable.of([Item("a.png", "tar://1/a.png", 1), Item("a.png", "tar://2/a.png", 1)])
    with pytest.raises(RequestError, match=r"tar://1/a\.png and tar://2/a\.png would both get the key 'a\.png'"):
        make_plan(items, (8, 8), 5)


def test_the_difference_names_what_came_went_and_changed():
    plan = planned(items_named(["a", "b", "c"], [0, 0, 1]), np.array([(8, 16), (8, 8), (8, 8)]), 2)
    assert plan_difference(plan, items_named(["a", "b", "c"], [0, 0, 1])).lines() == []
    difference = plan_difference(plan, items_named(["a", "c", "d", "e"], [0, 2, 0, 0]))
    assert difference.lines() == [
        "2 inputs not in the plan: d, e",
        "1 input planned, but gone: b",
        "1 input with another label: c",
    ]
    assert difference.new.keys.to_pylist() == ["d", "e"]


def test_a_cut_plan_file_is_an_error_of_data(tmp_path):
    make_plan(items_named(["a"]), (8, 8), 1).save(tmp_path / "plan.parquet")
    (tmp_path / "plan.parquet").write_bytes((tmp_path / "plan.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"plan\.parquet is not a whole parquet file"):
        Plan.load(tmp_path)
    (tmp_path / "plan.parquet").unlink()
    with pytest.raises(DataError, match=r"plan\.parquet is missing"):
        Plan.load(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "plan.parquet")
    with pytest.raises(DataError, match=r"plan\.parquet is not the plan of a store"):
        Plan.load(tmp_path)
