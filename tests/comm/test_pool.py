"""A pool gives no row to two, and takes all of them back."""

from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.comm.pool import RowPool


@given(st.integers(0, 60), st.lists(st.integers(1, 20), max_size=60), st.randoms())
def test_what_is_taken_is_free_and_what_is_given_back_is_free_again(count, wishes, random):
    pool, held, first_row = RowPool(100, count), [], 100
    for wish in wishes:
        free = set(range(first_row, first_row + count)) - {row for first, n in held for row in range(first, first + n)}
        first = pool.allocate(wish)
        if first is None:  # then no run is so long
            assert not any(free >= set(range(row, row + wish)) for row in free)
            if held:
                pool.free(*held.pop(random.randrange(len(held))))
        else:
            assert free >= set(range(first, first + wish))
            assert not any(free >= set(range(row, row + wish)) for row in free if row < first)  # the first that fits
            held.append((first, wish))
    for first, wish in held:
        pool.free(first, wish)
    assert pool.runs == ([(100, count)] if count else [])
