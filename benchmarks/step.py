# SPDX-License-Identifier: Apache-2.0
"""One step of pretraining: this project beside the stock form, as ratios measured in one run.

A step is all of it: views, teacher, student, losses, backward pass, optimiser, moving average. The stock form is as
MONAI's tutorials write it: a chain of dictionary transforms makes each view, ``ViTAutoEnc`` sees one view a pass, its
attention maps are kept, everything is float32, and the same losses are PyTorch's own functions on whole arrays. Every
figure comes from a process of its own; the forms take turns, so that a busy machine is busy for both. On a CPU it is
the time that the process computed (of all its threads together), which says more on a machine that is shared.

    python benchmarks/step.py [--size tiny|small|paper] [--turns 2] [--device cpu|cuda] [--output FILE]

On one core, ``small`` takes a minute a turn; ``paper`` takes several and 10 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step_forms import SIZES, Size, clock_of, gemm_rate, monai_views, our_views, ours, stock, token_losses

FORMS = ("stock, float32", "this project, float32", "this project, bfloat16", "this project, bfloat16, compiled")
VIEWS = ("MONAI's dictionary transforms", "this project")


def seconds_of(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median time of a step, after one that warms up: computing time on a CPU, wall time on a GPU."""
    clock = clock_of(device)
    times = []
    for _ in range(repeats + 1):
        started = clock()
        step()
        times.append(clock() - started)
    return statistics.median(times[1:])


def peak_gib(device: torch.device) -> float:
    """Largest memory of the process so far: the GPU's, or the resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def turn(name: str, size: Size, device: torch.device, repeats: int) -> dict[str, float]:
    """One form, in this process."""
    result: dict[str, float] = {}
    if name == FORMS[0]:
        step: Callable[[], None] = stock(size, device)
    elif name in FORMS:
        dtype = torch.float32 if "float32" in name else torch.bfloat16
        result["gemm"] = gemm_rate(dtype, device)
        step, result["flops"] = ours(size, device, dtype, "compiled" in name)
    elif name == VIEWS[0]:
        step = monai_views(size, device)
    elif name == VIEWS[1]:
        step = our_views(size, device)
    else:
        step = token_losses(size, device, plain=name == "plain")
    result["seconds"] = seconds_of(step, repeats, device)
    result["gib"] = peak_gib(device)
    return result


def pair(size: Size, processes: int, rank: int, place: str) -> dict[str, float]:
    """A window of eight mini-batches in one of some processes, on one thread."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=processes)
    step, _ = ours(size, torch.device("cpu"), torch.bfloat16, False, window=8)
    step()
    started = time.perf_counter()
    for _ in range(8):
        step()
    return {"seconds": time.perf_counter() - started}


class Turns:
    """Starts forms in processes of their own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names = ("--size", options.size, "--device", options.device, "--repeats", str(options.repeats))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A process with words of its own."""
        command = [sys.executable, __file__, *self.names, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self, process: subprocess.Popen[str]) -> dict[str, float]:
        """What a process has printed last."""
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(error[-3000:])
        found: dict[str, float] = json.loads(out.splitlines()[-1])
        return found

    def best(self, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """The fastest of each form's turns, and its largest memory."""
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(self.options.turns):
            for name in names:
                found[name].append(self.result(self.start("--form", name)))
        peaks = {name: max(one["gib"] for one in all_of) for name, all_of in found.items()}
        fastest = {name: min(all_of, key=lambda one: one["seconds"]) for name, all_of in found.items()}
        return {name: {**fastest[name], "gib": peaks[name]} for name in names}

    def processes(self) -> float:
        """Mini-batches a second of two processes of one thread each, over those of one such process."""
        times = []
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                words = ("--pair", f"{folder}/place", "--processes", str(processes))
                started = [self.start(*words, "--rank", str(rank)) for rank in range(processes)]
                times.append(max(self.result(process)["seconds"] for process in started))
        return 2 * times[0] / times[1]


def table(options: argparse.Namespace) -> Iterator[str]:
    """The results as lines of Markdown."""
    turns, size = Turns(options), SIZES[options.size]
    compiled = options.device == "cuda" or options.compile
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    yield "# A step of pretraining beside the stock form"
    yield ""
    words = f"--size {options.size} --turns {options.turns} --device {options.device}"
    yield f"`python benchmarks/step.py {words}`: {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
    yield f"load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}, torch {torch.__version__}."
    yield f"Global crops 2 x {'x'.join(map(str, size.image))}, local crops {size.num_local} x {size.local}^3, "
    yield f"{size.layers} blocks of {size.hidden}, {size.prototypes} prototypes, a volume a step."
    yield "The fastest turn counts, in CPU time on a CPU; memory is the largest."
    forms = turns.best(FORMS if compiled else FORMS[:-1])
    yield ""
    yield "| form | s / step | stock / this | peak GiB | this / stock | FLOPs / time / GEMM rate |"
    yield "|---|---|---|---|---|---|"
    first = forms[FORMS[0]]
    for name, one in forms.items():
        share = f"{one['flops'] / one['seconds'] / one['gemm']:.2f}" if "flops" in one else ""
        cells = f"{one['seconds']:.3g} | {first['seconds'] / one['seconds']:.2f} | {one['gib']:.2f}"
        yield f"| {name} | {cells} | {one['gib'] / first['gib']:.2f} | {share} |"
    views = turns.best(VIEWS)
    yield ""
    yield "| views (two global crops for teacher and student each, and the local crops) | views / s | ratio |"
    yield "|---|---|---|"
    for name, one in views.items():
        rate = (4 + size.num_local) / one["seconds"]
        yield f"| {name} | {rate:.3g} | {views[VIEWS[0]]['seconds'] / one['seconds']:.1f} |"
    parts = turns.best(("plain", "a few at a time"))
    yield ""
    yield "| cross-entropy of patch tokens, with its gradient | s | peak GiB of the process |"
    yield "|---|---|---|"
    for name, one in parts.items():
        yield f"| {name} | {one['seconds']:.3g} | {one['gib']:.2f} |"
    if options.device == "cpu":
        yield ""
        yield f"Two processes of one thread each do {turns.processes():.2f} times the mini-batches of one (bfloat16)."


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="steps of a turn that are timed")
    parser.add_argument("--compile", action="store_true", help="the compiled form on a CPU as well")
    parser.add_argument("--output", type=Path)
    for word in ("--form", "--pair"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    for word in ("--processes", "--rank"):
        parser.add_argument(word, type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.form:
        print(json.dumps(turn(options.form, size, torch.device(options.device), options.repeats)))
    elif options.pair:
        print(json.dumps(pair(size, options.processes, options.rank, options.pair)))
    else:
        lines = []
        for line in table(options):
            print(line, flush=True)
            lines.append(line)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
