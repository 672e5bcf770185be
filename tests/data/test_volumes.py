# SPDX-License-Identifier: Apache-2.0
import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny

from volta_components.data.preprocess import UnusableVoxels, survey
from volta_components.data.volumes import UnusableVolume, read_header, read_volume

SHAPE = (9, 10, 11)


def ramp(dtype=np.int16, shape=SHAPE):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def good(path, dtype=np.int16, voxels=None):
    shape, affine = tiny.grid("LPS", (0.94, 0.94, 1.2), SHAPE)
    return tiny.save(path, ramp(dtype, shape) if voxels is None else voxels, affine, dtype)


def edit(path, **fields):
    """Write fields into the header of a plain NIfTI file, whatever NiBabel thinks of them."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


def pixdim(path, *spacing):
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    values = header["pixdim"].copy()
    values[1:4] = spacing
    return edit(path, pixdim=values)


def dimensions(path, *dim):
    return edit(path, dim=list(dim) + [1] * (8 - len(dim)))


def write(path, content):
    path.write_bytes(content)
    return path


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the checksum
    return write(path, bytes(data))


def with_values(path, count, value):
    voxels = ramp(np.float32, tiny.grid("LPS", shape=SHAPE)[0])
    voxels.ravel()[:count] = value
    return good(path, np.float32, voxels)


def four_d(path, n):
    image = nib.Nifti1Image(
        np.zeros((*SHAPE, n), np.int16) + np.arange(9)[:, None, None, None].astype(np.int16), np.eye(4)
    )
    image.to_filename(path)
    return path


def typed(path, dtype):
    voxels = np.zeros(SHAPE, dtype)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)
    return path


BROKEN = {
    "missing": (lambda d: d / "a.nii", "no such file"),
    "folder": (lambda d: (d / "a.nii").mkdir() or d / "a.nii", "a folder, not a file"),
    "dangling link": (lambda d: (d / "a.nii").symlink_to(d / "gone.nii") or d / "a.nii", "no such file"),
    "zero bytes": (lambda d: write(d / "a.nii.gz", b""), r"empty file \(0 bytes\)"),
    "a few bytes": (lambda d: write(d / "a.nii", b"abc"), "truncated: 3 bytes, less than a NIfTI header"),
    "html instead of an image": (lambda d: write(d / "a.nii.gz", b"<html>login</html>" * 50), "wrong magic number"),
    "wrong magic": (lambda d: edit(good(d / "a.nii"), magic=b"xyz"), "wrong magic number"),
    "truncated": (
        lambda d: write(d / "a.nii", good(d / "b.nii").read_bytes()[:1500]),
        r"truncated: 0\.0015 of 0\.0023 MB",
    ),
    "truncated gzip": (lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:-300]), "truncated"),
    "gzip cut in the header": (lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:40]), "truncated"),
    "gzip of too little": (
        lambda d: write(d / "a.nii.gz", gzip.compress(good(d / "b.nii").read_bytes()[:1500])),
        r"truncated: 0\.0015 of 0\.0023 MB",
    ),
    "wrong checksum": (lambda d: flip_byte(good(d / "a.nii.gz")), "damaged gzip stream"),
    "damaged gzip": (
        lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:60] + b"\xff" * 400),
        "damaged gzip|truncated",
    ),
    "NaN": (lambda d: with_values(d / "a.nii", 7, np.nan), r"contains NaN \(7 voxels\)"),
    "Inf": (lambda d: with_values(d / "a.nii.gz", 3, -np.inf), r"contains Inf \(3 voxels\)"),
    "constant": (
        lambda d: good(d / "a.nii", voxels=np.full(tiny.grid("LPS", shape=SHAPE)[0], 5)),
        "constant: every voxel is 5",
    ),
    "4-D": (lambda d: four_d(d / "a.nii", 3), r"4-D \(9x10x11x3\)"),
    "2-D": (lambda d: dimensions(good(d / "a.nii"), 2, 9, 10), "2-D"),
    "a single slice": (lambda d: dimensions(good(d / "a.nii"), 3, 9, 10, 1), "not a volume: 9x10x1"),
    "huge": (lambda d: dimensions(good(d / "a.nii"), 3, 30000, 30000, 3000), "huge: 30000x30000x3000"),
    "impossible dimensions": (lambda d: dimensions(good(d / "a.nii"), 3, -4, 10, 11), "impossible dimensions"),
    "negative spacing": (lambda d: pixdim(good(d / "a.nii"), 1, -1, 1), "negative spacing 1 x -1 x 1 mm"),
    "zero spacing": (lambda d: pixdim(good(d / "a.nii"), 1, 0, 1), "zero spacing 1 x 0 x 1 mm"),
    "spacing NaN": (lambda d: pixdim(good(d / "a.nii"), 1, np.nan, 1), "not finite spacing"),
    "spacing in metres": (
        lambda d: edit(good(d / "a.nii"), srow_x=[0.001, 0, 0, 0], srow_y=[0, 0.001, 0, 0], srow_z=[0, 0, 0.001, 0]),
        "implausible spacing 0.001 x 0.001 x 0.001 mm",
    ),
    "singular affine": (
        lambda d: edit(good(d / "a.nii"), srow_x=[1, 0, 0, 0], srow_y=[1, 0, 0, 0], srow_z=[0, 0, 1, 0]),
        "singular affine",
    ),
    "zero affine": (
        lambda d: edit(good(d / "a.nii"), srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4),
        "singular affine",
    ),
    "affine NaN": (lambda d: edit(good(d / "a.nii"), srow_x=[np.nan, 0, 0, 0]), "affine with NaN"),
    "no sform and no qform": (lambda d: edit(good(d / "a.nii"), sform_code=0, qform_code=0), "no orientation"),
    "colour": (lambda d: typed(d / "a.nii", [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour, complex"),
    "complex": (lambda d: typed(d / "a.nii", np.complex64), "colour, complex"),
    "unknown type": (lambda d: edit(good(d / "a.nii"), datatype=77), "unknown voxel type 77"),
    "inverted scale": (lambda d: edit(good(d / "a.nii"), scl_slope=-1.0, scl_inter=0.0), "negative scale factor"),
    "broken MINC": (lambda d: write(d / "a.mnc", b"CDF\x01 nothing more"), "damaged header|not a volume file"),
    "empty MINC": (lambda d: write(d / "a.mnc", b""), "empty file"),
    "no MGH": (lambda d: write(d / "a.mgz", gzip.compress(b"no")), "damaged header|not a volume file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_file_is_named_with_a_remedy(tmp_path, kind):
    make, message = BROKEN[kind]
    path = make(tmp_path)
    with pytest.raises((UnusableVolume, UnusableVoxels), match=message) as caught:
        survey(read_volume(path))
    assert len(caught.value.remedy) > 10
    if isinstance(caught.value, UnusableVolume):
        assert str(caught.value).startswith(f"{path}: ")


def test_there_are_more_than_25_kinds():
    assert len(BROKEN) > 25


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), MemoryError()])
def test_errors_of_the_system_are_named(tmp_path, monkeypatch, error):
    path = good(tmp_path / "a.nii.gz")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(gzip, "open", refuse)
    with pytest.raises(
        UnusableVolume, match="permission denied" if isinstance(error, OSError) else "not fit in memory"
    ):
        read_volume(path)


def test_an_error_survives_the_way_from_a_worker(tmp_path):
    import pickle

    error = pickle.loads(pickle.dumps(UnusableVolume(tmp_path / "a.nii", "empty", "fetch it again")))
    assert (error.reason, error.remedy, str(error)) == (
        "empty",
        "fetch it again",
        f"{tmp_path}/a.nii: empty; fetch it again",
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", ">f4", "float64"])
def test_good_files_are_read_as_nibabel_reads_them(tmp_path, suffix, dtype):
    shape, affine = tiny.grid("PIR", (0.94, 0.94, 1.2), SHAPE, tiny.rotation(5, 9, -4))
    voxels = ramp(np.dtype(dtype).newbyteorder("="), shape) % 251
    image = nib.Nifti1Image(voxels, affine, nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"))
    image.header.set_data_dtype(np.dtype(dtype).newbyteorder("="))
    image.to_filename(tmp_path / f"a{suffix}")
    mine, theirs = read_volume(tmp_path / f"a{suffix}"), nib.load(tmp_path / f"a{suffix}")
    assert mine.voxels.dtype.isnative and mine.voxels.dtype.itemsize == np.dtype(dtype).itemsize
    assert np.array_equal(mine.voxels, np.asarray(theirs.dataobj))
    assert np.allclose(mine.affine, theirs.affine)


def test_scale_factors_are_kept_apart_from_the_voxels(tmp_path):
    path = edit(good(tmp_path / "a.nii"), scl_slope=0.5, scl_inter=10.0)
    volume = read_volume(path)
    assert volume.voxels.dtype == np.int16 and (volume.slope, volume.intercept) == (0.5, 10.0)
    assert np.allclose(volume.voxels * volume.slope + volume.intercept, nib.load(path).get_fdata())


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path):
    path = tmp_path / "a.nii"
    nib.Nifti1Image(ramp()[..., None], np.eye(4)).to_filename(path)
    assert np.array_equal(read_volume(path).voxels, ramp())


def test_qform_serves_where_sform_is_missing(tmp_path):
    path = edit(good(tmp_path / "a.nii"), sform_code=0)
    assert np.allclose(read_header(path).affine, nib.load(path).affine, atol=1e-5)


def test_nifti_2_and_pairs_are_read(tmp_path):
    nib.Nifti2Image(ramp(), np.diag([-1, 1, 2, 1])).to_filename(tmp_path / "two.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "two.nii.gz").voxels, ramp())
    nib.Nifti1Pair(ramp(), np.diag([-1, 1, 2, 1])).to_filename(tmp_path / "pair.img")
    assert np.allclose(read_volume(tmp_path / "pair.img").voxels, ramp())


def test_minc_is_read_in_its_own_axis_order(tmp_path):
    shape, affine = tiny.grid("RAS", (1.0, 1.1, 1.2), SHAPE)
    path = tiny.write_minc(tmp_path / "a.mnc", tiny.head(shape, affine), affine)
    volume = read_volume(path)
    assert volume.voxels.shape == shape[::-1]
    at = np.array([[2, 3, 4], [10, 9, 8]])
    expected = nib.affines.apply_affine(affine, at[:, ::-1])
    assert np.allclose(nib.affines.apply_affine(volume.affine, at), expected)
    assert np.allclose(volume.voxels.T, tiny.head(shape, affine), atol=0.02)


def test_assumed_orientation_is_centred(tmp_path):
    path = pixdim(edit(good(tmp_path / "a.nii"), sform_code=0, qform_code=0), 1, 2, 3)
    header = read_header(path, assume_orientation="LPS")
    assert nib.aff2axcodes(header.affine) == ("L", "P", "S")
    centre = nib.affines.apply_affine(header.affine, (np.array(header.shape) - 1) / 2)
    assert np.allclose(centre, 0) and np.allclose(header.spacing, (1, 2, 3))


def test_a_header_costs_no_voxels(tmp_path, monkeypatch):
    path = good(tmp_path / "a.nii")
    reads, real = [], Path.open

    def watched(self, *args, **kwargs):
        stream = real(self, *args, **kwargs)
        read = stream.read
        stream_read = lambda n=-1: reads.append(n) or read(n)  # noqa: E731
        return type(
            "S",
            (),
            {"read": staticmethod(stream_read), "__enter__": lambda s: s, "__exit__": lambda *a: stream.close()},
        )()

    monkeypatch.setattr(Path, "open", watched)
    read_header(path)
    assert max(reads) <= 540
