# SPDX-License-Identifier: Apache-2.0
"""Simply a folder of volumes (NIfTI, MINC, MGH), with or without labels and a table."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from volta_components.data.identity import biobank, canonical_patient_id, grouped, is_worldwide
from volta_components.data.layouts.bids import plainness
from volta_components.data.layouts.common import LabelFile, LayoutOptions, Listing, Scan, look, participants, slug
from volta_components.data.layouts.series import may_be_dicom
from volta_components.data.names import (
    OTHER_CONTRASTS,
    Name,
    date_in,
    date_of_folders,
    maybe_one_person,
    parse_name,
    split_visit,
)
from volta_components.data.sessions import place
from volta_components.data.tables import People
from volta_components.data.volumes import conversion, volume_suffix
from volta_components.data.walk import ASIDE, Tree, VolumeFile, tidy
from volta_components.errors import InputError

_LABEL = re.compile(r"[._-](label|labels|seg|mask|dseg)$", re.IGNORECASE)
_BRAIN = re.compile(r"(brain|skull|bet)[._-]?(mask|seg)?$", re.IGNORECASE)
# Folders that surely are sessions, those that are if something else says who, and file names that are nobody's.
_TIME = re.compile(r"(ses|sess|session|visit|tp|timepoint|time|fu|followup|wave)[-_ ]?\d{1,3}", re.IGNORECASE)
_MAYBE_TIME = re.compile(r"(v|m|mo|month|w|week|y|year|d|day)[-_ ]?\d{1,3}", re.IGNORECASE)
_NOBODY = re.compile(r"(t1[a-z]?|mprage|spgr|bravo|brain|orig|nu|norm|image|anat|struct|scan)", re.IGNORECASE)
# Words of protocols: what has one in its name is no person's name.
_PROTOCOL = re.compile(
    r"(?<![a-z])(t1[a-z]*|mpr[a-z]*|mprage|spgr|bravo|tfe|brain|orig|nu|norm|image|img|anat[a-z]*|struct[a-z]*|scan|head"
    r"|mri?|vol(ume)?|3d|iso|sag|tra|cor|raw|data|input)(?![a-z])",
    re.IGNORECASE,
)
_LABEL_FOLDERS = {"labels", "label", "labelstr"}
# The volumes in FreeSurfer's folder mri that are a T1 scan, the best first.
_FREESURFER = ("T1", "orig", "nu", "rawavg")


@dataclass(frozen=True)
class Found:
    """A volume, and who and when it is of.

    Attributes:
        volume: the file.
        name: its name, taken apart.
        subject: who, for the names of results.
        session: ``ses-X`` by the file's name, its folders, or the word for a visit at the name's end.
        patient: canonical id.
        date: of the scan, by the folders.
    """

    volume: VolumeFile
    name: Name
    subject: str
    session: str | None
    patient: str
    date: str | None


def read(options: LayoutOptions) -> Listing:
    """List all volumes under a folder.

    The name of a file in BIDS' way says who it is of (``sub-01_ses-1_run-2_T1w``); of any other, the name without its
    suffix and the word for the contrast is the subject, and ``_ses-X`` in it the session. Names that differ only in
    what looks like a visit (``p1_visit1``, ``p1_visit2``) are taken for one person, which is a problem unless the table
    says so. Files or folders named as in UK Biobank have the number for the person and the visit for the session. Where
    file names are not unique, the folders are the names. A date in the name of a folder is the scan's.

    A file in a folder ``labels``, or whose name ends in ``_label``, ``_seg``, ``_mask`` or ``_dseg``, is the label of
    the volume of that name. A table (see ``participants``, or ``--table``) may give sex, age, diagnosis and site.

    Raises:
        InputError: if there is no such folder, or no volume in it.
    """
    root = options.source
    listing = Listing(cohort=slug(root.resolve().name))
    tree = look(listing, root, options.follow_links)
    made = made_by_freesurfer(tree.volumes())
    for folder in sorted({path.parent for path in made}):
        listing.note("skipped", "(FreeSurfer)", folder, "made by FreeSurfer of the T1 that is taken")
    images, labels, others = ([v for v in volumes if v.path not in made] for volumes in _sorted_out(tree))
    if not images:
        contrasts = f", only {others[0].name} and the like" if others else ""
        raise InputError(
            f"{root}: no volume (.nii, .nii.gz, .mnc, .mgz) in it or below{contrasts}; for DICOM use --layout dicom"
        )
    listing.read_people(options.table or participants(root))
    found = identified(listing, images)
    listing.match_ids(one.patient for one in found)
    names = {one.volume.path: one for one in found}
    sure: list[Scan] = []
    unsure: list[Scan] = []
    for path, one in names.items():
        facts = listing.describe(one.patient, one.session, one.date)
        scan = Scan(one.subject, one.session, one.patient, path, listing.place(path), date=one.date, **facts)
        # Without a session, files of other names than BIDS' may be of several.
        (sure if scan.session or one.name.is_bids else unsure).append(scan)
    for scan in listing.one_of_session(sure, lambda scan: _order(names[scan.image].name, scan)) + unsure:
        listing.add(scan)
    _other_contrasts(listing, others, found)
    # A link to nothing without suffix is named already.
    files = (path for path in tree.files if not volume_suffix(path) and (path.suffix or path.exists()))
    for folder in sorted({path.parent for path in filter(may_be_dicom, files)}):
        parts = folder.relative_to(root).parts
        if not parts or parts[0] not in ASIDE:
            who = tidy(parts[0]) if parts else "(all)"
            listing.note("problem", who, folder, "DICOM files, not read", "use --layout dicom for them")
    note_without_volume(listing, tree, found)
    if options.labels != "none":
        _give_labels(listing, labels, names)
    listing.note_rows_without_scans(listing.people, "volume")
    listing.found = {"volumes": len(images), "labels": len(labels)}
    return listing.choose(options.sessions)


def note_without_volume(listing: Listing, tree: Tree, found: list[Found]) -> None:
    """Name folders at the top that hold no volume: problems where such folders are people."""
    root = listing.root
    tops = {tidy(volume.path.relative_to(root).parts[0]) for volume in tree.volumes()}
    noted = {finding.file.split("/")[0] for finding in listing.findings if finding.left_out}
    people = {one.patient for one in found if one.volume.folder != root}
    are_people = not people.isdisjoint(map(canonical_patient_id, tops))
    for folder in tree.folders:
        if folder.parent == root and (top := tidy(folder.name)) not in tops | noted | ASIDE:
            inside = [path for path in tree.files if folder in path.parents]
            reason = "has no volume" + (f", only {tidy(inside[0].name)} and the like" if inside else " in it")
            if are_people:
                listing.note("problem", top, top, reason, "fetch or convert its scans, or move the folder away")
            else:
                listing.note("quirk", top, top, reason, "nothing was taken from it", patient_id="")


def _sorted_out(tree: Tree) -> tuple[list[VolumeFile], list[VolumeFile], list[VolumeFile]]:
    """Images, labels, and volumes of other contrasts; of a BIDS folder, derivatives are no images."""
    root = tree.root
    aside = tree.aside()
    images, labels, others = [], [], []
    for volume in tree.volumes():
        parts = [part.lower() for part in volume.path.relative_to(root).parts[:-1]]
        is_label = bool(set(parts) & _LABEL_FOLDERS or _LABEL.search(volume.stem))
        if is_label and not _BRAIN.search(volume.stem):
            labels.append(volume)
        elif not aside.isdisjoint(parts[:1]):
            continue
        elif is_label or parse_name(volume.stem).is_other:
            others.append(volume)
        else:
            images.append(volume)
    return images, labels, others


def made_by_freesurfer(volumes: Iterable[VolumeFile]) -> set[Path]:
    """Of volumes in folders ``SUBJECT/mri``, those beside the one that is taken for the T1 scan."""
    folders: dict[Path, dict[str, Path]] = {}
    for volume in volumes:
        home = _freesurfer_home(volume)
        if home is not None:
            folders.setdefault(home, {})[volume.path.relative_to(home / "mri").as_posix()] = volume.path
    made: set[Path] = set()
    for inside in folders.values():
        taken = next((f"{name}.mgz" for name in _FREESURFER if f"{name}.mgz" in inside), None)
        made |= {path for name, path in inside.items() if taken and name != taken}
    return made


def _freesurfer_home(volume: VolumeFile) -> Path | None:
    """The folder of the subject that a volume of FreeSurfer's lies in (``mri`` or ``mri/orig`` below it), or None."""
    folder = volume.path.parent.parent if volume.path.parent.name == "orig" else volume.path.parent
    return folder.parent if folder.name == "mri" and volume.path.suffix == ".mgz" else None


