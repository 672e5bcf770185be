# SPDX-License-Identifier: Apache-2.0
"""Every kind of broken volume, with what is said of it, and the means to make more."""

import gzip

import nibabel as nib
import numpy as np
import tiny_datasets as tiny

SHAPE = (9, 10, 11)


def ramp(dtype=np.int16, shape=SHAPE):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def good(path, dtype=np.int16, voxels=None):
    shape, affine = tiny.grid("LPS", (0.94, 0.94, 1.2), SHAPE)
    return tiny.save(path, ramp(dtype, shape) if voxels is None else voxels, affine, dtype)


def edit(path, **fields):
    """Write fields into the header of a plain NIfTI file, whatever NiBabel thinks of them."""
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


def pixdim(path, *spacing):
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    values = header["pixdim"].copy()
    values[1:4] = spacing
    return edit(path, pixdim=values)


def dimensions(path, *dim):
    return edit(path, dim=list(dim) + [1] * (8 - len(dim)))


def write(path, content):
    path.write_bytes(content)
    return path


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the checksum
    return write(path, bytes(data))


def with_values(path, count, value):
    voxels = ramp(np.float32, tiny.grid("LPS", shape=SHAPE)[0])
    voxels.ravel()[:count] = value
    return good(path, np.float32, voxels)


def four_d(path, n):
    image = nib.Nifti1Image(
        np.zeros((*SHAPE, n), np.int16) + np.arange(9)[:, None, None, None].astype(np.int16), np.eye(4)
    )
    image.to_filename(path)
    return path


def typed(path, dtype):
    voxels = np.zeros(SHAPE, dtype)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)
    return path


BROKEN = {
    "missing": (lambda d: d / "a.nii", "no such file"),
    "folder": (lambda d: (d / "a.nii").mkdir() or d / "a.nii", "a folder, not a file"),
    "dangling link": (lambda d: (d / "a.nii").symlink_to(d / "gone.nii") or d / "a.nii", "no such file"),
    "zero bytes": (lambda d: write(d / "a.nii.gz", b""), r"empty file \(0 bytes\)"),
    "a few bytes": (lambda d: write(d / "a.nii", b"abc"), "truncated: 3 bytes, less than a NIfTI header"),
    "html instead of an image": (lambda d: write(d / "a.nii.gz", b"<html>login</html>" * 50), "wrong magic number"),
    "wrong magic": (lambda d: edit(good(d / "a.nii"), magic=b"xyz"), "wrong magic number"),
    "truncated": (
        lambda d: write(d / "a.nii", good(d / "b.nii").read_bytes()[:1500]),
        r"truncated: 0\.0015 of 0\.0023 MB",
    ),
    "truncated gzip": (lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:-300]), "truncated"),
    "gzip cut in the header": (lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:40]), "truncated"),
    "gzip of too little": (
        lambda d: write(d / "a.nii.gz", gzip.compress(good(d / "b.nii").read_bytes()[:1500])),
        r"truncated: 0\.0015 of 0\.0023 MB",
    ),
    "wrong checksum": (lambda d: flip_byte(good(d / "a.nii.gz")), "damaged gzip stream"),
    "damaged gzip": (
        lambda d: write(d / "a.nii.gz", good(d / "b.nii.gz").read_bytes()[:60] + b"\xff" * 400),
        "damaged gzip|truncated",
    ),
    "NaN": (lambda d: with_values(d / "a.nii", None, np.nan), r"contains NaN \(990 voxels\)"),
    "Inf": (lambda d: with_values(d / "a.nii.gz", 3, -np.inf), r"contains Inf \(3 voxels\)"),
    "constant": (
        lambda d: good(d / "a.nii", voxels=np.full(tiny.grid("LPS", shape=SHAPE)[0], 5)),
        "constant: every voxel is 5",
    ),
    "4-D": (lambda d: four_d(d / "a.nii", 3), r"4-D \(9x10x11x3\)"),
    "2-D": (lambda d: dimensions(good(d / "a.nii"), 2, 9, 10), "2-D"),
    "a single slice": (lambda d: dimensions(good(d / "a.nii"), 3, 9, 10, 1), "not a volume: 9x10x1"),
    "huge": (lambda d: dimensions(good(d / "a.nii"), 3, 30000, 30000, 3000), "huge: 30000x30000x3000"),
    "impossible dimensions": (lambda d: dimensions(good(d / "a.nii"), 3, -4, 10, 11), "impossible dimensions"),
    "negative spacing": (lambda d: pixdim(good(d / "a.nii"), 1, -1, 1), "negative spacing 1 x -1 x 1 mm"),
    "zero spacing": (lambda d: pixdim(good(d / "a.nii"), 1, 0, 1), "zero spacing 1 x 0 x 1 mm"),
    "spacing NaN": (lambda d: pixdim(good(d / "a.nii"), 1, np.nan, 1), "not finite spacing"),
    "spacing in metres": (
        lambda d: edit(good(d / "a.nii"), srow_x=[0.001, 0, 0, 0], srow_y=[0, 0.001, 0, 0], srow_z=[0, 0, 0.001, 0]),
        "implausible spacing 0.001 x 0.001 x 0.001 mm",
    ),
    "singular affine": (
        lambda d: edit(good(d / "a.nii"), srow_x=[1, 0, 0, 0], srow_y=[1, 0, 0, 0], srow_z=[0, 0, 1, 0]),
        "singular affine",
    ),
    "zero affine": (
        lambda d: edit(good(d / "a.nii"), srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4),
        "singular affine",
    ),
    "affine NaN": (lambda d: edit(good(d / "a.nii"), srow_x=[np.nan, 0, 0, 0]), "affine with NaN"),
    "no sform and no qform": (lambda d: edit(good(d / "a.nii"), sform_code=0, qform_code=0), "no orientation"),
    "colour": (lambda d: typed(d / "a.nii", [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour, complex"),
    "complex": (lambda d: typed(d / "a.nii", np.complex64), "colour, complex"),
    "unknown type": (lambda d: edit(good(d / "a.nii"), datatype=77), "unknown voxel type 77"),
    "inverted scale": (lambda d: edit(good(d / "a.nii"), scl_slope=-1.0, scl_inter=0.0), "negative scale factor"),
    "broken MINC": (lambda d: write(d / "a.mnc", b"CDF\x01 nothing more"), "damaged header|not a volume file"),
    "empty MINC": (lambda d: write(d / "a.mnc", b""), "empty file"),
    "no MGH": (lambda d: write(d / "a.mgz", gzip.compress(b"no")), "damaged header|less than an MGH header"),
}
