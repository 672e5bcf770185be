# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from scipy.linalg import expm

from volta_components.cli import main
from volta_components.data.phantom.anatomy import TEMPLATE_BOX, draw_velocity, geometry, load_template
from volta_components.data.phantom.command import phantom
from volta_components.data.phantom.dataset import _finished
from volta_components.data.phantom.deformation import exponential, follow, sample_field
from volta_components.data.phantom.render import render
from volta_components.data.phantom.subjects import SITES, Settings, draw_subject, scanner_of
from volta_components.errors import InputError
from volta_components.files import partial_prefix, sha256_file


def render_template(subject, spacing):
    return render(subject, load_template(spacing), spacing, scanner_of(Settings(), subject))


@pytest.fixture(scope="module")
def atlas():
    return load_template(3)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    phantom(folder, 4, seed=3, spacing=3, workers=1)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# --- who the subjects are ---------------------------------------------------------------------------------------------


def test_labels_are_balanced_from_the_first_subjects_on():
    subjects = [draw_subject(Settings(seed=5), number) for number in range(1, 401)]
    for start in range(0, 400, 4):
        kinds = {(s.diagnosis, s.sex) for s in subjects[start : start + 4]}
        assert kinds == {("AD", "M"), ("AD", "F"), ("CN", "M"), ("CN", "F")}
    counts = Counter((s.diagnosis, s.sex, s.site) for s in subjects)
    assert len(counts) == 12
    assert all(20 <= count <= 47 for count in counts.values())  # 400 / 12 = 33


@pytest.mark.parametrize(("share", "patients"), [(0.0, 0), (0.25, 50), (0.174, 35), (1.0, 200)])
def test_share_of_patients(share, patients):
    subjects = [draw_subject(Settings(ad_share=share), number) for number in range(1, 201)]
    assert sum(s.diagnosis == "AD" for s in subjects) == patients
    assert all((s.severity > 0) == (s.diagnosis == "AD") for s in subjects)


def test_effects_change_only_what_they_name():
    none = Settings(effect_sex=0, effect_age=0, effect_hippocampus=0, effect_ventricles=0)
    for number in range(1, 9):
        plain = draw_subject(none, number)
        ill = draw_subject(replace(none, effect_hippocampus=0.3, effect_ventricles=0.5), number)
        assert ill.log_hippocampus_left - plain.log_hippocampus_left == pytest.approx(-0.3 * plain.severity)
        assert ill.log_hippocampus_right - plain.log_hippocampus_right == pytest.approx(-0.3 * plain.severity)
        assert ill.log_ventricles - plain.log_ventricles == pytest.approx(0.5 * plain.severity)
        changed = {"log_hippocampus_left", "log_hippocampus_right", "log_ventricles"}
        assert {k for k, v in asdict(ill).items() if v != asdict(plain)[k]} <= changed
        grown = draw_subject(replace(none, effect_sex=0.06), number)
        factor = np.exp(0.03 if plain.sex == "M" else -0.03)
        assert np.array(grown.scale) / np.array(plain.scale) == pytest.approx([factor] * 3)
        older = draw_subject(replace(none, effect_age=0.2), number)
        assert older.log_ventricles - plain.log_ventricles == pytest.approx(0.2 * (plain.age - 72) / 10)


def test_numbers_and_seeds_give_different_subjects():
    drawn = {draw_subject(Settings(seed=seed), number).scale for seed in range(3) for number in range(1, 40)}
    assert len(drawn) == 3 * 39


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_exponential_of_a_linear_field_is_the_matrix_exponential():
    matrix = np.array([[0.10, -0.20, 0.0], [0.20, 0.05, 0.0], [0.0, 0.10, -0.15]]) / 2
    axes = [np.arange(low, high + 1, 3) for low, high in ((-84, 84), (-120, 87), (-84, 96))]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    centre = np.array([0.0, -15.0, 6.0])
    velocity = np.einsum("ij,j...->i...", matrix, places - centre[:, None, None, None])
    moved = exponential(torch.from_numpy(velocity).float(), TEMPLATE_BOX).numpy()
    expected = np.einsum("ij,j...->i...", expm(matrix) - np.eye(3), places - centre[:, None, None, None])
    near = np.linalg.norm(places - centre[:, None, None, None], axis=0) < 40  # the flow stays within the box
    assert np.abs(moved - expected)[:, near].max() < 0.02
    assert np.abs(expected[:, near]).max() > 4


