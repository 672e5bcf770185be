# SPDX-License-Identifier: Apache-2.0
"""``volta3d pack --push``: a packed bundle as a repository of the Hugging Face Hub, by ``huggingface_hub``.

The repository holds the unpacked folder, from which ``monai.bundle download --source huggingface_hub`` makes a bundle,
and a ``README.md``: the model card, with the fields that the Hub reads in front.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volta_components.errors import InputError
from volta_components.files import partial_prefix, read_json, write_text
from volta_components.sharing.card import is_phantom

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADDRESS = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)")
TAGS = ("monai", "medical", "mri", "brain", "3d", "vision-transformer", "volta-3d")
PIPELINES = {"features": "image-feature-extraction", "segmentation": "image-segmentation"}
# The bundle's own folders: what a new version no longer has goes; what somebody has added beside them stays.
OWN = ["configs/*", "docs/*", "models/*"]
# A picture or page beside the card.
RELATIVE = re.compile(r"(\]\()(?![\w+.-]+:|[/#])([^)\s]+\))")


@dataclass(frozen=True)
class Destination:
    """Where a bundle goes.

    Attributes:
        repo: ``ORG/NAME``.
        private: whether only members of ORG see it.
        confirmed: whether weights of people's scans may be uploaded.
    """

    repo: str
    private: bool
    confirmed: bool


def destination(address: str, private: bool = False, confirmed: bool = False) -> Destination:
    """Read an address; made before anything is packed, so that what is missing is said at once.

    Raises:
        InputError: if it is no ``hf://ORG/NAME``, or this machine has no token.
    """
    found = ADDRESS.fullmatch(address)
    if not found:
        raise InputError(f"--push {address}: give hf://ORG/NAME, where ORG is your name or organisation on the Hub")
    from huggingface_hub import get_token

    if not get_token():
        raise InputError(
            "--push: no token of the Hugging Face Hub on this machine; make one with write access on "
            "https://huggingface.co/settings/tokens, then log in (hf auth login) or set HF_TOKEN"
        )
    return Destination(found[1], private, confirmed)


def push(zipped: Path, where: Destination) -> str:
    """Say what will be uploaded, to whom it will be visible, and upload it as one commit with the version as its tag.

    Args:
        zipped: a zip of ``pack``.
        where: where it goes.

    Returns:
        The address of this version.

    Raises:
        InputError: if the weights are of people's scans and that was not confirmed, the repository holds something
            else, this version, or is visible to others than asked, the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="volta_components")
    with tempfile.TemporaryDirectory(dir=zipped.parent, prefix=partial_prefix()) as temporary:
        with zipfile.ZipFile(zipped) as archive:
            archive.extractall(temporary)
        (folder,) = Path(temporary).iterdir()
        metadata, record = read_json(folder / "configs" / "metadata.json"), read_json(folder / "models" / "model.json")
        version = str(metadata["version"])
        write_text(folder / "README.md", front_page(folder, metadata, record))
        print(_announcement(folder, where, api.endpoint, version, record))
        if not is_phantom(record) and not where.confirmed:
            raise InputError(
                "these weights are trained on people's scans, so nothing was uploaded. Read docs/sharing.md of the "
                'repository, "Before anything leaves your lab"; if you may share them, add --yes'
            )
        with explained(where.repo, api.endpoint, "Nothing was uploaded."):
            exists = _check(api, where, version)
            if not exists:
                api.create_repo(where.repo, private=where.private)
        with explained(where.repo, api.endpoint, "The push was not finished: start the same command again."):
            api.upload_folder(
                repo_id=where.repo,
                folder_path=folder,
                commit_message=f"{folder.name} {version}",
                delete_patterns=OWN,
            )
            api.create_tag(where.repo, tag=version)
    address = f"{api.endpoint}/{where.repo}/tree/{version}"
    print(
        f"pushed: {address}\n  python -m monai.bundle download --source huggingface_hub --repo {where.repo} "
        f"--name {folder.name} --version {version} --bundle_dir DIR"
    )
    return address


