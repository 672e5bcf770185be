# SPDX-License-Identifier: Apache-2.0
"""The command ``volta3d fetch``."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from volta_components.data.fetch.manifest import Resource, built_in, read_resource
from volta_components.errors import InputError
from volta_components.files import read_json, write_json, write_text

RECORD = "fetched.json"
SOURCE = "SOURCE.txt"
# Unfinished files; hidden, so that nothing takes them for data.
WORK = ".fetch"
Entry = dict[str, Any]


def fetch(*names: Path | str, output: Path | str | None = None, list: bool = False) -> None:
    """Download an open resource, check it, and keep its licence and citation beside it.

    The resource is one that comes with the package (see --list), or the path of a manifest: a JSON file with addresses,
    hashes, licence and citation; see docs/data/fetch.md.

    A broken download, started again, resumes. Files that are there are checked and not downloaded again.

    Args:
        names: Name of the resource, such as anatomies or ixi, or path of a manifest.
        output: Folder for the data.
        list: List the resources, or the files of the named one, and download nothing.

    Raises:
        InputError: if there is no such resource, a file cannot be downloaded, its hash is wrong, or there is no space.
    """
    if list:
        for name in names or built_in():
            print("\n".join(_describe(read_resource(name), with_files=bool(names))))
        return
    if len(names) != 1:
        raise InputError(
            f"{len(names)} resources named; name one: {', '.join(built_in())}, or the path of a manifest (.json)"
        )
    if output is None:
        raise InputError(
            f"--output is missing; give a folder for the data, such as --output data/{Path(names[0]).stem}"
        )
    resource, folder = read_resource(names[0]), Path(output)
    print(resource.terms())
    try:
        with _claim(folder, resource) as record:
            new = _provide_all(resource, folder, record)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); free some space or choose "
            f"another --output, then run the command again: what has arrived is kept in {folder / WORK}"
        ) from error
    unknown = [file.path for file in resource.files if not file.hashes]
    if unknown:
        print(
            f"note: no hash of {', '.join(unknown)} is known; that of the first download is recorded in "
            f"{folder / RECORD}, and later downloads to this folder are compared with it"
        )
    print(f"{folder}: {len(resource.files)} files ({new} new); licence and citation: {folder / SOURCE}")
    for command in resource.next_steps(folder):
        print(f"next: {command}")


def _describe(resource: Resource, with_files: bool) -> list[str]:
    lines = [f"{resource.name}: {resource.title}", f"  {resource.licence}; {resource.homepage}"]
    for file in resource.files if with_files else ():
        known = ", ".join(f"{kind} {value}" for kind, value in file.hashes.items()) or "hash not known"
        lines.append(f"  {file.path}{f' -> {file.unpack}/' if file.unpack else ''}  {file.url}  {known}")
    return lines


@contextlib.contextmanager
def _claim(folder: Path, resource: Resource) -> Iterator[dict[str, Entry]]:
    """Give what is recorded of the folder's files, to be changed in place; nobody else fetches into the folder.

    Raises:
        InputError: if another process does, or the folder holds another resource.
    """
    from filelock import FileLock, Timeout

    (folder / WORK).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / WORK / "lock", blocking=False):
            path = folder / RECORD
            content: Any = read_json(path) if path.is_file() else {"resource": resource.name, "files": {}}
            if content.get("resource") != resource.name:
                raise InputError(f"{folder}: holds {content.get('resource')}; give another --output")
            record: dict[str, Entry] = content["files"]
            _write_source(folder, resource, record)
            yield record
            shutil.rmtree(folder / WORK)
    except Timeout:
        raise InputError(f"{folder}: another process fetches into it; wait for it, or give another --output") from None


def _provide_all(resource: Resource, folder: Path, record: dict[str, Entry]) -> int:
    """Bring every file to its place.

    Returns:
        How many were not there.

    Raises:
        InputError: naming the files that are wrong, or that could not be downloaded.
    """
    from volta_components.data.fetch.download import DiskFull, DownloadError, NoConnection, open_session
    from volta_components.data.fetch.place import WrongFile, provide, tidy

    new, failed, wrong, is_cut_off = 0, [], [], False
    with open_session() as session:
        for file in resource.files:
            try:
                entry, is_new = provide(session, file, folder, folder / WORK, record.get(file.path, {}))
            except WrongFile as error:
                wrong.append((file.path, str(error)))
                continue
            except DiskFull as error:
                raise InputError(
                    f"{file.path}: {error}; free some space, or choose another --output, and run the command again"
                ) from error
            except DownloadError as error:
                failed.append((file.path, file.url, str(error)))
                if is_cut_off := isinstance(error, NoConnection):
                    break
                continue
            if entry != record.get(file.path):
                record[file.path] = entry
                write_json(folder / RECORD, {"resource": resource.name, "files": record})
                _write_source(folder, resource, record)
            tidy(folder / WORK, file)
            new += is_new
    total = len(resource.files)
    if wrong:
        raise InputError.many(
            f"{len(wrong)} of {total} files in {folder} are not what they should be",
            wrong,
            "If the file lies there, move it away and run the command again. If it was downloaded, nothing of it was "
            f"kept: try another network, or ask the source ({resource.homepage}) whether it has a new version; then "
            f"correct the hash in the manifest, or remove its entry from {folder / RECORD}.",
        )
    if failed:
        rest = " (the rest was not tried)" if is_cut_off else ""
        raise InputError.many(
            f"{len(failed)} of {total} files could not be downloaded{rest}",
            failed,
            "Check the network (behind a proxy: set HTTPS_PROXY) and the address, and run the command again: what has "
            "arrived is kept. On a machine without a network, put the files into "
            f"{folder} under these names; the command then checks them.",
        )
    return new


def _write_source(folder: Path, resource: Resource, record: Mapping[str, Entry]) -> None:
    """Keep licence, citation and hashes beside the data."""
    lines = [resource.terms()]
    for file in resource.files:
        state = f"SHA-256 {record[file.path]['sha256']}" if file.path in record else "not there yet"
        lines.append(f"{file.path}\n  {file.url}\n  {state}")
    write_text(folder / SOURCE, "\n".join([*lines, ""]))
