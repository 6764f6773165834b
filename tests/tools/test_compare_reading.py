"""The comparison of reading compares equal reads."""


def test_both_ways_read_the_same_entries(tool):
    found = tool("compare_reading").measure(entries=30, shard_size=7, reads=20, runs=3)
    assert {len(rates) for rates in found["rates"].values()} == {3}
    assert found["ratio"] == found["medians"]["store[i]"] / found["medians"]["reopened"] > 0
