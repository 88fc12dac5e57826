"""Writes docs/input_cases.md, the list of all cases:

python -m tests.zoo.listing
"""

from tests import ROOT

_START = """# Input cases

Each row is a test in `tests/zoo`: an input that is built by code and given to a command. A row ends in the stated
result, with the right pixels, classes, weights and counts; or, if it says *refused* or *unreadable*, in one line on
stderr, exit code 2, and nothing on disk. [Inputs](inputs.md) explains the rules.
"""


def page(cases) -> str:
    """Returns the page."""
    text = [_START]
    for command in dict.fromkeys(case.command for case in cases):
        rows = [case for case in cases if case.command == command]
        text += [f'## {command}\n', f'{len(rows)} inputs.\n', '| input | result |', '|---|---|']
        text += [f'| {case.input} | {case.outcome} |' for case in rows]
        text.append('')
    return '\n'.join(text)


if __name__ == '__main__':
    from tests.zoo.test_zoo import ALL

    (ROOT / 'docs' / 'input_cases.md').write_text(page(ALL))
