"""Validation gets whole files whose bytes are nearest to its share, from all over the list, wherever it lies."""

import itertools
import pathlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.model.files import make_stamp
from hpcmoe.model.split import MOST_TRIED, choose_validation, split_files


def make_files(**sizes):
    """Make up files as find_files gives them: path (with / for two underscores) and size."""
    info = {"st_mtime_ns": 0, "st_ctime_ns": 0, "st_ino": 0}
    paths = {name.replace("__", "/") + ".txt": size for name, size in sizes.items()}
    return {path: make_stamp(SimpleNamespace(st_size=size, **info)) for path, size in sorted(paths.items())}


def validation(files, share, least=1):
    """Name what is for validation, once it is certain that all else is for training."""
    split = split_files(files, share, least)
    paths = [span.path for span in split.training + split.validation]
    assert sorted(paths) == list(files)
    assert all((span.first, span.length) == (0, files[span.path].size) for span in split.training + split.validation)
    return sorted(span.path.removesuffix(".txt") for span in split.validation)


def num_bytes(sizes, chosen):
    return int(np.array(sizes)[chosen].sum())


def test_a_single_file_is_split_by_bytes():
    split = split_files(make_files(a=100), 0.25, 10)
    ((training,), (validating,)) = split.training, split.validation
    assert (training.path, training.first, training.length) == ("a.txt", 0, 75)
    assert (validating.path, validating.first, validating.length) == ("a.txt", 75, 25)
    for share, cut in ((0.001, 90), (0.25, 75), (0.999, 10)):
        assert split_files(make_files(a=100), share, 10).training[0].length == cut
    assert split_files(make_files(a=100), 0.25, 51).training[0].length == 75


def test_the_share_is_of_the_bytes():
    assert validation(make_files(tiny=30, big=100_000), 0.1, 17) == ["tiny"]
    assert validation(make_files(a=10, b=10, c=10, d=10, big=360), 0.1) == ["a", "b", "c", "d"]
    assert validation(make_files(a=50, b=1000, c=450, d=8500), 0.1) == ["b"]


def test_a_part_gets_a_sequence_where_whole_files_allow_it():
    assert validation(make_files(a=30, b=40, big=100_000), 0.0001, 65) == ["a", "b"]
    assert validation(make_files(a=30, b=40, big=100_000), 0.9999, 65) == ["big"]
    assert len(validation(make_files(a=50, b=50), 0.001)) == len(validation(make_files(a=50, b=50), 0.999)) == 1


def test_files_of_one_name_are_chosen_from_all_over_the_folders():
    files = make_files(**{f"d{folder}__text": 1000 for folder in range(10)})
    chosen = validation(files, 0.2)
    assert chosen == ["d4/text", "d9/text"]
    many = validation(make_files(**{f"d{folder:02d}__text": 1000 for folder in range(100)}), 0.2)
    gaps = np.diff([int(path[1:3]) for path in many])
    assert len(many) == 20 and gaps.min() >= 3 and gaps.max() <= 8


def test_each_folder_gives_its_share_where_the_names_are_alike():
    files = make_files(**{f"{language}__part{part}": 1000 for language in "abcdef" for part in range(10)})
    assert {path[0] for path in validation(files, 0.1)} == set("abcdef")


@pytest.mark.parametrize("numbers", [(10, 10), (25, 25, 25, 25), (40, 20, 20), (10,) * 10])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_each_folder_gives_its_share_where_no_names_are_alike(numbers, share):
    files = make_files(**{f"d{n}__{n}_{i}": 100 for n, number in enumerate(numbers) for i in range(number)})
    chosen = Counter(path.partition("/")[0] for path in validation(files, share))
    assert all(abs(chosen[f"d{n}"] - share * number) <= 1 for n, number in enumerate(numbers))


def test_the_choice_and_the_order_depend_on_names_and_sizes_alone(tmp_path, monkeypatch):
    sizes = {f"{path}": 100 + 7 * number for number, path in enumerate(["a/x", "a/y", "b/x", "c/d/x", "e", "f", "g"])}
    split_of = {}
    for where in ("one", "two/deep"):
        files = make_files(**{f"{tmp_path}/{where}/{path}": size for path, size in sizes.items()})
        split = split_files(files, 0.2, 10)
        split_of[where] = [[str(pathlib.Path(s.path).relative_to(tmp_path / where)) for s in part]
                           for part in (split.training, split.validation)]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    relative = split_files(make_files(**sizes), 0.2, 10)
    assert split_of["one"] == split_of["two/deep"]
    assert split_of["one"] == [[span.path for span in part] for part in (relative.training, relative.validation)]


def test_files_of_equal_size_are_chosen_by_their_number():
    for number, share in itertools.product(range(2, 30), (0.001, 0.1, 0.25, 0.5, 0.9)):
        chosen = choose_validation(np.full(number, 100), share, 10)
        count = min(max(round(number * share), 1), number - 1)
        assert chosen.tolist() == [index < count for index in range(number)]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5000) | st.sampled_from([1, 10**6, 10**9]), min_size=2, max_size=10),
    st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.99]),
    st.sampled_from([1, 17, 500]),
)
def test_no_choice_of_a_few_files_is_nearer(sizes, share, least):
    total = sum(sizes)
    choices = [np.array(mask) for mask in itertools.product([False, True], repeat=len(sizes))]
    held = np.array([num_bytes(sizes, mask) for mask in choices])
    held = held[(held >= least) & (total - held >= least)]
    mine = num_bytes(sizes, choose_validation(np.array(sizes), share, least))
    if len(held) > 0:
        wanted = min(max(share * total, least), total - least)
        assert least <= mine <= total - least
        assert abs(mine - wanted) == np.abs(held - wanted).min()


@pytest.mark.parametrize("number", [MOST_TRIED + 2, 100, 3000])
def test_many_files_come_very_near(number):
    random = np.random.default_rng(number)
    for spread, share in itertools.product((0.1, 1.0, 2.0), (0.01, 0.1, 0.5)):
        sizes = 1 + random.lognormal(8, spread, number).astype(np.int64)
        wanted, sums = share * sizes.sum(), np.zeros(1, np.int64)
        for size in sizes if number < 20 else ():
            sums = np.concatenate([sums, sums + size])
        nearest = np.abs(sums[1:-1] - wanted).min() if number < 20 else 0
        assert abs(num_bytes(sizes, choose_validation(sizes, share, 65)) - wanted) <= nearest + sizes.sum() / 100