def test_following_the_reversed_field_undoes_the_exponential(atlas):
    velocity = draw_velocity(draw_subject(Settings(), 2), atlas)
    displacement = exponential(velocity, TEMPLATE_BOX)
    nodes = torch.tensor([[20, 30, 30], [28, 20, 25], [35, 45, 40], [15, 35, 20]])
    low = np.array(TEMPLATE_BOX.low)
    start = torch.from_numpy(low).float() + 3.0 * nodes
    moved = start + displacement[:, nodes[:, 0], nodes[:, 1], nodes[:, 2]].T
    assert (moved - start).norm(dim=1).max() > 2
    assert (follow(-velocity, TEMPLATE_BOX, moved) - start).norm(dim=1).max() < 0.3


def test_random_velocity_has_the_amplitude_that_is_written(atlas):
    neutral = replace(
        draw_subject(Settings(), 1), log_hippocampus_left=0.0, log_hippocampus_right=0.0, log_ventricles=0.0
    )
    fields = torch.stack([draw_velocity(replace(neutral, number=number), atlas) for number in range(1, 9)])
    expected = np.sqrt(sum(deviation**2 for _, deviation in atlas.random_scales))
    assert fields.std().item() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("structure", ["hippocampus_left", "hippocampus_right", "ventricles"])
def test_volume_fields_diverge_in_their_structure_and_move_nothing_far_away(atlas, structure):
    field = getattr(atlas, structure).numpy()
    index = {"hippocampus_left": 4, "hippocampus_right": 5, "ventricles": 6}[structure]
    share = atlas.maps[index].numpy()[::3, ::3, ::3]
    divergence = sum(np.gradient(part, 3, axis=axis) for axis, part in enumerate(field))
    assert (divergence * share).sum() / share.sum() == pytest.approx(1, abs=0.3)  # central differences blur a little
    assert abs(divergence.sum()) < 0.01 * np.abs(divergence).sum()
    size = np.linalg.norm(field, axis=0)
    corner = size[:5, :5, -5:]
    assert corner.max() < 0.02 * size.max()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_jacobian_is_positive_everywhere_even_with_the_strongest_effects(number):
    settings = Settings(effect_sex=0.1, effect_age=0.3, effect_hippocampus=0.8, effect_ventricles=1.0)
    where = geometry(draw_subject(settings, number), load_template(3))
    places = np.moveaxis(where.voxels(load_template(2).image_affine(2), (72, 96, 96)).double().numpy(), 0, -1)
    for side in (slice(1, None), slice(None, -1)):  # differences to one neighbour: folds cannot average out
        edges = [
            np.diff(places, axis=axis)[tuple(side if a != axis else slice(None) for a in range(3))] for axis in range(3)
        ]
        determinant = np.linalg.det(np.stack(edges, axis=-1) / 2)
        assert determinant.min() > 0.01
        assert determinant.max() < 60


def test_heads_fit_the_field_of_view():
    atlas = load_template(3)
    settings = Settings(effect_sex=0.1)
    shrunk = 0
    for number in range(1, 7):
        subject = draw_subject(settings, number)
        where = geometry(subject, atlas)
        shrunk += where.fit < 1
        image = render_template(subject, 3).image
        for axis in range(3):
            occupied = np.flatnonzero(image.any(axis=tuple({0, 1, 2} - {axis})))
            assert occupied[0] > 0
            assert occupied[-1] < image.shape[axis] - 1
    giant = replace(draw_subject(settings, 1), scale=(1.3, 1.3, 1.3))
    made = render_template(giant, 3)
    assert geometry(giant, atlas).fit < 1
    assert made.truth["scale"][0] < 1.3
    assert not made.image[[0, -1]].any()
    assert made.image[1:3].any()  # no smaller than need be


