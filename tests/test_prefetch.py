"""A thread that makes items ahead: the same items in the same order, its errors in their place, no thread left."""

import itertools
import threading

import pytest

from pats_jax.data.prefetch import prefetch


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_items_come_as_they_are_and_in_their_order(ahead):
    with prefetch(iter(range(20)), ahead) as items:
        assert list(items) == list(range(20))
    assert not threads()


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_asked_are_made_ahead_and_all_in_one_other_thread(ahead):
    makers, made = set(), threading.Semaphore(0)

    def items():
        for number in itertools.count():
            makers.add(threading.get_ident())
            made.release()
            yield number

    with prefetch(items(), ahead) as taken:
        for number in range(4):
            assert next(taken) == number
        for _ in range(4 + ahead):
            assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.1), "more was made than there is room for"
    assert len(makers) == 1 and threading.get_ident() not in makers and not threads()


def test_an_error_is_raised_where_its_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise ValueError("no third")

    with prefetch(items(), 3) as taken:
        assert [next(taken), next(taken)] == [1, 2]
        with pytest.raises(ValueError, match="no third"):
            next(taken)
    assert not threads()


def test_who_stops_early_leaves_no_thread():
    with pytest.raises(KeyError), prefetch(itertools.count(), 4) as taken:
        next(taken)
        raise KeyError
    assert not threads()


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="at least 1"), prefetch(iter("a"), 0):
        pass
