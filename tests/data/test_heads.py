# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from scipy import ndimage
from toy_anatomies import toy_folder

from volta_components.data.phantom.anatomy import geometry
from volta_components.data.phantom.command import phantom
from volta_components.data.phantom.heads import load_head, lookup_codes, sample_tables, with_muscles
from volta_components.data.phantom.labels import CODES, NAMES
from volta_components.data.phantom.render import View, render, render_view, whole_view
from volta_components.data.phantom.scanner import BiasField, blur, draw_scanner, slices
from volta_components.data.phantom.subjects import Settings, draw_subject, scanner_of
from volta_components.data.prepare import prepare
from volta_components.errors import InputError
from volta_components.files import sha256_file

NEUTRAL = {
    "scale": (1.0, 1.0, 1.0), "rotation": (0.0, 0.0, 0.0), "translation": (0.0, 0.0, 0.0), "deformation": 0.0,
    "log_hippocampus_left": 0.0, "log_hippocampus_right": 0.0, "log_ventricles": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("anatomies"), 3)


@pytest.fixture(scope="module")
def head(folder):
    return load_head("head-1", str(folder / "head-1.nii.gz"))


@pytest.fixture(scope="module")
def settings():
    return Settings(anatomies=("head-1",), skull_share=1.0)


def subject_of(settings, number=1, **changes):
    return replace(draw_subject(settings, number), **changes)


def count(head, *names):
    return int(np.isin(head.codes, [CODES[name] for name in names]).sum())


def test_thick_soft_tissue_has_muscles_and_a_thin_scalp_has_none():
    """Bundles with fat between them and a few vessels; nothing else changes, and another head has others."""
    codes = np.full((70, 60, 50), CODES["air"], np.uint8)
    codes[5:65, 5:55, 5:30] = CODES["scalp"]  # a neck
    codes[5:65, 5:55, 31:45] = CODES["skull"]
    made = with_muscles(codes, "00ff" * 16)
    names = {name: (made == CODES[name]) & (codes == CODES["scalp"]) for name in ("scalp", "other_tissue", "sinus")}
    inner = names["other_tissue"][12:58, 12:48, 12:22]
    assert 0.5 < inner.mean() < 0.8
    assert 0.15 < names["scalp"][12:58, 12:48, 12:22].mean() < 0.45
    assert 0.002 < names["sinus"][12:58, 12:48, 12:22].mean() < 0.05
    assert names["scalp"][:8].sum() == (codes[:8] == CODES["scalp"]).sum()
    assert np.array_equal(made[codes != CODES["scalp"]], codes[codes != CODES["scalp"]])
    assert np.array_equal(made, with_muscles(codes, "00ff" * 16))
    assert not np.array_equal(made, with_muscles(codes, "01ff" * 16))


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_without_changes_a_head_is_its_anatomy(head, settings):
    made = render(subject_of(settings, **NEUTRAL), head, 1, draw_scanner(np.random.default_rng(0)))
    for label, name in ((1, "hippocampus_left"), (2, "hippocampus_right")):
        # The image's voxels lie between the label map's: edges of a small body are cut a little.
        assert (made.labels == label).sum() == pytest.approx(count(head, name), rel=0.06)
        assert made.truth[f"volume_{name}"] == pytest.approx(count(head, name), rel=0.01)
        centre = made.affine @ [*np.argwhere(made.labels == label).mean(axis=0), 1]
        own = np.argwhere(head.codes == CODES[name]).mean(axis=0) + head.box.low
        assert centre[:3] == pytest.approx(own, abs=0.2)
    ventricles = count(head, "lateral_ventricle_left", "lateral_ventricle_right")
    assert made.truth["volume_ventricles"] == pytest.approx(ventricles, rel=0.01)


@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_volumes_do_not_depend_on_the_spacing(head, settings, spacing):
    made = render(subject_of(settings, 2), head, spacing, scanner_of(settings, subject_of(settings, 2)))
    same = render(subject_of(settings, 2), head, 2, scanner_of(settings, subject_of(settings, 2)))
    # The deformation is looked up less often where voxels are large; these hippocampi are 10 mm thick, these
    # ventricles (6 ml) not even that.
    for name, tolerance in (
        ("hippocampus_left", 0.06),
        ("hippocampus_right", 0.06),
        ("brain", 0.02),
        ("ventricles", 0.06),
    ):
        assert made.truth[f"volume_{name}"] == pytest.approx(same.truth[f"volume_{name}"], rel=tolerance)
    # About 600 mm3 a side: 20 voxels of 3 mm.
    voxels = [(made.labels == label).sum() * spacing**3 for label in (1, 2)]
    assert voxels == pytest.approx(
        [made.truth["volume_hippocampus_left"], made.truth["volume_hippocampus_right"]], rel=0.1 * spacing
    )


