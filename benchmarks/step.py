# SPDX-License-Identifier: Apache-2.0
"""One step of pretraining, and the work around it, beside its stock forms: ratios measured side by side in one run.

A step is all of it: views, teacher, student, losses, backward pass, optimiser, moving average. The stock form is as
MONAI's tutorials write it: a chain of dictionary transforms makes each view, ``ViTAutoEnc`` sees one view a pass, its
attention maps are kept, everything is float32, and the same losses are PyTorch's own functions on whole arrays. Every
figure comes from a process of its own; the forms of a row take turns, so that a busy machine is busy for both. On a CPU
it is the time that the process computed (of all its threads together), which says more on a machine that is shared.

    python benchmarks/step.py [--size tiny|small|paper] [--turns 2] [--device cpu|cuda] [--rows ...] [--output FILE]

On one core, ``small`` takes some minutes a turn; ``paper`` takes half an hour and 10 GiB. With ``--limit SECONDS``, a
form that takes longer or fails is named in its rows, and the others are measured.
"""

from __future__ import annotations

import argparse
import atexit
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from less_work import PAIRS, kept_share
from step_forms import SIZES, Size, clock_of, flops_of, gemm_rate, halved, monai_views, our_views, ours, stock
from step_peer import peer
from task_forms import Starter, fine_tuning, unetr_inference

from volta_components.method.graphs import GraphedFunction

Step = Callable[[], None]
HALF, FULL = torch.bfloat16, torch.float32
OURS, FLOAT, STOCK = "this project, bfloat16", "this project, float32", "stock MONAI, float32"
COMPILED, NO_GRAPH, EIGHT, CROPS_96 = (f"{OURS}, {what}" for what in ("compiled", "no graph", "8 volumes", "crops_96"))
# By name; each is made in a process of its own, with a folder for its data.
FORMS: dict[str, Callable[[Size, torch.device, Path], Step]] = {
    STOCK: lambda size, device, _: stock(size, device),
    FLOAT: lambda size, device, _: ours(size, device, FULL).step,
    OURS: lambda size, device, _: ours(size, device, HALF).step,
    COMPILED: lambda size, device, _: ours(size, device, HALF, compiled=True).step,
    NO_GRAPH: lambda size, device, _: ours(size, device, HALF, graph=False).step,
    EIGHT: lambda size, device, _: ours(size, device, HALF, compiled=True, batch=8).step,
    CROPS_96: lambda size, device, _: ours(halved(size), device, HALF).step,
    "this project, bfloat16, from disk": lambda size, device, folder: ours(size, device, HALF, folder=folder).step,
    "DINOv2-style peer, bfloat16": lambda size, device, _: peer(size, device, HALF),
    "DINOv2-style peer, bfloat16, this project's views": lambda size, device, _: peer(size, device, HALF, True),
    "views by MONAI's dictionary transforms": lambda size, device, _: monai_views(size, device),
    "views by this project": lambda size, device, _: our_views(size, device),
    "starter model by MONAI's sliding window, float32": lambda size, device, _: Starter(device).stock,
    "starter model by the bundle's, bfloat16": lambda size, device, _: Starter(device).ours,
    "UNETR by MONAI's sliding window, float32": lambda size, device, _: unetr_inference(size, device, True),
    "UNETR by the bundle's, bfloat16": lambda size, device, _: unetr_inference(size, device, False),
    "fine-tuning as MONAI's tutorial, float32": lambda size, device, folder: fine_tuning(size, device, folder, True),
    "fine-tuning by the bundle, float32": lambda size, device, folder: fine_tuning(size, device, folder, False, False),
    "fine-tuning by the bundle, bfloat16": lambda size, device, folder: fine_tuning(size, device, folder, False),
}
for _title, _forms in PAIRS.items():
    for _place, _form in zip(("plain", "here"), _forms, strict=True):
        FORMS[f"{_title}: {_place}"] = lambda size, device, _, make=_form: make(size, device)

