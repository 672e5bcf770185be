# SPDX-License-Identifier: Apache-2.0
import nibabel as nib
import numpy as np
import pytest
from toy_anatomies import SHAPE, toy_folder, toy_labels, write_labels

from volta_components.data.phantom.labels import CODES, find_label_maps, read_label_map, read_label_maps
from volta_components.errors import InputError


def codes_of(path):
    return read_label_map("head", path).codes


def test_structures_keep_their_voxels(tmp_path):
    labels = toy_labels()
    codes = codes_of(write_labels(tmp_path / "a.nii.gz", labels))
    for number, name in (
        (17, "hippocampus_left"), (53, "hippocampus_right"), (2, "white_matter_left"), (42, "cortex_right"),
        (16, "brainstem"), (24, "fluid"), (515, "skull"), (507, "scalp"), (4, "lateral_ventricle_left"),
    ):  # fmt: skip
        assert (codes == CODES[name]).sum() == (labels == number).sum(), name


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
def test_orientation_and_format_change_nothing(tmp_path, axes, suffix):
    labels = toy_labels()
    plain = read_label_map("head", write_labels(tmp_path / "plain.nii.gz", labels))
    image = nib.Nifti1Image(labels, np.eye(4))
    turned = image.as_reoriented(nib.orientations.axcodes2ornt(axes))
    other = write_labels(tmp_path / f"other{suffix}", np.asarray(turned.dataobj), turned.affine)
    found = read_label_map("head", other)
    assert np.array_equal(found.codes, plain.codes)
    assert found.digest == plain.digest
    assert found.patient_id == plain.patient_id


def test_cortical_parcels_are_cortex(tmp_path):
    labels = toy_labels()
    parcels = labels.astype(np.int32)
    parcels[labels == 3] = 1000 + np.arange((labels == 3).sum()) % 36
    parcels[labels == 42] = 12101 + np.arange((labels == 42).sum()) % 75
    assert np.array_equal(
        codes_of(write_labels(tmp_path / "p.nii.gz", parcels)), codes_of(write_labels(tmp_path / "a.nii.gz", labels))
    )


def test_whole_numbers_stored_as_floats_are_taken_and_fractions_are_not(tmp_path):
    labels = toy_labels()
    assert np.array_equal(
        codes_of(write_labels(tmp_path / "f.nii.gz", labels.astype(np.float32))),
        codes_of(write_labels(tmp_path / "a.nii.gz", labels)),
    )
    write_labels(tmp_path / "bad" / "b.nii.gz", labels.astype(np.float32) + 0.25)
    with pytest.raises(InputError, match="no integers"):
        read_label_maps(tmp_path / "bad")


def test_half_millimetres_become_millimetres(tmp_path):
    labels = toy_labels(skull=False)
    fine = np.repeat(np.repeat(labels[::2], 4, axis=0), 1, axis=1)  # 0.5 mm along x, of a head twice as coarse
    found = read_label_map("head", write_labels(tmp_path / "a.nii.gz", fine, np.diag([0.5, 1, 1, 1])))
    assert any("brought to 1 mm" in note for note in found.notes)
    expected = (np.repeat(labels[::2], 2, axis=0) == 17).sum()
    assert (found.codes == CODES["hippocampus_left"]).sum() == pytest.approx(expected, rel=0.02)


def test_unknown_numbers_become_what_is_around_them_and_are_said(tmp_path):
    labels = toy_labels()
    odd = labels.copy()
    odd[24:27, 52:55, 62:65] = 9999  # within white matter
    assert (labels[23:28, 51:56, 61:66] == 2).all()
    found = read_label_map("head", write_labels(tmp_path / "a.nii.gz", odd))
    assert np.array_equal(found.codes, codes_of(write_labels(tmp_path / "b.nii.gz", labels)))
    assert any("9999" in note for note in found.notes)


def test_what_is_missing_is_said(tmp_path):
    labels = toy_labels(skull=False)
    labels[np.isin(labels, (10, 49))] = 2
    notes = read_label_map("head", write_labels(tmp_path / "a.nii.gz", labels)).notes
    assert any("no" in note and "thalamus left" in note for note in notes)
    assert any("nothing outside the brain" in note for note in notes)


def mirrored(labels):
    return np.ascontiguousarray(labels[::-1])


def without(labels, number):
    return np.where(labels == number, 2, labels)


def three_voxels(labels):
    small = np.where(labels == 53, 41, labels)
    small[67, 50, 40:43] = 53
    return small


def other_numbering(labels):
    return (labels + 6000 * (labels > 0)).astype(np.int16)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (mirrored, "left and right are swapped"),
        (lambda labels: without(labels, 17), r"has no hippocampus left \(17\)"),
        (lambda labels: without(labels, 53), r"has no hippocampus right \(53\)"),
        (three_voxels, r"hippocampus right of 3 mm\^3"),
        (other_numbering, "numbers that FreeSurfer does not use"),
        (lambda labels: labels - 1, "negative numbers"),
    ],
)
def test_bad_label_maps_are_named(tmp_path, spoil, says):
    toy_folder(tmp_path, 1)
    write_labels(tmp_path / "bad.nii.gz", spoil(toy_labels(5)))
    with pytest.raises(InputError, match=rf"(?s)1 of 2 label maps.*bad .*{says}"):
        read_label_maps(tmp_path)


def test_one_anatomy_under_two_names_is_named(tmp_path):
    toy_folder(tmp_path, 2)
    image = nib.load(tmp_path / "head-1.nii.gz").as_reoriented(nib.orientations.axcodes2ornt("LIP"))
    nib.save(image, tmp_path / "z.nii.gz")
    with pytest.raises(InputError, match=r"z +is the same as head-1"):
        read_label_maps(tmp_path)


def test_folders_of_freesurfer_are_named_after_their_subjects(tmp_path):
    for subject in ("anna", "bert"):
        write_labels(tmp_path / subject / "mri" / "aseg.mgz", toy_labels())
        write_labels(tmp_path / subject / "mri" / "aparc+aseg.mgz", toy_labels())
        write_labels(tmp_path / subject / "mri" / "brain.mgz", toy_labels())
    found = find_label_maps(tmp_path)
    assert list(found) == ["anna", "bert"]
    assert {path.name for path in found.values()} == {"aparc+aseg.mgz"}


def test_anatomies_are_named_alike_whatever_the_case_of_the_suffix(tmp_path):
    for name in ("A.NII", "B.nii", "C.Nii.GZ"):
        (tmp_path / name).touch()
    assert list(find_label_maps(tmp_path)) == ["A", "B", "C"]


def test_a_folder_without_maps_and_no_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no label maps"):
        read_label_maps(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_label_maps(tmp_path / "nowhere")
    toy_folder(tmp_path, 1)
    with pytest.raises(InputError, match="no anatomies head-7 to leave out; there are head-1"):
        read_label_maps(tmp_path, ["head-7"])
    with pytest.raises(InputError, match="every anatomy is left out"):
        read_label_maps(tmp_path, ["head-1"])
    assert toy_labels().shape == SHAPE
