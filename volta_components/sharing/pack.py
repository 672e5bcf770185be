# SPDX-License-Identifier: Apache-2.0
"""``volta3d pack``: a bundle's folder becomes a zip that ``monai.bundle download`` takes, with hashes and provenance.

The zip is laid out as the MONAI model zoo's are: one top folder of the bundle's name, with ``LICENSE``, ``configs``,
``docs`` and ``models/model.pt``. MONAI reads such zips and has no command that writes them, hence this module.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.downstream.inits import BASE_INIT, find_overlay
from volta_components.errors import InputError
from volta_components.files import (
    atomic_path,
    copy_file,
    file_tag,
    hash_file,
    partial_prefix,
    read_json,
    remove_partials,
    sha256_file,
    write_json,
    write_text,
)
from volta_components.inference.trust import check_trust
from volta_components.sharing.card import check_numbers, copy_picture, fill_card, is_phantom, other_settings, voxel_mm
from volta_components.sharing.hub import destination
from volta_components.sharing.hub import push as upload
from volta_components.training.people import make_secret, sealed_record

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
VERSION = re.compile(r"\d+\.\d+\.\d+")
KEPT = ("LICENSE", "configs/*.json", "configs/logging.conf", "docs/*")
TEXT = (".json", ".md", ".txt", ".yml", ".conf", "")
# What stays as it is in a packed bundle: where its own weights lie.
NOT_BAKED = ("_desc_", "suffix", "encoder_path", "bundle_root")
# An absolute path within a text. In quotes one name after "/" is enough, unless the text is joined to something, as in
# @bundle_root + '/models', and does not begin where only people's own files are; elsewhere it takes two, since "/" also
# divides and separates. /usr and the like are the same everywhere, and /path/to is a placeholder.
ABSOLUTE = re.compile(
    r"""(?<![\w+])(?<!\+\s)["']/(?!(?:dev|proc|sys|usr|bin|etc|path/to)(?![\w.-]))\w[^"']*
    |["']/(?:home|root|[Uu]sers|mnt|media|scratch|Volumes|gpfs|lustre|nfs)/\w[^"']*
    |(?<![\w.:/~)\]}>@*-])~(?:[A-Za-z_][\w.-]*)?/[\w.][^\s'"]*
    |(?<![\w.:/~)\]}>@*"'-])/(?!(?:dev|proc|sys|usr|bin|etc|path/to)(?![\w.-]))(?:[\w.~-]+/)+[\w.~-]*
    |\b(?:file:/{1,3}|sqlite:/{4}|sqlite:///(?=[A-Za-z]:))\w[^\s'"]*
    |(?<!\w)[A-Za-z]:[\\/]{1,2}\w[^\s'"]*
    |(?<![\\\w])\\{2,4}\w[\w.-]*\\[^\s'"]+""",
    re.VERBOSE,
)
PACKED = {"model_path": "$@ckpt_dir + '/model.pt'"}
EPOCH = (1980, 1, 1, 0, 0, 0)
# What a run's numbers have beside metrics: choices, and numbers that choices made on the scored scans flatter.
NO_METRIC = re.compile(r"optimistic_|(threshold|epoch)$")


@dataclass(frozen=True)
class Packed:
    """What was written for one bundle.

    ``hosted`` are weights to host beside the zip, which ``large_files.yml`` in it points to. ``other_settings`` are ids
    whose values in the packed ``train.json`` are not those that the weights were trained with.
    """

    path: Path
    sha256: str
    hosted: tuple[Path, ...] = ()
    other_settings: tuple[str, ...] = ()


def pack(
    output: Path | str,
    bundle: Path | str | None = None,
    all: bool = False,
    overlays: Sequence[str] = (),
    name: str | None = None,
    model: Path | str | None = None,
    metrics: Path | str | None = None,
    large_files: str | None = None,
    source: str = "",
    plain_hashes: bool = False,
    trust: bool = False,
    push: str | None = None,
    private: bool = False,
    yes: bool = False,
) -> int:
    """Pack a bundle into a zip that others can download, with its weights, their provenance and hashes.

    Args:
        output: Folder for NAME_vX.Y.Z.zip, model_info.json (an entry for each zip, as the model zoo keeps them) and
            SHA256SUMS.
        bundle: Folder of the bundle.
        all: Pack every bundle below "bundles" instead.
        overlays: Overlays that the model was trained with, such as tiny. Their values are merged into the packed
            configs, so that these fit the weights.
        name: Name of the packed bundle; by default that of its folder, with _phantom after it where the weights are
            trained on phantoms, and _tiny for the overlay tiny. Weights of phantoms need "phantom" in it.
        model: The weights; models/model.pt by default (pretrain: models/encoder.safetensors), with the suffix that the
            overlays give it. The JSON of the same name beside it is needed.
        metrics: A JSON of numbers for the model card besides those of the training run: metrics.json of evaluate.json,
            or probes.json of the pretrain bundle. Numbers of another model are refused.
        large_files: Address under which the weights will be hosted beside the zip. They are left out of the zip, and
            large_files.yml in it points there.
        source: Address under which the zip will be hosted, for model_info.json.
        plain_hashes: Leave the hashes of subjects and voxels as they are, so that other labs find overlaps too, but can
            also find out who is among the subjects. By default they are sealed with a secret of this lab.
        trust: Pack a bundle whose configs run what none of VolTA-3D's own bundles runs; without it, that is listed.
        push: hf://ORG/NAME uploads the packed bundle to that repository of the Hugging Face Hub, which is made if it is
            missing. First it says what will be visible to whom.
        private: With --push, only members of ORG see the repository; by default everybody does.
        yes: With --push, upload weights that are trained on people's scans. Without it only those of phantoms are.

    Returns:
        0; 1 if, with --all, a bundle was left out.

    Raises:
        InputError: if weights, record, metadata or configs are missing or do not fit each other, or a text has
            somebody's path.
    """
    if (bundle is None) == (not all):
        raise InputError("give one bundle (--bundle bundles/NAME) or --all")
    folder = Path(output)
    if push and (large_files or source):
        raise InputError("--push: the Hub holds the weights too; leave out --large_files and --source")
    if (private or yes) and not push:
        raise InputError("--private and --yes belong to --push")
    if all and (name or model or metrics or push):
        raise InputError("--name, --model, --metrics and --push belong to one bundle; give --bundle instead of --all")
    metadata = Path("bundles").glob("*/configs/metadata.json")
    bundles = sorted(path.parents[1] for path in metadata) if bundle is None else [Path(bundle)]
    if not bundles:
        raise InputError("no bundles/*/configs/metadata.json below this folder; run it from the repository's root")
    where = destination(push, private, yes) if push else None
    left_out = []
    for path in bundles:
        try:
            packed = pack_bundle(path, folder, overlays, name, model, metrics, large_files, source, plain_hashes, trust)
        except InputError as error:
            if not all:
                raise
            left_out.append(f"left out: {path.name}: {error}")
            continue
        _report(packed)
        if where:
            # As the model zoo's rows of the Hub: no checksum, since there is no zip.
            _note(folder, packed.path.stem, {"checksum": "", "source": upload(packed.path, where)})
    for line in left_out:
        print(line)
    return int(bool(left_out))


def _report(packed: Packed) -> None:
    print(f"{packed.path}: {packed.path.stat().st_size / 1e6:.1f} MB, SHA-256 {packed.sha256}")
    for path in packed.hosted:
        print(f"  host beside it: {path}")
    if packed.other_settings:
        print(
            f"  trained with other values of {', '.join(packed.other_settings)} than the packed train.json has (the "
            "card names both); if they are an overlay's, name it as well: --overlays FIRST,SECOND"
        )


def pack_bundle(
    bundle: Path,
    output: Path,
    overlays: Sequence[str] = (),
    name: str | None = None,
    model: str | os.PathLike[str] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    large_files: str | None = None,
    source: str = "",
    plain: bool = False,
    trust: bool = False,
) -> Packed:
    """Pack one bundle; see ``pack``."""
    _checked_metadata(bundle)
    check_trust(bundle, trust)
    output.mkdir(parents=True, exist_ok=True)
    remove_partials(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=partial_prefix()) as temporary:
        top = Path(temporary) / (name or default_name(bundle, overlays, model))
        assemble(bundle, top, overlays, model, metrics, None if plain else make_secret())
        others = tuple(other_settings(top, read_json(top / "models" / "model.json")))
        stem = f"{top.name}_v{read_json(top / 'configs' / 'metadata.json')['version']}"
        hosted = _set_aside(top, output, stem, large_files) if large_files else ()
        check_paths(top)
        path = output / f"{stem}.zip"
        before = file_tag(path)
        write_zip(top, path)
    digest, address = sha256_file(path), f"{source.rstrip('/')}/{path.name}" if source else ""
    if before not in ("", digest[:8]):
        print(f"{path}: replaces one of other content ({before}...); if that was shared, raise the version instead")
    _note(output, stem, {"checksum": hash_file(path, "sha1"), "source": address, "sha256": digest})  # as the zoo's
    _write_sums(output, [path, *hosted])
    return Packed(path, digest, hosted, others)


def _note(folder: Path, stem: str, row: Mapping[str, str]) -> None:
    """Write and print a version's row of ``model_info.json``, as the model zoo has them."""
    path = folder / "model_info.json"
    info = read_json(path) if path.is_file() else {}
    write_json(path, dict(sorted({**info, stem: row}.items())), indent=4)
    print(f"{path}: {json.dumps({stem: row})}")


def default_name(bundle: Path, overlays: Sequence[str] = (), model: str | os.PathLike[str] | None = None) -> str:
    """A packed bundle's name: the folder's, and whether it is of phantoms and of the quick start's size."""
    record = _checked_record(_find_weights(bundle, _overlay_values(bundle, overlays), model))
    return bundle.resolve().name + "_phantom" * is_phantom(record) + "_tiny" * ("tiny" in _stems(overlays))


def _stems(overlays: Sequence[str]) -> list[str]:
    return [Path(overlay).stem for overlay in overlays]


def assemble(
    bundle: Path,
    target: Path,
    overlays: Sequence[str] = (),
    model: str | os.PathLike[str] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    secret: bytes | None = None,
) -> Path:
    """Make a bundle's folder self-contained: configs that fit the weights, weights as ``models/model.pt``, filled card.

    The name of ``target``, a new folder, is the packed bundle's name; for the rest, and for errors, see ``pack``.
    Hashes of people are sealed with ``secret``, the lab's; None leaves them as they are.
    """
    if not NAME.fullmatch(target.name):
        raise InputError(f"name {target.name!r}: letters, digits and _ only, as MONAI takes it for a folder's name")
    metadata = _checked_metadata(bundle)
    baked = _overlay_values(bundle, overlays)
    weights = _find_weights(bundle, baked, model)
    record = sealed_record(_checked_record(weights), secret)
    if is_phantom(record) != ("phantom" in target.name):
        raise InputError(
            f"{weights} is trained on phantoms, but the name {target.name} does not say so; leave out --name, or give "
            "one with phantom in it"
            if is_phantom(record)
            else f"{weights} is not known to be trained on phantoms alone, but the name {target.name} says so; give "
            "another (--name)"
        )
    if target.exists():
        raise InputError(f"{target}: exists already; remove it first")
    for path in _kept(bundle):
        if path.stem not in _stems(overlays):
            copy = target / path.relative_to(bundle)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if not (target / "LICENSE").is_file():
        raise InputError(f"{bundle}: no LICENSE; a bundle that is shared needs one")
    for path in sorted((target / "configs").glob("*.json")):
        write_json(path, _baked(read_json(path), baked), indent=4)
    if "model_path" in read_json(target / "configs" / "train.json"):
        # Models are named by their init where they are trained; what is scored and applied here is this one.
        for name in ("evaluate.json", "inference.json"):
            config = target / "configs" / name
            if config.is_file():
                write_json(config, read_json(config) | PACKED)
    inference = read_json(target / "configs" / "inference.json")
    _fit_metadata(metadata, inference, record)
    write_json(target / "configs" / "metadata.json", metadata, indent=4)
    _write_weights(weights, target / "models" / "model.pt", record)
    _check_fit(target, weights, record, overlays)
    later = None if metrics is None else read_json(metrics)
    if metrics is not None:
        check_numbers(metrics, later, weights, {record["sha256"], sha256_file(target / "models" / "model.pt")})
    copy_picture(weights, target, record)
    fill_card(target, bundle.resolve().name, _stems(overlays), later)
    return target


def _kept(bundle: Path) -> Iterator[Path]:
    """The files of a bundle's folder that are passed on; hidden ones are not, and texts can be read."""
    for path in sorted(path for pattern in KEPT for path in bundle.glob(pattern)):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix in TEXT:
            _text(path)
        yield path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as bad:
        raise InputError(f"{path}: not text in UTF-8 ({bad.reason} at byte {bad.start}); save it as UTF-8") from bad


def _checked_metadata(bundle: Path) -> dict[str, Any]:
    path = bundle / "configs" / "metadata.json"
    if not path.is_file():
        raise InputError(f"{bundle}: no configs/metadata.json; give a bundle's folder, such as bundles/pretrain")
    metadata: dict[str, Any] = read_json(path)
    version = str(metadata.get("version", ""))
    if not VERSION.fullmatch(version):
        raise InputError(f"{path}: version {version!r} is not of the form 1.2.3")
    if version not in metadata.get("changelog", {}):
        raise InputError(f"{path}: the changelog says nothing of version {version}; add a line")
    return metadata


def _overlay_values(bundle: Path, overlays: Sequence[str]) -> dict[str, Any]:
    """Ids that the overlays set."""
    values: dict[str, Any] = {}
    for overlay in overlays:
        values |= read_json(find_overlay(bundle / "configs", overlay))
    nested = sorted(name for name in values if "#" in name or name.startswith("+"))
    if nested:
        raise InputError(
            f"overlays {', '.join(overlays)}: {', '.join(nested)} cannot be merged; leave out what sets it, "
            "and name the weights (--model FILE): the card then lists the settings that differ"
        )
    return values


def _find_weights(bundle: Path, baked: Mapping[str, Any], model: str | os.PathLike[str] | None) -> Path:
    suffix = str(baked.get("suffix") or "")
    init = "" if baked.get("init", BASE_INIT) == BASE_INIT else f"_{baked['init']}"
    own = [bundle / "models" / name for name in (f"model{init}{suffix}.pt", f"encoder{suffix}.safetensors")]
    places = own if model is None else [Path(model)]
    for path in places:
        if path.is_file():
            return path
    raise InputError(
        f"{places[0]}: no such weights; train them first (see {bundle / 'docs' / 'README.md'}), or give --model FILE"
    )


def _checked_record(weights: Path) -> dict[str, Any]:
    """The JSON beside the weights, which is there and of these weights."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        raise InputError(f"{path}: missing; weights without provenance are not packed: train or export them again")
    record: dict[str, Any] = read_json(path)
    if record.get("sha256") != sha256_file(weights):
        raise InputError(f"{weights}: its SHA-256 is not that of {path.name}; it was changed: train or export it again")
    missing = [key for key in ("datalist_hash", "code_version", "settings") if key not in record.get("provenance", {})]
    if missing:
        raise InputError(f"{path}: its provenance lacks {', '.join(missing)}; train or export the weights again")
    return record


def _baked(config: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the overlays' values merged in, and with its own folder as the bundle's root."""
    if "bundle_root" not in config:
        return config  # an overlay, or metadata.json
    config["bundle_root"] = "."
    rest = {name: value for name, value in values.items() if name not in NOT_BAKED}
    if "train" in config:
        return config | rest
    while wanted := [name for name in rest if name in config or f'@{name}"' in json.dumps(config)]:
        config |= {name: rest.pop(name) for name in wanted}
    return config


def _fit_metadata(metadata: dict[str, Any], inference: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Sizes of the packed network, its numbers, and what its weights were trained on."""
    size = inference.get("image_size")
    formats = metadata["network_data_format"]
    for tensor in [*formats["inputs"].values(), *formats["outputs"].values()]:
        if isinstance(size, list) and len(tensor["spatial_shape"]) == len(size):
            tensor["spatial_shape"] = list(size)
        if tensor["format"] == "features":
            tensor["num_channels"] = inference.get("hidden_size", tensor["num_channels"])
            metadata["pred_classes"] = f"{tensor['num_channels']} features of the summary token"
    metadata["image_classes"] = (
        f"single-channel T1-weighted MRI, RAS, voxels of {voxel_mm(inference)} mm, intensities scaled to [0, 1]"
    )
    numbers = record.get("metrics", {}).items()
    metadata["eval_metrics"] = {k: v for k, v in numbers if math.isfinite(v) and not NO_METRIC.match(k)}
    if is_phantom(record):
        metadata["name"] += " (trained on phantoms)"
        metadata["description"] = (
            "Trained on synthetic heads (phantoms): shows that the pipeline works, and nothing about patients. "
            f"{metadata['description']}"
        )
        metadata["data_source"] = "Phantoms grown from the MNI ICBM152 template by volta3d phantom."
    else:
        origin = record["provenance"]
        used = f"{origin.get('volumes', '?')} volumes of the cohort {origin.get('cohort') or '(not named)'}"
        metadata["data_source"] = f"Trained on {used}. Data set of the task: {metadata.get('data_source', '-')}"


def _check_fit(folder: Path, weights: Path, record: Mapping[str, Any], overlays: Sequence[str]) -> None:
    """Build the packed config's network and load the packed weights into it, all of them, or raise ``InputError``."""
    from monai.bundle import ConfigParser

    from volta_components.downstream.start import ids_as_trained, load_model, other_than_trained
    from volta_components.method.weights import trained_settings

    named = f"overlays {', '.join(_stems(overlays))}" if overlays else "no overlays"
    advice = f"{weights} does not fit the configs with {named}; name those that it was trained with (--overlays)"
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"] = str(folder)
    if rows := other_than_trained(trained_settings(record), ids_as_trained(parser)):
        raise InputError.many(f"{advice}. Id, weights, configs", rows, "")
    try:
        load_model(parser.get_parsed_content("network_def"), folder / "models" / "model.pt")
    except InputError as error:
        raise InputError(f"{advice}.\n{error}") from error


def _write_weights(source: Path, target: Path, record: dict[str, Any]) -> None:
    """The weights as ``model.pt``, which MONAI's tools look for, and their record with the new file's hash."""
    from volta_components.method.weights import read_weights
    from volta_components.training.archive import write_archive

    target.parent.mkdir(parents=True, exist_ok=True)
    state = read_weights(source)
    if source.suffix == ".pt":
        shutil.copyfile(source, target)
    else:
        write_archive(dict(sorted(state.items())), target)
    write_json(target.with_suffix(".json"), {**record, "sha256": sha256_file(target)}, indent=4)


def _set_aside(top: Path, output: Path, stem: str, address: str) -> tuple[Path, ...]:
    """Move the weights out of the folder; ``large_files.yml`` says where they will be."""
    path = top / "models" / "model.pt"
    hosted = output / f"{stem}_model.pt"
    copy_file(path, hosted)
    lines = [
        "large_files:",
        '- path: "models/model.pt"',
        f'  url: "{address.rstrip("/")}/{hosted.name}"',
        f'  hash_val: "{sha256_file(hosted)}"',
        '  hash_type: "sha256"',
    ]
    path.unlink()
    (top / "large_files.yml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (hosted,)


def check_paths(folder: Path) -> None:
    """Make sure that no text below a folder has an absolute or personal path.

    Raises:
        InputError: with files and lines.
    """
    rows = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TEXT:
            for number, line in enumerate(_text(path).splitlines(), 1):
                if found := absolute_path(line):
                    rows.append((f"{path.relative_to(folder)}:{number}", found))
    if rows:
        raise InputError.many(
            f"{len(rows)} places have an absolute path",
            rows,
            "Use paths relative to the bundle or to the working folder. models/model.json is beside the weights.",
        )


def absolute_path(line: str) -> str | None:
    """The first absolute path in a line of text or JSON, or the user's own folder; None where there is none."""
    own = str(Path.home())
    if len(own) > 5 and own in line:
        return own
    found = ABSOLUTE.search(line)
    return found[0] if found else None


def write_zip(folder: Path, path: Path) -> None:
    """Zip a folder under its own name; the same content gives the same bytes, whenever and wherever.

    Nothing is compressed: the weights, which are nearly all of it, hardly shrink, and what deflate gives differs
    between versions of zlib.
    """
    files = {file.relative_to(folder.parent).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as zipped:
        for name, file in sorted(files.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, whatever this machine is
            entry.external_attr = 0o100644 << 16
            with file.open("rb") as source, zipped.open(entry, "w", force_zip64=True) as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _write_sums(output: Path, paths: Sequence[Path]) -> None:
    """Hashes in the form that ``sha256sum --check`` reads."""
    sums_path = output / "SHA256SUMS"
    lines = sums_path.read_text(encoding="utf-8").splitlines() if sums_path.is_file() else []
    sums = {line.split("  ", 1)[1]: line.split("  ", 1)[0] for line in lines if "  " in line}
    # Of a file that is gone, the check would fail for everybody.
    sums = {name: digest for name, digest in sums.items() if (output / name).is_file()}
    sums |= {path.name: sha256_file(path) for path in paths}
    write_text(sums_path, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