# --- who -------------------------------------------------------------------------------------------------------------


def identified(listing: Listing, images: Sequence[VolumeFile]) -> list[Found]:
    """Who each image below the listing's root is of, by its name or by its folders; guesses are problems."""
    root, people = listing.root, listing.table
    places = {volume.path: tuple(map(tidy, volume.folder.relative_to(root).parts)) for volume in images}
    crowd = Counter(places.values())
    holders = ({places[volume.path] for volume in several} for several in grouped(images, lambda v: v.stem).values())
    # Folders with files of names that other folders have as well: there, names alone do not say who.
    alike = sorted({place for several in holders if len(several) > 1 for place in several})
    deepest = max(map(len, places.values()), default=0)
    levels = [{place[level : level + 1] for place in alike} for level in range(deepest)]
    found: list[Found] = []
    plain: list[Found] = []
    for volume in images:
        name, folders = parse_name(volume.stem), places[volume.path]
        date = date_of_folders(folders)
        session = name.session or next((part for part in folders if re.fullmatch(r"ses-\w+", part)), None)
        own = canonical_patient_id(volume.stem)
        if folders in alike and (time := next(filter(_is_time, folders), None)):
            session = session or _session(time)
        if name.is_bids and not (name.session or name.entities or people.knows(name.subject)):
            # A table that has sub-1_2 as a whole says that this is somebody's name.
            whole = volume.stem.removesuffix(f"_{name.contrast}")
            name = replace(name, subject=whole) if people.knows(whole) else name
        above = next((part for part in folders if _is_person(part, people)), None)
        home = _freesurfer_home(volume)
        person_and_visit = next(filter(None, map(biobank, (name.subject, *reversed(folders)))), None)
        if name.is_bids:
            found.append(Found(volume, name, name.subject, session, canonical_patient_id(name.subject), date))
        elif person_and_visit:
            person, number = person_and_visit
            found.append(Found(volume, name, person, session or f"ses-{number}", person, date))
        elif is_worldwide(own):
            visit = date or split_visit(name.subject)[1]
            found.append(Found(volume, name, name.subject, session or _session(visit), own, date))
        elif not people.knows(name.subject) and (above or home or folders in alike):
            differ = [part for part, level in zip(folders, levels, strict=False) if level - {(part,)}]
            who = above or (tidy(home.name) if home else _who(differ, folders, name.subject))
            who = who or tidy(root.resolve().name)
            rest = [part for part in differ if part != who and (not (above or home) or _is_time(part))]
            rest += [volume.stem] * (crowd[folders] > 1 and who != name.subject)
            session = session or _session(date or "".join(rest))
            (found if above else plain).append(Found(volume, name, who, session, canonical_patient_id(who), date))
            if not (above or home):
                _note_folder(listing, volume.path, who, session if rest else None, name.subject)
        else:
            plain.append(Found(volume, name, name.subject, session, canonical_patient_id(name.subject), date))
    return found + _by_name(listing, plain)


