"""Errors that are not bugs. Commands print them as one line and set the exit code."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class UserError(ValueError):
    """An error that the user can fix. The message names the value, what was expected and the remedy.

    Characters that are not printable become ?: names and values may be those of files of others.
    """

    def __init__(self, message: str):
        super().__init__(''.join(c if c.isprintable() else ' ' if c.isspace() else '?' for c in message))


class UnreadableError(UserError):
    """A record cannot be read. It keeps its row in the batch, with weight 0, and training continues."""


class DivergedError(FloatingPointError):
    """The loss, gradient or update is not finite. The message names the step."""


class TerminatedError(Exception):
    """The run was stopped by SIGTERM. The message names the saved step."""


@contextlib.contextmanager
def as_user_error(what: str, remedy: str = '') -> Iterator[None]:
    """Converts file system errors, also as wrapped by orbax and tensorstore, to UserError("WHAT: reason. REMEDY")."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{what}: {error.strerror or error}. {remedy}'.rstrip()) from error
    except Exception as error:
        if reason := re.search(r"(?:.*: )?(.*) \[os_error_code='\d+'", str(error)):
            raise UserError(f'{what}: {reason[1]}. {remedy}'.rstrip()) from error
        raise


def check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raises UserError('NAME is TYPE: expected EXPECTED.') if a value is of another type."""
    if not isinstance(value, kind):
        raise UserError(f'{name} is {type(value).__name__}: expected {expected}.')


def printable(text: str, longest: int = 100) -> str:
    """Returns text from a file as one short printable line."""
    return ''.join(c if c.isprintable() else '?' for c in text[:longest]) + ('...' if len(text) > longest else '')


def first_line(error: BaseException) -> str:
    """Returns the first line of an error message, with ? for control characters; if it is empty, the error's class."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return printable(line, len(line))


def listed(names: Sequence[str], most: int) -> str:
    """Returns 'cat, dog, ...': at most `most` names, separated by commas."""
    return ', '.join([*names[:most], *(['...'] if len(names) > most else [])])


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns a question for the closest of `choices`, or a list of all choices if none is close.

    >>> did_you_mean('poool', ['relu', 'lrn', 'pool'])
    " Did you mean 'pool'?"
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f' Did you mean {near[0]!r}?' if near else f' Choose from: {", ".join(choices)}.'
