# SPDX-License-Identifier: Apache-2.0
"""``volta3d segment`` and ``embed``: what can be given, what is odd or wrong about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from inference_bundles import ORIENTATIONS, SHAPE, BrightSides, affine_of, embed, image_of, segment
from labelled_scans import head
from prepared import ROOT, make_prepared
from scipy import ndimage

from volta_components.downstream.start import save_model
from volta_components.errors import InputError
from volta_components.inference.scans import check_source, prepared_grid
from volta_components.method.weights import load_encoder


def test_a_datalist_keeps_its_own_grid_and_ids(encoder_bundle: Path, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", count=4, shape=(16, 16, 16))
    for source, name in ((data, "folder"), (data / "datalist.json", "file")):
        assert embed([source], tmp_path / name, bundle=encoder_bundle) == 0
    rows = read_rows(tmp_path / "folder" / "embeddings.csv")
    assert [(row["subject_id"], row["session"]) for row in rows] == [(f"sub-{i:04d}", "ses-M000") for i in range(4)]
    with (
        np.load(tmp_path / "folder" / "embeddings.npz") as first,
        np.load(tmp_path / "file" / "embeddings.npz") as second,
    ):
        assert np.array_equal(first["summary"], second["summary"])
        volume = nib.load(rows[2]["file"]).get_fdata(dtype=np.float32)
        with torch.no_grad():
            expected = load_encoder(encoder_bundle)(torch.from_numpy(volume)[None, None])[0].numpy()
        np.testing.assert_allclose(first["summary"][2], expected, atol=1e-5)
    assert prepared_grid(str(data), 2.0, [8, 8, 8]) == ((1.0,) * 3, (16,) * 3)
    assert prepared_grid("scan.nii", 2.0, [8, 9, 10]) == ((2.0,) * 3, (8, 9, 10))
    with pytest.raises(InputError, match=r"sources on different grids[^$]*1x1x1 mm +16x16x16[^$]*2x2x2 mm +8x8x8"):
        prepared_grid([str(data), "scan.nii"], 2.0, [8, 8, 8])


def test_a_damaged_datalist_is_refused(encoder_bundle: Path, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", count=3)
    path = data / "images" / "sub-0001_ses-M000.nii"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for run in (
        lambda: embed([data], tmp_path / "out", bundle=encoder_bundle),
        lambda: check_source(data),
    ):
        with pytest.raises(InputError, match=r"1 files of 3 items cannot be used[^$]*sub-0001_ses-M000\.nii"):
            run()
    check_source([data], deep=False)


def test_scans_of_one_name_get_folders(
    sides_bundle: Path, encoder_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As FreeSurfer's: ``SUBJECT/mri/T1.mgz``."""
    for number in range(2):
        folder = tmp_path / "subjects" / f"bert{number}" / "mri"
        folder.mkdir(parents=True)
        scan = nib.load(raw / "scans" / f"sub-isotropic{number:02d}_T1w.nii")
        nib.save(nib.MGHImage(np.asarray(scan.dataobj), scan.affine), folder / "T1.mgz")
    pattern = str(tmp_path / "subjects" / "*" / "mri" / "T1.mgz")
    assert segment([pattern], tmp_path / "masks", bundle=sides_bundle) == 0
    assert embed([pattern], tmp_path / "maps", bundle=encoder_bundle, attention=True) == 0
    for number in range(2):
        place = Path(f"bert{number}", "mri")
        mask = nib.load(tmp_path / "masks" / place / "T1_hippocampus.nii.gz")
        truth = nib.load(raw / "truth" / f"sub-isotropic{number:02d}_T1w.nii")
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(truth.dataobj))
        assert (tmp_path / "maps" / "attention" / place / "T1_attention.nii.gz").is_file()
    assert "file names are not unique" in capsys.readouterr().out

    other = tmp_path / "subjects" / "bert0" / "mri" / "T1.nii"
    shutil.copy(raw / "scans" / "sub-isotropic00_T1w.nii", other)
    with pytest.raises(InputError, match=r"would have the same name[^$]*T1\.mgz[^$]*T1\.nii"):
        segment([other.parent], tmp_path / "clash", bundle=sides_bundle)


