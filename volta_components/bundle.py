# SPDX-License-Identifier: Apache-2.0
"""What expressions in the bundles' configs call: ``"$import volta_components.bundle as volta"``, then ``volta.NAME``.

Objects (``_target_``) are named by the module that they live in. Functions are found here, so that a config has one
import. A module is imported when something of it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from volta_components.errors import explain_input_errors
from volta_components.files import keep_private

# Now, since MONAI reads ids and makes folders before it evaluates ``initialize``.
explain_input_errors()
keep_private()

_MODULES = {
    "functools": ("partial",),
    "volta_components.errors": ("check_counts",),
    "volta_components.files": ("bundle_root", "file_tag"),
    "volta_components.distributed": (
        "join_processes",
        "leave_processes",
        "local_device",
        "process_count",
        "process_rank",
    ),
    "volta_components.data.checks": ("check_volumes",),
    "volta_components.data.datalist": ("cohort_weights", "load_datalist"),
    "volta_components.training.endless": ("anatomies_datalist",),
    "volta_components.training.ids": ("check_ids",),
    "volta_components.training.record": ("provenance", "run_settings"),
    "volta_components.training.stores": ("prepare_tracking",),
    "volta_components.training.schedules": ("CosineSchedule", "LinearSchedule"),
    "volta_components.method.networks": ("VoltaViT", "make_teacher", "parameter_groups"),
    "volta_components.method.weights": ("find_encoder", "load_encoder", "read_record"),
    "volta_components.downstream.amp": ("AmpInferer",),
    "volta_components.downstream.classification": ("labelled_items", "score_only"),
    "volta_components.downstream.label_maps": ("check_label_maps", "labelled_parts"),
    "volta_components.downstream.leaks": ("Origin", "check_encoder", "check_origin"),
    "volta_components.downstream.metrics": ("one_hot_pair",),
    "volta_components.downstream.splits": ("Parts", "check_classes", "check_shares", "class_weights", "split_items"),
    "volta_components.downstream.start": ("freeze_for", "load_model", "pool_of", "tuning_groups"),
    "volta_components.downstream.tracking": ("model_record", "run_name", "run_tags"),
    "volta_components.inference.embeddings": ("embedding_picture",),
    "volta_components.inference.probes": ("probe_report",),
    "volta_components.inference.scans": ("check_source", "find_volumes", "prepared_grid", "result_root"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