def _is_person(folder: str, people: People) -> bool:
    """Whether the name of a folder surely is somebody's."""
    return (
        re.fullmatch(r"sub-[A-Za-z0-9]+", folder) is not None
        or is_worldwide(canonical_patient_id(folder))
        or people.knows(folder)
    )


def _is_time(folder: str) -> bool:
    """Whether the name of a folder surely is a session: ``pre``, ``followup``, ``visit2``, ``2020-06-25``."""
    found = place(folder)
    return _TIME.fullmatch(folder) is not None or (found is not None and found[0] in ("first", "last", "date"))


def _who(differ: Sequence[str], folders: Sequence[str], subject: str) -> str | None:
    """Who a file of an ambiguous name is of: of the folders that differ, one that is no session, else its own name."""
    if not differ:
        return next(iter(folders), None)
    people = [part for part in differ if not _is_time(part)]
    surely = [part for part in people if not _MAYBE_TIME.fullmatch(part)]
    if _NOBODY.fullmatch(subject):
        shared = [part for part in folders if part not in differ and not _is_time(part)]
        return next(iter(surely or people or shared), None)
    return next(iter(surely), subject)


def _session(text: str) -> str | None:
    """A session's name out of a date, a word for a visit, or names of folders."""
    plain = re.sub(r"[\W_]", "", text)
    return f"ses-{plain}" if plain else None


