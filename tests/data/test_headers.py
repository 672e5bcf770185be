# SPDX-License-Identifier: Apache-2.0
"""Headers as tools write them: read right, read with a note, or refused; never read wrong without a word."""

import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from broken_volumes import edit, pixdim

from volta_components.data.geometry import describe_difference
from volta_components.data.headers import read_header
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import read_volume

TURN = tiny.rotation(6, -9, 14)


@pytest.fixture
def head(tmp_path):
    """An oblique head with an int16 ramp of intensities, qform and sform alike."""
    return tiny.save_head(tmp_path / "head.nii", "PIR", (0.9, 1.1, 1.3), turn=TURN)


def landmark(volume):
    """World coordinate of the bright spot of a volume as it was read."""
    voxels = volume.voxels * volume.slope + volume.intercept
    near = tiny.world(voxels.shape, volume.affine)
    peak = near[np.unravel_index(np.argmax(voxels), voxels.shape)]
    weight = np.where(np.linalg.norm(near - peak, axis=-1) < 6, np.clip(voxels - 0.6 * voxels.max(), 0, None), 0)
    return (near * weight[..., None]).sum((0, 1, 2)) / weight.sum()


def assert_right(volume, note=None):
    """The landmark is where it belongs; the one note is the given one."""
    assert np.linalg.norm(landmark(volume) - tiny.LANDMARK) < 0.5
    assert [note in text for text in volume.warnings] == [True] if note else volume.warnings == ()


def packed_copy(path):
    """The same volume, gzip compressed under a name of its own."""
    target = path.with_name("packed.nii.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def pixdim0(path, value):
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    return edit(path, pixdim=[value, *header["pixdim"][1:]])


# --- fields that the standard defines --------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [TURN, None, np.diag([1.0, 1, -1]) @ tiny.rotation(0, 0, 179)])
@pytest.mark.parametrize("value", [0, 0.5, np.nan])
def test_a_qfac_that_is_none_is_one(tmp_path, turn, value):
    path = edit(tiny.save_head(tmp_path / "a.nii", turn=turn), sform_code=0)
    was = nib.load(path).affine
    if nib.load(path).header["pixdim"][0] < 0:
        pixdim0(path, -abs(value) or -0.5)
        assert np.allclose(read_header(path).affine, was, atol=1e-5) or np.isnan(value)
        return
    volume = read_volume(pixdim0(path, value))
    assert np.allclose(volume.affine, was, atol=1e-5)
    assert_right(volume, "pixdim[0] (qfac)")


def test_a_qfac_that_nobody_needs_is_not_mentioned(head):
    assert_right(read_volume(edit(pixdim0(head, 0), qform_code=0)))


def test_half_turns_need_no_fourth_quaternion_component(tmp_path):
    """Rounding makes b^2 + c^2 + d^2 a little more than 1, for which NiBabel raises."""
    path = edit(tiny.save_head(tmp_path / "a.nii", "LPS"), sform_code=0)
    was = nib.load(path).affine
    assert_right(read_volume(edit(path, quatern_d=np.float32(1.0001))))
    assert np.allclose(read_header(path).affine, was, atol=1e-4)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected", "note"),
    [
        (1, np.nan, (1, 0), "scl_inter is nan, taken as 0"),
        (2, np.inf, (2, 0), "scl_inter is inf, taken as 0"),
        (np.nan, np.nan, (1, 0), None),
        (0, 7, (1, 0), None),
        (0, np.nan, (1, 0), None),
        (np.inf, 0, (1, 0), "scl_slope is infinite"),
    ],
)
def test_scale_factors_that_are_no_numbers(head, slope, intercept, expected, note):
    volume = read_volume(edit(head, scl_slope=slope, scl_inter=intercept))
    assert (volume.slope, volume.intercept) == expected
    assert_right(volume, note)