# Figure, goal, the form above the line, the form below it, and what is compared of them.
ROWS: list[tuple[str, str, str, str, str]] = [
    ("a step, stock MONAI / this project", ">= 3", STOCK, OURS, "seconds"),
    ("the same in float32", "", STOCK, FLOAT, "seconds"),
    ("peak memory, this project / stock MONAI", "<= 0.50", OURS, STOCK, "gib"),
    ("the same in float32", "", FLOAT, STOCK, "gib"),
    ("a step, plain / compiled", "", OURS, COMPILED, "seconds"),
    ("a step, kernel by kernel / a graph", "", NO_GRAPH, OURS, "seconds"),
    ("8 volumes, compiled, a graph / a step", "", EIGHT, OURS, "seconds"),
    ("crops_96.json / a step", "", CROPS_96, OURS, "seconds"),
    (
        "views a second, this project / MONAI's dictionary transforms",
        ">= 8",
        "views by MONAI's dictionary transforms",
        "views by this project",
        "seconds",
    ),
    ("a step, read from disk / in memory", "<= 1.05", "this project, bfloat16, from disk", OURS, "seconds"),
    ("a step, DINOv2-style peer / this project", "> 1.2", "DINOv2-style peer, bfloat16", OURS, "seconds"),
    ("the same with this project's views", "", "DINOv2-style peer, bfloat16, this project's views", OURS, "seconds"),
    (
        "hippocampus inference, starter model, stock / this project",
        ">= 2",
        "starter model by MONAI's sliding window, float32",
        "starter model by the bundle's, bfloat16",
        "seconds",
    ),
    (
        "hippocampus inference, UNETR, stock / this project",
        ">= 2",
        "UNETR by MONAI's sliding window, float32",
        "UNETR by the bundle's, bfloat16",
        "seconds",
    ),
    (
        "fine-tuning epoch, UNETR, stock / this project, which freezes half of the blocks",
        ">= 1.5",
        "fine-tuning as MONAI's tutorial, float32",
        "fine-tuning by the bundle, bfloat16",
        "seconds",
    ),
    (
        "the same fine-tuning in float32",
        "",
        "fine-tuning as MONAI's tutorial, float32",
        "fine-tuning by the bundle, float32",
        "seconds",
    ),
]


def peak_gib(device: torch.device) -> float:
    """Largest memory of the process so far: the GPU's, or the resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def turn(name: str, size: Size, device: torch.device, repeats: int) -> dict[str, float]:
    """One form, in this process: the time of a step, after one that warms up and whose FLOPs are counted."""
    result: dict[str, float] = {}
    clock = clock_of(device)
    with tempfile.TemporaryDirectory() as folder:
        step = FORMS[name](size, device, Path(folder))
        if name in (OURS, FLOAT, EIGHT):
            volumes = 8 if name == EIGHT else 1
            result["gemm"] = gemm_rate(FULL if name == FLOAT else HALF, device, volumes)
        if name in (OURS, FLOAT):
            result["flops"] = flops_of(step)
        else:
            step()
        if device.type == "cpu":
            result["seconds"] = statistics.median(_seconds(step, clock, 1) for _ in range(repeats))
        else:
            if name.startswith("this project"):
                _seconds(step, clock, GraphedFunction.WARM_UP)  # the last of them is recorded
            result["seconds"] = _seconds(step, clock, 1)
            count = min(200, int(2 / result["seconds"]))
            if count > 1:
                # As in a training, nothing waits between the steps: some to warm up, then as many as two seconds have.
                _seconds(step, clock, min(count, 6))
                result["seconds"] = _seconds(step, clock, count) / count
    result["gib"] = peak_gib(device)
    if name == "starter model by the bundle's, bfloat16":
        result["dice"] = Starter(device).dice()
    return result


def _seconds(step: Step, clock: Callable[[], float], count: int) -> float:
    started = clock()
    for _ in range(count):
        step()
    return clock() - started


def pair(size: Size, processes: int, rank: int, place: str, window: int) -> dict[str, float]:
    """A window of mini-batches in one of some processes, on one thread: seconds by the wall, and computed."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=processes)
    step = ours(size, torch.device("cpu"), HALF, window=window).step
    step()
    wall, computed = time.perf_counter(), time.process_time()
    for _ in range(window):
        step()
    return {"wall": time.perf_counter() - wall, "computed": time.process_time() - computed}


def pool_of(count: int, device: str) -> ProcessPoolExecutor:
    """Fresh processes that need not import again; a GPU can be used if their parent has not used it."""
    if device != "cuda":
        return ProcessPoolExecutor(count, multiprocessing.get_context("fork"))
    context = multiprocessing.get_context("forkserver")
    # The server that forks finds these modules by the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context.set_forkserver_preload(["less_work", "step_forms", "step_peer", "task_forms"])
    return ProcessPoolExecutor(count, context)


