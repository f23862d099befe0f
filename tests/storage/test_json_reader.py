"""JSON of strangers: what no honest file holds is refused with one ValueError."""

import pytest

from scalabl_pyro.storage import json_reader


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r'{"name": "\ud800"}', "half of a character"),
        (r'{"\uDFFF": 1}', "half of a character"),
        (r'[["a", {"b": ["\udc80x"]}]]', "half of a character"),
        ("[1e400]", "too large for 64 bits"),
        ('{"lr": -1e999999999}', "too large for 64 bits"),
        ('{"a": 1, "\\u0061": 2}', "stands twice"),
        ("[" * 10**5 + "]" * 10**5, "nested deeper"),
        ("1" * 10**5, "digits"),
    ],
)
def test_what_no_honest_file_holds_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        json_reader.loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"\ud83d\ude00"', "\U0001f600"),  # both halves of one character
        (r'{"path": "C:\\udata"}', {"path": "C:\\udata"}),  # not an escape
        ("[1e308, -2.5, 3]", [1e308, -2.5, 3]),
    ],
)
def test_honest_texts_and_numbers_are_read(text, value):
    assert json_reader.loads(text) == value
