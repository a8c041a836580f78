"""Pickles are read instruction by instruction and never run."""

import collections
import os
import pickle

import pytest

from ddkit.sets.pickles import scan_pickle


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("never-made",)


def test_every_way_to_name_code_in_a_pickle_is_found():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        facts = scan_pickle(pickle.dumps(Hostile(), protocol=protocol))
        assert any(name.endswith(" mkdir") for name in facts.foreign), protocol
    assert scan_pickle(b"(ios\nsystem\n.").foreign == {"os system"}


def test_what_a_checkpoint_holds_is_no_bomb():
    shared = "weight"
    values = [{shared: (1, 2, 3), "nested": [{shared: k} for k in range(200)]}, collections.OrderedDict(a=1), [[]] * 500]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        scan_pickle(pickle.dumps(values, protocol=protocol))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_unfolds_into_far_more_than_it_holds_is_refused(protocol):
    folded = (1, 1)
    for _ in range(60):
        folded = (folded, folded)
    pickled = pickle.dumps(folded, protocol=protocol)
    assert len(pickled) < 2000
    with pytest.raises(ValueError, match="unfolds"):
        scan_pickle(pickled)
