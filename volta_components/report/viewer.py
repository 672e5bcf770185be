# SPDX-License-Identifier: Apache-2.0
"""The interactive slice viewer: nilearn's, with the same volume embedded once for several overlays."""

from __future__ import annotations

import hashlib
import re
import warnings

import nibabel as nib
import numpy as np

from volta_components.report.masks import Case

# Missed, agreed, too much, on a scale from 0 (nothing) to 3.
AGREEMENT = ("#f0e442", "#009e73", "#d55e00")  # of Okabe and Ito: people who are colour-blind tell them apart
LINK = re.compile(r"<link\b[^>]*\bhref\s*=\s*[\"']?https?://[^>]*>")
# A crosshair of one voxel, in the viewer's blue, would hide a hippocampus; what is under this one is seen.
CROSSHAIR = ('"crosshair": true', '"crosshair": true, "colorCrosshair": "rgba(255, 255, 255, 0.3)"')
OPACITY = 0.55
SLIDER = re.compile(r'(<input type="range"[^>]*value=)"100"')
STYLE = (
    "<style>html, body { margin: 0; background: #000; color: #ddd; overflow: hidden; "
    'font: 14px system-ui, "DejaVu Sans", sans-serif; } body > div { padding: 0 0 4px; } '
    "div > div { padding: 0 16px; } p { margin: 0; }</style>"
)
BLOB = re.compile(r"[A-Za-z0-9+/]{2000,}={0,2}")


def agreement_map(mask: nib.Nifti1Image, truth: nib.Nifti1Image) -> nib.Nifti1Image:
    """1 where the truth is missed (or is the other side), 2 where both agree, 3 where the mask alone is."""
    ours, true = np.asanyarray(mask.dataobj), np.asanyarray(truth.dataobj)
    values = np.select([(true > 0) & (ours == true), true > 0, ours > 0], [2, 1, 3], 0)
    return nib.Nifti1Image(values.astype(np.float32), truth.affine)


def slice_viewer(case: Case, variant: str) -> str:
    """HTML of a page of its own that shows where a variant's mask and the truth agree; it needs no network.

    It opens at the left hippocampus.
    """
    from matplotlib.colors import ListedColormap
    from nilearn.plotting import view_img

    assert case.image is not None and case.truth is not None
    labels = np.asanyarray(case.truth.dataobj)
    truth = labels == labels[labels > 0].min() if (labels > 0).any() else labels > 0
    centre = nib.affines.apply_affine(case.truth.affine, np.argwhere(truth).mean(axis=0)) if truth.any() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = view_img(
            agreement_map(case.masks[variant], case.truth),
            bg_img=nib.Nifti1Image(np.asanyarray(case.image.dataobj).astype(np.float32), case.image.affine),
            cut_coords=None if centre is None else tuple(centre),
            cmap=ListedColormap(["#000000", *AGREEMENT]),
            threshold=0.5,
            vmin=-0.5,
            vmax=3.5,
            symmetric_cmap=False,
            colorbar=False,
            resampling_interpolation="nearest",
            black_bg=True,
            dim=0,
            opacity=OPACITY,
            width_view=900,
        )
    # The page's icon would be fetched from the network.
    page = LINK.sub("", str(view.html)).replace(*CROSSHAIR)
    page = SLIDER.sub(rf'\1"{100 * OPACITY:.0f}"', page)
    return page.replace("<body>", f"<body>{STYLE}", 1)


def share_blobs(pages: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Pages with ``@@key@@`` for their long base64 texts, and these by key: a volume is embedded once."""
    blobs: dict[str, str] = {}

    def take(found: re.Match[str]) -> str:
        key = hashlib.sha256(found[0].encode()).hexdigest()[:12]
        blobs[key] = found[0]
        return f"@@{key}@@"

    return {name: BLOB.sub(take, page) for name, page in pages.items()}, blobs
