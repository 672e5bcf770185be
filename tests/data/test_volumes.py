# SPDX-License-Identifier: Apache-2.0
import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from broken_volumes import BROKEN, SHAPE, edit, good, pixdim, ramp

from volta_components.data.survey import survey
from volta_components.data.unusable import UnusableVolume, UnusableVoxels
from volta_components.data.volumes import read_header, read_volume, volume_stem


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_file_is_named_with_a_remedy(tmp_path, kind):
    make, message = BROKEN[kind]
    path = make(tmp_path)
    with pytest.raises((UnusableVolume, UnusableVoxels), match=message) as caught:
        survey(read_volume(path))
    assert len(caught.value.remedy) > 10
    if isinstance(caught.value, UnusableVolume):
        assert str(caught.value).startswith(f"{path}: ")


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


@pytest.mark.parametrize(
    ("name", "stem"), [("a_T1w.nii.gz", "a_T1w"), ("x/T1.MGZ", "T1"), ("a.b.img.gz", "a.b"), ("notes.txt", "notes.txt")]
)
def test_a_volume_is_called_by_its_name_without_the_format(name, stem):
    assert volume_stem(Path(name)) == stem