def _announcement(folder: Path, where: Destination, endpoint: str, version: str, record: Mapping[str, Any]) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    origin = record["provenance"]
    trained = f"{origin.get('volumes', '?')} volumes of {origin.get('cohort') or 'a cohort that is not named'}"
    return "\n".join(
        [
            f"push to {endpoint}/{where.repo}, version {version}: {len(files)} files, {size:.1f} MB",
            "  visible to: " + ("members of its owner only (private)" if where.private else "EVERYBODY (public)"),
            f"  weights: trained on {'phantoms' if is_phantom(record) else 'scans of PEOPLE'}, {trained}",
            "  hashes of subjects: "
            + (
                "sealed with this lab's secret"
                if origin.get("sealed_with")
                else "plain: whoever knows an id can find out whether it is among them"
            ),
            "  also: all settings of the training, the numbers in the card, names of the cohort and of the versions",
        ]
    )


def _check(api: HfApi, where: Destination, version: str) -> bool:
    """Whether the repository is there, and then one that this version can be added to."""
    from huggingface_hub.errors import RepositoryNotFoundError

    who = api.whoami()
    owners = [who["name"], *(str(group["name"]) for group in who.get("orgs", []))]
    owner = where.repo.split("/")[0]
    if owner not in owners:
        raise InputError(
            f"--push hf://{where.repo}: the token is of {who['name']}, who may write to {', '.join(owners)}, not to "
            f"{owner}; choose one of them, or use another token"
        )
    try:
        info = api.model_info(where.repo)
    except RepositoryNotFoundError:
        return False
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
    if files and "configs/metadata.json" not in files:
        raise InputError(f"{where.repo}: is there and holds something else than a bundle; choose another name")
    if bool(info.private) != where.private:
        now, remedy = ("private", "add --private") if info.private else ("public", "leave out --private")
        raise InputError(
            f"{where.repo}: is there and is {now}; {remedy}, or change its visibility on "
            f"{api.endpoint}/{where.repo}/settings first"
        )
    if version in {tag.name for tag in api.list_repo_refs(where.repo).tags}:
        raise InputError(
            f"{where.repo}: has version {version} already; give the new one another version (and a line of the "
            "changelog) in configs/metadata.json"
        )
    return True


@contextmanager
def explained(repo: str, endpoint: str, state: str) -> Iterator[None]:
    """What the Hub refuses, or that it cannot be reached, as an ``InputError`` with the remedy; ``state`` ends it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; log in again (hf auth login), or renew HF_TOKEN",
            403: "the token may not do that; give it write access to the owner of this repository",
            409: "somebody else is writing to it, or has just made it; wait for them",
            413: "it is too large for the Hub's limits; see your storage there",
            429: "too many requests; wait for some minutes",
        }.get(status, "try again later" if status >= 500 else "the Hub did not take it")
        said = error.server_message or str(error).splitlines()[0]
        raise InputError(f"{repo}: {remedy} (the Hub's answer: {status}, {said}). {state}") from error
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: hf_xet, for large files
        raise InputError(
            f"{endpoint}: cannot be reached, or the connection broke ({type(error).__name__}: {error}); check the "
            f"network, and a proxy if there is one. {state}"
        ) from error


def front_page(folder: Path, metadata: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The repository's ``README.md``: licence, tags, data sets and numbers for the Hub, then the model card."""
    from huggingface_hub import EvalResult, ModelCardData

    phantom = is_phantom(record)
    cohort = re.sub(r"[^\w.-]+", "-", str(record["provenance"].get("cohort") or "not-named"))
    form = metadata["network_data_format"]["outputs"]["pred"]["format"]
    task = PIPELINES.get(form, "image-classification")
    numbers = metadata["eval_metrics"]
    apache = (folder / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    # The terms of people's scans may bind what was trained on them; those of the code do not tell.
    licence: dict[str, Any] = {"license": "apache-2.0"} if phantom and apache else {"license": "other"}
    if not phantom:
        licence |= {"license_name": "terms-of-the-training-data", "license_link": "docs/data_license.txt"}
    fields = ModelCardData(
        **licence,
        library_name="monai",
        pipeline_tag=task,
        tags=[*TAGS, "synthetic-data"] if phantom else list(TAGS),
        datasets=[cohort],
        metrics=list(numbers) or None,
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type=task, dataset_type=cohort, dataset_name=cohort, metric_type=name, metric_value=round(value, 4)
            )
            for name, value in numbers.items()
        ]
        or None,
    )
    card = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    card = RELATIVE.sub(r"\1docs/\2", card)
    return f"---\n{fields.to_yaml()}\n---\n\n{card}"