def test_mean_head_needs_no_fitting():
    atlas = load_template(3)
    fits = [geometry(draw_subject(Settings(), number), atlas).fit for number in range(1, 31)]
    assert np.mean(np.array(fits) == 1) > 0.8


# --- anatomy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "side"), [(4, -1), (5, 1)])
def test_hippocampi_of_the_template_lie_where_they_should(index, side):
    share = load_template(1).maps[index].numpy()
    where = np.argwhere(share > 0.5)
    centre = where.mean(axis=0) + np.array(TEMPLATE_BOX.low)
    assert centre == pytest.approx([26 * side, -20, -14], abs=3)
    assert 3000 < len(where) < 5000  # mm^3; adults have 3 to 4.5 ml a side
    assert load_template(1).maps[1].numpy()[share > 0.5].min() > 0.3  # grey matter


def test_ventricles_of_the_template():
    share = load_template(1).maps[6].numpy()
    assert 10_000 < share.sum() < 25_000
    assert load_template(1).maps[0].numpy()[share > 0.8].mean() < 0.4  # dark in T1
    x = np.arange(share.shape[0]) + TEMPLATE_BOX.low[0]
    assert (share.sum(axis=(1, 2)) * x).sum() / share.sum() == pytest.approx(0, abs=0.5)


def test_severity_shrinks_hippocampi_and_widens_ventricles():
    effect = Settings()
    healthy = draw_subject(effect, next(n for n in range(1, 9) if draw_subject(effect, n).diagnosis == "CN"))
    volumes, counts = [], []
    for severity in (0.0, 0.5, 1.0, 1.5):
        ill = replace(
            healthy,
            log_hippocampus_left=healthy.log_hippocampus_left - effect.effect_hippocampus * severity,
            log_hippocampus_right=healthy.log_hippocampus_right - effect.effect_hippocampus * severity,
            log_ventricles=healthy.log_ventricles + effect.effect_ventricles * severity,
        )
        made = render_template(ill, 2)
        volumes.append(
            [made.truth[f"volume_{n}"] for n in ("hippocampus_left", "hippocampus_right", "ventricles", "brain")]
        )
        counts.append([np.sum(made.labels == 1), np.sum(made.labels == 2)])
    volumes, counts = np.array(volumes), np.array(counts)
    assert (np.diff(volumes[:, :2], axis=0) < 0).all()
    assert (np.diff(counts, axis=0) < 0).all()
    assert (np.diff(volumes[:, 2]) > 0).all()
    assert volumes[:, 3] == pytest.approx(volumes[0, 3], rel=0.01)
    # At a severity of 1, the volume changes by the effect that was asked for; the smoothness of the field takes a part.
    ratio = np.log(volumes[2] / volumes[0])
    assert ratio[:2] == pytest.approx(-effect.effect_hippocampus, rel=0.35)
    assert ratio[2] == pytest.approx(effect.effect_ventricles, rel=0.35)


