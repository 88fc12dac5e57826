"""Reads pickles without executing anything: unknown objects become inert placeholders."""

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar


class Placeholder(dict):
    """Stands for an object of any class or the result of any function.

    Keeps the arguments (`args`), the state (`state`) and the items of the object, and does nothing with them. `path` is
    the name of the class or function, 'module.name'.
    """

    path = ''
    args: tuple = ()
    state: Any = None
    __hash__ = object.__hash__  # type: ignore[assignment]  # placeholders can be keys
    __eq__ = object.__eq__

    def __new__(cls, *args, **_):
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *_, **__):
        super().__init__()

    def __call__(self, *args, **_):
        return type(self)(*args)

    def __setstate__(self, state):
        self.state = state

    def append(self, _):
        pass

    extend = add = append


def kind(value: Any) -> str:
    """Returns the type of an unpickled value, for messages."""
    named = isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder))
    return value.path if named else type(value).__name__


class _Tuple(tuple):
    """A tuple whose hash does not depend on its parts: nested ones take exponential time, or end the process."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _as_tuple(opcode: bytes) -> tuple[int, Callable]:
    load = pickle._Unpickler.dispatch[opcode[0]]  # type: ignore[attr-defined]

    def load_tuple(self) -> None:
        load(self)
        self.stack[-1] = _Tuple(self.stack[-1])

    return opcode[0], load_tuple


def _refuse(self) -> None:
    raise pickle.UnpicklingError('a bytearray')  # Python allocates its declared size


# The implementation in Python, because that in C allocates the memo up to the highest index.
class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        **dict(map(_as_tuple, (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3))),
        pickle.BYTEARRAY8[0]: _refuse,
    }

    def __init__(self, file: BinaryIO, classes: Mapping[str, type], storage: Callable[[Any], Any] | None):
        super().__init__(_Bounded(file), encoding='latin1')  # strings of Python 2
        self._classes, self._storage = dict(classes), storage

    def find_class(self, module: str, name: str) -> type:
        # Only subclasses of Placeholder are returned. A pickle cannot change classes, but it can change functions.
        path = f'{module}.{name}'
        if path not in self._classes:
            self._classes[path] = type('Unknown', (Placeholder,), {'path': path})
        return self._classes[path]

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise ValueError('a reference outside of the pickle')
        return self._storage(pid)


class _Bounded:
    """A file from which at most its rest is read: Python allocates the declared size of a read."""

    def __init__(self, file: BinaryIO):
        position = file.tell()
        self._file, self._size, self.readline = file, file.seek(0, os.SEEK_END), file.readline
        file.seek(position)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size - self._file.tell()))


def load(file: BinaryIO, classes: Mapping[str, type] | None = None, storage: Callable[[Any], Any] | None = None) -> Any:
    """Returns the object of the pickle that starts at the file's position.

    Args:
      file: an open file. Its position is moved behind the pickle.
      classes: subclasses of `Placeholder` by the path that they stand for. Other paths become placeholders.
      storage: returns the object of a persistent id. None: there are no such ids.

    Raises:
      Exception: of any type, if the pickle is damaged.
    """
    return _Unpickler(file, classes or {}, storage).load()