def test_effects_change_the_volumes_that_they_name(head, settings):
    volumes = []
    for left, right, ventricles in ((0.0, 0.0, 0.0), (-0.4, 0.0, 0.0), (0.0, -0.4, 0.0), (0.0, 0.0, 0.5)):
        changes = {"log_hippocampus_left": left, "log_hippocampus_right": right, "log_ventricles": ventricles}
        made = render(subject_of(settings, **{**NEUTRAL, **changes}), head, 2, draw_scanner(np.random.default_rng(0)))
        volumes.append([made.truth[f"volume_{n}"] for n in ("hippocampus_left", "hippocampus_right", "ventricles")])
    change = np.log(np.array(volumes[1:]) / volumes[0])
    assert np.diag(change) == pytest.approx([-0.4, -0.4, 0.5], rel=0.35)
    assert np.abs(change - np.diag(np.diag(change))).max() < 0.08


def test_jacobian_is_positive_even_with_strong_effects_and_wide_variation(head):
    wide = Settings(anatomies=("head-1",), variation=5.0, effect_hippocampus=0.8, effect_ventricles=1.0, effect_age=0.3)
    for number in range(1, 5):
        where = geometry(draw_subject(wide, number), head)
        view = whole_view(head, 3)
        places = np.moveaxis(where.voxels(view.affine, view.shape).numpy(), 0, -1)
        for side in (slice(1, None), slice(None, -1)):
            edges = [
                np.diff(places, axis=axis)[tuple(side if a != axis else slice(None) for a in range(3))]
                for axis in range(3)
            ]
            # A mirror image would have a negative one throughout.
            assert np.linalg.det(np.stack(edges, axis=-1) / 3).min() > 0


def test_a_mirrored_head_has_its_sides_exchanged(head, settings):
    plain = subject_of(settings, **{**NEUTRAL, "log_hippocampus_left": -0.5})
    other = subject_of(settings, **{**NEUTRAL, "log_hippocampus_right": -0.5, "mirrored": True})
    scanner = draw_scanner(np.random.default_rng(0))
    a, b = (render(each, head, 2, scanner) for each in (plain, other))
    assert b.truth["volume_hippocampus_right"] == pytest.approx(a.truth["volume_hippocampus_left"], rel=0.06)
    assert b.truth["volume_hippocampus_left"] == pytest.approx(a.truth["volume_hippocampus_right"], rel=0.06)
    for made in (a, b):
        sides = [np.argwhere(made.labels == label)[:, 0].mean() for label in (1, 2)]
        assert sides[0] < sides[1]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_partial_volume_is_the_mean_of_the_codes_within_a_voxel(head):
    table = np.zeros(256, np.float32)
    table[CODES["white_matter_left"]], table[CODES["cortex_left"]] = 1.0, 0.6
    centre = np.array(head.codes.shape) // 2
    grid = np.stack(np.meshgrid(*(c + 2.0 * np.arange(-12, 12) + 0.5 for c in centre), indexing="ij"))
    places = torch.from_numpy(grid).float()
    sampled = sample_tables(head, table[None], places, 2)[0].numpy()
    values = table[head.codes]
    corner = centre - 24
    part = values[tuple(slice(c, c + 48) for c in corner)]
    expected = part.reshape(24, 2, 24, 2, 24, 2).mean(axis=(1, 3, 5))
    # The pooled map starts on an even or an odd voxel; where it is the other one, values lie between.
    near = ndimage.uniform_filter(expected, 3)
    assert np.abs(sampled - expected).mean() < 0.05
    assert np.abs(ndimage.uniform_filter(sampled, 3) - near).max() < 0.08
    assert len(np.unique(np.round(sampled, 3))) > 3  # not a flat fill


def test_lookups_beyond_the_label_map_are_air(head):
    places = torch.tensor([[-500.0, 1e4], [0.0, 50.0], [0.0, 50.0]])[:, :, None, None]
    assert not lookup_codes(head, places).any()


