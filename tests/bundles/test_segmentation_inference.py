# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle's masks, in their scans' own space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from csv_rows import read_rows
from labelled_scans import centred_affine, head
from monai.bundle import ConfigParser, ConfigWorkflow
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from segmentation_bundle import BUNDLE, NETWORK, configs, input_error

from volta_components.data.datalist import load_datalist


def infer(finished: Path, source: Path, output: Path, **changes: Any) -> list[dict[str, str]]:
    made = ConfigWorkflow(
        config_file=configs("inference"),
        meta_file=configs("metadata")[0],
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        source=str(source),
        output_dir=str(output),
        model_path=str(finished / "models" / "model.pt"),
        **{**NETWORK, **changes},
    )
    made.parser["handlers"] = made.parser["handlers"][:1]
    made.initialize()
    assert made.check_properties() == []
    made.run()
    return read_rows(output / "volumes.csv")


def test_a_mask_lies_in_its_scans_own_space(finished: Path, tmp_path: Path) -> None:
    """The same head in four orientations and two types of file: the same mask in the world, on each file's grid."""
    affine = centred_affine((36, 40, 34))
    volume, _ = head((36, 40, 34), affine, seed=20)
    image = nib.Nifti1Image((volume * 1000).astype(np.int16), affine)
    image.set_qform(affine, code=1)
    (tmp_path / "raw").mkdir()
    for codes, suffix in (("RAS", "nii.gz"), ("LPS", "nii"), ("PIR", "nii.gz"), ("SLA", "mgz")):
        turned = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes))))
        if suffix == "mgz":
            turned = nib.MGHImage(np.asarray(turned.dataobj), turned.affine)
        nib.save(turned, tmp_path / "raw" / f"sub-{codes}_T1w.{suffix}")
    rows = infer(finished, tmp_path / "raw", tmp_path / "out")
    assert [row["subject_id"] for row in rows] == ["sub-LPS", "sub-PIR", "sub-RAS", "sub-SLA"]
    masks = []
    for row in rows:
        scan = nib.load(row["file"])
        mask = nib.load(tmp_path / "out" / f"{row['subject_id']}_T1w_hippocampus.nii.gz")
        assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-4)
        assert mask.get_data_dtype() == np.uint8
        canonical = nib.as_closest_canonical(mask)
        masks.append(np.asarray(canonical.dataobj))
        assert np.allclose(canonical.affine, affine, atol=1e-4)
        for side, value in (("left", 1), ("right", 2)):
            assert float(row[f"{side}_mm3"]) == pytest.approx((masks[-1] == value).sum(), abs=0.06)
    assert masks[0].any()
    assert all(np.array_equal(mask, masks[0]) for mask in masks[1:])


def test_a_prepared_scan_gets_the_mask_that_was_scored(finished: Path, labelled: Path, tmp_path: Path) -> None:
    source = Path(load_datalist(labelled).split(0)[1][1]["image"])
    infer(finished, source, tmp_path)
    scored = nib.load(finished / "predictions" / "masks" / "sub-0005_ses-M000.nii.gz")
    mask = nib.load(tmp_path / "sub-0005_ses-M000_hippocampus.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(scored.dataobj))


def test_workers_load_in_memory_and_leave_the_device_alone(finished: Path, labelled: Path, tmp_path: Path) -> None:
    """A forked process cannot use CUDA; the evaluator moves each batch."""
    parser = ConfigParser()
    parser.read_config(configs("inference"))
    parser.update({**NETWORK, "device": "$torch.device('meta')"})
    item = {"image": str(labelled / "images" / "sub-0000_ses-M000.nii")}
    image = parser.get_parsed_content("preprocessing")(item)["image"]
    assert image.device.type == "cpu"
    for workers in (0, 2):
        infer(finished, labelled / "images", tmp_path / str(workers), num_workers=workers)
    alone, helped = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".jsonl"}
        for name in ("0", "2")
    )
    assert len(alone) == 11 and alone == helped


def test_scans_of_the_same_file_name_get_masks_of_their_own(finished: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("sub-1", "sub-2")):
        affine = centred_affine((36, 40, 34))
        volume, _ = head((36, 40, 34), affine, seed=number)
        (tmp_path / "raw" / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / "raw" / name / "T1.nii.gz")
    infer(finished, tmp_path / "raw", tmp_path / "out")
    masks = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert masks == ["sub-1/T1_hippocampus.nii.gz", "sub-2/T1_hippocampus.nii.gz"]
    with input_error("choose a folder outside of it"):
        infer(finished, tmp_path / "raw", tmp_path / "raw" / "masks")
    shutil.copy(tmp_path / "raw" / "sub-1" / "T1.nii.gz", tmp_path / "raw" / "sub-1" / "T1.mgz")
    with input_error("the same name", "T1.mgz", "T1.nii.gz"):
        infer(finished, tmp_path / "raw", tmp_path / "again")


def test_a_model_is_not_used_at_another_spacing_than_it_was_trained_at(finished: Path, tmp_path: Path) -> None:
    with input_error("was trained with other settings", "spacing      1.0", "2.0", "volume_size"):
        infer(finished, tmp_path / "any", tmp_path / "out", spacing=2.0, volume_size=[16, 16, 16])


def test_bad_scans_are_all_named_before_any_is_segmented(finished: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled / "images", tmp_path / "scans")
    for name in ("sub-0003_ses-M000.nii", "sub-0007_ses-M000.nii"):
        path = tmp_path / "scans" / name
        path.write_bytes(path.read_bytes()[:2000])
    with input_error("2 of 10 scans cannot be used", "sub-0003", "sub-0007"):
        infer(finished, tmp_path / "scans", tmp_path / "out")
    assert not (tmp_path / "out").exists()
