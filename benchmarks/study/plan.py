# SPDX-License-Identifier: Apache-2.0
"""What the study is made of: sizes, who is scored, and the commands that it runs, in their order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.data.phantom.labels import find_label_maps
from volta_components.errors import InputError
from volta_components.files import read_json

# Every fifth anatomy is scored and never trained on: of the 20 that volta3d fetch downloads, 05, 10, 15 and 20.
EVERY = 5
# Bundles, and their baselines from scratch; the first is the pretrained network without its pretraining.
TASKS = {
    "harp_hippocampus": ("unetr_scratch", "unet_scratch"),
    "ixi_sex": ("vit_scratch", "vit_mean_scratch", "swin_scratch"),
    "aibl_ad": ("vit_scratch", "vit_mean_scratch", "swin_scratch"),
}
# Classifiers that see the mean of the patch tokens; from scratch, their network is another one.
OF_THE_MEAN = {"frozen", "gentle"}
# The whole recipe; benchmarks/learning.py says what each part of it is worth.
RECIPE = ("synthetic", "recommended")
# In place of the number of a pretraining: one that learns nothing. What starts from its encoder differs from what
# starts from a pretrained one by the weights alone; what starts from scratch also trains its encoder at another rate.
UNTRAINED = "untrained"
LEARNS_NOTHING = {"epochs": 1, "warmup_epochs": 0, "learning_rate": 0, "final_learning_rate": 0}
# Nothing is chosen, so nobody is held out for it: the last model is the result. What would be the validation's curve is
# that of the scored heads.
NOTHING_CHOSEN = {"validation_fraction": 0.0, "validate#dataset#data": "$@parts.scored"}
# Or a quarter of the people is held back, and their curve tells after how many epochs an init is at its best.
HELD_BACK = 0.25
OWN_IDS: dict[str, dict[str, Any]] = {
    # An anatomy is a patient, and its heads are that patient's sessions.
    "classification": {**NOTHING_CHOSEN, "threshold": 0.5, "sessions": "all"},
    "harp_hippocampus": {**NOTHING_CHOSEN, "results#best": None, "results#optimistic": None},
}


@dataclass(frozen=True)
class Size:
    """An entry of ``sizes.json``.

    Attributes:
        spacing: mm.
        shape: of the prepared volumes, voxels.
        training_heads: heads that the tasks are trained on.
        scored_heads: heads that masks are scored on.
        scored_for_labels: heads that sex and diagnosis are scored on: more, as a label says less than a mask.
        fractions: shares of the training anatomies.
        seeds: of fine-tuning.
        pretrainings: seeds of pretraining.
        pretrained: inits that start from an encoder.
        untrained: those of them that start from an untrained one as well.
        overlays: of the bundles, before the ids below.
        pretrain, classification, harp_hippocampus: ids.
    """

    spacing: int
    shape: list[int]
    training_heads: int
    scored_heads: int
    scored_for_labels: int
    fractions: list[float]
    seeds: int
    pretrainings: int
    pretrained: list[str]
    untrained: list[str]
    overlays: list[str]
    pretrain: dict[str, Any]
    classification: dict[str, Any]
    harp_hippocampus: dict[str, Any]

    @classmethod
    def named(cls, name: str) -> Size:
        """The size of that name.

        Raises:
            InputError: if there is none.
        """
        sizes = read_json(Path(__file__).with_name("sizes.json"))
        if name not in sizes:
            raise InputError(f"SIZE={name}: choose {', '.join(sizes)}")
        return cls(**{key: value for key, value in sizes[name].items() if key != "_desc_"})


@dataclass(frozen=True)
class Step:
    """A command and what it is for."""

    title: str
    words: tuple[str, ...]


def split_anatomies(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the anatomies to train on, and of those to be scored on.

    Raises:
        InputError: if there is no such folder, or too few label maps in it.
    """
    names = list(find_label_maps(folder))
    scored = names[EVERY - 1 :: EVERY]
    if not scored:
        raise InputError(f"--anatomies {folder}: holds {len(names)} label maps, and a study needs {EVERY} or more")
    return [name for name in names if name not in scored], scored