def _note_folder(listing: Listing, place: Path, who: str, session: str | None, file: str) -> None:
    """Say that folders, not file names, told who a scan is of (``anna/T1.mgz``, ``bert/T1.mgz``)."""
    reason = f"other folders have files of these names too, so taken for {who}'s"
    if session:
        remedy = f"name it sub-..._{session}_T1w.nii.gz to be sure, or give a --table of people"
        if who.lower().removesuffix("s") in OTHER_CONTRASTS:  # T1/anna and T2/anna
            remedy = f"if {who} is no person, give the folder of T1 scans alone as --source; if it is, {remedy}"
        elif _PROTOCOL.search(who):
            remedy = f"if {who} is no person but the folder of T1 scans, give --source .../{who}; if it is, {remedy}"
        listing.note("problem", who, place, f"{reason}, session {session}", remedy, False, "")
    elif _PROTOCOL.search(file):
        listing.note("quirk", who, place, f"{reason}, by the folder", patient_id="")
    else:  # 2019/anna.nii.gz and 2020/anna.nii.gz may be one person's visits
        remedy = f"if it is {file}'s, name it sub-{re.sub(r'[^A-Za-z0-9]', '', file)}_ses-..._T1w.nii.gz; if not, "
        listing.note("problem", who, place, f"{reason}, by the folder", f"{remedy}give a --table with {who}", False, "")


def _by_name(listing: Listing, plain: list[Found]) -> list[Found]:
    """Join those whose names differ only in what looks like a visit, unless a table has each of them."""

    def base_of(one: Found) -> str:
        base, visit = split_visit(one.subject)
        return base if base and visit and not listing.table.knows(one.subject) else one.subject

    bases = grouped(plain, base_of)
    unknown = {one.subject for one in plain if not listing.table.knows(one.subject)}
    if unsure := maybe_one_person(unknown & set(bases)):
        some = "; ".join(" and ".join(group) for group in unsure[:5]) + (" and more" if len(unsure) > 5 else "")
        reason = f"{some}: taken for different people, but may be scans of one"
        remedy = "give a --table with each of them if they are different people; if not, name them sub-X_ses-N"
        listing.note("problem", unsure[0][0], "", reason, remedy, False)
    result = []
    for base, group in bases.items():
        patient = canonical_patient_id(base)
        is_known = listing.table.knows(base)
        subjects = sorted({one.subject for one in group})
        if subjects == [base] or (len(subjects) == 1 and not is_known):
            result += group
            continue
        if not is_known:
            some = f"{subjects[0]} and {subjects[1]}" + (f" and {len(subjects) - 2} more" if len(subjects) > 2 else "")
            reason = f"{some}: taken for one person, since their names differ only in what looks like a visit"
            bids = f"sub-{re.sub(r'[^A-Za-z0-9]', '', base)}_ses-..."
            remedy = f"if so, name them {bids}, or give a --table with {base}; if not, a --table with each of them"
            listing.note("problem", base, group[0].volume.path, reason, remedy, False, patient)
        visits = [split_visit(one.subject)[1] for one in group]
        # The word for the contrast is no part of a visit's name.
        if all(re.match(r"t1[_. -]", visit, re.IGNORECASE) for visit in visits):
            visits = [re.sub(r"^t1[_. -]+", "", visit, flags=re.IGNORECASE) for visit in visits]
        for one, visit in zip(group, visits, strict=True):
            session = one.session or _session(visit)
            date = one.date or date_in(visit)
            result.append(replace(one, subject=base, patient=patient, session=session, date=date))
    return result


