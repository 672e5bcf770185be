# SPDX-License-Identifier: Apache-2.0
"""``volta3d embed`` and ``volta3d segment``: raw scans in, results in the scans' own space out, by a bundle's config.

What is computed is said by the bundle's ``configs/inference.json`` alone; here scans are found, DICOM series are
converted and every file is read once, so that all bad ones are named together before long work starts.
"""

from __future__ import annotations

import filecmp
import glob
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from tqdm import tqdm

from volta_components.classification import find_volumes, scans_below
from volta_components.cores import cores
from volta_components.data.datalist import check_volumes, load_datalist
from volta_components.data.layouts.common import LayoutOptions
from volta_components.data.layouts.dicom import _dicom_folders, convert_series
from volta_components.data.layouts.dicom import read as read_dicom
from volta_components.data.preprocess import UnusableVoxels, survey
from volta_components.data.volumes import UnusableVolume, read_volume, volume_suffix
from volta_components.errors import InputError
from volta_components.files import partial_prefix, read_json, remove_partials

# File, what is wrong with it, and what to do.
Row = tuple[str, str, str]

CONVERTED = "converted"
REMEDY = "Mend or fetch them again, give a narrower --source (such as 'scans/*_T1w.nii.gz'), or add --skip-bad."


def embed(
    source: str | Sequence[str],
    output: str,
    *,
    bundle: str | None = None,
    overlays: str | Sequence[str] | None = None,
    weights: str | None = None,
    attention: bool = False,
    device: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Turn scans into embeddings: embeddings.csv and embeddings.npz, a row for each scan.

    Scans may have any orientation and spacing. Started again, with scans added or after a break, it goes on with those
    that are not done. Exit status: 0 done, 2 nothing could be done.

    Args:
        source: a folder (scans or DICOM series), a scan, a datalist, a pattern in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz', or several of these separated by commas. Of a BIDS folder, its T1w scans.
        output: folder of the results.
        bundle: folder of the pretrained bundle, as downloaded; bundles/pretrain by default.
        overlays: further configuration files, separated by commas, merged last: names in the bundle's configs, or
            paths; tiny for the quick start's models.
        weights: an exported encoder instead of the bundle's own.
        attention: also write where the summary looks, as NIfTI on the scan's own grid, mean 1.
        device: cuda:0, cpu, ...; by default the first GPU, or the CPU.
        skip_bad: leave out scans that cannot be used instead of ending there.
    """
    root = _bundle(bundle, "bundles/pretrain", ("type", "feature"))
    settings = {"save_attention": bool(attention), **_weights("encoder_path", weights)}
    target, items = _apply(root, source, output, overlays, device, skip_bad, settings)
    print(f"{len(items)} embeddings in {target / 'embeddings.csv'} and .npz")
    return 0


def segment(
    source: str | Sequence[str],
    output: str,
    *,
    bundle: str | None = None,
    overlays: str | Sequence[str] | None = None,
    weights: str | None = None,
    device: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Outline both hippocampi: NAME_hippocampus.nii.gz on each scan's own grid (1 left, 2 right), and volumes.csv.

    Scans may have any orientation and spacing. Started again, with scans added or after a break, it goes on with those
    that are not done. Exit status: 0 done, 2 nothing could be done.

    Args:
        source: a folder (scans or DICOM series), a scan, a datalist, a pattern in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz', or several of these separated by commas. Of a BIDS folder, its T1w scans.
        output: folder of the results.
        bundle: folder of the segmentation bundle, as downloaded; bundles/harp_hippocampus by default.
        overlays: further configuration files, separated by commas, merged last: names in the bundle's configs, or
            paths; tiny for the quick start's models.
        weights: a trained model instead of the bundle's own.
        device: cuda:0, cpu, ...; by default the first GPU, or the CPU.
        skip_bad: leave out scans that cannot be used instead of ending there.
    """
    root = _bundle(bundle, "bundles/harp_hippocampus", ("format", "segmentation"))
    _apply(root, source, output, overlays, device, skip_bad, _weights("model_path", weights))
    return 0


def _weights(name: str, given: str | None) -> dict[str, str]:
    """The id of a config that names weights, if they are given."""
    if given is None:
        return {}
    path = Path(str(given)).expanduser()
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file")
    return {name: str(path.absolute())}


def check_source(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], deep: bool = True) -> None:
    """Check every volume that a config's ``source`` names, before long work starts.

    Args:
        source: see ``volta_components.classification.find_volumes``.
        deep: of a datalist, read voxels and compare hashes; scans without a datalist are always read.

    Raises:
        InputError: listing every bad file with its reason.
    """
    files: list[Path] = []
    for part in [source] if isinstance(source, (str, os.PathLike)) else source:
        if _is_datalist(Path(part)):
            check_volumes(load_datalist(part), deep=deep)
        else:
            files += [Path(str(item["image"])) for item in find_volumes(part)]
    if rows := unusable_scans(files):
        raise _bad_scans(rows, len(files))


