# SPDX-License-Identifier: Apache-2.0
"""The command ``volta3d phantom``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from volta_components.data.phantom.settings import Contrast, Settings
from volta_components.errors import InputError


def phantom(
    output: Path | str,
    subjects: int,
    seed: int = 0,
    spacing: int = 1,
    first: int = 1,
    prefix: str = "PH",
    sites: int = 3,
    ad_share: float = 0.5,
    effect_sex: float = Settings.effect_sex,
    effect_age: float = Settings.effect_age,
    effect_hippocampus: float = Settings.effect_hippocampus,
    effect_ventricles: float = Settings.effect_ventricles,
    anatomies: Path | str | None = None,
    leave_out: Sequence[str] = (),
    contrast: Contrast = "t1",
    skull_share: float = Settings.skull_share,
    variation: float = Settings.variation,
    scans: int = Settings.scans,
    workers: int | None = None,
) -> None:
    """Make a BIDS data set of synthetic heads ("phantoms") with known sex, age, diagnosis and hippocampi.

    Phantoms grow from the MNI152 template, or with --anatomies from label maps of real heads. Then every anatomy counts
    as one patient, in folds, fractions and checks for leaks.

    Subject 7 of a seed is the same head whatever --subjects, --first and --workers are. An interrupted command, started
    again, makes only what is missing; with more --subjects it extends the data set.

    Args:
        output: Folder of the data set.
        subjects: Number of subjects.
        seed: Seed of everything random.
        spacing: Voxel size in mm: 1, 2 or 3.
        first: Number of the first subject. Data sets of one seed with other numbers share no head.
        prefix: Letters that subject ids begin with, as PH in sub-PH0001.
        sites: Number of sites, each with its own contrast: 1 to 3.
        ad_share: Share of subjects with Alzheimer's disease, 0 to 1. The others are healthy.
        effect_sex: Difference of log linear head size between men and women.
        effect_age: Log volume that the ventricles gain in ten years. The hippocampi lose a third of it.
        effect_hippocampus: Log volume that the hippocampi lose with Alzheimer's disease, on average.
        effect_ventricles: Log volume that the ventricles gain with Alzheimer's disease, on average.
        anatomies: Folder of label maps in FreeSurfer's numbering (aseg.mgz, aparc+aseg.mgz, SynthSeg's output) that
            heads grow from, in turn; the template by default.
        leave_out: Names of anatomies that are not used.
        contrast: "any" draws every tissue's brightness on its own; with --anatomies.
        skull_share: Share of subjects with a skull, 0 to 1. It is taken off the others; with --anatomies.
        variation: How far heads differ from their anatomy, 0 to 5: 1 as in one study; with --anatomies.
        scans: Scans of each subject, 1 to 9: the same head, lying otherwise, by another scanner, in a session
            of its own.
        workers: Number of processes; one for each core by default.

    Raises:
        InputError: if a value is out of its range, or the folder holds something else.
    """
    for name, value in (("subjects", subjects), ("first", first), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: give a whole number from 1")
    if leave_out and anatomies is None:
        raise InputError("--leave-out names anatomies; give their folder as --anatomies")
    settings = Settings(
        seed=seed,
        spacing=spacing,
        sites=sites,
        ad_share=ad_share,
        prefix=prefix.removeprefix("sub-"),
        effect_sex=effect_sex,
        effect_age=effect_age,
        effect_hippocampus=effect_hippocampus,
        effect_ventricles=effect_ventricles,
        contrast=contrast,
        skull_share=skull_share,
        variation=variation,
        scans=scans,
    )
    # Here, since they import torch: help and mistakes should not wait for it.
    from volta_components.data.phantom.dataset import make_dataset
    from volta_components.data.phantom.labels import read_label_maps

    maps = [] if anatomies is None else read_label_maps(Path(anatomies), list(leave_out))
    for each in maps:
        for note in each.notes:
            print(f"note: {each.name}: {note}")
    settings = replace(settings, anatomies=tuple(each.name for each in maps))
    folder = Path(output)
    count, new = make_dataset(folder, settings, range(first, first + subjects), maps, workers)
    grown = f" of {len(maps)} anatomies" if maps else ""
    print(f"{folder}: {count} phantoms{grown} of {spacing} mm ({new} new); look at {folder}/code/sheet.png")
