"""The next batch, made in a thread while this one is measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Ahead(Generic[Key, T]):
    """Makes what will be asked for next, one thing at a time; what ``make`` raises is raised where it is asked for.

    Args:
        make: a key, such as a position, to what it stands for. It runs in a thread of its own, never twice at once.
    """

    def __init__(self, make: Callable[[Key], T]):
        self._make, self._pool = make, ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next: tuple[Key, Future[T]] | None = None

    def get(self, key: Key, then: Key | None) -> T:
        """What a key stands for; the next one to be asked for is ``then``, or not known."""
        found = self._submit(key) if self._next is None or self._next[0] != key else self._next[1]
        self._next = None
        result = found.result()
        self._next = None if then is None else (then, self._submit(then))
        return result

    def _submit(self, key: Key) -> Future[T]:
        return self._pool.submit(self._make, key)

    def close(self) -> None:
        """Wait for the thread; what it made is dropped."""
        self._pool.shutdown(cancel_futures=True)