@dataclass(frozen=True)
class Study:
    """A study in a folder of its own.

    Attributes:
        root: of all that it makes.
        anatomies: folder of label maps.
        size: see ``Size``.
        jobs: fine-tunings at a time.
        longer: how many times the epochs of fine-tuning; such runs stand beside the others, of the same encoders.
        held_back: train without ``HELD_BACK`` of the people, whose curves are drawn; such runs stand beside the others.
    """

    root: Path
    anatomies: Path
    size: Size
    jobs: int = 2
    longer: int = 1
    held_back: bool = False

    @property
    def tag(self) -> str:
        """What names of such fine-tunings end with."""
        return ("" if self.longer == 1 else f"_x{self.longer}") + ("_held_back" if self.held_back else "")

    @property
    def store(self) -> str:
        """MLflow's store."""
        return f"sqlite:///{self.root.resolve()}/mlruns.db"

    def datalist(self, task: str) -> Path:
        """A task's scored heads in fold 0, the others in fold 1."""
        name = "with_masks" if task == "harp_hippocampus" else "with_labels"
        return self.root / "data" / name / "datalist.json"

    def encoder(self, number: int | str) -> Path:
        """The weights of a pretraining, or of ``UNTRAINED``."""
        return self.root / f"pretrain_{number}" / "models" / "encoder_phantom_study.safetensors"

    @staticmethod
    def scratch(task: str, init: str) -> str:
        """The network of an init without its pretraining."""
        by_mean = "vit_mean_scratch"
        return by_mean if init.removeprefix(UNTRAINED) in OF_THE_MEAN and by_mean in TASKS[task] else TASKS[task][0]

    def experiment(self, task: str, number: int | str = 0) -> str:
        """MLflow's experiment of a task and a pretraining; what starts from scratch is with the first."""
        if number == UNTRAINED:
            return f"study_{task}{self.tag}_{UNTRAINED}"
        return f"study_{task}{self.tag}" + (f"_pretrained_{number}" if number else "")

    def overlay(self, bundle: str) -> Path:
        """The file that ``write_overlays`` makes for a bundle."""
        if bundle == "pretrain":
            return self.root / "overlays" / "pretrain.json"
        kind = bundle if bundle == "harp_hippocampus" else "classification"
        return self.root / "overlays" / f"{kind}{self.tag}.json"

    def configs(self, bundle: str, *overlays: str) -> list[str]:
        """Config files of a bundle in the order in which they are merged."""
        folder = Path("bundles") / bundle / "configs"
        names = ["train", *overlays, *self.size.overlays]
        return [*(str(folder / f"{name}.json") for name in names), str(self.overlay(bundle))]

    def write_overlays(self) -> None:
        """Write what the size and the study set, a file for each kind of bundle."""
        for kind in ("pretrain", "classification", "harp_hippocampus"):
            path = self.overlay(kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = {**getattr(self.size, kind), **OWN_IDS.get(kind, {})}
            if self.longer > 1 and kind != "pretrain":
                ids["epochs"] = f"${self.longer} * {ids['epochs'].removeprefix('$')}"
            if self.held_back and kind != "pretrain":
                ids["validation_fraction"] = HELD_BACK
                del ids["validate#dataset#data"]
            path.write_text(json.dumps(ids, indent=4) + "\n", encoding="utf-8")

    def steps(self) -> list[Step]:
        """All commands; each resumes where it stopped, and does nothing twice."""
        training, scored = split_anatomies(self.anatomies)
        data = self.root / "data"
        steps = []
        heads = (
            ("scored", self.size.scored_heads, "1", "PS", training),
            ("scored_for_labels", self.size.scored_for_labels, "3", "PL", training),
            ("training", self.size.training_heads, "2", "PT", scored),
        )
        for name, count, seed, prefix, left_out in heads:
            raw = str(data / f"raw_{name}")
            words = ["phantom", "--output", raw, "--subjects", str(count), "--seed", seed, "--prefix", prefix]
            words += ["--spacing", str(self.size.spacing), "--anatomies", str(self.anatomies)]
            steps.append(_volta3d(f"Heads: {name}", *words, "--leave-out", ",".join(left_out)))
            words = ["prepare", "--layout", "bids", "--source", raw, "--output", str(data / name)]
            shape = ",".join(map(str, self.size.shape))
            words += ["--name", f"phantom_{name}", "--spacing", str(self.size.spacing), "--shape", shape]
            steps.append(_volta3d(f"Preparation: {name}", *words))
        for task, name in (("harp_hippocampus", "scored"), ("ixi_sex", "scored_for_labels")):
            words = ["merge", str(data / name), str(data / "training"), "--output", str(self.datalist(task))]
            words += ["--name", "phantom_study", "--hold-out"]
            steps.append(_volta3d(f"One data set, in which heads of {name} are fold 0", *words))
        encoders: list[int | str] = [*range(self.size.pretrainings), UNTRAINED]
        steps += [self._pretraining(number, scored) for number in encoders]
        for task, scratch in TASKS.items():
            for number in encoders:
                inits = self.size.untrained if number == UNTRAINED else self.size.pretrained
                inits = [*inits, *(scratch if number == 0 else ())]
                steps += [self._crossval(task, number, inits, seed) for seed in range(self.size.seeds)]
        experiments = ",".join(["volta3d_pretrain", *map(self.experiment, TASKS)])
        words = ["report", "--output", str(self.root / f"report{self.tag}"), "--tracking-uri", self.store]
        steps.append(_volta3d("Report, of the first pretraining", *words, "--experiments", experiments))
        return steps

    def _pretraining(self, number: int | str, left_out: Sequence[str]) -> Step:
        folder = self.root / f"pretrain_{number}"
        ids: dict[str, Any] = {
            **(LEARNS_NOTHING if number == UNTRAINED else {}),
            "seed": 0 if number == UNTRAINED else number,
            "run_name": folder.name,
            "suffix": "_phantom_study",
            "anatomies": self.anatomies,
            "leave_out": list(left_out),
            "output_dir": folder,
            "ckpt_dir": folder / "models",
            "tracking": "mlflow",
            "tracking_uri": self.store,
        }
        options = [word for name, value in ids.items() for word in (f"--{name}", str(value))]
        words = ("python", "-m", "monai.bundle", "run", "--config_file", str(self.configs("pretrain", *RECIPE)))
        title = "An encoder that learns nothing" if number == UNTRAINED else f"Pretraining, seed {number}"
        return Step(title, (*words, *options))

    def fractions(self) -> list[float]:
        """Shares of the training anatomies; of fewer than three people nobody can be held back."""
        least = 3 / len(split_anatomies(self.anatomies)[0]) if self.held_back else 0.0
        return [fraction for fraction in self.size.fractions if fraction >= least]

    def _crossval(self, task: str, number: int | str, inits: Sequence[str], seed: int) -> Step:
        words = ["crossval", "--bundle", f"bundles/{task}", "--datalist", str(self.datalist(task)), "--folds", "1"]
        words += ["--inits", ",".join(inits), "--fractions", ",".join(map(str, self.fractions()))]
        words += ["--overlays", ",".join([*self.size.overlays, str(self.overlay(task))]), "--seed", str(seed)]
        words += ["--encoder", str(self.encoder(number)), "--jobs", str(self.jobs), "--output", str(self.root)]
        words += ["--tracking-uri", self.store, "--experiment", self.experiment(task, number)]
        start = "untrained" if number == UNTRAINED else f"pretraining {number}"
        return _volta3d(f"{task}, {start}, seed {seed}", *words)


def _volta3d(title: str, *words: str) -> Step:
    return Step(title, ("volta3d", *words))