def _order(name: Name, scan: Scan) -> tuple[object, ...]:
    """Of a session's scans the lowest is taken: BIDS' rules, and no repeat where there is an original."""
    repeat = re.search(r"(?<![a-z])(repeat|rep|mpr-r|rescan)(?![a-z])", scan.image.name, re.IGNORECASE)
    return (bool(repeat), *plainness(scan)) if name.is_bids else (bool(repeat),)


def _other_contrasts(listing: Listing, others: Iterable[VolumeFile], found: list[Found]) -> None:
    """Set volumes aside whose names say that they are no T1 scans; whoever has nothing else is a problem."""
    known = {one.patient for one in found}
    subjects = {one.subject for one in found}
    timed = [one.volume.stem for one in found if re.search(r"[_. -]t\d+$", one.volume.stem, re.IGNORECASE)]
    visits = {split_visit(stem)[0] for stem in timed}
    for volume in others:
        name, path = parse_name(volume.stem), volume.path
        what = name.contrast if name.part == "mag" else f"part-{name.part}"
        patient = canonical_patient_id(name.subject)
        if name.contrast.lower() == "t2" and name.subject in visits:
            remedy = "name it ses-2 or T2w"
            listing.note("problem", name.subject, path, "T2 may be a contrast or a time point", remedy, True, patient)
        elif _BRAIN.search(volume.stem):
            listing.note("skipped", name.subject, path, "a mask of the brain, not of structures", patient_id="")
        elif patient in known or name.subject in subjects:
            listing.note("skipped", name.subject, path, f"no T1 scan by its name ({what})", patient_id=patient)
        else:
            remedy = "add the T1 scan, or name this one T1w if it is one"
            reason = f"has no T1 scan, only {what or 'a mask'}"
            listing.note("problem", name.subject, path, reason, remedy, True, patient)


# --- labels ----------------------------------------------------------------------------------------------------------


def _give_labels(listing: Listing, labels: list[VolumeFile], names: dict[Path, Found]) -> None:
    """Give each scan the label of its name, else the one of its subject and session; note those without a scan."""
    chosen: dict[Path, VolumeFile] = {}
    for label in sorted(labels, key=lambda volume: ("hippocamp" not in volume.stem.lower(), volume.path)):
        stem, name = _LABEL.sub("", label.stem), parse_name(label.stem)
        if remedy := conversion(label.path):
            listing.note("problem", stem, label.path, "label of a format that is not read", remedy, False, "")
            continue
        same = [one for one in names.values() if one.volume.stem in (stem, label.stem)]
        if not same and name.is_bids:
            same = [one for one in names.values() if (one.subject, one.session) == (name.subject, name.session)]
            same = [one for one in same if one.name.entities.get("run") == name.entities.get("run")] or same
        nearness = [_nearness(one.volume.path, label.path) for one in same]
        near = [one for one, found in zip(same, nearness, strict=True) if found == max(nearness)]
        if len(near) != 1:
            reason = "label of several images" if near else "label without image"
            remedy = "name it as its image" if near else "add the image"
            listing.note("problem", name.subject if name.is_bids else stem, label.path, reason, remedy)
        elif near[0].volume.path in chosen:
            reason = f"double label file: {chosen[near[0].volume.path].name} is used"
            listing.note("problem", near[0].subject, label.path, reason, "remove one", False, near[0].patient)
        else:
            chosen[near[0].volume.path] = label
    listing.scans = [
        replace(scan, labels=(LabelFile(chosen[scan.image].path),)) if scan.image in chosen else scan
        for scan in listing.scans
    ]


def _nearness(one: Path, other: Path) -> tuple[int, bool]:
    """How many folders two paths share from the top, and whether they share all of them."""
    common = Path(os.path.commonpath([one.parent, other.parent]))
    return len(common.parts), one.parent == other.parent
