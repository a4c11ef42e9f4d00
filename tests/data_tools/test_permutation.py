import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.permutation import INCREMENT, Permutation, _mix_in_place, _mixed, key_of, scattered
from tests.data_tools.making import REPOSITORY

KEYS = st.integers(0, (1 << 64) - 1)


@given(count=st.integers(1, 400), key=KEYS)
def test_every_place_is_visited_once(count: int, key: int) -> None:
    permutation = Permutation(count, key=key)
    assert sorted(permutation[place] for place in range(count)) == list(range(count))
    assert sorted(scattered(count, key=key).tolist()) == list(range(count))


@given(count=st.integers(1, 1 << 60), key=KEYS, data=st.data())
def test_places_far_out_stay_inside(count: int, key: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5, unique=True))
    found = [Permutation(count, key=key)[place] for place in places]
    assert all(0 <= number < count for number in found)
    assert len(set(found)) == len(places)


@pytest.mark.parametrize("order", ["scattered", "permutation"])
def test_orders_look_random(order: str) -> None:
    """Means of what a uniformly random permutation gives, within about five standard deviations."""
    count = 20_000
    for key in (1, 2, 1 << 63):
        permutation = Permutation(count, key=key)
        values = (
            scattered(count, key=key)
            if order == "scattered"
            else np.array([permutation[i] for i in range(count)])
        )
        places = np.arange(count)
        assert abs(np.corrcoef(places, values)[0, 1]) < 5 / count**0.5
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / count**0.5
        assert np.sum(places == values) < 8  # fixed points: Poisson with mean 1
        first_tenth = np.histogram(values[: count // 10], bins=10, range=(0, count))[0]
        assert np.all(abs(first_tenth - 200) < 5 * 200**0.5)


def test_keys_make_unrelated_orders() -> None:
    one, two = scattered(1000, key=key_of(1, "a")), scattered(1000, key=key_of(2, "a"))
    assert np.sum(one == two) < 8
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2
    assert len({key_of(1, "a"), key_of(2, "a"), key_of(1, "b"), key_of("1", "a")}) == 4


def test_orders_never_change() -> None:
    """Stored numbers on purpose: if these change, every run in the world that resumes sees other data."""
    assert key_of(1234, "corpus", 0, "documents") == 14802353197883864446
    assert scattered(8, key=7).tolist() == [3, 4, 0, 7, 5, 1, 2, 6]
    assert [Permutation(8, key=7)[place] for place in range(8)] == [2, 0, 6, 5, 3, 1, 7, 4]


def test_the_mixer_is_splitmix64() -> None:
    """Its first outputs for seed 0, as java.util.SplittableRandom and many others give them."""
    assert [_mixed(step * INCREMENT) for step in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    values = np.arange(4, dtype=np.uint64)
    _mix_in_place(values)
    assert values.tolist() == [_mixed(number) for number in range(4)]


def test_orders_do_not_depend_on_the_process() -> None:
    program = "from data_tools.permutation import *; print(scattered(50, key=key_of('a')).tolist())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=REPOSITORY)
    assert printed.stdout.decode().strip() == str(scattered(50, key=key_of("a")).tolist())
