# SPDX-License-Identifier: Apache-2.0
"""Size, random reads a second and computing time of ways to keep prepared volumes, in one process of one thread.

A read gives a float32 array of [0, 1]; files are in the page cache, so that what is compared is work, not the disk.
Ways whose packages are missing are left out (``pip install blosc2 zarr``).

    python benchmarks/stores.py DATA [--reads 30] [--output FILE]

DATA is a data set that ``volta3d prepare`` has written as float32.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from volta_components.data.datalist import load_datalist
from volta_components.data.nifti import write_nifti
from volta_components.data.places import image_of, place_of

Read = Callable[[int], np.ndarray]


def scaled(image: nib.Nifti1Image) -> np.ndarray:
    """As ``ShardReader`` scales integers."""
    voxels = np.asarray(image.dataobj.get_unscaled()).astype(np.float32)
    voxels *= np.float32(image.dataobj.slope)
    return voxels


def in_memory(image: nib.Nifti1Image) -> np.ndarray:
    """As NiBabel reads a file; one that it would only map is read as well."""
    voxels = image.get_fdata(dtype=np.float32)
    return voxels.copy(order="K") if isinstance(voxels, np.memmap) else voxels


def ways(folder: Path, volumes: list[np.ndarray]) -> dict[str, tuple[list[Path], Read]]:
    """By name: the files, and what reads volume number ``i``."""
    found: dict[str, tuple[list[Path], Read]] = {}
    steps = [np.round(volume * 255).astype(np.uint8) for volume in volumes]

    def files(name: str, arrays: list[np.ndarray], slope: float, suffix: str = ".nii") -> list[Path]:
        paths = [folder / f"{name}{i}{suffix}" for i in range(len(arrays))]
        for path, array in zip(paths, arrays):
            write_nifti(path, array, np.eye(4), slope)
        return paths

    def add(name: str, paths: list[Path], read: Read) -> None:
        found[name] = (paths, read)

    fine = [np.round(volume * 65535).astype(np.uint16) for volume in volumes]
    full, two = files("f", volumes, 1.0), files("w", fine, 1 / 65535)
    one, packed = files("b", steps, 1 / 255), files("z", steps, 1 / 255, ".nii.gz")
    for kind, paths in (("float32", full), ("uint16", two), ("uint8", one), ("uint8, gzip level 1", packed)):
        add(f"NIfTI {kind}, NiBabel", paths, lambda i, paths=paths: in_memory(nib.load(paths[i])))
    shard = folder / "shard.tar"
    places = []
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in one:
            tar.add(path, path.name)
    with tarfile.open(shard) as tar:
        places = [f"{shard}@{member.offset_data}:{member.size}" for member in tar]
    add("NIfTI uint8 in a tar, this project", [shard], lambda i: scaled(image_of(place_of(places[i]))))
    add("NIfTI uint8, this project", one, lambda i: scaled(nib.load(one[i])))
    try:
        import blosc2

        blosc2.set_nthreads(1)
        paths = []
        for i, step in enumerate(steps):
            paths.append(folder / f"{i}.b2")
            options = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filter": blosc2.Filter.NOFILTER, "typesize": 1}
            paths[-1].write_bytes(blosc2.compress2(np.ascontiguousarray(step), **options))
        frames = list(paths)
        shape = steps[0].shape

        def frame(i: int) -> np.ndarray:
            flat = np.frombuffer(blosc2.decompress2(frames[i].read_bytes()), np.uint8)
            return flat.reshape(shape).astype(np.float32) * np.float32(1 / 255)

        add("blosc2 uint8, zstd level 5", frames, frame)
    except ImportError:
        pass
    try:
        import zarr

        store = folder / "store.zarr"
        array = zarr.create_array(store, shape=(len(steps), *steps[0].shape), chunks=(1, *steps[0].shape), dtype="u1")
        for i, step in enumerate(steps):
            array[i] = step

        def chunk(i: int) -> np.ndarray:
            return np.asarray(array[i]).astype(np.float32) * np.float32(1 / 255)

        add("zarr uint8, its default zstd, a chunk each", [p for p in store.rglob("*") if p.is_file()], chunk)
    except ImportError:
        pass
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reads", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    items = load_datalist(options.data).items
    volumes = [nib.load(item["image"]).get_fdata(dtype=np.float32) for item in items]
    lines = [
        "| kept as | MB a volume | CPU ms a read | reads / s of one core | largest error |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, (paths, read) in ways(Path(folder), volumes).items():
            error = max(float(np.abs(read(i) - volume).max()) for i, volume in enumerate(volumes))
            order = np.random.default_rng(0).integers(0, len(volumes), options.reads)
            began = time.process_time()
            for i in order:
                read(int(i))
            seconds = (time.process_time() - began) / options.reads
            size = sum(path.stat().st_size for path in paths) / len(volumes) / 1e6
            lines.append(f"| {name} | {size:.1f} | {1000 * seconds:.0f} | {1 / seconds:.0f} | {error:.5f} |")
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
