# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from prepared import make_prepared

from volta_components.cli import main
from volta_components.data.checks import check_volumes
from volta_components.data.datalist import (
    assign_folds,
    cohort_weights,
    datalist_hash,
    load_datalist,
    make_content,
)
from volta_components.data.overlaps import check, merge
from volta_components.downstream.leaks import find_overlap
from volta_components.errors import InputError
from volta_components.files import sha256_file, write_json
from volta_components.training.people import facts_of

SHAPE = (8, 9, 10)


def item(i, patient=None, fold=0, cohort="tiny", **more):
    subject = patient or f"sub-{i:04d}"
    return {
        "image": f"images/{i}.nii",
        "subject_id": f"{subject}-{i}" if patient else subject,
        "patient_id": subject,
        "session": None,
        "cohort": cohort,
        "fold": fold,
        **more,
    }


def write(folder, items, name="tiny", volumes=False, **changes):
    content = make_content(name, (1, 1, 1), SHAPE, 0, 5, items, [])
    if changes:
        content = {**content, **changes}
        content["hash"] = datalist_hash(content)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in content["training"]:  # merging asks whether they are there
        if entry.get("image"):
            (folder / entry["image"]).touch()
    if volumes:
        for i, entry in enumerate(content["training"]):
            voxels = np.random.default_rng([i, *name.encode()]).random(SHAPE).astype(np.float32)
            image = nib.Nifti1Image(voxels, np.eye(4))
            image.set_sform(np.eye(4), 1)
            image.to_filename(folder / entry["image"])
            entry["sha256"] = sha256_file(folder / entry["image"])
        content["hash"] = datalist_hash(content)
    write_json(folder / "datalist.json", content)
    return folder / "datalist.json"


# --- folds -----------------------------------------------------------------------------------------------------------


def cohort(n=200, seed=3):
    rng = np.random.default_rng(seed)
    people = []
    for i in range(n):
        facts = {
            "sex": "FM"[rng.integers(2)],
            "diagnosis": "AD" if rng.random() < 0.17 else "CN",
            "site": "ABC"[rng.integers(3)],
        }
        people += [item(i, f"p{i:03d}", **facts) | {"session": f"s{k}"} for k in range(rng.integers(1, 4))]
    return people


def test_folds_are_by_patient_and_balanced_in_every_respect():
    people = cohort()
    folds = assign_folds(people, 5, seed=0)
    first = {entry["patient_id"]: entry for entry in people}
    assert set(folds) == set(first) and set(folds.values()) == set(range(5))
    for key in ("diagnosis", "sex", "site"):
        for value in {entry[key] for entry in first.values()}:
            counts = Counter(folds[p] for p, entry in first.items() if entry[key] == value)
            assert max(counts.values()) - min(counts[f] for f in range(5)) <= 3, (key, value, counts)
    counts = Counter(folds[p] for p, entry in first.items() if entry["diagnosis"] == "AD")
    assert max(counts.values()) - min(counts[f] for f in range(5)) <= 1
    sizes = Counter(folds.values())
    assert max(sizes.values()) - min(sizes.values()) <= 2


def test_folds_depend_on_patients_and_seed_alone():
    people = cohort()
    shuffled = [people[i] for i in np.random.default_rng(1).permutation(len(people))]
    assert assign_folds(people, 5, 0) == assign_folds(shuffled, 5, 0)
    assert assign_folds(people, 5, 0) != assign_folds(people, 5, 1)