@pytest.mark.parametrize(("unit", "factor", "name"), [(1, 0.001, "metres"), (3, 1000.0, "micrometres")])
def test_units_are_turned_into_mm(head, unit, factor, name):
    image = nib.load(head)
    affine = image.affine.copy()
    affine[:3] *= factor
    scaled = nib.Nifti1Image(np.array(image.dataobj), affine)
    scaled.set_sform(affine, 1)
    scaled.set_qform(affine, 1)
    scaled.header["xyzt_units"] = unit + 8
    scaled.to_filename(head)
    volume = read_volume(head)
    assert_right(volume, f"its unit is {name}")
    assert np.allclose(volume.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize(("unit", "note"), [(1, "which cannot be right: read as mm"), (0, None), (7, None)])
def test_units_that_cannot_be_are_not_believed(head, unit, note):
    assert_right(read_volume(edit(head, xyzt_units=unit)), note)


@pytest.mark.parametrize(("code", "note"), [(200, "a transform of unknown meaning"), (-3, "no such transform")])
def test_codes_that_do_not_exist(head, code, note):
    """A negative sform_code is none, so that the qform counts; NiBabel would take the sform."""
    wrong = nib.load(head).affine @ np.diag([-1.0, 1, 1, 1])
    if code < 0:
        edit(head, srow_x=wrong[0], srow_y=wrong[1], srow_z=wrong[2])
    volume = read_volume(edit(head, sform_code=code))
    assert_right(volume, note)
    assert volume.code == (2 if code > 0 else 1)


def test_an_intent_is_told(head):
    assert_right(read_volume(edit(head, intent_code=1002)), "no scan but label")
    with pytest.raises(UnusableVolume, match="5-D"):
        read_volume(edit(head, intent_code=1007, dim=[5, 8, 8, 8, 1, 3, 1, 1]))


# --- dimensions and length -------------------------------------------------------------------------------------------


def dimensions(path):
    return list(nib.load(path).shape)


def test_further_axes_of_no_length_count_as_one(head):
    volume = read_volume(edit(head, dim=[5, *dimensions(head), 0, 1, 0, 0]))
    assert_right(volume, "axes of no length")


def test_four_volumes_in_a_file_that_says_three_axes(head):
    image = nib.load(head)
    shape = dimensions(head)
    nib.Nifti1Image(np.stack([np.array(image.dataobj)] * 2, -1), image.affine, image.header).to_filename(head)
    edit(head, dim=[3, *shape, 2, 1, 1, 1])
    for path in (head, packed_copy(head)):
        with pytest.raises(UnusableVolume, match=r"2 volumes in one file, although dim.0. says 3-D"):
            read_volume(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_longer_than_its_header_says_is_noted(head, packed):
    shape = dimensions(head)
    path = edit(head, dim=[3, *shape[:2], shape[2] - 1, 1, 1, 1, 1])
    volume = read_volume(packed_copy(path) if packed else path)
    assert "bytes more than its header says" in volume.warnings[0]


@pytest.mark.parametrize("dim", [[0, 24, 26, 28], [9, 24, 26, 28], [3, 24, 0, 28]])
def test_dimensions_that_cannot_be_are_refused(head, dim):
    with pytest.raises(UnusableVolume, match="impossible dimensions"):
        read_volume(edit(head, dim=dim + [1] * (8 - len(dim))))


def test_bits_that_contradict_the_voxel_type(head):
    assert_right(read_volume(edit(head, bitpix=0)), "bitpix is 0, but voxels are int16")
    for path in (head, packed_copy(head)):
        assert_right(read_volume(path), "bitpix is 0, but voxels are int16")
    edit(head, datatype=8, bitpix=16)
    for path in (head, packed_copy(head)):
        with pytest.raises(UnusableVolume, match="int32 of 16 bits"):
            read_volume(path)


def test_a_header_of_the_wrong_size_is_read_by_its_magic(head):
    assert_right(read_volume(edit(head, sizeof_hdr=0)), "sizeof_hdr")


# --- where the voxels begin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 348, 351, -1, np.nan, 352.5])
@pytest.mark.parametrize("packed", [False, True])
def test_voxels_after_the_header_are_found_whatever_it_says(head, offset, packed):
    path = edit(head, vox_offset=offset)
    assert_right(read_volume(packed_copy(path) if packed else path), "voxels were read from byte 352")


def test_voxels_right_after_a_header_without_its_last_four_bytes(head):
    content = edit(head, vox_offset=0).read_bytes()
    head.write_bytes(content[:348] + content[352:])
    assert_right(read_volume(head), "voxels were read from byte 348")


def test_an_offset_that_the_length_does_not_fit_is_refused(head):
    content = edit(head, vox_offset=0).read_bytes()
    head.write_bytes(content + b"more")
    for path in (head, packed_copy(head)):
        with pytest.raises(UnusableVolume, match="vox_offset is 0, before the end of the header"):
            read_volume(path)


@pytest.mark.parametrize("offset", [353, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_an_offset_beyond_the_first_voxel_is_named(head, offset, packed):
    size = head.stat().st_size
    path = edit(head, vox_offset=offset)
    told = f"{size - offset:,} of {size - 352:,} bytes of voxels after vox_offset, which is {offset}"
    with pytest.raises(UnusableVolume, match=told):
        read_volume(packed_copy(path) if packed else path)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("packed", [False, True])
def test_extensions_are_skipped(head, kind, packed):
    image = nib.load(head)
    image = kind(np.array(image.dataobj), image.affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a few words on this scan"))
    image.to_filename(head)
    assert_right(read_volume(packed_copy(head) if packed else head))
    data = bytearray(head.read_bytes())
    start = kind.header_class.template_dtype.itemsize + 4
    field = kind.header_class()
    field["vox_offset"] = start
    at = kind.header_class.template_dtype.fields["vox_offset"]
    data[at[1] : at[1] + at[0].itemsize] = field["vox_offset"].tobytes()
    head.write_bytes(data)
    assert_right(read_volume(packed_copy(head) if packed else head), "within an extension")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_both_byte_orders_of_both_versions(head, order, kind):
    image = nib.load(head)
    kind(np.array(image.dataobj), image.affine, kind.header_class(endianness=order)).to_filename(head)
    volume = read_volume(head)
    assert_right(volume)
    assert volume.voxels.dtype.isnative


@pytest.mark.parametrize("name", ["plain.nii.gz", "packed.nii"])
def test_a_name_that_is_wrong_about_gzip(head, name):
    path = head.with_name(name)
    path.write_bytes(head.read_bytes() if name.startswith("plain") else gzip.compress(head.read_bytes()))
    assert_right(read_volume(path))


# --- qform and sform -------------------------------------------------------------------------------------------------


def with_transforms(path, sform, qform, codes=(1, 1)):
    image = nib.load(path)
    voxels = np.array(image.dataobj)
    made = nib.Nifti1Image(voxels, sform)
    made.set_qform(qform, codes[1])
    made.set_sform(sform, codes[0])
    made.to_filename(path)
    return path


def difference(path):
    (note,) = read_volume(path).warnings
    return note


def test_a_flip_between_qform_and_sform_is_shouted(head):
    affine = nib.load(head).affine
    mirrored = np.diag([-1.0, 1, 1, 1]) @ affine
    note = difference(with_transforms(head, affine, mirrored))
    assert note.startswith("qform (code 1) and sform (code 1) disagree: LEFT/RIGHT FLIP")
    assert note.endswith("the sform was taken")
    assert np.allclose(read_volume(head).affine, affine, atol=1e-5)


def test_a_half_turn_between_them_is_a_flip_too(tmp_path):
    path = tiny.save_head(tmp_path / "a.nii")
    affine = nib.load(path).affine
    assert "LEFT/RIGHT FLIP, 180 degrees" in difference(
        with_transforms(path, affine, np.diag([-1.0, -1, 1, 1]) @ affine)
    )


def test_other_differences_are_told_in_their_units(head):
    affine = nib.load(head).affine
    moved = affine.copy()
    moved[:3, 3] += [0, 90, 0]
    assert "disagree: up to 90.0 mm apart;" in difference(with_transforms(head, affine, moved))
    turn = np.eye(4)
    turn[:3, :3] = tiny.rotation(0, 20, 0)
    note = difference(with_transforms(head, affine, turn @ affine))
    assert "disagree: 20 degrees" in note and "FLIP" not in note
    half = affine @ np.diag([0.5, 0.5, 0.5, 1])
    note = difference(with_transforms(head, half, affine, (2, 1)))
    assert "sform (code 2)" in note and "voxels of 1.1x1.3x0.9 and 0.55x0.65x0.45 mm" in note
    assert "FLIP" not in note and "degrees" not in note


def test_a_sform_of_other_voxel_sizes_than_pixdim(head):
    affine = nib.load(head).affine @ np.diag([0.5, 0.5, 0.5, 1])
    edit(head, srow_x=affine[0], srow_y=affine[1], srow_z=affine[2], qform_code=0)
    assert "pixdim says voxels of" in difference(head)


def test_small_differences_are_not_mentioned(head):
    affine = nib.load(head).affine
    moved = affine.copy()
    moved[:3, 3] += [0.3, -0.3, 0.2]
    assert_right(read_volume(with_transforms(head, affine, moved)))


def test_an_affine_of_voxel_sizes_alone_is_noted(tmp_path):
    nib.Nifti1Image(np.arange(720, dtype=np.int16).reshape(8, 9, 10), np.eye(4)).to_filename(tmp_path / "a.nii")
    assert "the orientation may be made up" in difference(tmp_path / "a.nii")


def test_a_qform_that_is_none_is_told_or_refused(head):
    note = difference(edit(head, quatern_b=np.nan))
    assert note == "qform with NaN or Inf; the sform was taken"
    with pytest.raises(UnusableVolume, match="qform with NaN"):
        read_volume(edit(head, sform_code=0))
    with pytest.raises(UnusableVolume, match="qform without a rotation"):
        read_volume(edit(head, quatern_b=2.0))


def test_a_sform_that_is_none_is_refused_and_the_qform_is_mentioned(head):
    with pytest.raises(UnusableVolume, match="singular affine") as caught:
        read_volume(edit(head, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4))
    assert "its qform is sound" in caught.value.remedy


def test_the_difference_of_equal_affines_is_nothing():
    affine = nib.affines.from_matvec(TURN * [1, 2, 3], [4, 5, 6])
    assert describe_difference(affine, affine + 1e-5, (10, 11, 12)) == ""


# --- no orientation --------------------------------------------------------------------------------------------------


def stored(kind, path, spacing=(3.0, 3.0, 3.0)):
    """A large head whose axes run to the front, up and to the left, in a format without orientation."""
    shape, affine = tiny.grid("ASL", spacing, tuple(round(n / s) for n, s in zip((72, 78, 84), spacing, strict=True)))
    voxels = np.round(tiny.head(shape, affine / [[3], [3], [3], [1]], neck=False)).astype(np.int16)
    image = kind(voxels, None)
    image.header.set_zooms(tuple(nib.affines.voxel_sizes(affine)))
    image.to_filename(path)
    return path


KINDS = {"raw.img": nib.AnalyzeImage, "spm.img": nib.Spm2AnalyzeImage, "pair.img": nib.Nifti1Pair}


@pytest.mark.parametrize("name", [*KINDS, "single.nii", "single.nii.gz", "second.nii"])
def test_no_format_is_given_an_orientation_that_it_does_not_have(tmp_path, name):
    kind = KINDS.get(name) or (nib.Nifti2Image if name == "second.nii" else nib.Nifti1Image)
    path = stored(kind, tmp_path / name)
    with pytest.raises(UnusableVolume, match="no orientation") as caught:
        read_volume(path)
    assert "--assume-orientation" in caught.value.remedy
    volume = read_volume(path, "ASL")
    assert nib.aff2axcodes(volume.affine) == ("A", "S", "L")
    # The phantom's landmark, three times as far from the grid's centre as in the tiny head.
    expected = 3 * (np.array(tiny.LANDMARK) - (0.3, -1.2, 0.7) / np.array([3, 3, 3]))
    assert np.linalg.norm(landmark(volume) - expected) < 1.5


def test_spm_keeps_the_orientation_of_analyze_beside_it(tmp_path):
    shape, affine = tiny.grid("LAS")
    image = nib.Spm2AnalyzeImage(np.round(tiny.head(shape, affine)).astype(np.int16), affine)
    image.to_filename(tmp_path / "a.img")
    assert (tmp_path / "a.mat").is_file()
    assert_right(read_volume(tmp_path / "a.img"), "SPM's .mat")


def pair(tmp_path):
    shape, affine = tiny.grid("LPS")
    image = nib.Nifti1Pair(np.round(tiny.head(shape, affine)).astype(np.int16), affine)
    image.set_sform(affine, 1)
    image.to_filename(tmp_path / "pair.img")
    return tmp_path / "pair.img"


def test_pairs_are_found_from_either_file_and_in_any_spelling(tmp_path):
    path = pair(tmp_path)
    assert_right(read_volume(path))
    assert_right(read_volume(path.with_suffix(".hdr")))
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.img.gz").write_bytes(gzip.compress(path.read_bytes()))
    shutil.copy(path.with_suffix(".hdr"), packed / "a.HDR")
    assert_right(read_volume(packed / "a.img.gz"))


def test_pairs_are_refused_as_single_files_are(tmp_path):
    path = pair(tmp_path)
    hdr = path.with_suffix(".hdr")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UnusableVolume, match="truncated"):
        read_volume(path)
    path.write_bytes(content)
    with pytest.raises(UnusableVolume, match="zero spacing"):
        pixdim(hdr, 1, 0, 1)
        read_volume(path)
    with pytest.raises(UnusableVolume, match="header of a pair without its voxels"):
        read_volume(hdr.rename(tmp_path / "pair.nii"))
    with pytest.raises(UnusableVolume, match=r"half of a pair: there is no pair.hdr"):
        read_volume(path)


def test_a_pair_whose_offset_is_that_of_a_single_file(tmp_path):
    path = pair(tmp_path)
    edit(path.with_suffix(".hdr"), vox_offset=352)
    assert_right(read_volume(path), "voxels were read from byte 0")


# --- FreeSurfer's format ---------------------------------------------------------------------------------------------


def mgh(path):
    shape, affine = tiny.grid("LIA")
    nib.MGHImage(tiny.head(shape, affine).astype(np.float32), affine).to_filename(path)
    return path


def test_mgh_is_read_whatever_its_name_says_of_gzip(tmp_path):
    assert_right(read_volume(mgh(tmp_path / "a.mgz")))
    plain = mgh(tmp_path / "a.mgh").rename(tmp_path / "plain.mgz")
    assert_right(read_volume(plain))
    assert_right(read_volume(mgh(tmp_path / "b.mgz").rename(tmp_path / "packed.mgh")))


def test_mgh_without_orientation_is_refused_and_can_be_assumed(tmp_path):
    path = mgh(tmp_path / "a.mgh")
    data = bytearray(path.read_bytes())
    data[28:30] = b"\0\0"
    path.write_bytes(data)
    with pytest.raises(UnusableVolume, match="no orientation in the header"):
        read_volume(path)
    volume = read_volume(path, "LIA")
    assert np.linalg.norm(landmark(volume) - (np.array(tiny.LANDMARK) - (0.3, -1.2, 0.7))) < 0.5


def test_mgh_that_is_cut_or_damaged(tmp_path):
    path = mgh(tmp_path / "a.mgz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnusableVolume, match="truncated"):
        read_volume(path)
    path.write_bytes(content[:-8] + bytes(4) + content[-4:])
    with pytest.raises(UnusableVolume, match="damaged gzip"):
        read_volume(path)
