"""Pieces of HTML, which hold pictures of any size."""

import base64
import io

import pytest
from PIL import Image

from ddkit.runtime.html import data_uri


@pytest.mark.parametrize(("size", "shown"), [((9, 16383), (9, 16383)), ((100, 32766), (50, 16383)), ((20000, 2), (16383, 2))])
def test_picture_beyond_what_webp_holds_is_made_smaller(size, shown):
    picture = Image.new("L", size)
    kind, _, data = data_uri(picture).partition(",")
    assert kind == "data:image/webp;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == shown
    assert picture.size == size
