"""The normal form of text from files."""

import re
import unicodedata

from alexnet_jax.utils.errors import UserError

_MAX_MARKS = 500  # one after another. Unicode's Stream-Safe Text Format has at most 30
_LONG_RUN = re.compile(f'[^\x00-\u02ff]{{{_MAX_MARKS},}}')


def to_nfc(text: str) -> str:
    """Returns text in Unicode's normal form NFC. Raises UserError for long runs of marks, which take quadratic time."""
    for found in _LONG_RUN.finditer(text):
        run = 0
        for character in found[0]:
            run = run + 1 if unicodedata.combining(character) else 0
            if run > _MAX_MARKS:
                raise UserError(f'more than {_MAX_MARKS} combining marks follow each other in a text.')
    return unicodedata.normalize('NFC', text)
