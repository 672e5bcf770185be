# SPDX-License-Identifier: Apache-2.0
"""Random files: for each, the landmark is where it belongs, or the problem is named, or the scan is marked."""

import csv
import gzip
import io
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import tiny_datasets as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volta_components.data.layouts import LayoutOptions, reader
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.spreadsheets import read_table
from volta_components.data.unusable import UnusableVolume, UnusableVoxels
from volta_components.data.volumes import Volume, read_volume
from volta_components.errors import InputError

SETTINGS = Settings(shape=(30, 32, 34))
# The same examples in every run, and no limit on one of them: machines differ.
PROPERTY = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BAD = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0, 0.5, 1e30])
CODES = st.sampled_from(["RAS", "LPS", "LAS", "PIR", "ASL", "SRP", "IAL"])


def landmark(image, affine):
    """World coordinate of the bright spot of a prepared volume."""
    near = tiny.world(image.shape, affine)
    peak = near[np.unravel_index(np.argmax(image), image.shape)]
    if not image.max() > 0.6:
        return np.full(3, np.inf)
    weight = np.where(np.linalg.norm(near - peak, axis=-1) < 6, np.clip(image - 0.6, 0, None), 0)
    return (near * weight[..., None]).sum((0, 1, 2)) / weight.sum()


def outcome(path, assume_orientation=None):
    """``named``, ``marked``, ``right`` or ``wrong``; any other exception ends the test."""
    try:
        done = prepare_volume(read_volume(path, assume_orientation), SETTINGS)
    except (UnusableVolume, UnusableVoxels) as error:
        assert error.reason and error.remedy and "\n" not in error.reason
        return "named"
    if np.linalg.norm(landmark(done.image, done.affine) - tiny.LANDMARK) < 1:
        return "right"
    return "marked" if done.warnings else "wrong"


def fields(**values):
    return st.fixed_dictionaries(values)


# What tools write wrong, a group of fields at a time. Nothing here changes what the scan is, so it has one landmark.
FAULTS = st.one_of(
    fields(qfac=BAD),
    fields(scl_slope=BAD, scl_inter=BAD),
    fields(scl_slope=st.floats(2**-10, 2**10, width=32), scl_inter=BAD),
    fields(vox_offset=st.one_of(BAD, st.integers(-400, 1000).map(float), st.just(1e9))),
    fields(axes=st.integers(-2, 9), rest=st.lists(st.integers(-1, 3), min_size=4, max_size=4)),
    fields(dim=st.lists(st.integers(-3, 40), min_size=3, max_size=3)),
    fields(bitpix=st.sampled_from([0, 1, 8, 16, 24, 32, 64, -16])),
    fields(datatype=st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2304, 77])),
    fields(sizeof_hdr=st.integers(-(2**31), 2**31 - 1)),
    fields(intent_code=st.sampled_from([0, 2, 1002, 1005, 1007, 2001, 2003, 3003])),
    fields(xyzt_units=st.integers(0, 127)),
    fields(sform_code=st.integers(-3, 300), qform_code=st.integers(-3, 300)),
    fields(sform_code=st.just(0), qform_code=st.just(0)),
    fields(srow_x=st.lists(BAD, min_size=4, max_size=4)),
    fields(srow_x=st.just([0.0] * 4), srow_y=st.just([0.0] * 4), srow_z=st.just([0.0] * 4)),
    fields(quatern_b=BAD, quatern_c=BAD),
    fields(qoffset_x=st.one_of(BAD, st.floats(-300, 300, width=32))),
    fields(pixdim=st.lists(BAD, min_size=3, max_size=3)),
    fields(magic=st.sampled_from([b"ni1", b"n+1", b"n+2", b"", b"xyz"])),
)


