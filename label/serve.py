# SPDX-License-Identifier: Apache-2.0
"""Start the MONAI Label server with this project's bundles: what ``make label`` calls.

Runs in the environment that ``make label`` makes. Without ``--bundle`` it serves the trained models that it finds in
``bundles`` or that ``make demo`` has left in ``runs/demo``, as packed copies, so that what annotators train does not
replace the results of an experiment. A packed bundle (``volta3d pack``, or downloaded) is served where it is.
"""

from __future__ import annotations

import argparse
import base64
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.files import file_tag, keep_private, read_json
from volta_components.inference.trust import check_trust
from volta_components.method.weights import read_record
from volta_components.sharing.pack import assemble, default_name

SEGMENTATION = "harp_hippocampus"
CLASSIFICATION = ("ixi_sex", "aibl_ad")
# One thread: several ones of OpenMP and of the server wait for each other, for seconds a request on a small machine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false",
    "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}',
}


def trained_models(name: str, root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Trained models of a bundle, best first, each with the overlays that it was trained with."""
    models = root / "bundles" / name / "models"
    places = [
        (models / "model.pt", ()),
        (models / "model_starter.pt", ("starter",)),
        (models / "model_phantom_tiny.pt", ("tiny",)),
    ]
    demo = sorted((root / "runs" / "demo").rglob("models/model_phantom_tiny.pt"))
    for path, overlays in [*places, *((path, ("tiny",)) for path in demo)]:
        if path.is_file() and read_record(path).get("bundle") == name:
            yield path, overlays


def served_copy(name: str, root: Path, folder: Path) -> Path | None:
    """A packed copy of a bundle with its best model; one that is there already, of the same model, is kept.

    Returns:
        Its folder, or None when the bundle has no trained model.
    """
    for model, overlays in trained_models(name, root):
        bundle = root / "bundles" / name
        copy = folder / file_tag(model) / default_name(bundle, overlays, model)
        if not (copy / "models" / "model.json").is_file():
            shutil.rmtree(copy, ignore_errors=True)
            # Moved when it is whole: what is refused on the way must not be taken for a copy by the next start.
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as partial:
                assemble(bundle, Path(partial) / copy.name, overlays, model=model).replace(copy)
        return copy
    return None


def choose_bundles(given: str, root: Path, copies: Path, trust: bool = False) -> list[Path]:
    """Folders of the bundles to serve.

    Args:
        given: packed bundles, separated by commas; empty for those that were trained here.
        root: the repository.
        copies: where packed copies go.
        trust: also serve bundles that run other code than the project's own.

    Raises:
        InputError: if there is nothing to serve, or a folder is no packed bundle.
    """
    if not given:
        segmentation = served_copy(SEGMENTATION, root, copies)
        if segmentation is None:
            raise InputError(
                "there is no trained hippocampus model to serve. Train one first: `make demo` (phantoms, some minutes) "
                f"or `python -m monai.bundle run --config_file bundles/{SEGMENTATION}/configs/train.json`; or give a "
                "packed bundle, such as one that was downloaded: make label BUNDLE=DIR"
            )
        others = [served_copy(name, root, copies) for name in CLASSIFICATION]
        return [segmentation, *(path for path in others if path is not None)]
    folders = [Path(word.strip()).resolve() for word in given.split(",") if word.strip()]
    wrong = []
    for folder in folders:
        config = folder / "configs" / "inference.json"
        if not config.is_file():
            wrong.append((str(folder), "no configs/inference.json: not a bundle's folder"))
        elif not (folder / "models" / "model.pt").is_file():
            wrong.append((str(folder), "no models/model.pt: train or download the weights first"))
        elif read_json(config).get("bundle_root") != ".":
            wrong.append((str(folder), "not packed: its configs are those of the repository"))
    wrong += [(str(f), "another bundle has this name") for f in folders if [g.name for g in folders].count(f.name) > 1]
    if wrong:
        raise InputError.many(
            "bundles that cannot be served",
            wrong,
            "Pack them with volta3d pack and unzip the result, or leave out BUNDLE to serve what was trained here.",
        )
    for folder in folders:
        # MONAI Label's own, which it writes again for each training on several GPUs.
        (folder / "configs" / "monailabel_train.json").unlink(missing_ok=True)
        check_trust(folder, trust)
    return folders


def make_app(folder: Path, bundles: list[Path]) -> Path:
    """The app's folder: ``main.py``, and ``model`` with a link to each bundle."""
    models = folder / "model"
    models.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("main.py"), folder / "main.py")
    for old in models.iterdir():
        if old.is_symlink():
            old.unlink()
    for bundle in bundles:
        (models / bundle.name).symlink_to(bundle, target_is_directory=True)
    return folder


def server_command(app: Path, studies: str, host: str, port: int) -> list[str]:
    """The command that starts the server."""
    names = ",".join(sorted(path.name for path in (app / "model").iterdir()))
    options = {"models": names, "zoo_source": "local", "sam2": "false"}
    start = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", studies]
    start += ["--uvicorn_app", "guard:app"]
    conf = [word for name, value in options.items() for word in ("--conf", name, value)]
    return [*start, "--host", host, "--port", str(port), *conf]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_password(host: str) -> None:
    """Demand a password where other machines are let in.

    Raises:
        InputError: if there is none.
    """
    own = os.environ.get("MONAI_LABEL_AUTH_ENABLE", "").lower() in ("true", "1", "yes", "on")
    if not is_loopback(host) and not os.environ.get("LABEL_PASSWORD") and not own:
        raise InputError(
            f"HOST={host} lets other machines read, change and delete the scans: give a password, in the environment "
            "and not on the command line (read -rs LABEL_PASSWORD; export LABEL_PASSWORD), or MONAI Label's own "
            "authentication (MONAI_LABEL_AUTH_ENABLE=true, with a Keycloak server)"
        )


