import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.data.sources import Item
from latentae.errors import DataError, RequestError
from latentae.store.plan import Plan, make_plan, plan_difference


def items_named(keys, labels=None):
    return [Item(key, f"file:///{key}", 10 + i, labels and labels[i]) for i, key in enumerate(keys)]


@given(
    keys=st.lists(st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()), unique=True, min_size=1),
    shapes=st.lists(st.sampled_from([(8, 8), (8, 16), (16, 8)]), min_size=1),
    shard_size=st.integers(1, 7),
)
def test_shards_part_the_inputs_and_are_of_one_shape(keys, shapes, shard_size):
    items = items_named(sorted(keys))
    shape_of = {item.key: shapes[i % len(shapes)] for i, item in enumerate(items)}
    plan = make_plan(items, [shape_of[item.key] for item in items], shard_size)
    assert sorted(item.key for item in plan.items()) == sorted(keys)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    for shard in plan.shards:
        assert 1 <= len(shard.items) <= shard_size
        assert {shape_of[item.key] for item in shard.items} == {shard.shape}
        assert [item.key for item in shard.items] == sorted(item.key for item in shard.items)


def test_a_plan_survives_its_file(tmp_path):
    items = items_named(["a.png", "b/ü.png", "c.png"], labels=[0, None, 3])
    plan = make_plan(items, [(8, 8), (8, 16), (8, 8)], 2)
    plan.save(tmp_path / "plan.parquet")
    loaded = Plan.load(tmp_path / "plan.parquet")
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint


def test_the_fingerprint_is_of_what_is_encoded_not_of_where_it_lies():
    items = items_named(["a", "b", "c"])
    moved = [Item(item.key, "s3://elsewhere/" + item.key, item.size, item.label) for item in items]
    shapes = [(8, 8)] * 3
    plan = make_plan(items, shapes, 2)
    assert make_plan(moved, shapes, 2).fingerprint == plan.fingerprint
    assert make_plan(items, shapes, 3).fingerprint != plan.fingerprint
    assert make_plan(items, [(8, 16)] * 3, 2).fingerprint != plan.fingerprint
    assert make_plan(items[:2], shapes[:2], 2).fingerprint != plan.fingerprint
    assert make_plan(items_named(["a", "b", "c"], [1, 1, 2]), shapes, 2).fingerprint != plan.fingerprint


def test_two_inputs_of_one_key_are_refused_with_both_places():
    items = [Item("a.png", "tar://1/a.png", 1), Item("a.png", "tar://2/a.png", 1)]
    with pytest.raises(RequestError, match=r"'a\.png': tar://1/a\.png and tar://2/a\.png"):
        make_plan(items, [(8, 8)] * 2, 5)


def test_the_difference_names_what_came_went_and_changed():
    planned = make_plan(items_named(["a", "b", "c"], [0, 0, 1]), [(8, 8)] * 3, 2)
    assert plan_difference(planned, items_named(["a", "b", "c"], [0, 0, 1])) == []
    assert plan_difference(planned, items_named(["a", "c", "d", "e"], [0, 2, 0, 0])) == [
        "2 inputs not in the plan: d, e",
        "1 input planned, but gone: b",
        "1 input with another label: c",
    ]


def test_a_cut_plan_file_is_an_error_of_data(tmp_path):
    make_plan(items_named(["a"]), [(8, 8)], 1).save(tmp_path / "plan.parquet")
    (tmp_path / "plan.parquet").write_bytes((tmp_path / "plan.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"plan\.parquet is not a whole parquet file"):
        Plan.load(tmp_path / "plan.parquet")
    with pytest.raises(DataError, match=r"nothing\.parquet is missing"):
        Plan.load(tmp_path / "nothing.parquet")
