# SPDX-License-Identifier: Apache-2.0
"""Brain masks by the names of the usual tools, on any grid; skulls are measured."""

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from csv_rows import read_rows

from volta_components.data.datalist import load_datalist, uneven_skulls
from volta_components.data.layouts import Listing, Scan
from volta_components.data.overlaps import check, merge
from volta_components.data.prepare import prepare
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.skull import apply_mask, attach_masks, is_stripped
from volta_components.data.survey import MAYBE_STRIPPED, survey
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import Volume, read_volume

OPTIONS = {"spacing": 1.0, "shape": (28, 30, 32), "workers": 1, "folds": 1}
SCAN = tiny.grid("LPS", turn=tiny.rotation(5, 0, 8))
GRIDS = {
    "the scan's": SCAN,
    "another": tiny.grid("LIA", (1.5, 1.5, 1.5), (20, 20, 20), centre=(0, 0, 0)),
    "larger": tiny.grid("RAS", (1.0, 1.0, 1.0), (40, 40, 40)),
}


def brain(grid):
    """A ball of 6 mm around the head's centre."""
    return np.linalg.norm(tiny.world(*grid), axis=-1) < 6


def write_mask(path, grid=SCAN, voxels=None):
    return tiny.save(path, brain(grid) if voxels is None else voxels, grid[1], np.uint8)


# --- applying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_on_any_grid_leaves_the_brain(tmp_path, grid):
    scan = tiny.save(tmp_path / "scan.nii", tiny.head(*SCAN), SCAN[1])
    done = apply_mask(read_volume(scan), write_mask(tmp_path / "mask.nii.gz", GRIDS[grid]))
    distance = np.linalg.norm(tiny.world(*SCAN), axis=-1)
    assert (done.voxels[distance > 7] == 0).all()
    assert np.array_equal(done.voxels[distance < 5], nib.load(scan).get_fdata()[distance < 5])
    assert done.warnings == ()


@pytest.mark.parametrize("kind", ["brainmask", "probability", "255"])
def test_images_and_probabilities_are_masks_too(tmp_path, kind):
    inside = brain(SCAN)
    made = {
        "brainmask": np.where(inside, 110 + 5 * inside.cumsum().reshape(inside.shape) % 50, 1),  # 1 was erased by hand
        "probability": np.where(inside, 0.8, 0.3).astype(np.float32),
        "255": inside * 255,
    }[kind]
    path = tiny.save(tmp_path / "mask.nii", made, SCAN[1], np.float32)
    scan = Volume(tiny.head(*SCAN).astype(np.float32), SCAN[1], 1.0, 0.0, 1)
    assert np.array_equal(apply_mask(scan, path).voxels > 20, inside & (scan.voxels > 20))


@pytest.mark.parametrize("labels", [(1, 2), (1, 2, 3)])
def test_a_lesion_or_tissues_in_a_mask_are_brain_too(tmp_path, labels):
    distance = np.linalg.norm(tiny.world(*SCAN), axis=-1)
    parts = np.select([distance < 6 * (1 - i / len(labels)) for i in reversed(range(len(labels)))], labels[::-1])
    scan = Volume(tiny.head(*SCAN).astype(np.float32), SCAN[1], 1.0, 0.0, 1)
    done = apply_mask(scan, write_mask(tmp_path / "m.nii", voxels=parts))
    assert np.array_equal(done.voxels > 20, brain(SCAN) & (scan.voxels > 20)) and set(np.unique(parts)) == {0, *labels}


def test_a_mask_of_a_part_of_the_brain_is_refused(tmp_path):
    shape, affine = tiny.grid("RAS", (10.0, 10.0, 10.0))
    scan = Volume(tiny.head(*tiny.grid("RAS", shape=shape)).astype(np.float32), affine, 1.0, 0.0, 1)
    distance = np.linalg.norm(tiny.world(shape, affine), axis=-1)
    with pytest.raises(UnusableVolume, match=r"the brain mask holds \d{3} ml of a head of \d{4} ml"):
        apply_mask(scan, write_mask(tmp_path / "a.nii", (shape, affine), distance < 36))
    apply_mask(scan, write_mask(tmp_path / "b.nii", (shape, affine), distance < 52))