def test_dicom_series_are_converted(sides_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = pytest.importorskip("tiny_datasets")
    affine = affine_of("anisotropic")
    voxels, label = head(SHAPE["anisotropic"], affine, seed=7)
    turned, truth = (image_of(a, affine).as_reoriented(ORIENTATIONS[13]) for a in (voxels * 1000, label))
    tiny.write_series(tmp_path / "dicom" / "t1", np.asarray(turned.dataobj), turned.affine)
    tiny.write_series(tmp_path / "dicom" / "t2", np.asarray(turned.dataobj), turned.affine, "Axial PD-T2 TSE", number=4)
    broken = tmp_path / "dicom" / "broken"
    broken.mkdir()
    (broken / "slice.dcm").write_bytes(bytes(128) + b"DICM" + b"\x01" * 40)
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"1 of 2 scans cannot be used[^$]*broken"):
        segment([tmp_path / "dicom"], output, bundle=sides_bundle)
    capsys.readouterr()
    assert segment([tmp_path / "dicom"], output, bundle=sides_bundle, skip_bad=True) == 0
    printed = capsys.readouterr()
    assert "1 T1 series converted" in printed.out and "Axial PD-T2 TSE" in printed.out
    assert "1 of 2 scans are left out" in printed.err and "broken" in printed.err
    (row,) = read_rows(output / "volumes.csv")
    assert (row["subject_id"], row["session"]) == ("sub-ADNI002S0295", "ses-20060418")
    scan, mask = nib.load(row["file"]), nib.load(output / "sub-ADNI002S0295_ses-20060418_hippocampus.nii.gz")
    assert Path(row["file"]).parent == output / "converted"
    assert mask.shape == scan.shape
    for value in (1, 2):
        centres = [
            nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == value)).mean(axis=0)
            for image in (mask, truth)
        ]
        np.testing.assert_allclose(*centres, atol=0.5)


def header_of(path: Path) -> dict[str, Any]:
    header = nib.load(path).header
    names = ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z")
    return {name: np.array(header[name])[:4] if name == "pixdim" else np.array(header[name]) for name in names}


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 2), (3, 0), (0, 4)])
def test_masks_and_maps_have_the_transforms_of_their_scan(
    sides_bundle: Path, encoder_bundle: Path, tmp_path: Path, qform_code: int, sform_code: int
) -> None:
    affine = affine_of("oblique")
    image = nib.Nifti1Image((head(SHAPE["oblique"], affine, seed=7)[0] * 1000).astype(np.int16), affine)
    shifted = affine.copy()
    shifted[:3, 3] += [0, 60, 0]
    image.set_sform(affine, sform_code)
    image.set_qform(shifted if sform_code and qform_code else affine, qform_code)
    scan = tmp_path / "scan_T1w.nii.gz"
    image.to_filename(scan)
    segment([scan], tmp_path / "masks", bundle=sides_bundle)
    embed([scan], tmp_path / "maps", bundle=encoder_bundle, attention=True)
    made = (tmp_path / "masks" / "scan_T1w_hippocampus.nii.gz", tmp_path / "maps/attention/scan_T1w_attention.nii.gz")
    for path in made:
        for name, value in header_of(path).items():
            assert np.array_equal(value, header_of(scan)[name]), name
    assert np.asarray(nib.load(made[0]).dataobj).dtype == np.uint8
    row, *_ = read_rows(tmp_path / "masks" / "volumes.csv")
    assert ("qform (code 1) and sform (code 2) disagree: up to 60.0 mm" in row["marks"]) is bool(
        sform_code and qform_code
    )


def test_a_scan_without_orientation_needs_one_by_the_user(
    sides_bundle: Path, encoder_bundle: Path, raw: Path, tmp_path: Path
) -> None:
    scan = tmp_path / "scan.img"
    source = nib.load(raw / "scans" / "sub-isotropic00_T1w.nii")
    codes = "".join(nib.aff2axcodes(source.affine))
    image = nib.AnalyzeImage(np.array(source.dataobj), None)
    image.header.set_zooms(source.header.get_zooms())
    image.to_filename(scan)
    for name, command, bundle in (("segment", segment, sides_bundle), ("embed", embed, encoder_bundle)):
        output = tmp_path / name
        with pytest.raises(InputError, match="no orientation"):
            command([scan], output, bundle=bundle)
        with pytest.raises(InputError, match="three axis codes"):
            command([scan], output, bundle=bundle, assume_orientation="RRS")
        assert command([scan], output, bundle=bundle, assume_orientation=codes.lower()) == 0
    mask = nib.load(tmp_path / "segment" / "scan_hippocampus.nii.gz")
    truth = nib.load(raw / "truth" / "sub-isotropic00_T1w.nii")
    for value in (1, 2):
        ours, true = np.asarray(mask.dataobj) == value, np.asarray(truth.dataobj) == value
        assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.8


