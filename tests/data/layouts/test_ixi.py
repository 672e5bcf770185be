# SPDX-License-Identifier: Apache-2.0
import pytest

from volta_components.data.layouts.common import LayoutOptions
from volta_components.data.layouts.ixi import read
from volta_components.errors import InputError

TABLE = "IXI_ID,SEX_ID (1=m),AGE\n2,2,35\n"


def ages(root, **tables):
    (root / "IXI-T1").mkdir()
    (root / "IXI-T1/IXI002-Guys-0828-T1.nii.gz").touch()
    for name, text in tables.items():
        (root / name.replace("__", "/")).with_suffix(".csv").write_text(text)
    return [scan.age for scan in read(LayoutOptions(root)).scans]


@pytest.mark.parametrize("name", ["IXI", "IXI_mine", "IXI-T1__IXI"])
def test_ixis_table_comes_before_other_tables(tmp_path, name):
    others = {"IXI-T1__IXI_my_qc": "ID,rating\n2,good\n"} if name == "IXI" else {}
    assert ages(tmp_path, **{name: TABLE}, **others) == [35]


def test_two_tables_that_may_be_ixis_are_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"which of IXI_a\.csv, IXI_b\.csv is IXI's table is not known; give it as --table"
    ):
        ages(tmp_path, IXI_a=TABLE, IXI_b=TABLE)


def test_a_row_without_an_id_is_named_and_the_sex_read_from_usual_columns(tmp_path):
    (tmp_path / "IXI002-Guys-0828-T1.nii.gz").touch()
    (tmp_path / "IXI.csv").write_text("IXI_ID,Gender,AGE\n,2,50\n2,Female,35\n")
    listing = read(LayoutOptions(tmp_path))
    assert [(scan.sex, scan.age) for scan in listing.scans] == [("F", 35)]
    assert [f.reason for f in listing.findings] == ["a row without an id (Gender 2, AGE 50)"]