def test_what_is_no_mask_of_the_scan_is_refused_or_noted(tmp_path):
    scan = Volume(np.round(tiny.head(*SCAN)).astype(np.int16), SCAN[1], 1.0, 0.0, 1)
    for voxels in (np.zeros(SCAN[0]), np.ones(SCAN[0])):
        with pytest.raises(UnusableVolume, match="the brain mask holds"):
            apply_mask(scan, write_mask(tmp_path / "a.nii", voxels=voxels))
    for voxels in (~brain(SCAN), np.linalg.norm(tiny.world(*SCAN) - [9, 10, 9], axis=-1) < 5):
        with pytest.raises(UnusableVolume, match="of the brain mask lie outside of the head: it is inverted, or of"):
            apply_mask(scan, write_mask(tmp_path / "b.nii", voxels=voxels))
    beside = np.linalg.norm(tiny.world(*SCAN) - [7, 0, 0], axis=-1) < 6
    assert "outside of the head" in apply_mask(scan, write_mask(tmp_path / "c.nii", voxels=beside)).warnings[-1]


def test_dark_is_dark_whatever_the_scale(tmp_path):
    path = write_mask(tmp_path / "mask.nii")
    scan = Volume(np.round(tiny.head(*SCAN)).astype(np.uint16), SCAN[1], 2.0, -40.0, 1)  # 20 means 0
    assert set(np.unique(apply_mask(scan, path).voxels[~brain(SCAN)])) == {20}


# --- finding ---------------------------------------------------------------------------------------------------------


def findings(output):
    return read_rows(output / "qc/findings.csv")


def people(root, names, folder="anat"):
    for number, name in enumerate(names):
        tiny.save(root / name / folder / f"{name}_T1w.nii.gz", tiny.head(*SCAN, seed=number), SCAN[1])
    return root


NAMES = {
    "BIDS": "{0}/anat/{0}_desc-brain_mask.nii.gz",
    "in the scan's space": "{0}/anat/{0}_space-T1w_desc-brain_mask.nii.gz",
    "HD-BET": "{0}_T1w_bet_mask.nii.gz",
    "SynthStrip": "{0}_T1w_synthstrip_mask.nii.gz",
    "plain": "{0}_T1w_mask.nii",
    "of the same name": "{0}_T1w.nii.gz",
}


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_a_folder_are_found_by_the_usual_names(tmp_path, name):
    source = people(tmp_path / "bids", ["sub-1", "sub-10"])
    for subject in ("sub-1", "sub-10"):
        write_mask(tmp_path / "masks" / NAMES[name].format(subject))
        # A mask in another space is none of the scan's.
        write_mask(tmp_path / "masks" / f"{subject}/anat/{subject}_space-MNI152_desc-brain_mask.nii.gz")
    prepare("bids", source, tmp_path / "out", mask=tmp_path / "masks", skip_bad=True, **OPTIONS)
    items = load_datalist(tmp_path / "out").items
    assert [item["stripped"] for item in items] == [True, True]
    assert np.linalg.norm(tiny.find_landmark(items[0]["image"]) - tiny.LANDMARK) > 1  # the landmark lies outside
    assert nib.load(items[0]["image"]).get_fdata().astype(bool).sum() < 1.2 * brain(SCAN).sum()


