# SPDX-License-Identifier: Apache-2.0
"""Who the phantoms are: sex, age, diagnosis and scanner of each subject."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volta_components.data.phantom.labels import CODES
from volta_components.data.phantom.scanner import Scanner, draw_scanner
from volta_components.data.phantom.settings import SITES, Settings

FIELD_OF_VIEW = (144, 192, 192)
FORMAT = 2  # raised whenever the same parameters begin to give other images
_MEAN_SCALE = 0.88


def session_name(scan: int) -> str:
    """BIDS name of a subject's scan, from 0."""
    return f"ses-M{scan:03d}"


SESSION = session_name(0)


@dataclass(frozen=True)
class Subject:
    """Everything that is drawn for one phantom, but for the random fields (these come from ``seed`` and ``number``).

    Lengths are in mm, angles in degrees; ``scale`` holds one factor for each axis; ``rotation`` is pitch, roll and yaw
    about the x, y and z axis. ``log_*`` are changes of log volume against the template's structure.
    """

    seed: int
    number: int
    sex: str
    age: float
    diagnosis: str
    severity: float
    site: str
    scale: tuple[float, float, float]
    rotation: tuple[float, float, float]
    translation: tuple[float, float, float]
    log_hippocampus_left: float
    log_hippocampus_right: float
    log_ventricles: float
    grey: float
    fluid: float
    gamma: float
    bias: float
    blur: float
    noise: float
    gain: float
    anatomy: str = ""
    mirrored: bool = False
    deformation: float = 1.0