def test_folds_are_the_same_in_another_process_and_hash_seed():
    """Pinned: the folds of a stored cohort must not change with a release, a machine or Python's string hashing."""
    code = (
        "from volta_components.data.datalist import assign_folds;"
        "print(list(assign_folds([{'patient_id': f'p{i}', 'sex': 'FM'[i % 2]} for i in range(12)], 3, 7).values()))"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = assign_folds([{"patient_id": f"p{i}", "sex": "FM"[i % 2]} for i in range(12)], 3, 7)
    assert results == {f"{list(expected.values())}\n"}
    assert "".join(str(expected[f"p{i}"]) for i in range(12)) == PINNED


PINNED = "102122010210"


def test_few_patients_and_one_fold():
    assert set(assign_folds([item(0)], 5, 0).values()) <= set(range(5))
    assert set(assign_folds(cohort(20), 1, 0).values()) == {0}


# --- form and hash ---------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_content_alone(tmp_path):
    one = load_datalist(write(tmp_path / "a", [item(1), item(0)]))
    two = load_datalist(write(tmp_path / "elsewhere/b", [item(0), item(1)]))
    other = load_datalist(write(tmp_path / "c", [item(0), item(1, fold=2)]))
    assert one.hash == two.hash == one.content["hash"] != other.hash
    assert one.items[0]["image"] == str(tmp_path / "a/images/0.nii")
    assert load_datalist(tmp_path / "a").hash == one.hash


def test_an_edited_datalist_is_used_under_its_own_hash(tmp_path):
    path = write(tmp_path, [item(0), item(1)])
    content = json.loads(path.read_text())
    del content["training"][1]
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="was changed since it was written"):
        datalist = load_datalist(path)
    assert datalist.hash != content["hash"] and len(datalist) == 1


