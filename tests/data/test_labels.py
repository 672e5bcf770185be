# SPDX-License-Identifier: Apache-2.0
import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny

from volta_components.data.labels import read_labels
from volta_components.data.layouts.common import LabelFile
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import read_volume


@pytest.fixture
def place(tmp_path):
    """A scan in LPS order, its grid, and a function that saves a label beside it."""
    shape, affine = tiny.grid("LPS")
    scan = tiny.save(tmp_path / "scan.nii.gz", tiny.head(shape, affine), affine)

    def save(name, voxels, dtype=np.uint8, at=affine):
        return tiny.save(tmp_path / name, voxels, at, dtype)

    return scan, shape, affine, save


def both(scan, *files):
    return read_labels([LabelFile(path, value) for path, value in files], read_volume(scan), scan)


def test_two_sides_are_merged_in_ras_order(place):
    scan, shape, affine, save = place
    left = save("l.nii", tiny.harp_label(shape, affine, -1))
    right = save("r.nii", tiny.harp_label(shape, affine, 1))
    merged, placed, quirks = both(scan, (left, 1), (right, 2))
    assert quirks == [] and nib.aff2axcodes(placed) == ("R", "A", "S")
    for value, side in ((1, -1), (2, 1)):
        assert (merged == value).sum() == tiny.harp_label(shape, affine, side).sum()
        assert np.sign(nib.affines.apply_affine(placed, np.argwhere(merged == value).mean(0))[0]) == side


def test_swapped_sides_are_put_right_whatever_the_names(place):
    scan, shape, affine, save = place
    left = save("l.nii", tiny.harp_label(shape, affine, 1) + 41, np.int16)
    right = save("r.nii", tiny.harp_label(shape, affine, -1))
    merged, placed, quirks = both(scan, (left, 1), (right, 2))
    assert nib.affines.apply_affine(placed, np.argwhere(merged == 1).mean(0))[0] < 0
    assert quirks[0][1] == "values 41 and 42 taken as 0 and 1"
    assert "left and right swapped" in quirks[1][1]


def test_what_is_odd_in_a_labels_header_is_a_quirk(place, tmp_path):
    scan, shape, affine, _ = place
    image = nib.Nifti1Image(tiny.harp_label(shape, affine, -1).astype(np.uint8), affine)
    image.set_sform(affine, 1)
    image.set_qform(np.diag([-1, 1, 1, 1]) @ affine, 1)  # left and right exchanged
    image.to_filename(tmp_path / "flip.nii")
    quirks = both(scan, (tmp_path / "flip.nii", 1))[2]
    assert quirks == [("flip.nii", warning) for warning in read_volume(tmp_path / "flip.nii").warnings] != []


def test_a_label_in_another_axis_order_shares_the_grid(place, tmp_path):
    scan, shape, affine, _ = place
    image = nib.Nifti1Image(tiny.harp_label(shape, affine, -1).astype(np.uint8), affine)
    turned = nib.as_closest_canonical(image)
    turned.to_filename(tmp_path / "turned.nii")
    merged, _, _ = both(scan, (tmp_path / "turned.nii", 1))
    assert (merged == 1).sum() == tiny.harp_label(shape, affine, -1).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * 0, "empty label: every voxel is 0"),
        (lambda v: v + (np.arange(v.size).reshape(v.shape) == 0) * 5, "3 values instead of two"),
        (lambda v: v * 0.4 + 0.3, "no integers"),
        (lambda v: np.where(v > 0, np.nan, 0), "NaN"),
    ],
)
def test_bad_one_sided_files(place, change, message):
    scan, shape, affine, save = place
    bad = save("l.nii", change(tiny.harp_label(shape, affine, -1)), np.float32)
    with pytest.raises(UnusableVolume, match=message):
        both(scan, (bad, 1))


def test_bad_maps(place):
    scan, shape, affine, save = place
    with pytest.raises(UnusableVolume, match=r"label values \[0, 17, 53\].*renumber"):
        both(
            scan,
            (save("m.nii", 17 * tiny.harp_label(shape, affine, -1) + 53 * tiny.harp_label(shape, affine, 1)), None),
        )
    with pytest.raises(UnusableVolume, match="label of 9x26x28 voxels, scan of 24x26x28"):
        both(scan, (save("s.nii", tiny.harp_label(shape, affine, -1)[:9]), None))
    moved = affine.copy()
    moved[1, 3] += 2
    with pytest.raises(UnusableVolume, match=r"do not share one grid: up to 2\.0 mm"):
        both(scan, (save("a.nii", tiny.harp_label(shape, affine, -1), at=moved), None))
    wrong = tiny.harp_label(shape, affine, 1) + 2 * tiny.harp_label(shape, affine, -1)
    with pytest.raises(UnusableVolume, match=r"label 1 \(left\) lies right of label 2 \(right\)"):
        both(scan, (save("w.nii", wrong), None))
    # The commonest form of a mask: one value for both sides.
    mask = np.minimum(tiny.harp_label(shape, affine, -1) + tiny.harp_label(shape, affine, 1), 1)
    for value, missing in ((1, r"right \(2\)"), (2, r"left \(1\)")):
        with pytest.raises(UnusableVolume, match=f"label without voxels of {missing}.*one value stands for both sides"):
            both(scan, (save("b.nii", mask * value), None))
