# SPDX-License-Identifier: Apache-2.0
import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from volta_components.data.cuts import FACES
from volta_components.data.labels import SIDE_COLOURS
from volta_components.data.quality import (
    THUMBNAIL,
    find_marks,
    thumbnail,
    write_contact_sheets,
    write_page,
    write_table,
)


def row(**changes):
    return {
        "spacing": "1x1x1",
        "oblique_degrees": 0.0,
        "foreground_fraction": 0.3,
        "mean": 0.5,
        "snr": 20.0,
        **{f"cut_{side}": 0.0 for side in FACES},
        "warnings": [],
        **changes,
    }


def test_thumbnail_shows_three_views_the_right_way_up():
    image = np.zeros((20, 30, 40))
    image[:, :, 30:] = 1  # the upper quarter
    label = np.zeros(image.shape, np.uint8)
    label[4, 14, 18], label[6, 16, 22] = 1, 2
    picture = np.asarray(Image.open(io.BytesIO(thumbnail(image)))).astype(int)
    assert picture.shape == (THUMBNAIL, 3 * THUMBNAIL, 3)
    sagittal = picture[:, :THUMBNAIL, 0]
    assert sagittal[: THUMBNAIL // 5, THUMBNAIL // 2].min() > 200 and sagittal[THUMBNAIL // 2 :].max() == 0
    coloured = np.asarray(Image.open(io.BytesIO(thumbnail(image, label * 0 + (image > 0))))).astype(int)
    assert (np.abs(coloured[..., 0] - coloured[..., 2]) > 50).any()
    assert thumbnail(image) == thumbnail(image)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"cut_top": 0.02}, "2.0 % of the foreground cut at the top"),
        ({"cut_bottom": 0.2}, None),
        ({"cut_bottom": 0.6}, "60 % of the foreground cut at the bottom"),
        ({"spacing": "1x1x5"}, "coarse source"),
        ({"oblique_degrees": 33.0}, "oblique by 33 degrees"),
        ({"foreground_fraction": 0.01}, "fills only 1.0 %"),
        ({"warnings": ["dcm2niix: missing slices"]}, "missing slices"),
    ],
)
def test_marks_beyond_a_limit(changes, expected):
    (marks,) = find_marks([row(**changes)])
    assert (marks == []) if expected is None else (len(marks) == 1 and expected in marks[0])


def test_outliers_are_told_from_the_rest_of_the_data_set(rng):
    rows = [row(snr=float(s)) for s in rng.normal(20, 2, 40)]
    assert not any(find_marks(rows))
    rows[7]["snr"] = 60.0
    rows[9]["snr"] = None
    marks = find_marks(rows)
    assert [i for i, found in enumerate(marks) if found] == [7] and "snr 60 is far from the median" in marks[7][0]
    assert not any(find_marks(rows[:9]))  # too few to tell


def test_contact_sheets_hold_all_and_frame_the_marked(tmp_path):
    (tmp_path / "t.png").write_bytes(thumbnail(np.full((8, 8, 8), 0.5)))
    entries = [(f"sub-{i}", tmp_path / "t.png", i == 1) for i in range(103)]
    paths = write_contact_sheets(tmp_path, entries)
    assert [path.name for path in paths] == ["contact_sheet.png", "contact_sheet_02.png"]
    sheet = np.asarray(Image.open(paths[0])).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 100)
    width = 3 * THUMBNAIL + 8
    assert red[:, width : 2 * width].sum() > 100 and red[:, :width].sum() == 0


def test_table_is_plain_csv(tmp_path):
    write_table(tmp_path / "q.csv", [{"subject_id": 'a "b", c', "marks": ["x", "y"], "snr": None}])
    with (tmp_path / "q.csv").open(newline="") as stream:
        (found,) = csv.DictReader(stream)
    assert found["subject_id"] == 'a "b", c' and found["marks"] == "x; y" and found["snr"] == ""


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.links, self.stack, self.buttons = 0, [], [], 0

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.buttons += tag == "button"
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_page_has_a_row_a_subject_and_needs_no_network(tmp_path):
    rows = [
        {
            **row(),
            "subject_id": f"<b>{i}",
            "key": f"s{i}",
            "marks": ["odd & bad"] if i else [],
            "snr": 20.5,
            "sex": None,
        }
        for i in range(3)
    ]
    finding = {"kind": "quirk", "subject": "s1", "file": "f", "reason": "<r>", "remedy": "", "left_out": True}
    write_page(tmp_path / "index.html", "tiny", ["3 scans"], rows, [finding])
    text = (tmp_path / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == [] and page.rows == 3 + 1 + 1 + 1
    assert page.links == ["thumbnails/s0.png", "thumbnails/s1.png", "thumbnails/s2.png"]
    assert "http" not in text and "&lt;b&gt;1" in text and "<b>" not in text and "odd &amp; bad" in text
    assert page.buttons > 8 and 'data-v="20.5"' in text


def test_page_writes_each_kind_of_value_and_escapes_names(tmp_path):
    values = {
        "subject_id": "s",
        "key": '"s"<',
        "marks": ["a<b", "c"],
        "stripped": True,
        "high": 1234567.5,
        "age": None,
        "label_volume_mm3": {"left": 3000.25, "<right>": 2.0},
    }
    write_page(tmp_path / "index.html", "A & B", [], [{**row(), **values}, {**row(), **values, "age": 7}], [])
    text = (tmp_path / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == [] and page.links == ['thumbnails/"s"<.png'] * 2
    for cell in (
        '<td data-v="2">a&lt;b<br>c</td>',
        "<td data-more>yes</td>",
        '<td data-more class="n" data-v="1234567.5">1.23457e+06</td>',
        "<td data-more>left: 3000.25, &lt;right&gt;: 2</td>",
    ):
        assert text.count(cell) == 2
    assert "<td data-more></td>" in text and '<td data-more class="n" data-v="7">7</td>' in text
    assert "A &amp; B" in text and "Findings" not in text and "more than 0.5 % of the head" in text


def test_what_one_looks_for_comes_first_and_the_rest_on_demand(tmp_path):
    volumes = [
        {**row(cut=0.01, mean=0.4), "subject_id": f"s{i}", "key": f"s{i}", "marks": ["odd"] * i} for i in range(3)
    ]
    write_page(tmp_path / "index.html", "tiny", [], volumes, [])
    text = (tmp_path / "index.html").read_text()
    head = re.findall(r'<th scope="col"( data-more)?><button [^>]*>(.*?)</button>', text)
    assert [name for more, name in head if not more] == ["subject id", "marks", "cut", "snr"]
    assert {"spacing", "mean", "cut left"} <= {name for more, name in head if more}
    assert "only the 2 marked" in text and '<meta name="viewport"' in text
    for colour in SIDE_COLOURS.values():
        assert f"background: {colour}" in text
