"""The ways a run ends early that are not bugs. The commands turn them into one line and an exit code."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """An error that the user can fix. The message names the value, what was expected and the remedy."""


class UnreadableError(UserError):
    """One record cannot be read. Batches keep its place, with weight 0, and go on with the others."""


class DivergedError(FloatingPointError):
    """Loss or gradient stopped being finite; the message names the step."""


class TerminatedError(Exception):
    """SIGTERM came; the message says what is saved."""


@contextlib.contextmanager
def as_user_error(what: str, remedy: str = '') -> Iterator[None]:
    """Turns file-system errors, also as orbax and tensorstore wrap them, into "WHAT: the system's reason. REMEDY"."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{what}: {error.strerror or error}. {remedy}') from error
    except Exception as error:
        if reason := re.search(r"(?:.*: )?(.*) \[os_error_code='\d+'", str(error)):
            raise UserError(f'{what}: {reason[1]}. {remedy}') from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'pool'?"` for the nearest of `choices`, or a list of all of them when none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f' Did you mean {near[0]!r}?' if near else f' Choose from: {", ".join(choices)}.'
