# SPDX-License-Identifier: Apache-2.0
"""One MONAI Label server for all tests that need no other; those that train come last."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from label_server import CLASSES, HARP, LABEL, ROOT, SMALL, Server, page_blocks, running
from labelled_scans import head, make_labelled
from monai.bundle import ConfigWorkflow
from packed import random_weights
from web import free_port

from volta_components.files import write_json
from volta_components.sharing.pack import assemble


@pytest.fixture(scope="session")
def _environment() -> None:
    if not (LABEL / ".ready").is_file():
        message = "there is no MONAI Label environment (.venv-label): make test-label makes it"
        if os.environ.get("LABEL_TESTS") == "required":
            pytest.fail(message)
        pytest.skip(message)


# --- what is served ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> dict[str, Path]:
    """Three packed bundles: a hippocampus model that has learnt its phantoms, two classifiers with random weights."""
    folder = tmp_path_factory.mktemp("bundles")
    source = ROOT / "bundles" / "harp_hippocampus"
    overlay = folder / "tiny.json"
    # A data set that cannot be read: what annotators train reads the studies alone.
    (folder / "trap").mkdir()
    (folder / "trap" / "datalist.json").write_text("no data set")
    write_json(overlay, {**SMALL, "dataset_dir": str(folder / "trap")})
    made = ConfigWorkflow(
        config_file=[str(source / "configs" / name) for name in ("train.json", "unetr_scratch.json")] + [str(overlay)],
        meta_file=str(source / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(source),
        dataset_dir=str(make_labelled(folder / "data", cohort="phantom")),
        output_dir=f"${str(folder / 'run')!r}",
        epochs=60,
        val_interval=60,
        learning_rate=0.01,
    )
    made.parser["train"]["handlers"] = [h for h in made.parser["train"]["handlers"] if "ProgressBar" not in str(h)]
    made.initialize()
    made.run()
    made.finalize()
    (model,) = (folder / "run" / "models").glob("*.pt")
    found = {HARP: assemble(source, folder / HARP, [str(overlay)], model=model)}
    for name in CLASSES:
        bundle = name.removesuffix("_phantom_tiny")
        weights = random_weights(bundle, folder / bundle)
        found[name] = assemble(ROOT / "bundles" / bundle, folder / name, ["tiny"], model=weights)
    return found


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Path:
    """Raw scans: LPS, three spacings, intensities of a scanner; their truth in ``../truth``."""
    folder = tmp_path_factory.mktemp("label") / "studies"
    (folder.parent / "truth").mkdir(parents=True)
    folder.mkdir()
    shape, spacing = (40, 36, 30), np.array([0.9, 1.0, 1.2])
    affine = np.diag([*(spacing * [-1, -1, 1]), 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * np.diag(affine)[:3]
    for number in range(4):
        volume, label = head(shape, affine, seed=40 + number)
        for array, where in ((np.round(volume * 900).astype(np.int16), folder), (label, folder.parent / "truth")):
            image = nib.Nifti1Image(array, affine)
            image.set_sform(affine, code=1)
            image.set_qform(affine, code=1)
            nib.save(image, where / f"sub-IXI{number:03d}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="session")
def server(bundles: dict[str, Path], studies: Path) -> Iterator[Server]:
    """Started by the page's own command, with settings of its table."""
    port, app = free_port(), studies.parent / "app"
    start = shlex.split(page_blocks()[0].text)
    assert start[:2] == ["make", "label"]
    words = [word.replace("=DIR", f"={studies}") for word in start]
    words += [f"PORT={port}", f"BUNDLE={','.join(map(str, bundles.values()))}", f"APP={app}"]
    with running(words, f"http://127.0.0.1:{port}", app) as made:
        yield made
