# SPDX-License-Identifier: Apache-2.0
"""The one way to look through a folder of scans: hidden files left alone, links followed once, names readable."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from volta_components.data.volumes import conversion, volume_stem, volume_suffix
from volta_components.errors import InputError
from volta_components.files import readable

# Folders that programs leave among the data: of macOS's zip, of Synology, of Windows.
_LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_OFFICE_LOCK = "~$"
# Folders beside the subjects in which BIDS keeps what is no raw scan.
ASIDE = frozenset({"derivatives", "sourcedata", "code", "stimuli", "phenotype"})


@dataclass(frozen=True)
class VolumeFile:
    """A volume's file and the name that it goes by.

    Attributes:
        path: the file.
        name: its name with suffix, readable; that of the folder for a folder ``scan.nii.gz/`` that holds one file,
            as some programs unpack ``scan.nii.gz``.
    """

    path: Path
    name: str

    @classmethod
    def of(cls, path: Path) -> VolumeFile:
        """A file with the name that it goes by."""
        return cls(path, tidy(path.parent.name if volume_suffix(path.parent) else path.name))

    @property
    def folder(self) -> Path:
        """The folder that the file lies in, without the one that it was unpacked into, which has its name."""
        return self.path.parent.parent if volume_suffix(self.path.parent) else self.path.parent

    @property
    def stem(self) -> str:
        """The name without the volume format's suffix."""
        return volume_stem(Path(self.name))


@dataclass
class Tree:
    """What a folder holds.

    Attributes:
        root: the folder.
        files: all visible files below it, sorted; links whose content is missing are among them.
        folders: all visible folders below it, sorted.
        again: links that lead to what is there already, and what that is.
        locked: folders that cannot be listed.
        outside: links that leave the folder, which are not followed.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    again: list[tuple[Path, Path]] = field(default_factory=list)
    locked: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)

    def aside(self) -> frozenset[str]:
        """Names of folders at the top of a BIDS data set that hold no scans; none elsewhere."""
        is_bids = any(folder.parent == self.root and folder.name.startswith("sub-") for folder in self.folders)
        return ASIDE if is_bids else frozenset()

    def volumes(self) -> list[VolumeFile]:
        """The volume files, in order of their paths, without copies in a format that is not read."""
        paths = [path for path in self.files if volume_suffix(path)]
        read = {path.with_name(volume_stem(path)) for path in paths if not conversion(path)}
        kept = (path for path in paths if not (conversion(path) and path.with_name(volume_stem(path)) in read))
        return [VolumeFile.of(path) for path in kept]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data: ``.git``, ``._scan.nii``, ``__MACOSX``, ``~$table.xlsx``."""
    return name.startswith((".", _OFFICE_LOCK)) or name.lower() in _LITTER


def tidy(name: str) -> str:
    """A file name as text that goes into ids and tables: readable, one form of accents (NFC), no control characters."""
    text = unicodedata.normalize("NFC", readable(name))
    return "".join(letter if letter.isprintable() else "_" for letter in text).strip()


def tidy_stem(path: Path) -> str:
    """A file's name as ids have it: tidy, without the volume format's suffix."""
    return volume_stem(Path(tidy(path.name)))


def size_and_time(path: Path) -> tuple[int | None, int | None]:
    """Bytes of a file, and when it was last written to, ns; None where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def walk(root: Path, follow_links: bool = False) -> Tree:
    """Look through a folder.

    Hidden files and folders below it are left alone, as are pipes, sockets and devices. Links to folders and files
    are followed, each folder and file once: where a link leads to what is there under its own name too, that name
    counts. Links that lead to a folder above are not followed.

    Args:
        root: the folder.
        follow_links: also follow links that leave the folder. Those of git-annex and DataLad, which lead to the
            ``.git`` of the data set, always are.

    Raises:
        InputError: if the folder is missing, is none, or cannot be listed.
    """
    if not root.exists():
        raise InputError(f"{root}: no such folder; give the data set's root as --source")
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; give the data set's root as --source")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"{root}: permission denied; make it readable (chmod u+rx)")
    tree = Tree(root)
    seen: dict[tuple[int, int], Path] = {}
    for above in (place := root.resolve(), *place.parents):
        status = above.stat()
        seen[status.st_dev, status.st_ino] = above
    links: list[Path] = []
    home = None if follow_links else place
    _visit(root, tree, seen, links, home)
    # Later than the folders themselves, so that these count and not the links to them.
    while links:
        link = links.pop(0)
        if _is_new(link, tree, seen):
            _visit(link, tree, seen, links, home)
    _leave_out_links(tree)
    tree.files.sort()
    tree.folders.sort()
    tree.outside.sort()
    return tree


def leaves(link: Path, home: Path) -> bool:
    """Whether a link leads out of a folder, and not into the annex of the data set that the folder is or lies in.

    Args:
        link: the link.
        home: the folder, without links in its path.
    """
    target = Path(os.path.realpath(link))
    if target.is_relative_to(home):
        return False
    parts = target.parts
    if ".git" not in parts:
        return True
    place = parts.index(".git")
    return not (home.is_relative_to(Path(*parts[:place])) and "objects" in parts[place:] and "annex" in parts[place:])


def _is_new(folder: Path, tree: Tree, seen: dict[tuple[int, int], Path]) -> bool:
    """Add a folder to the tree: to its folders, or to what is there already."""
    status = folder.stat()
    other = seen.setdefault((status.st_dev, status.st_ino), folder)
    if other is folder:
        tree.folders.append(folder)
        return True
    tree.again.append((folder, other))
    return False


def _visit(folder: Path, tree: Tree, seen: dict[tuple[int, int], Path], links: list[Path], home: Path | None) -> None:
    """List a folder and the folders in it; links to folders are put aside, as are those that leave ``home``."""
    todo = [folder]
    while todo:
        parent = todo.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError:
            tree.locked.append(parent)
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            path = Path(entry.path)
            if entry.is_symlink() and home is not None and leaves(path, home):
                tree.outside.append(path)
            elif entry.is_symlink() and (path.is_dir() or path.is_file() or not path.exists()):
                (links if path.is_dir() else tree.files).append(path)
            elif entry.is_file():
                tree.files.append(path)
            elif entry.is_dir() and _is_new(path, tree, seen):
                todo.append(path)


def _leave_out_links(tree: Tree) -> None:
    """Keep one of a file and the links to it.

    Links that lead out of the folder, or to what is hidden in it, are the files themselves: two of them with different
    names may be two scans that happen to be the same, as git-annex stores such, and stay.
    """
    links = sorted(path for path in tree.files if path.is_symlink())
    if not links:
        return
    targets = {os.path.realpath(path): path for path in tree.files if not path.is_symlink()}
    visible = set(targets)
    for link in links:
        target = os.path.realpath(link)
        other = targets.setdefault(target, link)
        if other is not link and link.exists() and (target in visible or other.name == link.name):
            tree.files.remove(link)
            tree.again.append((link, other))