def prepared_grid(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    spacing: float | Sequence[float],
    shape: Sequence[int],
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The grid that a network sees volumes on: a datalist's own, otherwise the one that scans are prepared to.

    Args:
        source: see ``volta_components.classification.find_volumes``.
        spacing: of scans that are prepared on the way, mm, one number or three.
        shape: of the same, voxels.

    Returns:
        Spacing and shape, three numbers each.

    Raises:
        InputError: if the parts of the source do not have one grid.
    """
    given = (tuple(np.broadcast_to(np.asarray(spacing, float), 3).tolist()), tuple(int(side) for side in shape))
    grids: dict[Any, str] = {}
    for part in [source] if isinstance(source, (str, os.PathLike)) else source:
        grid: Any = given
        if _is_datalist(Path(part)):
            datalist = load_datalist(part)
            grid = (tuple(map(float, datalist.spacing)), tuple(datalist.shape))
        grids.setdefault(grid, str(part))
    if len(grids) > 1:
        rows = [
            (name, "x".join(f"{mm:g}" for mm in g[0]) + " mm", "x".join(map(str, g[1]))) for g, name in grids.items()
        ]
        raise InputError.many("sources on different grids", rows, "Give them one after the other.")
    return next(iter(grids), given)


def unusable_scans(files: Sequence[Path], workers: int | None = None) -> list[Row]:
    """Read every scan once, with a progress bar.

    Args:
        files: volumes of any format.
        workers: threads, a scan in memory each; the number of cores by default.

    Returns:
        File, reason and remedy of each that cannot be used.
    """

    def examine(path: Path) -> Row | None:
        try:
            if not survey(read_volume(path)).foreground.any():
                return str(path), "nothing stands out from the background", "look at it; it may hold no head"
        except UnusableVolume as error:
            return str(path), error.reason, error.remedy
        except UnusableVoxels as error:
            return str(path), error.reason, error.remedy
        except OSError as error:
            return str(path), error.strerror or str(error), "check the disk and the permissions"
        except MemoryError:
            return str(path), "does not fit in memory", "check the file's dimensions"
        return None

    with ThreadPoolExecutor(workers or cores()) as pool:
        rows = list(tqdm(pool.map(examine, files), total=len(files), unit="scan", desc="reading", disable=not files))
    return [row for row in rows if row is not None]


def _bad_scans(rows: Sequence[Row], count: int) -> InputError:
    return InputError.many(f"{len(rows)} of {count} scans cannot be used", rows, REMEDY)


# --- the bundle ------------------------------------------------------------------------------------------------------


def _bundle(given: str | None, default: str, output: tuple[str, str]) -> Path:
    """A bundle's folder, absolute; one whose metadata say that it gives something else is refused."""
    root = Path(str(given)).expanduser() if given is not None else Path(default)
    if given is None and not root.is_dir() and Path("configs/inference.json").is_file():
        root = Path()  # run from within a bundle
    config = root / "configs" / "inference.json"
    if not config.is_file():
        raise InputError(
            f"{config}: no such bundle; give its folder (--bundle DIR), download one (python -m monai.bundle "
            "download), or run from the repository's root"
        )
    meta = config.with_name("metadata.json")
    key, wanted = output
    try:
        found = read_json(meta)["network_data_format"]["outputs"]["pred"][key]
    except (KeyError, TypeError) as error:
        raise InputError(f"{meta}: does not say what the bundle's network gives; fetch the bundle again") from error
    if found != wanted:
        raise InputError(
            f"{root}: its network gives {key} {found!r} where {wanted!r} is wanted; give another --bundle "
            f"(its own task: python -m monai.bundle run --config_file {config})"
        )
    return root.resolve()


def _config_files(root: Path, overlays: str | Sequence[str] | None) -> list[str]:
    configs = root / "configs"
    files = [configs / "inference.json"]
    for name in _words(overlays):
        stem = name if name.endswith(".json") else f"{name}.json"
        found = next((path for path in (configs / stem, Path(stem)) if path.is_file()), None)
        if found is None:
            raise InputError(f"{configs / stem}: no such overlay; give a name in {configs}, or a path")
        files.append(found.resolve())
    return [str(file) for file in files]


def _words(value: str | Sequence[Any] | None) -> list[str]:
    """``a,b`` or a sequence, as a list of words."""
    if value is None or value is False:
        return []
    parts = [value] if isinstance(value, (str, int, float)) else list(value)
    return [word.strip() for part in parts for word in str(part).split(",") if word.strip()]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Bad input as itself, not wrapped into what ``monai.bundle`` makes of it, nor said once more in a log."""
    hook = sys.excepthook
    logs = [logging.getLogger(name) for name in ("monai.bundle.workflows", "ignite")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None
    finally:
        sys.excepthook = hook  # the configs set their own
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _check_device(device: str) -> str:
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: cannot be used here ({reason}); try --device cpu") from error
    return device


def _apply(
    root: Path,
    source: str | Sequence[str],
    output: str,
    overlays: str | Sequence[str] | None,
    device: str | None,
    skip_bad: bool,
    settings: Mapping[str, Any],
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the bundle's inference on scans; the output folder, and the items of the scans."""
    files = _config_files(root, overlays)
    target = Path(str(output)).expanduser().resolve()
    changes: dict[str, Any] = {"bundle_root": str(root), "output_dir": str(target), **settings}
    if device is not None:
        changes["device"] = f"$torch.device({_check_device(str(device))!r})"
    parts = _parts(source, target)
    with _plain_errors():
        _check_weights(_workflow(files, changes))
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{target}: cannot write there ({error.strerror}); choose another --output") from error
        chosen = _scans(parts, target, skip_bad)
        items = find_volumes(chosen)
        # Absolute paths as plain text: nothing in them is taken for a config's expression or reference.
        changes |= {"source": [str(path) for path in chosen], "check_volumes": False}
        workflow = _workflow(files, changes)
        _set_folders(workflow.parser, items)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return target, items


def _workflow(files: Sequence[str], changes: Mapping[str, Any]) -> ConfigWorkflow:
    return ConfigWorkflow(config_file=list(files), logging_file=False, workflow_type="infer", **changes)


def _check_weights(workflow: ConfigWorkflow) -> None:
    """Miss the weights before the scans are read."""
    for name in ("model_path", "encoder_path"):
        if name in workflow.parser and not Path(str(workflow.parser.get_parsed_content(name))).is_file():
            raise InputError(
                f"{workflow.parser.get_parsed_content(name)}: no such weights; train the bundle first, download one "
                "with weights (--bundle DIR), or add --overlays tiny for the quick start's"
            )


# --- the scans -------------------------------------------------------------------------------------------------------


def _is_datalist(path: Path) -> bool:
    return path.suffix == ".json" or (path / "datalist.json").is_file()


def _parts(source: str | Sequence[str], target: Path) -> list[Path]:
    """What the user gave, patterns expanded; all of it is there, and the output is not among it."""
    parts: list[Path] = []
    missing: list[tuple[str]] = []
    for given in [source] if isinstance(source, (str, int, float)) else source:
        text = str(given)
        for word in [text] if Path(text).expanduser().exists() else _words(text):
            path = Path(word).expanduser()
            found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            parts += [path.absolute() for path in found]
            if not found:
                missing.append((word,))
    if missing or not parts:
        raise InputError.many(
            f"{len(missing)} of the given sources are not there",
            missing or [("(none)",)],
            "Give a folder, a scan, a datalist.json, or a pattern in quotes, with --source.",
        )
    for part in parts:
        if part.is_dir() and part.resolve() in (target, *target.parents):
            raise InputError(
                f"--output {target} lies in --source {part}, where the next start would take results for scans; choose "
                "a folder outside of it"
            )
    return list(dict.fromkeys(parts))


def _scans(parts: Sequence[Path], target: Path, skip_bad: bool) -> list[Path]:
    """Datalists as they are, and every scan that can be used; what cannot be is named in one list."""
    datalists = [part for part in parts if _is_datalist(part)]
    files: list[Path] = []
    rows: list[Row] = []
    for part in parts:
        if part in datalists:
            continue
        if part.is_file():
            files.append(part)
            continue
        volumes, others = scans_below(part)
        if others:
            print(f"{part}: {len(others)} volumes that are no T1w scans are left aside, such as {others[0]}")
        if series := _dicom_folders(part):
            converted, bad = _convert(part, target)
            files += converted
            rows += bad
        if not volumes and not series:
            raise InputError(f"{part}: no scans in it: no volumes (.nii, .nii.gz, .mgz, ...), no DICOM files")
        files += volumes
    files = list(dict.fromkeys(files))
    strange = [path for path in files if volume_suffix(path) is None]
    rows += [(str(path), "not a volume", "give .nii, .nii.gz, .mgz, ...; of DICOM, the folder") for path in strange]
    count = len(files) + len(rows) - len(strange)
    files = [path for path in files if path not in strange]
    for datalist in datalists:
        check_volumes(load_datalist(datalist), deep=True)
    rows += unusable_scans(files)
    if rows and not skip_bad:
        raise _bad_scans(rows, count)
    if rows:
        print(InputError.many(f"{len(rows)} of {count} scans are left out", rows, ""), file=sys.stderr)
    bad_files = {row[0] for row in rows}
    chosen = [*datalists, *(path for path in files if str(path) not in bad_files)]
    if not chosen:
        raise InputError("no scan is left; see the list above")
    return chosen


def _convert(root: Path, target: Path) -> tuple[list[Path], list[Row]]:
    """Convert the T1 series below a folder to NIfTI in ``target/converted``, as ``volta3d prepare`` chooses them."""
    files: list[Path] = []
    remove_partials(target)
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=target) as name:
        temporary = Path(name)
        options = LayoutOptions(root, ("all",), "none", temporary=temporary, workers=cores())
        listing = read_dicom(options)
        rows = [
            (str(root / f.file), f.reason, f.remedy) for f in listing.findings if f.kind == "problem" and f.left_out
        ]
        skipped = [finding for finding in listing.findings if finding.kind == "choice"]
        for scan in tqdm(sorted(listing.scans, key=lambda scan: scan.key), unit="series", desc="converting DICOM"):
            folder = temporary / scan.key
            folder.mkdir(exist_ok=True)
            try:
                path, warnings = convert_series(scan.image, str(scan.series), folder)
                if min(read_volume(path).voxels.shape) < 8:
                    raise UnusableVolume(scan.image, "fewer than 8 slices", "download the series again")
            except UnusableVolume as error:
                rows.append((str(scan.image), error.reason, error.remedy))
                continue
            for warning in warnings:
                tqdm.write(f"{scan.key}: {warning}", file=sys.stderr)
            place = target / CONVERTED / f"{scan.key}.nii"
            place.parent.mkdir(exist_ok=True)
            # The same volume as before stays, and with it what was made of it.
            if not place.is_file() or not filecmp.cmp(path, place, shallow=False):
                path.replace(place)
            files.append(place)
    print(f"{root}: {len(files)} T1 series converted to {target / CONVERTED}, {len(skipped)} other series skipped")
    for finding in skipped[:20]:
        print(f"  {finding.subject}  {finding.reason}")
    return files, rows