def test_t1_contrast_has_bright_white_and_dark_fluid(head, settings):
    for number in range(1, 7):
        subject = subject_of(settings, number)
        scanner = replace(scanner_of(settings, subject), thickness=1.0, cut=0.0)
        made = render(subject, head, 2, scanner)
        where = geometry(subject, head)
        codes = lookup_codes(head, where.voxels(made.affine, made.image.shape))

        def mean(name, made=made, codes=codes):
            inside = ndimage.binary_erosion(codes == CODES[name])
            return made.image[inside].mean()

        assert mean("white_matter_left") > mean("cortex_left") * 1.02
        assert mean("lateral_ventricle_left") < 0.9 * mean("white_matter_left")
        assert mean("skull") < 0.6 * mean("white_matter_left")


def test_any_contrast_draws_every_tissue_and_both_sides_alike():
    brighter = 0
    for seed in range(40):
        means = draw_scanner(np.random.default_rng(seed), "any").means
        brighter += means[CODES["cortex_left"]] > means[CODES["white_matter_left"]]
        assert means[CODES["hippocampus_left"]] == means[CODES["hippocampus_right"]]
        assert means[0] == 0
    assert 10 <= brighter <= 30
    t1 = [draw_scanner(np.random.default_rng(seed)).means for seed in range(40)]
    assert all(m[CODES["cortex_left"]] < m[CODES["white_matter_left"]] for m in t1)


def test_without_skull_nothing_outside_the_brain_is_left(head, settings):
    subject = subject_of(settings, 3)
    where = geometry(subject, head)
    view = whole_view(head, 2)
    codes = lookup_codes(head, where.voxels(view.affine, view.shape))
    outside = np.isin(codes, [CODES[name] for name in ("skull", "scalp", "skin", "air")])
    for seed in range(6):
        scanner = draw_scanner(np.random.default_rng(seed), with_skull=False)
        made = render(subject, head, 2, scanner)
        assert scanner.mask in ("brain", "tissue")
        assert not made.image[outside].any()
        assert (made.image[codes == CODES["white_matter_left"]] > 0).all()
        assert (made.image[codes == CODES["fluid"]] > 0).all() == (scanner.mask == "brain")


def test_a_part_of_a_head_shows_what_the_whole_shows(head, settings):
    subject = subject_of(settings, 2)
    where = geometry(subject, head)
    quiet = replace(
        scanner_of(settings, subject), noise=0.0, texture=0.0, deviations=np.zeros(256, np.float32), thickness=1.0
    )
    whole = whole_view(head, 1)
    first = (60, 90, 70)
    affine = whole.affine.copy()
    affine[:3, 3] += first
    part = View(affine, (40, 36, 32))
    seen, all_of_it = (render_view(subject, head, where, quiet, view) for view in (part, whole))
    box = tuple(slice(a + 4, a + n - 4) for a, n in zip(first, part.shape, strict=True))
    inner = (slice(4, -4),) * 3
    assert torch.allclose(seen.image[inner], all_of_it.image[box], atol=0.02)
    assert torch.allclose(seen.hippocampi[(slice(None), *inner)], all_of_it.hippocampi[(slice(None), *box)], atol=0.02)
    assert seen.hippocampi.sum() > 100


def test_parts_of_a_picture_are_made_on_the_device_that_is_asked_for(head, settings):
    device = torch.device("meta")  # nothing is computed there; tensors of two devices do not go together
    subject = subject_of(settings, 2)
    view = whole_view(head, 1)
    for affine, shape in ((view.affine, view.shape), (view.affine * 3, (56, 72, 64))):
        voxels = geometry(subject, head).voxels(affine, shape, device)
        codes = lookup_codes(head, voxels)
        bias = BiasField.draw(np.random.default_rng(0), 0.1).over(shape, *view.within(head), device)
        image = slices(blur(bias, 0.8), 4.0, 2, 1.0)
        assert voxels.device == codes.device == image.device == device
        assert codes.shape == image.shape == shape


def test_bias_field_has_its_deviation_and_its_parts_fit():
    field = BiasField.draw(np.random.default_rng(1), 0.1)
    whole = field.over((48, 48, 48), (-1, -1, -1), (1, 1, 1)).numpy()
    assert np.log(whole).std() == pytest.approx(0.1, rel=0.05)
    half = field.over((24, 48, 48), (-1, -1, -1), (-1 + 2 * 23 / 47, 1, 1)).numpy()
    assert half == pytest.approx(whole[:24], rel=0.01)