def alone(device: str, limit: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result in a process of its own, so that its memory is its own too; 0 is no limit.

    Raises:
        BrokenProcessPool: if it takes more seconds than the limit.
    """
    with pool_of(1, device) as pool:
        return pool.submit(_limited, limit, function, *arguments).result()


def _limited(limit: int, function: Callable[..., Any], *arguments: Any) -> Any:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.alarm(limit)
    # Loaders fork their workers, as in a training; a process that was started otherwise would start them so too.
    multiprocessing.set_start_method("fork", force=True)
    found = function(*arguments)
    # As at a program's end, which this is not: a loader ends its workers there. Otherwise each takes five seconds.
    atexit._run_exitfuncs()
    return found


class Turns:
    """Starts forms in processes of their own, and remembers what they measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.found: dict[str, list[dict[str, float]]] = {}
        self.lost: dict[str, str] = {}  # why a form has no figures

    def measure(self, names: list[str]) -> None:
        """Forms that take turns; those that were measured before are not measured again."""
        names = [name for name in dict.fromkeys(names) if name not in self.found | self.lost]
        size, device = SIZES[self.options.size], torch.device(self.options.device)
        for _ in range(self.options.turns):
            for name in names:
                if name not in self.lost:
                    self._measure(name, size, device)

    def _measure(self, name: str, size: Size, device: torch.device) -> None:
        options = self.options
        try:
            found = alone(options.device, options.limit, turn, name, size, device, options.repeats)
        except Exception as error:
            if not options.limit:
                raise
            is_late = isinstance(error, BrokenProcessPool)
            first = str(error).strip().partition("\n")[0]
            reason = f"not done within {options.limit} s" if is_late else f"{type(error).__name__}: {first}"
            self.lost[name] = reason.replace("|", "/")
            self.found.pop(name, None)
            print(f"{name}: {self.lost[name]}", file=sys.stderr, flush=True)
        else:
            self.found.setdefault(name, []).append(found)
            print(f"{name}: {found}", file=sys.stderr, flush=True)

    def why_not(self, names: list[str]) -> str:
        """Which of some forms have no figures, and why; empty if all have."""
        return "; ".join(f"{name}: {self.lost[name]}" for name in names if name in self.lost)

    def best(self, name: str) -> dict[str, float]:
        """A form's fastest turn, and its largest memory."""
        turns = self.found[name]
        return {**min(turns, key=lambda one: one["seconds"]), "gib": max(one["gib"] for one in turns)}

    def ratio(self, above: str, below: str, what: str) -> float:
        """Of two forms."""
        return self.best(above)[what] / self.best(below)[what]

    def share(self, name: str) -> float | None:
        """FLOPs of a step over its time, over the rate of a matrix product of its type and size.

        PyTorch cannot count the FLOPs of compiled blocks: they are those of the plain form, for each volume.
        """
        one, plain = self.best(name), self.best(OURS) if OURS in self.found else {}
        counted = plain if name in (COMPILED, EIGHT) else one
        if "flops" not in counted:
            return None
        volumes = 8 if name == EIGHT else 1
        return volumes * counted["flops"] / one["seconds"] / one.get("gemm", counted["gemm"])

    def processes(self) -> tuple[float, float]:
        """Mini-batches of two processes of one thread each over those of one: by the wall, and by time computed."""
        size, window = SIZES[self.options.size], self.options.window
        times = []
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as folder, pool_of(count, "cpu") as pool:
                started = [pool.submit(pair, size, count, rank, f"{folder}/place", window) for rank in range(count)]
                ends = [process.result() for process in started]
                times.append({name: max(one[name] for one in ends) for name in ends[0]})
        wall, computed = (2 * times[0][name] / times[1][name] for name in ("wall", "computed"))
        return wall, computed


def head(options: argparse.Namespace) -> Iterator[str]:
    """What was measured, where and how."""
    size = SIZES[options.size]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    yield f"# A step of pretraining and the work around it, beside stock forms: size {options.size}"
    yield ""
    rows = f" --rows {' '.join(options.rows)}" if options.rows else ""
    words = f"--size {options.size} --turns {options.turns} --device {options.device}{rows}"
    yield f"`python benchmarks/step.py {words}`: {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
    yield f"load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}, torch {torch.__version__}."
    yield f"Global crops 2 x {'x'.join(map(str, size.image))}, local crops {size.num_local} x {size.local}^3,"
    yield f"{size.layers} blocks of {size.hidden}, {size.prototypes} prototypes, a volume a step."
    yield "The fastest turn counts, in seconds of computing on a CPU, by the wall on a GPU; memory is the largest."


def table(options: argparse.Namespace) -> Iterator[str]:
    """The results as lines of Markdown."""
    turns, size = Turns(options), SIZES[options.size]
    yield from head(options)

    def wanted(title: str) -> bool:
        return not options.rows or any(word in title for word in options.rows)

    skipped = set() if options.device == "cuda" or options.compile else {COMPILED}
    skipped |= set() if options.device == "cuda" else {NO_GRAPH, EIGHT, CROPS_96}
    rows = [row for row in ROWS if wanted(row[0]) and not skipped & set(row[2:4])]
    yield ""
    yield "| figure | goal | ratio | turns |"
    yield "|---|---|--:|--:|"
    for title, goal, above, below, what in rows:
        known = set(turns.found)
        turns.measure([above, below])
        missing = turns.why_not([above, below])
        ratio = f"not measured ({missing})" if missing else f"{turns.ratio(above, below, what):.2f}"
        yield f"| {title} | {goal} | {ratio} | {options.turns} |"
        for name in (each for each in (above, below) if each in turns.found):
            one = turns.best(name)
            if name not in known and (share := turns.share(name)):
                least = ">= 0.45" if options.device == "cuda" else ">= 0.70"
                title = f"FLOPs / time / rate of a matrix product, {name.removeprefix('this project, ')}"
                yield f"| {title} | {least} | {share:.2f} | {options.turns} |"
    if options.device == "cpu" and wanted("two processes / one"):
        wall, computed = turns.processes()
        yield f"| two processes of one core each / one, by the wall | >= 1.8 | {wall:.2f} | 1 |"
        yield f"| the same by time computed, as on two free cores | >= 1.8 | {computed:.2f} | 1 |"
    if any("dice" in one for all_of in turns.found.values() for one in all_of):
        dice = turns.best("starter model by the bundle's, bfloat16")["dice"]
        yield f"| both masks of the starter model, Dice | > 0.999 | {dice:.4f} | 1 |"
    yield ""
    yield "| form | s | peak GiB |"
    yield "|---|--:|--:|"
    for name in turns.found:
        one = turns.best(name)
        yield f"| {name} | {one['seconds']:.3g} | {one['gib']:.2f} |"
    pairs = [title for title in PAIRS if wanted(f"less work: {title}")]
    if pairs:
        yield ""
        yield "Less work for the same gradient:"
        yield ""
        yield "| what | s without | s with | without / with | peak GiB without | with |"
        yield "|---|--:|--:|--:|--:|--:|"
    for title in pairs:
        names = [f"{title}: {place}" for place in ("plain", "here")]
        turns.measure(names)
        if missing := turns.why_not(names):
            yield f"| {title} | not measured ({missing}) | | | | |"
            continue
        plain, here = (turns.best(name) for name in names)
        cells = f"{plain['seconds']:.3g} | {here['seconds']:.3g} | {plain['seconds'] / here['seconds']:.2f}"
        yield f"| {title} | {cells} | {plain['gib']:.2f} | {here['gib']:.2f} |"
    if pairs:
        shares = alone(options.device, 0, kept_share, size)
        yield ""
        yield f"Without air, {shares[0]:.0%} of the tokens of global crops remain, and {shares[1]:.0%} of local crops'."


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="steps of a turn that are timed on a CPU")
    parser.add_argument("--compile", action="store_true", help="the compiled form on a CPU as well")
    parser.add_argument("--window", type=int, default=8, help="mini-batches of a window of two processes")
    parser.add_argument("--limit", type=int, default=0, help="seconds that a form may take; 0 for no limit")
    parser.add_argument("--rows", nargs="*", help="only rows with one of these words")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = ""
    for line in table(options):
        print(line, flush=True)
        lines += line + "\n"
        if options.output:  # at once: a run may be ended before its last row
            options.output.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