def test_marks_stand_beside_the_results_and_on_the_console(
    sides_bundle: Path, encoder_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    affine = affine_of("isotropic")
    whole = image_of((head(SHAPE["isotropic"], affine, seed=7)[0] * 1000).astype(np.int16), affine)
    folder = tmp_path / "scans"
    folder.mkdir()
    whole.slicer[:18].to_filename(folder / "half.nii")
    for command, bundle, table in ((segment, sides_bundle, "volumes"), (embed, encoder_bundle, "embeddings")):
        command([folder], tmp_path / table, bundle=bundle)
        (row,) = read_rows(tmp_path / table / f"{table}.csv")
        assert "the field of view ends within the head at the right" in row["marks"]
        error = capsys.readouterr().err
        assert "1 of 1 scans are marked" in error and row["marks"] in error


def test_a_bundle_without_a_trained_model_is_used_with_the_one_that_ships(
    sides_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "sides"
    shutil.copytree(sides_bundle, bundle)
    overlay = {"init": "starter", "network_def": {"_target_": f"{__name__}.BrightSides"}, "largest_part": True}
    (bundle / "configs" / "starter.json").write_text(json.dumps(overlay))
    save_model(bundle / "models" / "model_starter.pt", BrightSides(), {})
    scan = raw / "scans" / "sub-isotropic00_T1w.nii"
    assert segment([scan], tmp_path / "own", bundle=bundle) == 0
    assert "model_starter" not in capsys.readouterr().out
    (bundle / "models" / "model.pt").unlink()
    assert segment([scan], tmp_path / "shipped", bundle=bundle) == 0
    assert "model_starter.pt: the small model that ships" in capsys.readouterr().out
    own, shipped = (np.asarray(nib.load(next((tmp_path / n).rglob("*.nii.gz"))).dataobj) for n in ("own", "shipped"))
    assert (shipped > 0).any()
    for side in (1, 2):  # the overlay's: each side keeps its largest part
        assert ndimage.label(shipped == side, np.ones((3, 3, 3)))[1] == 1
    assert ((shipped > 0) <= (own > 0)).all()


def test_scans_that_cannot_be_used_are_named_together(
    sides_bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = scans / "sub-zipped_T1w.nii.gz"
    image = nib.load(good)
    (scans / "a_cut.nii.gz").write_bytes(good.read_bytes()[:5000])
    (scans / "b_empty.nii").touch()
    nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), scans / "c_nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 4), np.int16), np.eye(4)), scans / "d_series.nii")
    output = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        segment([scans], output, bundle=sides_bundle)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 6 scans cannot be used:"
    for line, words in zip(
        lines[1:5],
        (("a_cut.nii.gz", "truncated"), ("b_empty.nii", "empty file"), ("c_nan.nii", "NaN"), ("d_series.nii", "4-D")),
        strict=True,
    ):
        assert all(word in line for word in words)
    assert "--skip-bad" in lines[-1]
    assert list(output.iterdir()) == []  # nothing was done yet

    assert segment([scans], output, bundle=sides_bundle, skip_bad=True) == 0
    assert [row["subject_id"] for row in read_rows(output / "volumes.csv")] == ["sub-isotropic00", "sub-zipped"]
    assert "4 of 6 scans are left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="no scan is left"):
        segment([scans / "b_empty.nii"], output, bundle=sides_bundle, skip_bad=True)


def test_wrong_options_are_told_before_anything_is_done(sides_bundle: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"source": [scans / "none.nii", scans / "nix*.nii"]},
            r"2 of the given sources are not there[^$]*none\.nii[^$]*nix",
        ),
        ({"output": scans / "masks"}, r"masks lies in --source .*scans"),
        ({"bundle": tmp_path / "nobody"}, r"nobody/configs/inference\.json: no such bundle; .*--bundle"),
        (
            {"bundle": ROOT / "bundles" / "ixi_sex"},
            r"ixi_sex: its network gives format .* instead of 'segmentation'",
        ),
        ({"overlays": ["tinny"]}, r"tinny\.json: no such overlay"),
        ({"device": "cuda:99"}, r"--device cuda:99: cannot be used here"),
        ({"device": "gpu"}, r"--device gpu: cannot be used here"),
    ]
    for changes, message in cases:
        given = {"source": [scans], "output": output, "bundle": sides_bundle, **changes}
        with pytest.raises(InputError, match=message):
            segment(**given)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no scans in it"):
        segment([tmp_path / "nothing"], output, bundle=sides_bundle)


def test_weights_that_are_missing_or_changed(
    sides_bundle: Path, encoder_bundle: Path, scans: Path, tmp_path: Path
) -> None:
    for run, bundle in ((segment, sides_bundle), (embed, encoder_bundle)):
        copy = tmp_path / bundle.name
        shutil.copytree(bundle, copy)
        model = copy / "models" / "model.pt"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.pt: its SHA-256 is not that of model\.json"):
            run([scans], tmp_path / "out", bundle=copy)
        record = model.with_suffix(".json").rename(tmp_path / f"{bundle.name}.json")
        shutil.copy(bundle / "models" / "model.pt", model)
        with pytest.raises(InputError, match=r"model\.pt: weights of a bundle, but no model\.json with their hash"):
            run([scans], tmp_path / "out", bundle=copy)
        record.rename(model.with_suffix(".json"))
        model.unlink()
        with pytest.raises(InputError, match=r"no such weights|no encoder in it"):
            run([scans], tmp_path / "out", bundle=copy)