def test_masks_among_the_derivatives_and_freesurfers(tmp_path):
    source = people(tmp_path / "bids", ["sub-1", "sub-2", "sub-3"])
    write_mask(source / "derivatives/fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    grid = GRIDS["another"]
    image = nib.MGHImage(np.where(brain(grid), 100, 0).astype(np.uint8), grid[1])
    (source / "derivatives/freesurfer/sub-2/mri").mkdir(parents=True)
    image.to_filename(source / "derivatives/freesurfer/sub-2/mri/brainmask.mgz")
    assert prepare("bids", source, tmp_path / "out", mask="bids", **OPTIONS) == 1
    assert [item["subject_id"] for item in load_datalist(tmp_path / "out").items] == ["sub-1", "sub-2"]
    (problem,) = [row for row in findings(tmp_path / "out") if "brain mask" in row["reason"]]
    assert problem["subject"] == "sub-3" and "sub-3_T1w_mask.nii.gz" in problem["remedy"]
    from volta_components.errors import InputError

    with pytest.raises(InputError, match="prepared with masked True instead of False"):
        prepare("bids", source, tmp_path / "out", **OPTIONS)
    with pytest.raises(InputError, match="give none, bids or a folder"):
        prepare("bids", source, tmp_path / "other", mask=tmp_path / "nowhere", **OPTIONS)


def test_two_masks_of_one_scan_are_a_problem(tmp_path):
    source = people(tmp_path / "bids", ["sub-1", "sub-2"])
    for name in ("a/sub-1_T1w_mask.nii", "b/sub-1_T1w_bet_mask.nii", "a/sub-2_T1w_mask.nii"):
        write_mask(tmp_path / "masks" / name)
    assert prepare("bids", source, tmp_path / "out", mask=tmp_path / "masks", **OPTIONS) == 1
    assert any("has 2 brain masks" in row["reason"] for row in findings(tmp_path / "out"))


def masks_of(tmp_path, scans, masks, chosen=slice(None)):
    """The mask of each scan, relative to their folder; files are empty, since only names are looked at."""
    listing = Listing("x", root=tmp_path)
    for source, subject, session in scans:
        listing.add(Scan(subject, session, subject, tmp_path / source, source))
    for name in masks:
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / name).touch()
    kept = attach_masks(listing, listing.scans[chosen], str(tmp_path / "masks"), tmp_path)
    remedies = [finding.remedy for finding in listing.findings]
    return {scan.key: scan.mask.relative_to(tmp_path / "masks").as_posix() for scan in kept}, remedies


ANNA, BERT = ("anna/T1.nii.gz", "anna", None), ("bert/T1.nii.gz", "bert", None)


@pytest.mark.parametrize(
    ("scans", "masks", "given"),
    [
        ([ANNA, BERT], ["anna/T1_mask.nii.gz"], {"anna": "anna/T1_mask.nii.gz"}),
        (
            [ANNA, BERT],
            [f"{x}/T1_mask.nii" for x in ("anna", "bert")],
            {x: f"{x}/T1_mask.nii" for x in ("anna", "bert")},
        ),
        ([ANNA, BERT], ["T1_mask.nii.gz"], {}),
        ([ANNA, BERT], ["T1_mask.nii.gz", "bert_mask.nii.gz"], {"bert": "bert_mask.nii.gz"}),
        ([ANNA], ["T1_mask.nii.gz"], {"anna": "T1_mask.nii.gz"}),
        ([ANNA, ("anna/T1.nii", "anna", "x")], ["T1_mask.nii"], {"anna": "T1_mask.nii", "anna_x": "T1_mask.nii"}),
        (
            [("1/anna.nii", "anna", "ses-1"), ("2/anna.nii", "anna", "ses-2")],
            ["2/anna_mask.nii"],
            {"anna_ses-2": "2/anna_mask.nii"},
        ),
        (
            [("a/MPRAGE", "sub-1", None), ("b/MPRAGE", "sub-2", None)],
            ["sub-2/MPRAGE.nii"],
            {"sub-2": "sub-2/MPRAGE.nii"},
        ),
    ],
)
def test_a_mask_is_not_given_to_another_scan_of_the_same_name(tmp_path, scans, masks, given):
    found, remedies = masks_of(tmp_path, scans, masks)
    assert found == given and len(remedies) == len(scans) - len(given)
    assert all(any(f"add {who}" in remedy for remedy in remedies) for _, who, _ in scans if who not in str(given))


def test_a_mask_of_a_scan_that_is_not_used_is_given_to_no_other(tmp_path):
    found, _ = masks_of(tmp_path, [ANNA, BERT], ["bert/T1_mask.nii.gz"], slice(1))
    assert found == {}


# --- measuring -------------------------------------------------------------------------------------------------------