@dataclass(frozen=True)
class Phantom:
    """One rendered subject.

    Attributes:
        image: ``[X, Y, Z]`` int16 T1-weighted intensities, 0 outside the brain.
        labels: ``[X, Y, Z]`` uint8; 1 left, 2 right hippocampus.
        affine: ``[4, 4]`` voxel to world, RAS, mm.
        truth: parameters and true volumes, as JSON can hold them.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    truth: dict[str, Any]


def random_stream(seed: int, *stream: int) -> np.random.Generator:
    """A random generator for a seed and a stream."""
    return np.random.default_rng(np.random.SeedSequence([seed, *stream]))


def _diagnosis(settings: Settings, number: int) -> tuple[bool, int]:
    """Whether a subject has AD (evenly spread over groups of four), and how many of its diagnosis come before it."""
    index = number - 1
    group, place = divmod(index, 4)
    position = 4 * group + int(random_stream(settings.seed, 1, group).permutation(4)[place])
    patients = math.floor(position * settings.ad_share + 0.5)
    patient = math.floor((position + 1) * settings.ad_share + 0.5) > patients
    return patient, patients if patient else position - patients


def draw_subject(settings: Settings, number: int) -> Subject:
    """Draw the person and the scanner of one phantom, by its number from 1.

    Sexes and sites are in turn within each diagnosis, in random order, so that even a few subjects have all of them and
    none goes with another.
    """
    patient, rank = _diagnosis(settings, number)
    pair, turn = divmod(rank, 2)
    sex = "MF"[random_stream(settings.seed, 2, int(patient), pair).permutation(2)[turn]]
    round_, turn = divmod(rank, settings.sites)
    site = list(SITES)[random_stream(settings.seed, 3, int(patient), round_).permutation(settings.sites)[turn]]

    rng = random_stream(settings.seed, 4, number)

    def normal(mean: float, deviation: float, limit: float = 2.0) -> float:
        """A normal deviate, drawn again while it is beyond ``limit`` deviations."""
        while abs(value := rng.standard_normal()) > limit:
            pass
        return float(mean + deviation * value)

    age = round(normal(72.0, 7.0), 1)
    severity = float(rng.uniform(0.5, 1.5))  # drawn for everybody: the diagnosis changes nothing else of a subject
    severity = round(severity, 3) if patient else 0.0
    decades = (age - 72.0) / 10
    size = normal(math.log(_MEAN_SCALE), 0.022) + settings.effect_sex * (0.5 if sex == "M" else -0.5)
    wide = settings.variation if settings.anatomies else 1.0
    if settings.anatomies:  # heads of anatomies have their own size; the template is large
        size = wide * (size - math.log(_MEAN_SCALE))
    scale = [math.exp(size + normal(0.0, 0.008 if not settings.anatomies else 0.02 * wide)) for _ in range(3)]
    rotation = [normal(0.0, 3.0 * wide) for _ in range(3)]
    translation = [normal(0.0, deviation * wide) for deviation in (1.5, 2.5, 2.5)]
    hippocampus = normal(0.0, 0.08) - settings.effect_age / 3 * decades - settings.effect_hippocampus * severity
    sides = [hippocampus + normal(0.0, 0.03) for _ in range(2)]
    ventricles = normal(0.0, 0.2) + settings.effect_age * decades + settings.effect_ventricles * severity
    scanner = SITES[site]
    return Subject(
        seed=settings.seed,
        number=number,
        sex=sex,
        age=age,
        diagnosis="AD" if patient else "CN",
        severity=severity,
        site=site,
        scale=(scale[0], scale[1], scale[2]),
        rotation=(rotation[0], rotation[1], rotation[2]),
        translation=(translation[0], translation[1], translation[2]),
        log_hippocampus_left=sides[0],
        log_hippocampus_right=sides[1],
        log_ventricles=ventricles,
        grey=scanner["grey"] + normal(0.0, 0.02),
        fluid=scanner["fluid"] + normal(0.0, 0.02),
        gamma=scanner["gamma"] * math.exp(normal(0.0, 0.08)),
        bias=scanner["bias"] * math.exp(normal(0.0, 0.2)),
        blur=scanner["blur"] * math.exp(normal(0.0, 0.2)),
        noise=scanner["noise"] * math.exp(normal(0.0, 0.2)),
        gain=math.exp(normal(math.log(1200.0), 0.3)),
        anatomy=_anatomy(settings, number),
        mirrored=bool(rng.random() < settings.mirrored_share) if settings.anatomies else False,
        deformation=wide,
    )


def _anatomy(settings: Settings, number: int) -> str:
    """Anatomies in turn, each round in a random order of its own."""
    if not settings.anatomies:
        return ""
    round_, turn = divmod(number - 1, len(settings.anatomies))
    return settings.anatomies[int(random_stream(settings.seed, 7, round_).permutation(len(settings.anatomies))[turn])]


def scanned_again(settings: Settings, subject: Subject, scan: int) -> tuple[Subject, Settings]:
    """The same head, lying otherwise, in another scanner; and the settings for that scanner. Scan 0 is the subject."""
    if not scan:
        return subject, settings
    drawn = replace(settings, seed=int(random_stream(settings.seed, 11, scan).integers(2**31)))
    other = draw_subject(drawn, subject.number)
    of_scan = ("site", "grey", "fluid", "gamma", "bias", "blur", "noise", "gain", "rotation", "translation")
    return replace(subject, **{name: getattr(other, name) for name in of_scan}), drawn


def scanner_of(settings: Settings, subject: Subject, has_outside: bool = True) -> Scanner:
    """The scanner of a subject.

    A subject of the template has its site's, with a shift of its own. A subject of an anatomy has one of its own; its
    site shifts grey matter and fluid, and scales gamma, bias field, blur and noise.
    """
    rng = random_stream(settings.seed, 8, subject.number)
    with_skull = bool(rng.random() < settings.skull_share) and has_outside
    scanner = draw_scanner(rng, settings.contrast, with_skull, settings.variation)
    if not settings.anatomies:
        means = np.zeros(256, np.float32)
        means[CODES["cortex_left"]], means[CODES["fluid"]] = subject.grey, subject.fluid
        return replace(
            scanner,
            means=means,
            gamma=subject.gamma,
            bias=subject.bias,
            blur=subject.blur,
            noise=subject.noise,
            thickness=1.0,
            mask="brain",
            cut=0.0,
        )
    site, mean = SITES[subject.site], SITES["A"]
    return replace(
        scanner,
        gamma=scanner.gamma * site["gamma"] / mean["gamma"],
        noise=scanner.noise * site["noise"] / 0.03,
        blur=scanner.blur * site["blur"] / 0.5,
    )
