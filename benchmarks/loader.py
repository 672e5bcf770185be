# SPDX-License-Identifier: Apache-2.0
"""Volumes a second that the loader of pretraining delivers from disk, views drawn, by the number of its workers.

A step with data from disk is as fast as one with data in memory as long as this is above the steps a second.

    python benchmarks/loader.py [--size tiny|small|paper] [--volumes 8] [--passes 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
from monai.transforms import Compose, LoadImaged

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step_forms import SIZES, generator_of, volume_of

from volta_components.method.views import DrawViewsd
from volta_components.training.sampling import KeyedDataLoader, KeyedDataset


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--volumes", type=int, default=8)
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    size = SIZES[options.size]
    load = LoadImaged("image", reader="volta_components.data.load.ShardReader", ensure_channel_first=True)
    transform = Compose([load, DrawViewsd(generator_of(size))])
    print("| workers | volumes / s |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.nii" for i in range(options.volumes)]
        for path in paths:
            nib.Nifti1Image(volume_of(size)[0, 0].numpy().astype(np.float32), np.eye(4)).to_filename(path)
        for workers in sorted({0, 1, 2, 4, 8} & set(range(joblib.cpu_count() + 1))):
            data = KeyedDataset([{"image": str(path)} for path in paths], transform)
            loader = KeyedDataLoader(data, shuffle=True, num_workers=workers)
            loader.sampler.set_position(1)
            sum(1 for _ in loader)  # the workers start
            started = time.perf_counter()
            count = sum(1 for _ in range(options.passes) for _ in loader)
            print(f"| {workers} | {count / (time.perf_counter() - started):.3g} |", flush=True)


if __name__ == "__main__":
    main()