def true_size(skull, air, stretch=(1, 1, 1)):
    """A brain of true size at 2 mm, with or without scalp and bone around it; air is noise or nothing."""
    shape, affine = (96, 110, 100), np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-96, -110, -110]
    xyz = tiny.world(shape, affine)
    radius = np.sqrt(((xyz / [70, 88, 70]) ** 2).sum(-1))
    tissue = 600 + 200 * (radius < 0.9)
    rng = np.random.default_rng(0)
    outside = rng.rayleigh(8, shape) if air == "noise" else np.zeros(shape)
    voxels = np.where(radius < 1, tissue, outside)
    if skull:
        voxels = np.where((radius >= 1) & (radius < 1.12), 50 + rng.normal(0, 8, shape), voxels)
        voxels = np.where((radius >= 1.12) & (radius < 1.2), 700, voxels)
    affine = np.diag([*stretch, 1]) @ affine
    return Volume(np.asfortranarray(np.round(voxels).astype(np.int16)), affine, 1.0, 0.0, 1)


@pytest.mark.parametrize(("skull", "air"), [(True, "noise"), (True, "blank"), (False, "blank")])
def test_skulls_are_measured(skull, air):
    assert is_stripped(survey(true_size(skull, air))) is not skull


@pytest.mark.parametrize("skull", [False, True])
@pytest.mark.parametrize("stretch", [(0.88, 1.05, 1.05), (0.8, 1.1, 1.1), (1.15, 0.9, 1)])
def test_narrow_and_wide_brains_are_stripped_too(skull, stretch):
    assert is_stripped(survey(true_size(skull, "blank", stretch))) is not skull


def test_what_looks_like_padding_is_no_mark_of_a_stripped_scan(rng):
    brain = true_size(False, "blank")
    inside = brain.voxels > 0
    brain.voxels[inside] += rng.normal(1000, 20, inside.sum()).astype(np.int16)
    settings = Settings(spacing=(3.0, 3.0, 3.0), shape=(56, 64, 60))
    assert MAYBE_STRIPPED in survey(brain).warnings[0]
    done = prepare_volume(brain, settings)
    assert done.quality["stripped"] and done.warnings == []


def test_a_scan_whose_mask_was_applied_counts_as_stripped():
    settings = Settings(spacing=(3.0, 3.0, 3.0), shape=(56, 64, 60))
    done = prepare_volume(true_size(True, "noise"), settings, has_mask=True)
    assert done.quality["stripped"]
    assert done.warnings == ["it does not look stripped, although its brain mask was applied"]


def test_brats_is_stripped_and_a_head_with_a_neck_is_not(tmp_path):
    prepare("brats", tiny.make_brats(tmp_path / "brats"), tmp_path / "out", skip_bad=True, **OPTIONS)
    assert all(item["stripped"] for item in load_datalist(tmp_path / "out").items)
    prepare("bids", tiny.make_bids(tmp_path / "bids"), tmp_path / "out2", skip_bad=True, **OPTIONS)
    assert not any(item["stripped"] for item in load_datalist(tmp_path / "out2").items)


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_uneven_mixtures_are_told_by_merge_and_check(tmp_path, capsys):
    prepare("brats", tiny.make_brats(tmp_path / "brats"), tmp_path / "a", skip_bad=True, **OPTIONS)
    prepare("bids", tiny.make_bids(tmp_path / "bids"), tmp_path / "b", skip_bad=True, **OPTIONS)
    capsys.readouterr()
    merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "c" / "datalist.json")
    told = "warning: scans without skull: adni 0 %, brats 100 %"
    assert told in capsys.readouterr().out
    check(tmp_path / "a", tmp_path / "b")
    assert told in capsys.readouterr().out
    from volta_components.data.checks import check_volumes

    with pytest.warns(UserWarning, match="scans without skull: adni 0 %, brats 100 %"):
        check_volumes(load_datalist(tmp_path / "c"))


def test_even_mixtures_and_old_datalists_are_not(tmp_path):
    def items(**shares):
        return [{"cohort": c, "stripped": i < 100 * s} for c, s in shares.items() for i in range(100)]

    assert uneven_skulls(items(a=1.0, b=0.9), "") is None
    assert uneven_skulls(items(a=0.2, b=0.5), "").startswith("scans without skull: a 20 %, b 50 %")
    assert uneven_skulls([{"cohort": "a", "stripped": True}, {"cohort": "b"}], "") is None
