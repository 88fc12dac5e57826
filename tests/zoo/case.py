"""A case: an input as people have it, and what a command makes of it."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests import helpers

SIZE = 32  # side of the pictures: nothing is resized unless a case is about sizes


class Case(NamedTuple):
    """One input of one command.

    `build` creates the input in a folder. What it returns depends on the command and is described there.
    """

    command: str
    input: str  # for docs/input_cases.md
    outcome: str  # the same
    build: Callable[[pathlib.Path], Any]
    words: tuple[str, ...] = ()  # further words of the command line; FOLDER is the folder of the case
    says: tuple[str, ...] = ()  # patterns of lines that the command must print
    refused: str = ''  # pattern of the one line with which the command ends


class Cases(list[Case]):
    """The cases of one command. A decorated function `build` becomes a case."""

    def __init__(self, command: str):
        super().__init__()
        self._command = command

    def read(self, input: str, outcome: str, *, words=(), says=()):
        return self._add(input, outcome, words, says, '')

    def refused(self, input: str, outcome: str, *, by: str, words=(), says=()):
        """The case ends in one line. What `build` returns is ignored: no output is expected."""
        add = self._add(input, outcome, words, says, by)
        return lambda build: add(lambda folder: (build(folder), None)[1])

    def partly_refused(self, input: str, outcome: str, *, by: str, words=(), says=()):
        """The same, but the output that `build` returns is written as well."""
        return self._add(input, outcome, words, says, by)

    def _add(self, input, outcome, words, says, refused):
        says = (says,) if isinstance(says, str) else tuple(says)

        def add(build):
            self.append(Case(self._command, input, outcome, build, tuple(words), says, refused))
            return build

        return add


@functools.cache
def picture(seed: int) -> np.ndarray:
    """Returns uint8 [SIZE, SIZE, 3]."""
    return helpers.picture(seed, SIZE, SIZE)


@functools.cache
def png(seed: int) -> bytes:
    return helpers.encode(picture(seed), 'PNG')