def test_split(tmp_path):
    datalist = load_datalist(write(tmp_path, [item(i, fold=i % 5) for i in range(10)]))
    training, validation = datalist.split(3)
    assert [entry["fold"] for entry in validation] == [3, 3] and len(training) == 8
    with pytest.raises(InputError, match="no fold 5; it has folds 0 to 4"):
        datalist.split(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such datalist; make one with: volta3d prepare"),
        ("{", "not valid JSON"),
        ("[]", "not a datalist"),
        ('{"training": []}', "format None instead of 1"),
        ('{"training": [], "format": 1}', "the datalist is empty"),
        ('{"training": [{}], "format": 1}', "lacks name, spacing"),
    ],
)
def test_files_that_are_no_datalist(tmp_path, content, message):
    if content is not None:
        (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_datalist(tmp_path / "datalist.json")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([item(0, "p"), item(1, "p", fold=1)], "patient p is in folds 0 and 1"),
        ([item(0), item(0)], "is there twice, without a session"),
        ([{**item(0), "session": "M6"}] * 2, "session M6 is there twice"),
        ([item(0), {**item(1), "image": "images/0.nii"}], r"image images/0.nii is also that of patient sub-0000"),
        ([item(0, visit="first")], "visit is 'first', not a whole number from 0 without quotes or null"),
        ([item(0, age="65Y")], "age is '65Y', not a number of years"),
        ([item(0, fold=7)], "fold 7 where folds 0 to 4 exist"),
        ([{**item(0), "image": None}], "lacks image"),
        ([{**item(0), "fold": None}], "lacks fold"),
        ([{**item(0), "subject_id": "$print()"}], r"has a \$"),
        ([{**item(0), "patient_id": "a\tb"}], "control characters"),
        ([{**item(0), "session": "ses-\x7f1"}], "control characters"),
        ([item(0, fold="1")], "fold is '1', not a whole number without quotes"),
        ([item(0, fold=True)], "fold is True, not a whole number"),
        ([item(0, label=None)], "label is null; leave it out"),
        ([{**item(0), "session": 1}], "session is 1, not a text in quotes or null"),
        ([{**item(0), "patient_id": 7}], "patient_id is 7, not a text in quotes"),
        ([{**item(0), "patient_id": ""}], "patient_id is '', not a text in quotes"),
    ],
)
def test_datalists_that_contradict_themselves(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        load_datalist(write(tmp_path, items))


def test_a_label_may_be_a_number(tmp_path):
    (entry,) = load_datalist(write(tmp_path, [item(0, label=1)])).items
    assert entry["label"] == 1 and entry["image"] == str(tmp_path / "images/0.nii")


@pytest.mark.parametrize("changes", [{"n_folds": "2"}, {"n_folds": 0}, {"seed": None}, {"n_folds": True}])
def test_numbers_of_a_datalist_are_numbers(tmp_path, changes):
    with pytest.raises(InputError, match="whole numbers without quotes are needed"):
        load_datalist(write(tmp_path, [item(0)], **changes))


def test_another_shape_or_spacing_than_wanted(tmp_path):
    path = write(tmp_path, [item(0)])
    assert load_datalist(path, shape=SHAPE, spacing=(1, 1, 1)).shape == SHAPE
    with pytest.raises(
        InputError, match="volumes of shape 8x9x10, but 96x96x96 is expected; prepare it with --shape 96,96,96"
    ):
        load_datalist(path, shape=(96, 96, 96))
    assert load_datalist(path, spacing=1.0).spacing == (1, 1, 1)
    for spacing in (2, (2, 2, 2)):
        with pytest.raises(InputError, match="volumes of spacing 1x1x1, but 2x2x2 is expected"):
            load_datalist(path, spacing=spacing)
    with pytest.raises(InputError, match="three positive numbers"):
        load_datalist(write(tmp_path, [item(0)], shape=[8, 9]))


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_check_finds_a_patient_in_any_form_and_exits_non_zero(tmp_path, capsys):
    adni = write(tmp_path / "adni", [item(0, "002_S_0295"), item(1, "011_S_0003")], "adni")
    harp = write(tmp_path / "harp", [{**item(2), "patient_id": "sub-ADNI002S0295", "subject_id": "x"}], "harp")
    other = write(tmp_path / "ixi", [item(3, "IXI002", voxels_sha256="v")], "ixi")
    assert main(["check", str(adni), str(other)]) == 0
    assert "no overlap" in capsys.readouterr().out
    assert main(["check", str(adni), str(harp), str(other)]) == 1
    out = capsys.readouterr().out.split("1 overlaps:")[1]  # before it, that the volumes are empty
    assert "002_S_0295" in out and "011_S_0003" not in out and str(harp) in out
    assert "--exclude-patients-of OTHER" in out and "same voxels" not in out
    # Those of one number are other people; of a scan that is there twice, leaving out by ids would leave out those.
    copy = write(tmp_path / "copy", [item(4, "IXI009", voxels_sha256="v")], "copy")
    assert main(["check", str(other), str(copy)]) == 1
    out = capsys.readouterr().out.split("1 overlaps:")[1]
    assert "Of scans with the same voxels, keep one" in out and "--exclude-patients-of" not in out


def test_check_names_volumes_that_are_missing_or_truncated(tmp_path, capsys):
    data = make_prepared(tmp_path / "data", count=3)
    assert check(str(data)) == 0 and "warning" not in capsys.readouterr().out
    first, second = sorted((data / "images").glob("*.nii"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    assert check(str(data)) == 0
    out = capsys.readouterr().out
    assert "2 volumes cannot be used" in out and first.name in out and second.name in out and "truncated" in out
    with pytest.raises(InputError, match="2 files of 3 items cannot be used"):
        check(str(data), volumes=True)


def test_check_finds_the_same_voxels_under_two_ids(tmp_path, capsys):
    one = write(tmp_path / "a", [item(0, voxels_sha256="same"), item(1, voxels_sha256="x")], "a")
    two = write(tmp_path / "b", [item(5, cohort="other", voxels_sha256="same")], "b")
    assert check(str(one), str(two)) == 1
    assert "sub-0000 = sub-0005" in capsys.readouterr().out
    inside = write(tmp_path / "c", [item(0, source_sha256="q"), item(1, source_sha256="q")], "c")
    assert check(str(inside)) == 1


def test_plain_ids_in_cohorts_of_different_names_need_not_be_one_person(tmp_path, capsys):
    one = write(tmp_path / "a", [item(0, cohort="oasis")], "oasis")
    two = write(tmp_path / "b", [item(0, cohort="local")], "local")
    assert check(str(one), str(two)) == 0
    assert "1 ids are in cohorts of different names" in capsys.readouterr().out
    assert check(str(one), str(two), strict=True) == 1
    same = write(tmp_path / "c", [item(0, cohort="local")], "local")
    assert check(str(two), str(same)) == 1
    with pytest.raises(InputError, match="no datalist given"):
        check()


def test_check_names_both_spellings_of_ids_that_look_alike(tmp_path, capsys):
    one = write(tmp_path / "a", [item(0, "SUB-7667", cohort="clinic"), item(1, "sub-01", cohort="clinic")], "clinic")
    two = write(tmp_path / "b", [item(2, "7667", cohort="Clinic"), item(3, "sub-11", cohort="clinic")], "clinic")
    assert main(["check", str(one), str(two)]) == 1
    out = capsys.readouterr().out
    assert "1 overlaps" in out and "7667 = SUB-7667" in out and "--accept-look-alikes" in out
    assert main(["check", str(one), str(two), "--accept-look-alikes"]) == 0
    # Within one datalist they only count if they are in two folds.
    for fold, status in ((0, 0), (1, 1)):
        inside = write(tmp_path / f"c{fold}", [item(0, "sub-1"), item(1, "SUB_01", fold=fold)])
        assert check(str(inside)) == status
    with pytest.raises(InputError, match=r"1 groups of ids look alike(?s:.)*7667 = SUB-7667(?s:.)*--refold"):
        merge(str(one), str(two), output=str(tmp_path / "d"))
    merge(str(one), str(two), output=str(tmp_path / "d"), refold=True)
    folds = {entry["patient_id"]: entry["fold"] for entry in load_datalist(tmp_path / "d").items}
    assert folds["7667"] == folds["SUB-7667"]
    merge(str(one), str(two), output=str(tmp_path / "e"), accept_look_alikes=True)


def test_check_warns_of_volumes_that_are_nearly_the_same(tmp_path, capsys):
    prints = ("0" * 128, "f" + "0" * 127, "f" * 128)
    one, two, three = (write(tmp_path / str(i), [item(i, fingerprint=print_)], "x") for i, print_ in enumerate(prints))
    assert check(str(one), str(two), str(three)) == 0
    out = capsys.readouterr().out
    assert "warning: 1 pairs of volumes are nearly the same" in out and "sub-0000 ~ sub-0001" in out
    assert check(str(one), str(three)) == 0
    assert "nearly" not in capsys.readouterr().out


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merged_volumes_stay_where_they_are_and_keep_fold_and_cohort(tmp_path, capsys):
    adni = write(
        tmp_path / "d/adni", [item(i, f"002_S_{i:04d}", fold=i % 5, cohort="adni") for i in range(6)], "adni", True
    )
    items = [item(i, f"BraTS-GLI-{i:05d}", fold=i % 5, cohort="brats") for i in range(3)]
    brats = write(tmp_path / "brats", items, "brats", True)
    assert main(["merge", str(adni), str(brats), "--output", str(tmp_path / "both"), "--name", "pretraining"]) == 0
    both = load_datalist(tmp_path / "both")
    assert both.name == "pretraining" and len(both) == 9
    assert Counter(entry["cohort"] for entry in both.items) == {"adni": 6, "brats": 3}
    check_volumes(both, deep=True)
    assert both.content["training"][0]["image"] == "../d/adni/images/0.nii"
    assert {entry["patient_id"]: entry["fold"] for entry in both.items}["002_S_0003"] == 3
    for drawn in (both.items, both.split(0)[0]):
        weights = cohort_weights(both, drawn, {"adni": 1, "brats": 3})
        by_cohort = Counter()
        for entry, weight in zip(drawn, weights, strict=True):
            by_cohort[entry["cohort"]] += weight
        assert by_cohort == pytest.approx({"adni": 0.25, "brats": 0.75}) and sum(weights) == pytest.approx(1)


def test_merging_spares_its_inputs_and_keeps_the_mark_of_phantoms(tmp_path):
    one = write(tmp_path / "a", [item(0, cohort="phantom")], "phantom")
    two = write(tmp_path / "b", [item(1, cohort="phantom_2")], "phantom_2")
    for output in (two, two.parent):
        with pytest.raises(InputError, match="is one of the datalists to merge"):
            merge(str(one), str(two), output=str(output), name="phantom_both")
    for kind in (".prepare", "shards"):
        (tmp_path / kind / kind).mkdir(parents=True)
        with pytest.raises(InputError, match="holds a prepared or packed data set"):
            merge(str(one), str(two), output=str(tmp_path / kind), name="phantom_both")
    with pytest.raises(InputError, match=r"--name both: these are phantoms.* try phantom_both"):
        merge(str(one), str(two), output=str(tmp_path / "d"), name="both")
    merge(str(one), str(two), output=str(tmp_path / "d"), name="phantom_both")
    real = write(tmp_path / "e", [item(2, cohort="ixi")], "ixi")
    merge(str(one), str(real), output=str(tmp_path / "f"), name="both")


def test_what_was_left_out_is_no_part_of_the_hash(tmp_path):
    first, second = (
        make_content("x", [1.0] * 3, [8] * 3, 0, 1, [{"subject_id": "a", "fold": 0}], excluded)
        for excluded in ([], [{"subject_id": "b", "reason": "broken"}])
    )
    assert first["hash"] == second["hash"]
    third = make_content("x", [1.0] * 3, [8] * 3, 0, 2, [{"subject_id": "a", "fold": 1}], [])
    assert third["hash"] != first["hash"]


def test_merging_refuses_what_would_leak(tmp_path):
    one = write(tmp_path / "a", [item(0, "002_S_0295", fold=0)], "a")
    two = write(tmp_path / "b", [item(1, "002_S_0295", fold=3)], "b")
    with pytest.raises(InputError, match="different folds"):
        merge(str(one), str(two), output=str(tmp_path / "c"))
    merge(str(one), str(two), output=str(tmp_path / "c"), refold=True, folds=3, seed=1)
    merged = load_datalist(tmp_path / "c")
    assert merged.n_folds == 3 and len({entry["fold"] for entry in merged.items}) == 1
    twin = write(tmp_path / "d", [item(9, voxels_sha256="v")], "d")
    again = write(tmp_path / "e", [item(8, voxels_sha256="v")], "e")
    with pytest.raises(InputError, match="1 volumes are there twice"):
        merge(str(twin), str(again), output=str(tmp_path / "f"))
    small = write(tmp_path / "g", [item(7)], "g", shape=[4, 4, 4])
    with pytest.raises(InputError, match=r"shape \[4, 4, 4\] where"):
        merge(str(one), str(small), output=str(tmp_path / "h"))
    with pytest.raises(InputError, match="two datalists or more"):
        merge(str(one), output=str(tmp_path / "h"))


@pytest.mark.parametrize(
    ("theirs", "ours", "what"),
    [
        ({"sex": "M"}, {"sex": "F", "session": "ses-1"}, "sub-0000  sex"),
        ({"source_sha256": "a"}, {"source_sha256": "b"}, r"sub-0000  voxels of session \(none\)"),
        ({"sex": "M", "session": "1", "sha256": "a"}, {"sex": "M", "session": "2", "sha256": "b"}, None),
        ({"sex": "M", "cohort": "bids"}, {"sex": "F", "cohort": "site_b"}, None),
    ],
)
def test_merging_does_not_make_one_person_of_two(tmp_path, theirs, ours, what):
    """Folders called ``bids``, prepared without ``--name``, have one cohort name."""
    one = write(tmp_path / "a", [{**item(0, cohort="bids"), **theirs}, item(1, cohort="bids")], "bids")
    two = write(tmp_path / "b", [{**item(0, cohort="bids", fold=1), **ours}, item(2, cohort="bids")], "bids")
    if what is None:
        merge(one, two, output=tmp_path / "c", refold=True)
    else:
        with pytest.raises(InputError, match=f"(?s)1 patients of one id.*{what}.*--name NAME"):
            merge(one, two, output=tmp_path / "c", refold=True)


def test_merging_holds_out_the_first_data_set_whole(tmp_path):
    held = write(tmp_path / "a", [item(i, fold=i, cohort="held") for i in range(3)], "held", True)
    others = [
        write(tmp_path / name, [item(i + 10 * place, fold=i % 2, cohort=name) for i in range(4)], name, True)
        for place, name in ((1, "b"), (2, "c"))
    ]
    words = ["merge", str(held), *map(str, others), "--output", str(tmp_path / "all"), "--hold-out"]
    assert main(words) == 0
    made = load_datalist(tmp_path / "all")
    assert made.n_folds == 2
    training, scored = made.split(0)
    assert {entry["cohort"] for entry in scored} == {"held"} and len(scored) == 3
    assert {entry["cohort"] for entry in training} == {"b", "c"} and len(training) == 8
    assert main([*words, "--refold"]) == 2
    again = write(tmp_path / "d", [item(0, cohort="held"), item(9, cohort="held")], "held")
    with pytest.raises(InputError, match=r"1 patients are in different folds(?s:.)*--exclude-patients-of"):
        merge(held, again, output=tmp_path / "e", hold_out=True)


def test_merging_asks_whether_the_volumes_are_there(tmp_path):
    first, second = (write(tmp_path / name, [item(i, cohort=name)], name=name) for i, name in enumerate("ab"))
    (tmp_path / "b/images/1.nii").unlink()
    with pytest.raises(InputError, match=r"1 of 2 volumes are not there:\n  sub-0001 (.|\n)*with its volumes"):
        merge(first, second, output=tmp_path / "c")


def test_merging_keeps_different_people_of_one_plain_id_apart(tmp_path):
    one = write(tmp_path / "a", [item(0, cohort="oasis", fold=1)], "oasis")
    two = write(tmp_path / "b", [item(0, cohort="local", fold=2)], "local")
    merge(str(one), str(two), output=str(tmp_path / "c/both.json"))
    merged = load_datalist(tmp_path / "c/both.json")
    assert merged.patients == {"oasis-sub-0000", "local-sub-0000"}


@pytest.mark.parametrize("patient", ["sub-01", "P01", "01"])
def test_people_are_recognised_after_a_merge_has_renamed_them(tmp_path, capsys, patient):
    mine, other = (write(tmp_path / name, [item(0, patient, cohort=name)], name) for name in ("mine", "open"))
    test = write(tmp_path / "test", [item(1, patient, cohort="mine", session="ses-2")], "mine")
    third = write(tmp_path / "third", [item(2, patient, cohort="third")], "third")
    merge(mine, other, output=tmp_path / "both")
    assert check(tmp_path / "both", test) == 1 and check(tmp_path / "both", other) == 1
    capsys.readouterr()
    assert check(tmp_path / "both", third) == 0 and "1 ids are in cohorts" in capsys.readouterr().out
    trained = facts_of(load_datalist(tmp_path / "both").items)
    assert find_overlap(load_datalist(test).items, trained).known == {patient: ""}
    found = find_overlap(load_datalist(third).items, trained)
    assert not found.known and not found.look_alikes
    # One name for one person, and no cohort's name twice.
    merge(tmp_path / "both", test, third, output=tmp_path / "all")
    assert load_datalist(tmp_path / "all").patients == {f"{name}-{patient}" for name in ("mine", "open", "third")}


def test_an_unrelated_data_set_hides_no_overlap(tmp_path, capsys):
    train, test, other = (
        write(tmp_path / name, [item(i, "sub-01", cohort=cohort, visit=0)], cohort)
        for i, (name, cohort) in enumerate((("train", "mine"), ("test", "mine"), ("other", "open")))
    )
    assert check(train, test) == check(train, test, other) == 1
    out = capsys.readouterr().out
    assert "1 ids are in cohorts of different names" in out and f"{train} and {test}\n" in out
    merge(train, test, other, output=tmp_path / "all")
    entries = load_datalist(tmp_path / "all").items
    assert [(entry["patient_id"], "visit" in entry) for entry in entries] == [
        ("mine-sub-01", False),
        ("mine-sub-01", False),
        ("open-sub-01", True),
    ]


def test_a_cohort_that_is_null_is_the_datalist_s(tmp_path):
    path = write(tmp_path / "one", [item(0, fold=0, cohort=None), item(1, fold=1, cohort=None)], "mine")
    datalist = load_datalist(path)
    assert cohort_weights(datalist, datalist.items, {"mine": 2}) == [0.5, 0.5]
    other = write(tmp_path / "two", [item(0, fold=0, cohort=None), item(1, fold=1, cohort=None)], "other")
    merge(path, other, output=tmp_path / "both")
    assert Counter(entry["cohort"] for entry in load_datalist(tmp_path / "both").items) == {"mine": 2, "other": 2}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"adni": 1}, "missing: brats"),
        ({"adni": 1, "brats": 1, "ixi": 1}, "unknown: ixi"),
        ({"adni": 1, "brats": -1}, "positive numbers"),
        ({"adni": 0, "brats": 0}, "positive numbers"),
    ],
)
def test_bad_cohort_weights(tmp_path, weights, message):
    path = write(tmp_path, [item(0, cohort="adni"), item(1, cohort="brats")])
    with pytest.raises(InputError, match=message):
        datalist = load_datalist(path)
        cohort_weights(datalist, datalist.items, weights)