@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_image_and_labels_of_each_spacing(spacing):
    made = render_template(draw_subject(Settings(), 2), spacing)
    assert made.image.shape == made.labels.shape == (144 // spacing, 192 // spacing, 192 // spacing)
    assert nib.aff2axcodes(made.affine) == ("R", "A", "S")
    assert set(np.unique(made.labels)) == {0, 1, 2}
    brain = made.image > 0
    assert brain[made.labels > 0].all()
    assert brain.sum() * spacing**3 == pytest.approx(made.truth["volume_brain"], rel=0.03)
    for label, name in ((1, "left"), (2, "right")):
        truth = made.truth[f"volume_hippocampus_{name}"]
        assert np.sum(made.labels == label) * spacing**3 == pytest.approx(truth, rel=0.25)
        centre = made.affine @ [*np.argwhere(made.labels == label).mean(axis=0), 1]
        assert centre[0] * (-1 if name == "left" else 1) > 12
    # The anatomy does not depend on the spacing.
    other = render_template(draw_subject(Settings(), 2), 3)
    for name in ("brain", "hippocampus_left", "ventricles"):
        assert made.truth[f"volume_{name}"] == pytest.approx(other.truth[f"volume_{name}"], rel=0.03)


def test_ventricles_are_darker_than_tissue_at_every_site():
    for number in range(1, 7):
        subject = draw_subject(Settings(), number)
        for site, scanner in SITES.items():
            seen = replace(subject, site=site, **{k: scanner[k] for k in ("grey", "fluid", "gamma", "bias", "noise")})
            made = render_template(seen, 3)
            voxels = geometry(seen, load_template(3)).voxels(made.affine, made.image.shape)
            places = torch.movedim(voxels, 0, -1) / TEMPLATE_BOX.half - 1
            maps = sample_field(load_template(3).maps, places).numpy()
            fluid, grey = made.image[maps[6] > 0.6].mean(), made.image[maps[1] > 0.8].mean()
            assert fluid < 0.85 * grey
        if number == 2:
            break


# --- data set ---------------------------------------------------------------------------------------------------------


def test_data_set_is_bids(cohort):
    raw = re.compile(
        r"dataset_description\.json|README\.md|LICENSE|participants\.(tsv|json)|sessions\.json|code/.+"
        r"|(sub-[A-Za-z0-9]+)/(\2_sessions\.tsv|(ses-[A-Za-z0-9]+)/anat/\2_\4_T1w\.(nii\.gz|json))"
    )
    derived = re.compile(
        r"dataset_description\.json|README\.md|desc-hippocampus_dseg\.tsv"
        r"|desc-hippocampus_dseg\.json"
        r"|(sub-[A-Za-z0-9]+)/(ses-[A-Za-z0-9]+)/anat/\1_\2_desc-hippocampus_dseg\.nii\.gz"
    )
    for name in files(cohort):
        inner = name.removeprefix("derivatives/hippocampus/")
        assert (raw if inner == name else derived).fullmatch(inner), name
    for folder, kind in ((cohort, "raw"), (cohort / "derivatives/hippocampus", "derivative")):
        description = json.loads((folder / "dataset_description.json").read_text())
        assert description["DatasetType"] == kind
        assert description["Name"]
        assert re.fullmatch(r"1\.\d+\.\d+", description["BIDSVersion"])
        assert description["GeneratedBy"][0]["Name"] == "volta3d phantom"
        assert "ICBM" in description["License"]
    assert "McConnell Brain Imaging Centre" in (cohort / "LICENSE").read_text()


def bids_issues(folder):
    """What the BIDS validator finds: severity, code, key and place of each issue."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("bids-validator-deno", path=places)
    if program is None:
        pytest.skip("no BIDS validator here: pip install bids-validator-deno")
    done = subprocess.run([program, str(folder), "--format", "json"], capture_output=True, text=True, timeout=300)
    try:
        found = json.loads(done.stdout)["issues"]["issues"]
    except ValueError:
        pytest.skip(f"the BIDS validator does not run here: {done.stderr.strip()[-300:]}")
    return {(item["severity"], item["code"], item.get("subCode"), item.get("location")) for item in found}


def test_the_bids_validator_finds_nothing_but_the_lack_of_a_scanner(cohort, tmp_path):
    for folder in (cohort, cohort / "derivatives/hippocampus"):
        for severity, code, key, place in bids_issues(folder):
            assert severity == "warning", (code, key, place)
            # There was no scanner, so it has no make, coil or sequence; there are no event tags; there is one author.
            of_a_scanner = code == "SIDECAR_KEY_RECOMMENDED" and place.endswith("_T1w.nii.gz")
            assert of_a_scanner or key == "HEDVersion" or code == "TOO_FEW_AUTHORS", (code, key, place)
    # It does look: something that has no place in a data set, and a label map that is no volume.
    broken = shutil.copytree(cohort, tmp_path / "broken")
    (broken / "sub-PH0001/ses-M000/anat/notes.docx").touch()
    (broken / "sub-PH0002/ses-M000/anat/sub-PH0002_ses-M000_T1w.nii.gz").write_bytes(b"")
    errors = {(code, place) for severity, code, _, place in bids_issues(broken) if severity == "error"}
    assert ("NOT_INCLUDED", "/sub-PH0001/ses-M000/anat/notes.docx") in errors
    assert ("EMPTY_FILE", "/sub-PH0002/ses-M000/anat/sub-PH0002_ses-M000_T1w.nii.gz") in errors


def test_tables_and_sidecars_agree(cohort):
    participants = read_rows(cohort / "participants.tsv")
    assert [row["participant_id"] for row in participants] == [f"sub-PH000{i}" for i in range(1, 5)]
    assert set(json.loads((cohort / "participants.json").read_text())) == {"sex", "age", "site"}
    assert {row["sex"] for row in participants} == {"M", "F"}
    for row in participants:
        name = row["participant_id"]
        (session,) = read_rows(cohort / name / f"{name}_sessions.tsv")
        truth = json.loads((cohort / f"{name}/ses-M000/anat/{name}_ses-M000_T1w.json").read_text())["Phantom"]
        assert session["session_id"] == "ses-M000"
        assert session["diagnosis"] == truth["diagnosis"]
        assert float(session["age"]) == float(row["age"]) == truth["age"]
        assert row["sex"] == truth["sex"]
        assert row["site"] == truth["site"]
        assert truth["seed"] == 3 and (truth["severity"] > 0) == (truth["diagnosis"] == "AD")
        image = nib.load(cohort / f"{name}/ses-M000/anat/{name}_ses-M000_T1w.nii.gz")
        label = nib.load(
            cohort / f"derivatives/hippocampus/{name}/ses-M000/anat/{name}_ses-M000_desc-hippocampus_dseg.nii.gz"
        )
        assert image.shape == label.shape == (48, 64, 64)
        assert np.array_equal(image.affine, label.affine)
        assert image.header.get_zooms() == (3, 3, 3)
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) == {0, 1, 2}


def test_started_again_it_makes_only_what_is_missing(cohort):
    before = files(cohort)
    image = cohort / "sub-PH0002/ses-M000/anat/sub-PH0002_ses-M000_T1w.nii.gz"
    kept = cohort / "sub-PH0001/ses-M000/anat/sub-PH0001_ses-M000_T1w.nii.gz"
    changed = kept.stat().st_mtime_ns
    image.unlink()
    phantom(cohort, 4, seed=3, spacing=3, workers=1)
    assert files(cohort) == before
    assert kept.stat().st_mtime_ns == changed


def test_an_interrupted_run_leaves_whole_files_only(tmp_path, monkeypatch):
    write, calls = Path.write_bytes, []

    def fail(path, content):
        calls.append(path)
        if len(calls) == 4:  # the second subject's label map
            write(path, b"half a file")
            raise OSError("No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        phantom(tmp_path / "d", 3, spacing=3, workers=1)
    names = files(tmp_path / "d")
    assert not any("partial" in name for name in names)
    assert not _finished(tmp_path / "d", Settings(), 2)
    phantom(tmp_path / "d", 3, spacing=3, workers=1)
    assert [row["participant_id"] for row in read_rows(tmp_path / "d" / "participants.tsv")] == [
        "sub-PH0001",
        "sub-PH0002",
        "sub-PH0003",
    ]


def test_what_a_killed_run_left_is_removed(cohort):
    before = files(cohort)
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = partial_prefix().replace(f"-{os.getpid()}-", f"-{dead.pid}-") + "x.nii.gz"
    image = cohort / "sub-PH0002/ses-M000/anat/sub-PH0002_ses-M000_T1w.nii.gz"
    for folder in (cohort, image.parent, cohort / "derivatives/hippocampus/sub-PH0002/ses-M000/anat"):
        (folder / name).write_bytes(b"half")
    image.unlink()  # killed before this subject was whole
    phantom(cohort, 4, seed=3, spacing=3, workers=1)
    assert files(cohort) == before


@pytest.mark.slow
def test_a_subject_is_the_same_in_any_cohort_and_with_any_number_of_workers(cohort, tmp_path):
    phantom(tmp_path / "d", 3, seed=3, spacing=3, first=2, workers=2)
    whole, part = files(cohort), files(tmp_path / "d")
    shared = [name for name in part if "sub-PH" in name]
    assert {name.split("/")[0] for name in shared if name.startswith("sub")} == {
        "sub-PH0002",
        "sub-PH0003",
        "sub-PH0004",
    }
    assert len(shared) == 3 * 4
    assert all(part[name] == whole[name] for name in shared)
    # A second call extends it to the first subject; then it is the same data set.
    phantom(tmp_path / "d", 1, seed=3, spacing=3, workers=1)
    assert files(tmp_path / "d") == whole


def test_other_parameters_in_the_same_folder_are_refused(cohort):
    before = files(cohort)
    with pytest.raises(InputError, match=r"(?s)seed +there 3 +asked 4.*another --output"):
        phantom(cohort, 4, seed=4, spacing=3, workers=1)
    with pytest.raises(InputError, match=r"effect_hippocampus +there 0\.\d+ +asked 0\.11"):
        phantom(cohort, 4, seed=3, spacing=3, effect_hippocampus=0.11, workers=1)
    assert files(cohort) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        phantom(tmp_path, 1, spacing=3)
    with pytest.raises(InputError, match="not an empty folder"):
        phantom(tmp_path / "thesis.docx", 1, spacing=3)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("spacing", "4", "1, 2 or 3"),
        ("spacing", "1.5", "whole number"),
        ("subjects", "0", "whole number from 1"),
        ("subjects", "many", "whole number"),
        ("first", "0", "whole number from 1"),
        ("workers", "-1", "whole number from 1"),
        ("seed", "-1", "from 0"),
        ("sites", "4", "1 to 3"),
        ("ad_share", "1.5", "0.0 to 1.0"),
        ("ad_share", "nan", "0.0 to 1.0"),
        ("prefix", "a_b", "letters"),
        ("prefix", "A1", "end in a letter"),
        ("effect_ventricles", "5.0", "0.0 to 1.0"),
        ("effect_sex", "large", "a number"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, capsys, option, value, says):
    options = {"output": str(tmp_path / "d"), "subjects": "1", option: value}
    assert main(["phantom", *(word for name in options for word in (f"--{name}", options[name]))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"volta3d phantom: --{option.replace('_', '-')} {value}: ") and says in error
    assert not (tmp_path / "d").exists()


def test_command_line(tmp_path, capsys):
    words = ["phantom", "--output", str(tmp_path / "d"), "--subjects", "1", "--spacing", "3", "--prefix", "sub-Test"]
    assert main([*words, "--workers", "1"]) == 0
    assert "1 phantoms of 3 mm (1 new)" in capsys.readouterr().out
    assert (tmp_path / "d/sub-Test0001/ses-M000/anat/sub-Test0001_ses-M000_T1w.nii.gz").is_file()
    assert main([*words, "--seed", "9"]) == 2
    assert "seed" in capsys.readouterr().err