def answer(address: str) -> dict[str, Any] | None:
    """What the server says of itself; None while it says nothing."""
    word = base64.b64encode(f"label:{os.environ.get('LABEL_PASSWORD', '')}".encode()).decode()
    request = urllib.request.Request(f"{address}/info/", headers={"Authorization": f"Basic {word}"})
    try:
        # Never by a proxy, which knows nothing of this machine's addresses.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            content: dict[str, Any] = json.load(response)
            return content
    except (urllib.error.URLError, OSError, ValueError):
        return None


def guide(address: str, info: dict[str, Any], studies: str, log: Path) -> str:
    """What to do next, for people."""
    models = [f"  {name}: {model['type']}, {', '.join(model['labels'])}" for name, model in info["models"].items()]
    is_remote = studies.startswith(("http://", "https://"))
    viewer = (
        f"OHIF: open {address}/ohif/ in a browser."
        if is_remote
        else "OHIF reads DICOM only: give a DICOMweb server as STUDIES (docs/monai_label.md)."
    )
    password = ["It asks for LABEL_PASSWORD, with any user name."] if os.environ.get("LABEL_PASSWORD") else []
    return "\n".join(
        [
            f"\nMONAI Label is at {address}, scans from {studies}.",
            *password,
            *models,
            "\n3D Slicer: install the extension MONAILabel (View > Extensions Manager), open the module MONAI Label, "
            f"enter {address} as the server, press the refresh button, then Next Sample and Run.",
            viewer,
            f"By hand: {address}/ in a browser lists every request. The log is {log}. Ctrl-C ends the server.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Start the server and wait for its end."""
    parser = argparse.ArgumentParser(prog="make label", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--studies", required=True, help="folder with scans (.nii, .nii.gz), or a DICOMweb address")
    parser.add_argument("--bundle", default="", help="packed bundles, separated by commas; default: those trained here")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; it needs a password")
    parser.add_argument("--names", default="", help="more names that the server is called by, separated by commas")
    parser.add_argument("--trust", help="any text: also serve bundles that run other code than this project's own")
    parser.add_argument("--origins", default="", help="web pages that may use it, such as http://viewer.lab:3000")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--app", type=Path, default=Path("apps/label"), help="folder that the server writes to")
    options = parser.parse_args(arguments)
    keep_private()
    try:
        is_remote = options.studies.startswith(("http://", "https://"))
        if not is_remote and not Path(options.studies).is_dir():
            raise InputError(
                f"{options.studies or 'STUDIES'}: no such folder; give one with scans: make label STUDIES=DIR"
            )
        check_password(options.host)
        # Before anything is changed that a running server uses.
        address = reachable(options.host, options.port)
        app = options.app.resolve()
        bundles = choose_bundles(
            options.bundle, Path(__file__).resolve().parents[1], app / "bundles", bool(options.trust)
        )
        make_app(app, bundles)
    except InputError as error:
        print(f"make label: {error}", file=sys.stderr)
        return 2
    studies = options.studies if is_remote else str(Path(options.studies).resolve())
    guard = {
        "LABEL_HOST": options.host,
        "LABEL_NAMES": options.names,
        "LABEL_ORIGINS": options.origins,
        "PYTHONPATH": str(Path(__file__).resolve().parent),
    }
    return run_server(server_command(app, studies, options.host, options.port), app, studies, address, guard)


def reachable(host: str, port: int) -> str:
    """The address at which this machine reaches a server that is yet to start.

    Args:
        host: what it listens on; 0.0.0.0 is every address of this machine.
        port: its port.

    Raises:
        InputError: if something listens there already.
    """
    name = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        socket.create_connection((name, port), timeout=5).close()
    except OSError:
        return f"http://{name}:{port}"
    raise InputError(f"something answers at http://{name}:{port} already; give another PORT")


def run_server(command: list[str], app: Path, studies: str, address: str, guard: dict[str, str]) -> int:
    """Run the server, print how to connect once it answers, and end it with everything that it started.

    Args:
        command: see ``server_command``.
        app: the app's folder; the server runs in it, so that no data set of the repository is found by its name.
        studies: the scans.
        address: of the server.
        guard: environment of ``guard.py``.
    """
    log = app / "logs" / "server.log"
    log.parent.mkdir(exist_ok=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with log.open("w", encoding="utf-8") as stream:
        environment = {**ENVIRONMENT, **os.environ, **guard}
        # A session of its own: a training that the server has started ends with it.
        server = subprocess.Popen(
            command, cwd=app, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            print("starting the server ...", flush=True)
            while server.poll() is None:
                info = answer(address)
                if info is not None:
                    print(guide(address, info, studies, log), flush=True)
                    return server.wait()
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join([*lines[-20:], f"make label: the server did not start; all of its log is {log}"]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
