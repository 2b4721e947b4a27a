"""Makes batches ahead of the device, in a separate thread."""

import collections
import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextlib.contextmanager
def prefetch(items: Iterator[T], ahead: int = 2) -> Iterator[Iterator[T]]:
    """Runs an iterator in a thread, a few items ahead of its consumer; a context manager that ends the thread.

    Order and content are those of the iterator. If it raises an error, the error is raised in place of the item.

    Args:
      items: the iterator; only the thread uses it, one item after another.
      ahead: number of items to prepare while one is in use, at least 1.

    Yields:
      The iterator over the prepared items.

    Examples:
      >>> with prefetch(iter("abc")) as letters:
      ...     print(list(letters))
      ['a', 'b', 'c']
    """
    if ahead < 1:
        raise ValueError(f"ahead={ahead} must be at least 1")
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        yield _take(items, ahead, thread)
    finally:
        thread.shutdown(cancel_futures=True)


def _take(items, ahead, thread):
    pending = collections.deque(thread.submit(next, items, _END) for _ in range(ahead))
    while (item := pending.popleft().result()) is not _END:
        pending.append(thread.submit(next, items, _END))
        yield item