def apply(header, faults):
    for name, value in faults.items():
        if name == "qfac":
            header["pixdim"] = [value, *header["pixdim"][1:]]
        elif name == "pixdim":
            header["pixdim"] = [header["pixdim"][0], *value, *header["pixdim"][4:]]
        elif name == "axes":
            header["dim"] = [value, *header["dim"][1:]]
        elif name == "rest":
            header["dim"] = [*header["dim"][:4], *value]
        elif name == "dim":
            header["dim"] = [header["dim"][0], *value, *header["dim"][4:]]
        elif name == "magic" and isinstance(header, nib.Nifti2Header):
            header["magic"] = value
        else:
            header[name] = value


def write(folder, codes, dtype, order, version, faults):
    """One head in a file, with faults in its header."""
    shape, affine = tiny.grid(codes, (0.9, 1.0, 1.2), turn=tiny.rotation(4, -6, 9))
    kind = nib.Nifti2Image if version == 2 else nib.Nifti1Image
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(np.round(tiny.head(shape, affine)).astype(dtype), affine, header)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    path = Path(folder) / "scan.nii"
    image.to_filename(path)
    data = bytearray(path.read_bytes())
    size = kind.header_class.template_dtype.itemsize
    edited = kind.header_class(bytes(data[:size]), endianness=order, check=False)
    with np.errstate(all="ignore"):
        apply(edited, faults)
    data[:size] = edited.binaryblock
    path.write_bytes(data)
    return path


FILES = {
    "codes": CODES,
    "dtype": st.sampled_from([np.int16, np.uint16, np.int32, np.float32, np.float64]),
    "order": st.sampled_from("<>"),
    "version": st.sampled_from([1, 1, 1, 2]),
}


@PROPERTY
@given(**FILES)
def test_a_sound_file_is_right_and_unmarked(tmp_path, codes, dtype, order, version):
    path = write(tmp_path, codes, dtype, order, version, {})
    done = prepare_volume(read_volume(path), SETTINGS)
    assert done.warnings == [] and outcome(path) == "right"


@PROPERTY
@given(**FILES, faults=FAULTS, more=FAULTS, twice=st.booleans(), packed=st.sampled_from(["", "scan.nii.gz", "b.nii"]))
def test_no_header_is_read_wrong_without_a_word(tmp_path, codes, dtype, order, version, faults, more, twice, packed):
    path = write(tmp_path, codes, dtype, order, version, {**faults, **(more if twice else {})})
    if packed:
        content = gzip.compress(path.read_bytes(), compresslevel=1)
        path = path.with_name(packed)
        path.write_bytes(content)
    assert outcome(path) != "wrong"


@PROPERTY
@given(codes=CODES, kind=st.sampled_from(["analyze", "spm", "pair"]), faults=FAULTS, assume=st.booleans())
def test_no_pair_is_read_wrong_without_a_word(tmp_path, codes, kind, faults, assume):
    shape, affine = tiny.grid(codes, centre=(0, 0, 0))  # where an assumed orientation has the centre
    image_class = {"analyze": nib.AnalyzeImage, "spm": nib.Spm2AnalyzeImage, "pair": nib.Nifti1Pair}[kind]
    image = image_class(np.round(tiny.head(shape, affine)).astype(np.int16), affine if kind == "pair" else None)
    if kind == "pair":
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
    image.to_filename(tmp_path / "scan.img")
    (tmp_path / "scan.mat").unlink(missing_ok=True)
    hdr = tmp_path / "scan.hdr"
    header = nib.Nifti1Header(hdr.read_bytes()[:348], endianness="<", check=False)
    with np.errstate(all="ignore"):
        apply(header, faults)
    hdr.write_bytes(header.binaryblock)
    result = outcome(tmp_path / "scan.img", codes if assume else None)
    if kind != "pair" and not assume:
        assert result == "named"
    assert result != "wrong"


@PROPERTY
@given(cut=st.integers(0, 40000), added=st.binary(max_size=40), at=st.integers(0, 40000), byte=st.integers(1, 255),
       packed=st.booleans())  # fmt: skip
