# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import tiny_datasets as tiny

from volta_components.data.layouts.common import Listing, look
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import read_volume
from volta_components.data.walk import VolumeFile, tidy, walk
from volta_components.errors import InputError


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_of(root):
    return [volume.path.relative_to(root).as_posix() for volume in walk(root).volumes()]


def test_volumes_are_told_by_their_suffix(tmp_path):
    fill(tmp_path, "b/mri/T1.mgz", "a.nii.gz", "b/a.NII", "note.txt")
    assert names_of(tmp_path) == ["a.nii.gz", "b/a.NII", "b/mri/T1.mgz"]


def test_what_is_hidden_or_litter_is_left_alone(tmp_path):
    fill(
        tmp_path,
        "a.nii.gz",
        "._a.nii.gz",
        ".hidden.nii",
        ".git/annex/objects/x.nii.gz",
        "__MACOSX/a.nii.gz",
        "sub/@eaDir/a.nii.gz",
        "~$table.nii",
    )
    assert names_of(tmp_path) == ["a.nii.gz"]


def test_a_hidden_source_is_looked_into(tmp_path):
    assert names_of(fill(tmp_path / ".data", "a.nii")) == ["a.nii"]


def test_links_are_followed_once_and_never_round(tmp_path):
    root, other = tmp_path / "root", tmp_path / "elsewhere"
    fill(root, "real/a.nii")
    fill(other, "b.nii", "deep/c.nii")
    (root / "again").symlink_to(root / "real")
    (root / "round").symlink_to(root)
    (root / "real/up").symlink_to("..")
    (root / "outside").symlink_to(other)
    (root / "outside2").symlink_to(other)
    (other / "back").symlink_to(root)
    (root / "itself").symlink_to("itself")
    tree = walk(root, follow_links=True)
    found = [volume.path.relative_to(root).as_posix() for volume in tree.volumes()]
    assert found == ["outside/b.nii", "outside/deep/c.nii", "real/a.nii"]
    assert {link.relative_to(root).as_posix() for link, _ in tree.again} == {
        "again",
        "round",
        "real/up",
        "outside2",
        "outside/back",
    }


def test_links_that_leave_the_folder_are_named_and_not_followed(tmp_path):
    root, other = fill(tmp_path / "root", "a_T1w.nii"), fill(tmp_path / "elsewhere", "b.nii", "note.txt")
    (root / "folder").symlink_to(other)
    (root / "b_T1w.nii").symlink_to("../elsewhere/b.nii")
    (root / "note.txt").symlink_to(other / "note.txt")
    # A neighbour whose name only begins alike is another folder.
    fill(tmp_path / "root2", "c.nii")
    (root / "c.nii").symlink_to("../root2/c.nii")
    listing = Listing("x")
    tree = look(listing, root)
    assert [volume.name for volume in tree.volumes()] == ["a_T1w.nii"]
    assert [path.name for path in tree.outside] == ["b_T1w.nii", "c.nii", "folder", "note.txt"]
    problems = {f.file for f in listing.findings if f.kind == "problem" and "--follow-links" in f.remedy}
    assert problems == {"b_T1w.nii", "c.nii", "folder"}
    followed = look(Listing("x"), root, follow_links=True)
    assert not followed.outside
    assert {volume.name for volume in followed.volumes()} == {"a_T1w.nii", "b.nii", "c.nii"}


def test_links_into_the_annex_of_the_data_set_are_followed_from_any_folder_in_it(tmp_path):
    root = fill(tmp_path / "ds", ".git/annex/objects/K/x.nii", ".git/modules/sub/annex/objects/y.nii", "sub-1/note")
    (root / "sub-1/a.nii").symlink_to("../.git/annex/objects/K/x.nii")
    (root / "sub-1/b.nii").symlink_to("../.git/modules/sub/annex/objects/y.nii")
    (root / "sub-1/absent.nii").symlink_to("../.git/annex/objects/K/z.nii")
    fill(tmp_path / "other", ".git/annex/objects/z.nii", ".git/config")
    (root / "sub-1/c.nii").symlink_to(tmp_path / "other/.git/annex/objects/z.nii")
    (root / "sub-1/d.nii").symlink_to("../.git/config")
    assert names_of(root / "sub-1") == ["a.nii", "absent.nii", "b.nii"]
    assert [path.name for path in walk(root / "sub-1").outside] == ["c.nii", "d.nii"]


