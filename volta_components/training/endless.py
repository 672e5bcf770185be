# SPDX-License-Identifier: Apache-2.0
"""Heads that are rendered while a network trains: no data on disk, and as many heads as the run has time for."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from volta_components.data.datalist import Datalist, datalist_hash
from volta_components.data.phantom.anatomy import geometry
from volta_components.data.phantom.heads import Head, load_head
from volta_components.data.phantom.labels import read_label_maps
from volta_components.data.phantom.render import Pixels, View, render_view, whole_view
from volta_components.data.phantom.scanner import Contrast, standard_scanner
from volta_components.data.phantom.subjects import Settings, draw_subject, random_stream, scanner_of
from volta_components.data.preprocess import PERCENTILES, shift_of_a_brain
from volta_components.errors import InputError
from volta_components.training.sampling import KeyedDataset, derived_seed

_COARSE = 4  # mm


def anatomies_datalist(
    folder: str | os.PathLike[str],
    shape: Sequence[int],
    spacing: float | Sequence[float],
    leave_out: Sequence[str] = (),
    scored: Sequence[Mapping[str, Any]] = (),
) -> Datalist:
    """A folder of label maps as a datalist: an item for each anatomy, who is a patient.

    Args:
        folder: of the label maps; see ``labels.find_label_maps``.
        shape: voxels of the volumes that are rendered.
        spacing: of these volumes, mm.
        leave_out: names of anatomies that are not used.
        scored: items that will be scored: none of them may be of these anatomies.

    Raises:
        InputError: if label maps cannot be used, or one of them is scored.
    """
    path = Path(folder).expanduser()
    maps = read_label_maps(path, list(leave_out))
    taken = {str(item["patient_id"]) for item in scored}
    if rows := [(each.name, each.patient_id) for each in maps if each.patient_id in taken]:
        raise InputError.many(
            f"{len(rows)} anatomies would be trained on and scored",
            rows,
            "Leave them out (--leave_out \"['NAME', ...]\"), or score others.",
        )
    items = [
        {
            "subject_id": each.name,
            "session": None,
            "patient_id": each.patient_id,
            "cohort": "phantom",
            "image": str(each.path.resolve()),
            "fold": 0,
        }
        for each in maps
    ]
    three = [float(side) for side in np.broadcast_to(np.asarray(spacing, dtype=float), 3)]
    content = {
        "name": "phantom_anatomies",
        "rendered": True,
        "spacing": three,
        "shape": [int(side) for side in shape],
        "seed": 0,
        "n_folds": 1,
        "training": items,
    }
    same_everywhere = [{key: value for key, value in item.items() if key != "image"} for item in items]
    return Datalist(path / "datalist.json", content, datalist_hash({**content, "training": same_everywhere}))


class EndlessHeads(KeyedDataset):
    """Heads grown from label maps, each a function of seed, epoch and index alone.

    What an item looks like does not depend on workers, processes or restarts. Items are as ``volta3d prepare`` would
    make them of the head's scan: RAS, in [0, 1] between percentiles of the head, the window's top at the head's.

    Args:
        data: the anatomies: items of ``anatomies_datalist``.
        length: heads of one epoch.
        fresh: heads of an epoch that the epoch before did not have, where rendering is slower than training: the others
            are kept in memory, which all workers of a loader share. ``length`` by default: never the same head twice.
        shape: voxels of an item: the whole window, or crops of it.
        window: voxels of the whole window; ``shape`` by default.
        spacing: mm.
        hippocampus_share: with crops, share of them that lie around the hippocampi; the others lie anywhere.
        jitter: how far a crop's middle lies from that of the hippocampi at most, mm on each axis.
        scanners: pictures of one head; more than one give ``image``, ``image_2``, ... of the same deformed head.
        standard: whether items also have ``standard`` ``[1, *shape]``: the brain by a scanner that is the same for all.
        contrast, skull_share, mirrored_share, variation: see ``subjects.Settings``.
        shares: whether items also have ``shares`` ``[2, *shape]``: of each voxel, that of the left and the right
            hippocampus, float32.
        transform: applied to each item; random ones are seeded for each.
        seed: base seed.
        device: where items are rendered, and stay. Another device than the CPU takes a loader without workers; its
            heads are the same but for rounding, texture, bias field and noise.

    Shapes:
        items: ``image`` ``[1, *shape]`` float32 in [0, 1]; ``label`` ``[1, *shape]`` uint8 with 1 left, 2 right;
        ``key``: epoch and index, as ``KeyedDataset`` gives.

    Raises:
        InputError: if there are no anatomies.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        length: int,
        shape: Sequence[int],
        window: Sequence[int] | None = None,
        spacing: float = 1.0,
        hippocampus_share: float = 0.75,
        jitter: float = 16.0,
        scanners: int = 1,
        contrast: Contrast = "t1",
        skull_share: float = 0.7,
        mirrored_share: float = 0.5,
        variation: float = 2.0,
        shares: bool = False,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        fresh: int | None = None,
        standard: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if not data:
            raise InputError("no anatomies to render heads from; give a folder of label maps (--anatomies DIR)")
        if fresh is not None and not 1 <= fresh <= length:
            raise InputError(f"fresh heads of an epoch: {fresh} is not between 1 and all of its {length}")
        super().__init__(list(data), transform, seed)
        self.device = torch.device(device)
        self.paths = {str(item["subject_id"]): str(item["image"]) for item in data}
        self.settings = Settings(
            seed=seed,
            anatomies=tuple(self.paths),
            contrast=contrast,
            skull_share=skull_share,
            mirrored_share=mirrored_share,
            variation=variation,
        )
        self.heads: dict[str, Head] = {}
        self.length = length
        self.shape = tuple(int(side) for side in shape)
        self.window = self.shape if window is None else tuple(int(side) for side in window)
        self.spacing = spacing
        self.hippocampus_share = hippocampus_share
        self.jitter = jitter
        self.scanners = scanners
        self.shares = shares
        self.fresh = fresh
        self.standard = standard
        # Of the heads that are kept, by ``number % length``: their tensors, and the number that lies there.
        self._kept: dict[str, torch.Tensor] = {}
        self._numbers = torch.full((length,), -1).share_memory_()

    def __len__(self) -> int:
        return self.length

    def fill(self, indices: Iterable[int] | None = None) -> None:
        """Load the anatomies (about 15 MB and half a second each) before workers are forked off, which share them."""
        for name in self.paths:
            self._head(name)
        if self.fresh is not None and not self._kept:
            self.item(0, 0)

    def _head(self, name: str) -> Head:
        if name not in self.heads:
            self.heads[name] = load_head(name, self.paths[name])
        return self.heads[name]

    def item(self, epoch: int, index: int, *repeat: int) -> dict[str, Any]:
        """A head; one that was rendered for an epoch before, here or by another worker, is taken from memory."""
        if self.fresh is None:
            return self._render(epoch, index, *repeat)
        number = max(0, epoch - 1) * self.fresh + index  # epoch 0 is that of pictures
        slot = number % self.length
        if self._numbers[slot] != number:
            head = self._render(0, number)
            if not self._kept:
                self._kept = {name: self._memory(value) for name, value in head.items()}
            for name, value in head.items():
                self._kept[name][slot] = value
            self._numbers[slot] = number  # last: a worker that finds the number finds all of the head
        return {name: values[slot].clone() for name, values in self._kept.items()}

    def _memory(self, one: torch.Tensor) -> torch.Tensor:
        """Room for as many tensors as an epoch has, that a forked process shares.

        Not ``share_memory_``: that lies in ``/dev/shm``, which is small in containers: whoever needs more is killed.
        """
        shape = (self.length, *one.shape)
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=one.dtype, device=self.device)
        memory = mmap.mmap(-1, math.prod(shape) * one.element_size())
        return torch.frombuffer(memory, dtype=one.dtype).view(shape)

    def _render(self, epoch: int, index: int, *repeat: int) -> dict[str, torch.Tensor]:
        settings = replace(self.settings, seed=derived_seed(self.seed, "heads", epoch, *repeat))
        subject = draw_subject(settings, index + 1)
        head = self._head(subject.anatomy)
        where = geometry(subject, head)
        rng = random_stream(settings.seed, 9, index)
        item: dict[str, torch.Tensor] = {}
        view: View | None = None
        for number in range(self.scanners):
            drawn = settings if not number else replace(settings, seed=derived_seed(settings.seed, number))
            scanner = scanner_of(drawn, subject, head.has_outside)
            survey = render_view(
                subject, head, where, scanner, whole_view(head, _COARSE, rough=True), stream=10 + 2 * number
            )
            if view is None:
                view = self._place(rng, head, survey, scanner.mask != "head")
            seen = render_view(subject, head, where, scanner, view, stream=11 + 2 * number)
            item["image" if not number else f"image_{number + 1}"] = self._unit(rng, seen, survey)[None]
            if not number:
                label = torch.zeros(self.shape, dtype=torch.uint8, device=self.device)
                label[seen.hippocampi[0] > 0.5] = 1
                label[seen.hippocampi[1] > 0.5] = 2
                item["label"] = label[None]
                if self.shares:
                    item["shares"] = seen.hippocampi.clone()
        if self.standard and view is not None:
            item["standard"] = render_view(subject, head, where, standard_scanner(), view).image.clamp_(0, 1)[None]
        return item

    def _place(self, rng: np.random.Generator, head: Head, survey: Pixels, stripped: bool) -> View:
        """The window, or a crop of it, as ``place_window`` places it: top at the head's, centred on it."""
        affine = head.image_affine(_COARSE)
        box = ndimage.find_objects(survey.inside.numpy().view(np.uint8))[0]
        low, high = (
            np.array(corner) * _COARSE + affine[:3, 3] for corner in zip(*((s.start, s.stop - 1) for s in box))
        )
        size = np.array(self.window) * self.spacing
        start = (low + high) / 2 - size / 2
        start[2] = high[2] + _COARSE / 2 - size[2]
        if stripped:
            start += shift_of_a_brain(size - (high - low) - _COARSE)
        crop = np.array(self.shape) * self.spacing
        room = size - crop
        if rng.random() < self.hippocampus_share and room.any():
            places = np.argwhere((survey.hippocampi.sum(dim=0) > 0.3).numpy())
            if len(places):
                middle = places.mean(axis=0) * _COARSE + affine[:3, 3] + rng.uniform(-self.jitter, self.jitter, 3)
                start += np.clip(middle - crop / 2 - start, 0, room)
            else:
                start += room / 2
        else:
            start += rng.uniform(0, 1, 3) * room
        grid = np.diag([float(self.spacing)] * 3 + [1.0])
        grid[:3, 3] = start + self.spacing / 2
        return View(grid, self.shape, device=self.device)

    def _unit(self, rng: np.random.Generator, seen: Pixels, survey: Pixels) -> torch.Tensor:
        """Intensities in [0, 1] between percentiles of the whole head, estimated from a coarse picture."""
        low, high = np.percentile(survey.image.numpy()[survey.inside.numpy()], PERCENTILES)
        high = low + (high - low) * rng.uniform(0.85, 1.15)
        image: torch.Tensor = seen.image.sub(float(low)).div(float(high - low)).clamp(0, 1)
        return image