def test_no_damage_to_the_bytes_raises_anything_else(tmp_path, cut, added, at, byte, packed):
    path = write(tmp_path, "LPS", np.int16, "<", 1, {})
    data = bytearray(gzip.compress(path.read_bytes(), compresslevel=1) if packed else path.read_bytes())
    data[at % len(data)] ^= byte
    path = tmp_path / ("scan.nii.gz" if packed else "scan.nii")
    path.write_bytes(bytes(data[: len(data) - cut % len(data)] if cut % 2 else data) + added)
    outcome(path)  # one byte of an affine may lie without a sign of it; whatever it is, nothing else is raised


# --- voxels ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    padding=st.one_of(st.none(), st.sampled_from([-1, -300, -2000, -32768, 5000, 32767])),
    spikes=st.integers(0, 5),
    noise=st.sampled_from([0, 0, 300, 2000]),
    codes=CODES,
)
def test_no_background_hides_the_head_without_a_word(padding, spikes, noise, codes):
    shape, affine = tiny.grid(codes, centre=(0, 0, 0))
    voxels = tiny.head(shape, affine)
    rng = np.random.default_rng(spikes)
    far = np.linalg.norm(tiny.world(shape, affine) / [12, 13, 14], axis=-1) > 1.15
    if noise:
        voxels = np.where(far, rng.uniform(0, noise, shape), voxels)
    if padding is not None:
        voxels = np.where(far, padding, voxels)
    at = np.flatnonzero(far)
    voxels.ravel()[rng.choice(at, spikes)] = 1e6
    volume = Volume(np.asfortranarray(voxels.astype(np.float32)), affine, 1.0, 0.0, 1)
    try:
        done = prepare_volume(volume, SETTINGS)
    except UnusableVoxels:
        return
    assert done.warnings or np.linalg.norm(landmark(done.image, done.affine) - tiny.LANDMARK) < 1


# --- names and tables ------------------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abXY09éß _-.+()[]#%&'"), min_size=1, max_size=8)
NAMES = st.builds(
    lambda *parts: "".join(parts).strip() or "x",
    st.sampled_from(["", "sub-", "IXI", "._", "."]),
    WORDS,
    st.sampled_from(["", "_ses-1", "_ses-M006", "_run-1", "_run-2", "_T1w", "_dseg", "_label", " (1)"]),
    st.sampled_from([".nii", ".nii.gz", ".NII", ".mgz", ".txt", ""]),
)


@PROPERTY
@given(names=st.lists(NAMES, min_size=1, max_size=8, unique_by=str.lower))
def test_no_file_of_a_folder_is_lost_without_a_word(names):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "scans"
        root.mkdir()
        for name in names:
            (root / name).write_bytes(b"content")
        try:
            listing = reader("folder")(LayoutOptions(source=root, sessions=("all",)))
        except InputError:
            return
        scans = {scan.source for scan in listing.scans}
        named = scans | {finding.file for finding in listing.findings}
        named |= {label.path.name for scan in listing.scans for label in scan.labels}
        volumes = {name for name in names if name.lower().endswith((".nii", ".nii.gz", ".mgz")) and name[0] != "."}
        assert volumes <= named
        assert len({scan.key for scan in listing.scans}) == len(listing.scans)


CELLS = st.text(st.sampled_from("abZ059 éüß'\"-/+"), max_size=6).map(str.strip)


@PROPERTY
@given(
    rows=st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"]),
)
def test_no_table_is_read_wrong(rows, delimiter, end, encoding):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end)
    writer.writerow(["participant_id", "sex", "age"])
    rows = [[f"p{number}", *cells[1:]] for number, cells in enumerate(rows)]
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(stream.getvalue().encode(encoding))
        try:
            read = read_table(path)
        except InputError:
            return
    assert [[row["participant_id"], row["sex"], row["age"]] for row in read] == rows