def test_a_link_to_a_scan_is_that_scan_and_another_name_of_it_a_problem(tmp_path):
    root = fill(tmp_path / "root", "real/a_T1w.nii")
    (root / "all").mkdir()
    (root / "all/a_T1w.nii").symlink_to("../real/a_T1w.nii")
    (root / "b_T1w.nii").symlink_to("real/a_T1w.nii")
    listing = Listing("x")
    tree = look(listing, root)
    assert [volume.name for volume in tree.volumes()] == ["a_T1w.nii"]
    assert {(f.kind, f.file, f.left_out) for f in listing.findings} == {
        ("quirk", "all/a_T1w.nii", False),
        ("problem", "b_T1w.nii", True),
    }


def test_two_links_to_one_hidden_content_stay_two_scans(tmp_path):
    """An annex keeps equal contents once; that two scans are the same is found by their voxels."""
    root = fill(tmp_path / "root", ".git/annex/objects/key")
    for name in ("a.nii", "b.nii"):
        (root / name).symlink_to(".git/annex/objects/key")
    assert names_of(root) == ["a.nii", "b.nii"]


@pytest.mark.parametrize(
    ("make", "reason", "remedy"),
    [
        (lambda p: p.symlink_to("../.git/annex/objects/aa/bb/K/K"), "not fetched .a git-annex link", "datalad get"),
        (
            lambda p: p.write_text("/annex/objects/SHA256E-s1--ab.nii.gz\n"),
            "not fetched .a git-annex pointer",
            "datalad",
        ),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"), "Git LFS", "git lfs pull"),
        (lambda p: p.symlink_to("gone.nii"), "a link to gone.nii, which is not there", "mend the link"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.mnc"])
def test_content_that_is_not_there_is_named_with_what_fetches_it(tmp_path, make, reason, remedy, name):
    make(tmp_path / name)
    assert names_of(tmp_path) == [name]
    with pytest.raises(UnusableVolume, match=reason) as error:
        read_volume(tmp_path / name)
    assert remedy in error.value.remedy


def test_a_file_unpacked_into_a_folder_of_its_name_has_that_name(tmp_path):
    fill(tmp_path, "x/sub-01_T1w.nii.gz/0057_brain.nii")
    volume = walk(tmp_path).volumes()[0]
    assert (volume.name, volume.stem, volume.folder) == ("sub-01_T1w.nii.gz", "sub-01_T1w", tmp_path / "x")
    assert volume == VolumeFile.of(tmp_path / "x/sub-01_T1w.nii.gz/0057_brain.nii")


@pytest.mark.parametrize("inside", [[], ["a.nii", "b.nii"]])
def test_a_folder_of_a_files_name_without_one_volume_is_a_problem(tmp_path, inside):
    (tmp_path / "sub-01_T1w.nii.gz").mkdir()
    fill(tmp_path, *(f"sub-01_T1w.nii.gz/{name}" for name in inside))
    listing = Listing("x")
    look(listing, tmp_path)
    assert [(f.kind, f.subject) for f in listing.findings] == [("problem", "sub-01_T1w")]
    assert f"holds {len(inside)} volumes" in listing.findings[0].reason


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path, monkeypatch):
    fill(tmp_path, "sub-01/a.nii", "sub-02/a.nii")
    real = os.scandir

    def refuse(path):
        if Path(path).name == "sub-01":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list anything
    listing = Listing("x")
    look(listing, tmp_path)
    assert [(f.kind, f.subject, f.reason) for f in listing.findings] == [("problem", "sub-01", "permission denied")]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"M\xfcller", "Müller"),
        ("Mu\u0308ller".encode(), "Müller"),
        (b"a\nb\tc", "a_b_c"),
        (b"\x80uro", "€uro"),
        (b"\x81", "\\x81"),
        ("中文".encode(), "中文"),
    ],
)
def test_names_become_text_that_can_be_written(raw, expected):
    assert tidy(os.fsdecode(raw)) == expected
    assert tidy(os.fsdecode(raw)).encode()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.touch()])
def test_a_source_that_is_no_folder_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=r"x: (no such folder|not a folder)"):
        walk(tmp_path / "x")


def test_a_linked_scan_is_read(tmp_path):
    tiny.save_head(tmp_path / "far/a.nii.gz")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.nii.gz").symlink_to(tmp_path / "far/a.nii.gz")
    assert read_volume(walk(tmp_path / "root", follow_links=True).volumes()[0].path).voxels.shape == tiny.SHAPE


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "link.nii").symlink_to("pipe.nii")
    (tmp_path / "scan.nii").touch()
    assert walk(tmp_path).files == [tmp_path / "scan.nii"]
