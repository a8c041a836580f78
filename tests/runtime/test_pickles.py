"""Pickles are read as they are, and nothing that they name is imported or called."""

import collections
import os
import pickle

import pytest

from ddkit.runtime.pickles import Call, read_pickle


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("never-made",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_value_is_read_as_pickle_reads_it(protocol):
    value = [1, -1, 1 << 80, 2.5, "text", b"bytes", None, True, False, (), (1,), (1, 2, 3, 4), [[]] * 3, {"a": {1: 2}}]
    assert read_pickle(pickle.dumps(value, protocol=protocol))[0] == value


def test_every_way_to_name_code_in_a_pickle_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        value, names = read_pickle(pickle.dumps(Hostile(), protocol=protocol))
        assert isinstance(value, Call) and value.name == "mkdir" and value.arguments == ("never-made",)
        assert (os.mkdir.__module__, "mkdir") in names, protocol
    assert read_pickle(b"(ios\nsystem\n.")[1] == {("os", "system")}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [collections.OrderedDict(a=1), collections.defaultdict(int, a=1)])
def test_entries_of_other_dicts_are_kept(value):
    assert read_pickle(pickle.dumps(value))[0].entries == {"a": 1}


def test_an_object_keeps_the_state_that_it_would_be_given():
    from argparse import Namespace

    assert read_pickle(pickle.dumps(Namespace(ipc=10)))[0].state == {"ipc": 10}


@pytest.mark.parametrize("data", [b"", b"text", b"\x80\x04K\x01", b"\x80\x04]R.", b"\x80\x04cos\nsystem\nK\x01b."])
def test_damage_is_a_value_error(data):
    with pytest.raises(ValueError, match="its pickle is damaged"):
        read_pickle(data)


def test_a_large_number_of_a_memo_takes_no_memory():
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.")[0] is None
