"""A table is a dict, and its views are that dict as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.core.table import Table, TrackedTable

KEYS = st.text("abcdefgh", min_size=1, max_size=2)
STEPS = st.lists(st.tuples(st.sampled_from(["set", "delete", "view"]), KEYS, st.integers()), max_size=200)


@given(STEPS)
def test_it_does_what_a_dict_does_and_no_view_ever_changes(steps):
    table, model = Table(), {}
    views = []
    for step, key, value in steps:
        if step == "set":
            table[key] = model[key] = value
        elif step == "delete":
            assert table.pop(key, None) == model.pop(key, None)
        else:
            views.append((table.view(), dict(model)))
        assert (len(table), table.get(key), key in table) == (len(model), model.get(key), key in model)
    assert table == model
    assert list(table) == sorted(model)
    for view, as_it_was in views:
        assert (dict(view), len(view), list(view)) == (as_it_was, len(as_it_was), sorted(as_it_was))


@given(STEPS)
def test_a_tracked_one_tells_what_has_changed_and_what_was_there_before(steps):
    table, model, since = TrackedTable({"a": 0}), {"a": 0}, {}
    assert table.changes() == {"a": None}
    for step, key, value in steps:
        if step == "set":
            since.setdefault(key, model.get(key))
            table[key] = model[key] = value
        elif step == "delete" and key in model:
            since.setdefault(key, model[key])
            del table[key], model[key]
        elif step == "view":
            assert table.changes() == since
            since = {}
    assert table.changes() == since
    assert table.changes() == {}


def test_what_is_not_there_cannot_be_deleted():
    for table in (Table({"a": 1}), TrackedTable({"a": 1})):
        with pytest.raises(KeyError):
            del table["b"]
        assert dict(table) == {"a": 1}


def test_an_unchanged_table_gives_the_same_view():
    table = Table({"a": 1})
    assert table.view() is table.view()
