# SPDX-License-Identifier: Apache-2.0
"""``volta3d pack-data``: the volumes of a prepared data set in a few large tar files.

``benchmarks/stores.py`` compares them with other stores.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from volta_components.data.datalist import Datalist, load_datalist, make_content
from volta_components.data.places import place_of, sha256_of
from volta_components.data.unusable import UnusableVolume
from volta_components.errors import InputError
from volta_components.files import atomic_path, write_json

_BLOCK = 512


def pack_data(datalist: Path | str, output: Path | str, shard_mb: int = 1000) -> int:
    """Write the volumes of a prepared data set into a few large tar files, and a datalist that names them there.

    A file system is spared a hundred thousand files, and shards can be copied to where they are read by URL. Every
    volume is compared with its hash before it is written, and again within the shard. An interrupted command, started
    again, writes only what is missing. Label maps stay where they are.

    Args:
        datalist: The prepared data set (datalist.json, or the folder that holds one).
        output: Folder for the shards and their datalist.
        shard_mb: Size of a shard, MB; the last one is smaller.

    Returns:
        0.

    Raises:
        InputError: if a volume has no hash or another one, or the output has another data set.
    """
    loaded = load_datalist(datalist)
    target = Path(output)
    if target.resolve() == loaded.path.resolve().parent or shard_mb < 1:
        raise InputError(f"--output {target}, --shard-mb {shard_mb}: give another folder, and at least 1 MB")
    is_fit = all(item.get("sha256") and place_of(item["image"]) is None for item in loaded.items)
    if loaded.content.get("rendered") or not is_fit:
        raise InputError(f"{loaded.path}: give a datalist of volta3d prepare, each volume a file with its hash")
    _check_output(target, loaded)
    shards: list[list[dict[str, Any]]] = []
    filled = 0
    for item in tqdm(loaded.items, desc="looking at sizes", leave=False):
        try:
            size = Path(item["image"]).stat().st_size
        except OSError as error:
            raise UnusableVolume(item["image"], str(error.strerror), "prepare it again") from error
        if not shards or filled + size > shard_mb * 1e6:
            shards.append([])
            filled = 0
        shards[-1].append({**item, "start": filled + _BLOCK, "size": size})
        filled += _BLOCK + -(-size // _BLOCK) * _BLOCK
    (target / "shards").mkdir(parents=True, exist_ok=True)
    items = []
    for number, members in enumerate(tqdm(shards, desc="packing", unit="shard")):
        name = f"shards/{number:05d}.tar"
        if not _is_whole(target / name, members):
            _write_shard(target / name, members)
        if not _is_whole(target / name, members):
            raise InputError(f"{target / name}: is not what was written; check the disk, then start this command again")
        items += [_packed(item, name, target) for item in members]
    facts = {key: loaded.content[key] for key in ("name", "spacing", "shape", "seed", "n_folds")}
    write_json(target / "datalist.json", make_content(**facts, items=items, excluded=loaded.excluded))
    for old in (target / "shards").iterdir():  # of smaller shards before
        if re.fullmatch(r"\d{5}\.tar", old.name) and int(old.stem) >= len(shards):
            old.unlink()
    print(f"{target / 'datalist.json'}: {len(items)} volumes in {len(shards)} shards")
    return 0


def _check_output(target: Path, datalist: Datalist) -> None:
    """Refuse a folder that holds another data set than the packed volumes of this one."""
    is_other = (target / ".prepare").is_dir()
    if (target / "datalist.json").exists() and not is_other:
        before = load_datalist(target).items
        is_packed = all(place_of(item["image"]) is not None for item in before)
        hashes = ({item.get("sha256") for item in items} for items in (before, datalist.items))
        is_other = not is_packed or next(hashes) != next(hashes)
    if is_other:
        raise InputError(f"--output {target}: holds another data set; choose another folder, or remove that one first")


def _packed(item: Mapping[str, Any], shard: str, target: Path) -> dict[str, Any]:
    kept = {key: value for key, value in item.items() if key not in ("start", "size")}
    if "label" in kept:
        kept["label"] = Path(os.path.relpath(kept["label"], target.resolve())).as_posix()
    return {**kept, "image": f"{shard}@{item['start']}:{item['size']}"}


def _write_shard(path: Path, members: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in members:
            content = Path(item["image"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != item["sha256"]:
                raise UnusableVolume(item["image"], "its content is not what was prepared", "prepare it again")
            name = Path(item["image"]).name
            if len(os.fsencode(name)) > tarfile.LENGTH_NAME:  # volumes are found by their place
                name = item["sha256"] + "".join(Path(name).suffixes[-2:])
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _is_whole(path: Path, members: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a shard is there and has each volume at its place."""
    try:
        return all(sha256_of(f"{path}@{item['start']}:{item['size']}") == item["sha256"] for item in members)
    except (OSError, UnusableVolume):
        return False