def _set_folders(parser: Any, items: Sequence[Mapping[str, Any]]) -> None:
    """Give results the folders of their scans where file names alone would clash, as FreeSurfer's ``T1.mgz`` do."""
    paths = [Path(str(item["image"])).absolute() for item in items]
    stems = [path.name[: -len(volume_suffix(path) or "")] for path in paths]
    twice = {str(path.parent / stem) for path, stem in zip(paths, stems, strict=True)}
    if len(twice) < len(paths):
        counts = Counter(path.parent / stem for path, stem in zip(paths, stems, strict=True))
        rows = [(str(p),) for p, s in zip(paths, stems, strict=True) if counts[p.parent / s] > 1]
        raise InputError.many("results of these scans would have the same name", rows, "Leave out one of each.")
    if len(set(stems)) == len(stems):
        return
    top = os.path.commonpath([path.parent for path in paths])
    for name in ("postprocessing", "handlers"):
        block = parser.get(name, [])
        for part in block.get("transforms", []) if isinstance(block, dict) else block:
            kind = str(part.get("_target_", "")) if isinstance(part, dict) else ""
            if kind.endswith("SaveImaged"):
                part["data_root_dir"] = top
            elif kind.endswith("EmbeddingTable"):
                part["root"] = top
    print(f"file names are not unique: results lie in folders like those of the scans below {top}")
