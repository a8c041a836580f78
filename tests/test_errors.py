"""Words that messages share."""

import pytest

from ddkit.errors import first_few


@pytest.mark.parametrize(
    ("count", "options", "text"),
    [
        (0, {}, ""),
        (2, {}, "0, 1"),
        (4, {}, "0, 1 and 2 more"),
        (4, {"joint": "; "}, "0; 1; and 2 more"),
        (4, {"joint": "; ", "kind": "block"}, "0; 1; and 2 more blocks"),
        (3, {"joint": "; ", "kind": "block"}, "0; 1; and 1 more block"),
    ],
)
def test_first_few_of_a_longer_list_says_how_many_are_left_out(count, options, text):
    assert first_few([str(number) for number in range(count)], 2, **options) == text
