"""Writes the tables of the documentation from the files in docs/results.

    python docs/tables.py

Replaces the text between `<!-- table: FILE KIND -->` and `<!-- end -->` in every page of this folder. A suite of
`alexnet_jax experiments` writes such a file, DIR/SUITE.json, and `alexnet_jax benchmark` prints one as a line of JSON.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

from alexnet_jax.experiments import ablations, tables

DOCS = pathlib.Path(__file__).parent
_MARK = re.compile(r'(<!-- table: (\S+) (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def suite(result: dict[str, Any]) -> list[list[str]]:
    """A row for each network of a suite: seeds, errors, and the difference from its baseline."""
    rows = result['runs']
    table = [['network', 'seeds', 'training error', 'top-1', 'top-5', 'difference']]
    for name, baseline in result['networks'].items():
        runs = [row for row in rows if row['variant'] == name]
        measured = [row for row in runs if not row['diverged']]
        diverged = f', {len(runs) - len(measured)} diverged' if len(measured) < len(runs) else ''
        change = tables.deltas(rows, ablations.Variant(name, {}, baseline)) if baseline else []
        views = 'ten' if all('top1_ten' in row for row in measured) else 'error'
        errors = [tables.format_mean_std([row[key] for row in measured]) for key in ('train_error', f'top1_{views}')]
        errors.append(tables.format_mean_std([row[f'top5_{views}'] for row in measured]))
        table.append([name, f'{len(measured)}{diverged}', *errors, tables.format_mean_std(change, signed=True)])
    return table


def speed(result: dict[str, Any]) -> list[list[str]]:
    """A row for each measured program: median, lowest and highest images/s, and our ratio to it."""
    programs = result['images_per_second']
    ours = programs['alexnet_jax']['median']
    table = [['program', 'images/s', 'lowest - highest', 'n', 'alexnet_jax / program']]
    for name, program in programs.items():
        values = program['measurements']
        median = statistics.median(values)
        spread = f'{min(values):,.1f} - {max(values):,.1f}'
        table.append(
            [name, f'{median:,.1f}', spread, str(len(values)), '' if median == ours else f'{ours / median:.2f}']
        )
    return table


_KINDS: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {'suite': suite, 'speed': speed}


def render(page: str) -> str:
    """Returns the text of a page with its tables replaced."""

    def table(found: re.Match[str]) -> str:
        head, *rows = _KINDS[found[3]](json.loads((DOCS / 'results' / found[2]).read_text(encoding='utf-8')))
        lines = [head, ['---'] * len(head), *rows]
        return found[1] + ''.join(f'| {" | ".join(line)} |\n' for line in lines) + found[4]

    return _MARK.sub(table, page)


def main() -> None:
    for path in sorted(DOCS.glob('*.md')):
        path.write_text(render(path.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
    main()
