# SPDX-License-Identifier: Apache-2.0
"""Tiny copies of the public data sets: true names, formats and quirks, heads of a few millimetres.

Each head is a ball with a neck and one bright landmark at a known world coordinate, which is far from every axis of
symmetry, so that a flip, a swap of axes or a shift shows.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

LANDMARK = (4.0, -3.0, 5.5)
SHAPE = (24, 26, 28)


def rotation(degrees_x=0.0, degrees_y=0.0, degrees_z=0.0):
    result = np.eye(3)
    for axis, degrees in enumerate((degrees_x, degrees_y, degrees_z)):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        result = turn @ result
    return result


def grid(codes="RAS", spacing=(1.0, 1.0, 1.0), shape=SHAPE, turn=None, centre=(0.3, -1.2, 0.7)):
    """Shape and affine of a grid with axes towards ``codes``, centred on a world point; ``spacing`` in RAS order."""
    axes = (np.eye(3) if turn is None else turn) * np.asarray(spacing)
    ras = np.eye(4)
    ras[:3, :3] = axes
    ras[:3, 3] = np.asarray(centre) - axes @ ((np.asarray(shape) - 1) / 2)
    move = ornt_transform(axcodes2ornt(("R", "A", "S")), axcodes2ornt(tuple(codes)))
    new_shape = apply_orientation(np.empty(shape, bool), move).shape
    return new_shape, ras @ inv_ornt_aff(move, shape)


def world(shape, affine):
    index = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)
    return nib.affines.apply_affine(affine, index).reshape(*shape, 3)


def head(shape, affine, landmark=LANDMARK, seed=0, neck=True, stripped=False):
    """Intensities of the head at every voxel: body about 300, landmark up to 1,000, air with a little noise."""
    xyz = world(shape, affine)
    radius = np.sqrt((xyz[..., 0] / 9) ** 2 + (xyz[..., 1] / 10.5) ** 2 + (xyz[..., 2] / 10) ** 2)
    body = 1 / (1 + np.exp((radius - 1) * 14))
    if neck:
        column = np.sqrt(xyz[..., 0] ** 2 + (xyz[..., 1] + 2) ** 2)
        body = np.maximum(body, 1 / (1 + np.exp((column - 3.5) * 2)) / (1 + np.exp((xyz[..., 2] + 6) * 2)))
    blob = np.exp(-((xyz - np.asarray(landmark)) ** 2).sum(-1) / (2 * 1.6**2))
    field = body * (300 + 4 * xyz[..., 0] + 3 * xyz[..., 1] + 5 * xyz[..., 2]) + 700 * blob
    if stripped:
        return np.where(body + blob > 0.5, field, 0)
    return field + np.abs(np.random.default_rng(seed).normal(0, 4, shape))


def save(path, voxels, affine, dtype=np.int16, code=1):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.round(voxels) if np.dtype(dtype).kind in "iu" else voxels
    image = nib.Nifti1Image(np.asarray(voxels).astype(dtype), affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def save_head(path, codes="RAS", spacing=(1.0, 1.0, 1.0), shape=SHAPE, turn=None, dtype=np.int16, **options):
    new_shape, affine = grid(codes, spacing, shape, turn)
    return save(path, head(new_shape, affine, **options), affine, dtype)


def find_landmark(path):
    """World coordinate of the brightest spot of a prepared volume, by the centroid of what is above half."""
    image = nib.load(path)
    voxels = image.get_fdata()
    peak = np.array(np.unravel_index(np.argmax(voxels), voxels.shape))
    near = world(voxels.shape, image.affine)
    distance = np.linalg.norm(near - nib.affines.apply_affine(image.affine, peak), axis=-1)
    weight = np.where(distance < 6, np.clip(voxels - 0.6, 0, None), 0)
    return (near * weight[..., None]).sum((0, 1, 2)) / weight.sum()


# --- BIDS ------------------------------------------------------------------------------------------------------------


def make_bids(root, subjects=6, cohort="ADNI", labels=True, sessions=("ses-M000",), spacing=(1.0, 1.0, 1.0)):
    """As Clinica writes it; every third scan oblique, every second not RAS; plain and gzip NIfTI."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": f"Tiny {cohort}", "BIDSVersion": "1.7.0"}))
    rows = ["participant_id\tsex\tage_bl"]
    for i in range(subjects):
        name = f"sub-ADNI{i // 3 + 2:03d}S{295 + i:04d}" if cohort == "ADNI" else f"sub-{cohort}{i + 1:03d}"
        rows.append(f"{name}\t{'MF'[i % 2]}\t{60 + i}")
        visits = ["session_id\tdiagnosis\tage"]
        for n, session in enumerate(sessions):
            turn = rotation(8, -5, 12) if i % 3 == 2 else None
            codes = "RAS" if i % 2 == 0 else ("LPS", "PIR", "ASL")[i // 2 % 3]
            suffix = ".nii" if i % 4 == 3 else ".nii.gz"
            stem = f"{name}_{session}"
            image = root / name / session / "anat" / f"{stem}_T1w{suffix}"
            save_head(image, codes, spacing, turn=turn, seed=100 * i + n)
            visits.append(f"{session}\t{('CN', 'AD')[i // 2 % 2]}\t{60 + i + n / 2}")
            if labels:
                shape, affine = grid(codes, spacing, turn=turn)
                x = world(shape, affine)
                label = np.zeros(shape)
                for value, side in ((1, -1), (2, 1)):
                    label[(((x - [side * 4, -2, -2]) / [2.2, 3.5, 2.0]) ** 2).sum(-1) < 1] = value
                place = root / "derivatives" / "hippocampus" / name / session / "anat"
                save(place / f"{stem}_desc-hippocampus_dseg.nii.gz", label, affine, np.uint8)
        (root / name / f"{name}_sessions.tsv").write_text("\n".join(visits) + "\n")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


# --- IXI -------------------------------------------------------------------------------------------------------------


def write_xls(path, rows):
    """An old Excel sheet (BIFF 2), which xlrd reads like IXI's own."""
    out = struct.pack("<HHHH", 0x0009, 4, 0x0007, 0x0010)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell is None:
                continue
            if isinstance(cell, str):
                text = cell.encode("latin-1")
                out += struct.pack("<HHHH3sB", 0x0004, 8 + len(text), r, c, b"\0\0\0", len(text)) + text
            else:
                out += struct.pack("<HHHH3sd", 0x0003, 15, r, c, b"\0\0\0", float(cell))
    Path(path).write_bytes(out + struct.pack("<HH", 0x000A, 0))


def make_ixi(root):
    """Six scans; ids in two rows, a row without scan, a scan without row, an unknown sex, missing ages."""
    root = Path(root)
    for i, (number, site) in enumerate([(2, "Guys"), (12, "HH"), (13, "HH"), (14, "IOP"), (35, "IOP"), (40, "Guys")]):
        name = f"IXI{number:03d}-{site}-{828 + i:04d}-T1.nii.gz"
        save_head(root / "IXI-T1" / name, "PIR", (1.2, 0.9375, 0.9375), shape=(20, 28, 28), seed=i)
    rows = [
        ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE"],
        [2, 2, 164, 35.8],
        [12, 1, 175, 38.78],
        [12, 1, 175, 38.78],
        [13, 1, 182, None],
        [13, 1, 182, 46.71],
        [14, 2, 163, None],
        [35, 3, 170, 30.0],
        [99, 1, 180, 50.0],
    ]
    write_xls(root / "IXI.xls", rows)
    return root


# --- BraTS -----------------------------------------------------------------------------------------------------------


def make_brats(root):
    """GLI with two time points of a patient, MET, PED as .nii, PED without t1n, an empty case."""
    root = Path(root)
    cases = [
        ("GLI/training_data1/BraTS-GLI-00005-100", ".nii.gz"),
        ("GLI/training_data1/BraTS-GLI-00005-101", ".nii.gz"),
        ("GLI/training_data2/BraTS-GLI-00008-100", ".nii.gz"),
        ("MET/BraTS-MET-00002-000", ".nii.gz"),
        ("PED/BraTS-PED-00012-000", ".nii"),
    ]
    for i, (case, suffix) in enumerate(cases):
        name = Path(case).name
        # BraTS is on the SRI24 atlas' grid, LPS; its brains are stripped.
        landmark = (4.0 - 0.5 * i, -3.0, 5.5)
        for modality in ("t1n", "t2f"):
            save_head(root / case / f"{name}-{modality}{suffix}", "LPS", stripped=True, landmark=landmark, neck=False)
        shape, affine = grid("LPS")
        save(root / case / f"{name}-seg{suffix}", np.zeros(shape), affine, np.uint8)
    lonely = root / "PED/BraTS-PED-00099-000"
    save_head(lonely / "BraTS-PED-00099-000-t2w.nii.gz", "LPS", stripped=True)
    (root / "PED/BraTS-PED-00100-000").mkdir()
    return root


# --- HarP ------------------------------------------------------------------------------------------------------------


def write_minc(path, voxels, affine):
    """A MINC 1 volume (netCDF) in z, y, x order, as the hippocampus release has; ``affine`` is diagonal, RAS order."""
    from scipy.io import netcdf_file

    path.parent.mkdir(parents=True, exist_ok=True)
    top = float(voxels.max())
    with netcdf_file(path, "w") as stream:
        names = ("zspace", "yspace", "xspace")
        for axis, name in zip((2, 1, 0), names, strict=True):
            stream.createDimension(name, voxels.shape[axis])
            variable = stream.createVariable(name, "i", ())
            variable.spacing = b"regular__"
            variable.step = float(affine[axis, axis])
            variable.start = float(affine[axis, 3])
            variable.length = voxels.shape[axis]
            variable.direction_cosines = np.eye(3)[axis]
        image = stream.createVariable("image", "h", names)
        image.signtype = b"unsigned"
        image.valid_range = np.array([0.0, 65535.0])
        image[:] = np.round(voxels.T / top * 65535).astype(np.uint16).view(np.int16)
        for name, value in (("image-max", top), ("image-min", 0.0)):
            variable = stream.createVariable(name, "d", ())
            variable.data[...] = value
    return path


HARP = [
    ("100", "ADNI_002_S_0295_13722", {}),
    ("100", "ADNI_007_S_1304_74384", {"swap": True}),
    ("100", "ADNI_011_S_0003_90001", {"offset": 7000}),
    ("35", "ADNI_016_S_4121_280306", {}),
    ("35", "ADNI_023_S_0030_11111", {"swap": True}),
    ("35", "ADNI_067_S_0077_22222", {"shift": 3.0}),
    ("35", "ADNI_098_S_0269_33333", {"sides": "L"}),
]


def harp_label(shape, affine, side):
    x = world(shape, affine)
    return ((((x - [side * 4.2, -2, -2]) / [2.2, 3.7, 2.1]) ** 2).sum(-1) < 1).astype(float)


def make_harp(root, spacing=(1.0, 1.0, 1.0)):
    """Seven scans: plain, swapped and on the list, offset values, on the list but right, swapped but not on the list,
    labels on another grid, one side missing; and a label without a scan."""
    root = Path(root)
    shape, affine = grid("RAS", spacing)
    for i, (part, name, quirk) in enumerate(HARP):
        write_minc(root / part / f"{name}_ACPC.mnc", head(shape, affine, seed=i), affine)
        for letter, side in (("L", -1), ("R", 1)):
            if letter not in quirk.get("sides", "LR"):
                continue
            label = harp_label(shape, affine, -side if quirk.get("swap") else side) + quirk.get("offset", 0)
            placed = affine.copy()
            placed[0, 3] += quirk.get("shift", 0)
            dtype = np.float32 if "offset" in quirk else np.uint8
            save(root / f"Labels_{part}_NIFTI" / f"{name}_{letter}.nii", label, placed, dtype)
    for letter in "LR":
        save(root / "Labels_100_NIFTI" / f"ADNI_999_S_9999_1_{letter}.nii", harp_label(shape, affine, 1), affine)
    return root


# --- DICOM -----------------------------------------------------------------------------------------------------------


def write_series(
    folder,
    voxels,
    affine,
    description="MPRAGE",
    image_type=("ORIGINAL", "PRIMARY", "M", "ND"),
    patient="002_S_0295",
    number=2,
    date="20060418",
    suffix=".dcm",
    slices=None,
    uid=None,
    **facts,
):
    """A series of 2-D slices along the last axis of ``voxels``; ``affine`` is RAS+, DICOM's world is LPS+.

    ``facts`` are further values of the header; of None, the value is left out.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    column, row = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    seed = f"{folder}{description}{number}"
    study = generate_uid(entropy_srcs=[patient, date or "undated"])
    series = uid or generate_uid(entropy_srcs=[seed])
    for k in range(voxels.shape[2]):
        if slices is not None and k not in slices:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[seed, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        data.Modality, data.Manufacturer, data.PatientPosition = "MR", "SIEMENS", "HFS"
        data.PatientID = data.PatientName = patient
        data.PatientSex, data.PatientAge = "F", "075Y"
        data.StudyInstanceUID, data.SeriesInstanceUID = study, series
        data.StudyDate = data.SeriesDate = data.AcquisitionDate = date
        data.StudyTime = data.AcquisitionTime = data.ContentTime = "080000"
        data.SeriesNumber, data.AcquisitionNumber, data.InstanceNumber = number, 1, k + 1
        data.SeriesDescription = data.ProtocolName = description
        data.ImageType = list(image_type)
        data.ScanningSequence, data.SequenceVariant, data.MRAcquisitionType = ["GR", "IR"], ["SP", "MP"], "3D"
        data.RepetitionTime, data.EchoTime, data.InversionTime, data.FlipAngle = "2300", "2.98", "900", "9"
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        data.SliceThickness = data.SpacingBetweenSlices = f"{spacing[2]:.6f}"
        data.ImageOrientationPatient = [f"{v:.8f}" for v in (*column, *row)]
        data.ImagePositionPatient = [f"{v:.6f}" for v in (lps @ [0, 0, k, 1])[:3]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = np.round(voxels[:, :, k].T).astype("<u2").tobytes()
        for name, value in facts.items():
            setattr(data, name, value)
            if value is None:
                delattr(data, name)
        data.save_as(folder / f"{description.replace(' ', '_')}_{number}_{k:04d}{suffix}", enforce_file_format=True)
    return series


def make_dicom(root):
    """Two ADNI patients with localiser, derived, T2 and repeated series; a second session; two series in one folder."""
    root = Path(root)
    shape, affine = grid("PIR", (1.2, 0.94, 0.94), (18, 28, 28))
    oblique_shape, oblique = grid("PIR", (1.2, 0.94, 0.94), (18, 28, 28), turn=rotation(6, 4, -7))
    first = root / "002_S_0295"
    write_series(first / "MP-RAGE/2006-04-18_08_20_30.0/S13408", head(shape, affine, seed=1), affine)
    write_series(
        first / "3_Plane_Loc/2006-04-18_08_20_30.0/S13407",
        head(shape, affine)[:, :, :3],
        affine,
        "3 Plane Localizer",
        ("ORIGINAL", "PRIMARY", "LOCALIZER"),
        number=1,
    )
    write_series(
        first / "MPR_derived/2006-04-18_08_20_30.0/S13410",
        head(shape, affine),
        affine,
        "MPRAGE MPR",
        ("DERIVED", "SECONDARY", "MPR"),
        number=7,
    )
    write_series(first / "T2/2006-04-18_08_20_30.0/S13411", head(shape, affine), affine, "Axial PD-T2 TSE", number=4)
    write_series(
        first / "MP-RAGE_REPEAT/2006-04-18_08_20_30.0/S13409",
        head(shape, affine, seed=2),
        affine,
        "MPRAGE Repeat",
        number=3,
    )
    write_series(first / "MP-RAGE/2007-04-20_09_00_00.0/S20000", head(shape, affine, seed=3), affine, date="20070420")
    mixed = root / "011_S_0003/all"
    write_series(
        mixed,
        head(oblique_shape, oblique, seed=4),
        oblique,
        "IR-SPGR w/acceleration".replace("/", " "),
        patient="011_S_0003",
        suffix="",
    )
    write_series(mixed, head(oblique_shape, oblique), oblique, "Field Map", patient="011_S_0003", number=9, suffix="")
    broken = root / "023_S_0030/MP-RAGE/2006-01-01_00_00_00.0/S1"
    broken.mkdir(parents=True)
    (broken / "slice.dcm").write_bytes(bytes(128) + b"DICM" + b"\x01" * 40)
    return root


def write_enhanced(path, voxels, affine, patient="P1", description="MPRAGE", slices=None):
    """A series as one image of many frames (enhanced MR), slices along the last axis of ``voxels``."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    column, row = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    numbers = [k for k in range(voxels.shape[2]) if slices is None or k in slices]

    def item(**values):
        data = Dataset()
        for name, value in values.items():
            setattr(data, name, value)
        return data

    def frame(place, k):
        position = [f"{v:.6f}" for v in (lps @ [0, 0, k, 1])[:3]]
        content = item(StackID="1", InStackPositionNumber=place + 1, DimensionIndexValues=[1, place + 1])
        return item(
            FrameContentSequence=Sequence([content]),
            PlanePositionSequence=Sequence([item(ImagePositionPatient=position)]),
        )

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = EnhancedMRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = EnhancedMRImageStorage, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=[patient])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[str(path), "series"])
    data.Modality, data.Manufacturer, data.PatientID, data.PatientName = "MR", "Philips", patient, patient
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = "20060418"
    data.SeriesNumber, data.InstanceNumber, data.SeriesDescription = 3, 1, description
    data.ImageType, data.MRAcquisitionType = ["ORIGINAL", "PRIMARY", "T1", "NONE"], "3D"
    data.Rows, data.Columns, data.NumberOfFrames = voxels.shape[1], voxels.shape[0], len(numbers)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    measures = item(
        PixelSpacing=[f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"],
        SliceThickness=f"{spacing[2]:.6f}",
        SpacingBetweenSlices=f"{spacing[2]:.6f}",
    )
    axes = item(ImageOrientationPatient=[f"{v:.8f}" for v in (*column, *row)])
    data.SharedFunctionalGroupsSequence = Sequence(
        [item(PixelMeasuresSequence=Sequence([measures]), PlaneOrientationSequence=Sequence([axes]))]
    )
    data.PerFrameFunctionalGroupsSequence = Sequence([frame(place, k) for place, k in enumerate(numbers)])
    data.PixelData = b"".join(np.round(voxels[:, :, k].T).astype("<u2").tobytes() for k in numbers)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