def test_slices_average_along_one_axis():
    image = torch.rand(20, 21, 24, generator=torch.Generator().manual_seed(0))
    thick = slices(image, 4.0, 2, 1.0)
    means = image.reshape(20, 21, 6, 4).mean(dim=-1)
    centres = (np.arange(24) + 0.5) / 4 - 0.5  # of the voxels, in slices
    expected = ndimage.map_coordinates(
        means.numpy(), np.meshgrid(np.arange(20), np.arange(21), centres, indexing="ij"), order=1, mode="nearest"
    )
    assert thick.numpy() == pytest.approx(expected, abs=1e-5)
    assert slices(image, 1.0, 2, 1.0) is image


def test_blur_is_gaussian():
    image = torch.rand(16, 17, 18, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(image.numpy(), 0.8, mode="nearest", radius=2)
    assert blur(image, 0.8).numpy() == pytest.approx(expected, abs=1e-4)


# --- cohort -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cohort") / "heads"
    phantom(str(output), 6, seed=2, spacing=3, anatomies=str(folder), workers=1)
    return output


def files(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def people(cohort):
    return read_rows(cohort / "participants.tsv")


def test_anatomies_come_in_turn():
    many = Settings(anatomies=("a", "b", "c"))
    drawn = [draw_subject(many, number).anatomy for number in range(1, 91)]
    assert Counter(drawn) == {"a": 30, "b": 30, "c": 30}
    assert all(set(drawn[i : i + 3]) == {"a", "b", "c"} for i in range(0, 90, 3))
    pairs = Counter((draw_subject(many, n).anatomy, draw_subject(many, n).diagnosis) for n in range(1, 91))
    assert min(pairs.values()) >= 8


def test_tables_and_sidecars_name_the_anatomy(cohort):
    rows = people(cohort)
    assert Counter(row["anatomy"] for row in rows) == {"head-1": 2, "head-2": 2, "head-3": 2}
    assert len({(row["anatomy"], row["anatomy_id"]) for row in rows}) == 3
    for row in rows:
        stem = f"{row['participant_id']}/ses-M000/anat/{row['participant_id']}_ses-M000"
        sidecar = json.loads((cohort / f"{stem}_T1w.json").read_text())
        truth = sidecar["Phantom"]
        assert truth["anatomy"] == row["anatomy"]
        assert set(truth["scanner"]["means"]) == set(NAMES)
        assert sidecar["SkullStripped"] == (truth["scanner"]["mask"] != "head")
        label = nib.load(cohort / f"derivatives/hippocampus/{stem}_desc-hippocampus_dseg.nii.gz")
        for value, name in ((1, "left"), (2, "right")):
            volume = (np.asarray(label.dataobj) == value).sum() * 27
            assert volume == pytest.approx(truth[f"volume_hippocampus_{name}"], rel=0.35)
    assert (cohort / "code/sheet.png").stat().st_size > 2000


def test_started_again_and_with_workers_it_is_the_same(cohort, folder, tmp_path):
    before = files(cohort)
    (cohort / "sub-PH0004/ses-M000/anat/sub-PH0004_ses-M000_T1w.nii.gz").unlink()
    phantom(str(cohort), 6, seed=2, spacing=3, anatomies=str(folder), workers=1)
    assert files(cohort) == before
    phantom(str(tmp_path / "d"), 3, seed=2, spacing=3, anatomies=str(folder), first=4, workers=2)
    shared = {name: digest for name, digest in files(tmp_path / "d").items() if "sub-PH" in name}
    assert len(shared) == 12
    assert all(before[name] == digest for name, digest in shared.items())


def test_other_anatomies_in_the_same_folder_are_refused(cohort, folder, tmp_path):
    with pytest.raises(InputError, match="anatomies"):
        phantom(str(cohort), 6, seed=2, spacing=3, anatomies=str(folder), leave_out=["head-2"], workers=1)
    with pytest.raises(InputError, match="--leave-out names anatomies"):
        phantom(str(tmp_path / "d"), 1, leave_out=["head-2"], workers=1)
    with pytest.raises(InputError, match="--contrast t2: give t1 or any"):
        phantom(str(tmp_path / "d"), 1, anatomies=str(folder), contrast="t2", workers=1)


def test_an_anatomy_is_a_patient(cohort, tmp_path):
    prepare("bids", str(cohort), str(tmp_path / "p"), spacing=3, shape=(48, 64, 64), folds=3, workers=1)
    datalist = json.loads((tmp_path / "p/datalist.json").read_text())
    items = datalist["training"]
    assert len(items) == 6
    assert {item["patient_id"] for item in items} == {row["anatomy_id"] for row in people(cohort)}
    folds = {(item["patient_id"], item["fold"]) for item in items}
    assert len(folds) == 3  # each patient in one fold
    assert len({fold for _, fold in folds}) == 3
