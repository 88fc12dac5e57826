"""Writes the tables of the documentation from the files in docs/results.

    python docs/tables.py

Replaces the text between `<!-- table: FILES KIND -->` and `<!-- end -->` in every page of this folder. FILES is a name
or a pattern, such as `step_*.json`. A suite of `alexnet_jax experiments` writes such a file, DIR/SUITE.json, and
`alexnet_jax benchmark --output` one for each measurement. A stage of `launch/gpu_figures.sh` holds several of them.
"""

import json
import pathlib
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alexnet_jax.benchmark.scaling_report import best, duration
from alexnet_jax.experiments import ablations, tables

DOCS = pathlib.Path(__file__).parent
_MARK = re.compile(r'(<!-- table: (\S+) (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
_OURS = 'alexnet_jax'
_PRODUCT = 'float32 product'
Record = dict[str, Any]
Row = dict[str, str]  # {column: cell}
# Flags that the other columns show, or that do not change what is measured.
_SHOWN = ('config', 'batch_size', 'batch_sizes', 'against', 'output', 'repeats', 'steps')
_PROGRAMS = {'torch': 'PyTorch', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}


def suite(records: Sequence[Record]) -> list[Row]:
    """A row for each network of a suite: seeds, errors, and the difference from its baseline."""
    (result,), table = records, []
    rows = result['runs']
    for name, baseline in result['networks'].items():
        runs = [row for row in rows if row['variant'] == name]
        measured = [row for row in runs if not row['diverged']]
        diverged = f', {len(runs) - len(measured)} diverged' if len(measured) < len(runs) else ''
        measure = result.get('measures', {}).get(name, 'top1_error')
        change = tables.deltas(rows, ablations.Variant(name, {}, baseline, measure=measure)) if baseline else []
        views = 'ten' if all('top1_ten' in row for row in measured) else 'error'
        keys = {'training error': 'train_error', 'top-1': f'top1_{views}', 'top-5': f'top5_{views}'}
        errors = {title: tables.format_mean_std([row[key] for row in measured]) for title, key in keys.items()}
        first = {'network': name, 'seeds': f'{len(measured)}{diverged}'}
        table.append({**first, **errors, 'difference': tables.format_mean_std(change, signed=True)})
    return table


def figure1(records: Sequence[Record]) -> list[Row]:
    """A row for each activation and learning rate of figure 1, and the ratios of epochs with own and common rates."""
    (result,), table = records, []
    runs: dict[str, list[Record]] = {}
    for row in result['runs']:
        runs.setdefault(row['variant'], []).append(row)
    reached = {name: {row['seed']: row['epochs'] for row in rows if row['reached']} for name, rows in runs.items()}
    for name, rows in sorted(runs.items(), key=lambda item: (item[0].split()[0], float(item[0].split()[1]))):
        found = list(reached[name].values())
        row = {'network': name, 'seeds that reach 25%': f'{len(found)} of {len(rows)}'}
        row['epochs'] = tables.format_mean_std(found) if found else f'more than {rows[0]["epochs"]:.0f}'
        table.append({**row, 'training error at the end': tables.format_mean_std([one['train_error'] for one in rows])})

    def ratio(relu: str, tanh: str, title: str) -> None:
        ratios = [reached[tanh][seed] / reached[relu][seed] for seed in reached[relu].keys() & reached[tanh].keys()]
        if ratios:
            row = {'network': title, 'seeds that reach 25%': f'{len(ratios)}', 'epochs': tables.format_mean_std(ratios)}
            table.append({**row, 'paper': '6'})

    ratio(*sorted(result['networks']), '**tanh / ReLU, each with its own rate**')
    for name in sorted(runs):
        if name.startswith('relu') and (tanh := name.replace('relu', 'tanh')) in runs:
            ratio(name, tanh, f'tanh / ReLU, both with {name.split()[1]}')
    return table


def faults(records: Sequence[Record]) -> list[Row]:
    """A row for each kind of fault: trials, and what was lost."""
    (result,) = records
    rows = {**result['kinds'], '**all**': result}
    columns = ('trials', 'survived', 'lost', 'silent')
    return [{'fault': name.replace('_', ' '), **{key: str(row[key]) for key in columns}} for name, row in rows.items()]


def power_cuts(records: Sequence[Record]) -> list[Row]:
    """A row for each recorded command: its changes of files, the disks built from them, and what they led to."""
    (result,), commands = records, {'run': 'training, 24 updates, 3 saves', 'out': '`prepare`, 1,797 images'}
    return [
        {
            'recorded': commands[name],
            'changes': f'{counts["changes"]:,}',
            'disks': f'{counts["disks"]:,}',
            'lost': str(counts['lost']),
            'disks by last step or state': ', '.join(
                f'{key}: {number:,}' for key, number in counts['outcomes'].items()
            ),
        }
        for name, counts in result['replayed'].items()
    ]


def errors(records: Sequence[Record]) -> list[Row]:
    """A row for each network that was trained to its end: test errors beside that of the authors."""
    return [
        {
            'network': f'`{record["name"].partition(":")[2]}`',
            "the author's error": f'{record["authors_error"]:g}%',
            **{f'here, {view}': f'{error:.2f}%' for view, error in record['test_error'].items()},
            'training error': f'{record["training_error"]:.2f}%',
            'epochs': f'{record["epochs"]:g}',
            'seeds': str(record['seeds']),
        }
        for record in records
    ]


def fuzz(records: Sequence[Record]) -> list[Row]:
    """A row for each run of `python -m tests.fuzz`: cases, and what was wrong."""
    return [
        {
            'reader': f'`{name}`',
            'cases': f'{run["cases"]:,}',
            'read without an error': f'{run["accepted"]:,}',
            'seconds': str(run['seconds']),
            'findings': str(run['findings']),
            'commit': run['commit'][:7],
        }
        for record in records
        for name, runs in record['readers'].items()
        for run in runs
    ]


def step(records: Sequence[Record]) -> list[Row]:
    """A row for each measurement of a training step: images/s, ratio, and the share of the machine's product."""
    return [
        {'network': _name(record), 'batch': str(record['batch_size']), **_rates(record), **_share(record)}
        for record in records
    ]


def rates(records: Sequence[Record]) -> list[Row]:
    """A row for each measurement of the input or the preparation: images/s and ratio."""
    return [{'options': _options(record) or 'default', **_rates(record)} for record in records]


def loop(records: Sequence[Record]) -> list[Row]:
    """A row for each measurement of the training loop around an empty step."""
    rows = []
    for record in records:
        times = record['host_milliseconds']
        median = statistics.median(times)
        row = {'network': record['config'], 'batch': str(record['batch_size'])}
        row['host work per step, ms'] = f'{median:.3f} ({min(times):.3f} - {max(times):.3f})'
        rows.append({**row, 'images/s, at most': f'{1000 * record["batch_size"] / median:,.0f}'})
    return rows


def inference(records: Sequence[Record]) -> list[Row]:
    """A row for each batch size: images/s, the ratio to the fastest other program, the bound and the share of it."""
    table = []
    for record in records:
        for size, programs in record['images_per_second'].items():
            row = {'network': _name(record), 'batch': size, **_rates({'images_per_second': programs})}
            if limits := record.get('limits', {}).get(size):
                row |= {'at most': f'{limits["bound"]:,.0f} ({limits["bound_by"]})', 'share': f'{limits["share"]:.0%}'}
            table.append(row)
    return table


def communication(records: Sequence[Record]) -> list[Row]:
    """A row for each mesh: the bytes that a device receives in a training step, from the compiled program."""
    table = []
    for record in records:
        found = record['images_per_second'][_OURS]['collectives']
        sizes = {
            name: f'{count}: {size / 1e6:{".1f" if size > 1e6 else ".1g"}} MB'
            for name, (count, size) in sorted(found.items())
        }
        total = f'{sum(size for _, size in found.values()) / 1e6:.1f} MB'
        table.append({'mesh': '{data}x{tower}'.format(**record['mesh']), **sizes, 'per step and device': total})
    return table


def moved(records: Sequence[Record]) -> list[Row]:
    """A row for each mesh: the MB that a device receives in a step, for each number of images per device.

    The least of each number of devices is bold.
    """
    table: dict[tuple, Row] = {}
    sizes: dict[tuple[int, str], list[tuple[float, Row]]] = {}  # by devices and column
    for record in sorted(records, key=lambda record: record['batch_size']):
        mesh, facts = record['mesh'], record['compiled']
        keys = (facts['devices'], mesh['tower'], mesh['dense'])
        shape = '{data}x{tower}'.format(**mesh)
        row = table.setdefault(keys, {'devices': str(keys[0]), 'mesh': shape, '`mesh.dense`': mesh['dense']})
        images = record['batch_size'] // facts['devices']
        column, size = f'{images:,} images per device', sum(size for _, size in facts['collectives'].values()) / 1e6
        row[column] = f'{size:,.0f}'
        sizes.setdefault((keys[0], column), []).append((size, row))
    for (_, column), found in sizes.items():
        _, least = min(found, key=lambda pair: pair[0])
        least[column] = f'**{least[column]}**'
    return [table[keys] for keys in sorted(table)]


_SCHEMES = {'data': 'Nx1', 'towers': 'N/2 x 2', 'hybrid': 'hybrid'}


def scaling(records: Sequence[Record]) -> list[Row]:
    """A row for each number of devices: predicted images/s of each scheme, and the step of the fastest."""
    table = []
    for record in records:
        for devices, schemes in record['steps'].items():
            fastest = best(schemes)
            step, row = schemes[fastest], {'devices': devices, 'batch': f'{schemes["data"]["batch"]:,}'}
            for name, title in _SCHEMES.items():
                rate = f'{schemes[name]["images_per_second"]:,.0f}' if name in schemes else ''
                row[f'{title}, images/s'] = f'**{rate}**' if name == fastest else rate
            row['compute + communication, ms'] = f'{step["compute_ms"]:.2f} + {step["communication_ms"]:.2f}'
            row |= {
                'efficiency': f'{step["efficiency"]:.0%}',
                f'{record["epochs"]:g} epochs': duration(step['seconds']),
            }
            table.append({**row, 'limit': step['limit']})
    return table


def published(records: Sequence[Record]) -> list[Row]:
    """A row for each published rate of several devices: the prediction and its error, without and with overlap."""
    table, (record,) = [], records
    ways = ('without overlap', 'with overlap')
    for point in record['published']['points']:
        scheme = '' if point['scheme'] == 'data' else f', {point["scheme"]}'
        row = {'publication': point['who'] + scheme, 'devices': f'{point["devices"]} ({point["machine"]})'}
        row |= {'batch per device': str(point['batch']), 'published images/s': f'{point["rate"]:,.0f}'}
        if point['alone'] is None:
            table.append({**row, 'of one device': f'not published; needs {point["needed"]:,.0f}'})
            continue
        row |= {'of one device': f'{point["alone"]:,.0f}', 'predicted': f'{point["predicted"][ways[0]]:,.0f}'}
        table.append({**row, **{way: f'{point["error_percent"][way]:+.1f}%' for way in ways}})
    for name, mean in record['published']['mean_error_percent'].items():
        row = {'publication': f'**mean error, {name}, {mean["points"]} points**'}
        table.append({**row, **{way: f'**{mean[way]:.1f}%**' for way in ways}})
    return table


def compiled(records: Sequence[Record]) -> list[Row]:
    """A row for each compiled step: memory, arithmetic, bytes over each kind of link, and the least times in us."""
    table = []
    for record in _by_size(records):
        facts, cost = record['compiled'], record['compiled']['layers']['all']
        row = _devices(record)
        row['GiB per device'] = f'{facts["bytes"] / 2**30:.2f} of {facts["memory"] / 2**30:.0f}'
        row['TFLOP per device'] = f'{cost["flops"] / 1e12:.2f}'
        row |= {f'{name}, us': f'{value:,.0f}' for name, value in facts['floor_us'].items()}
        table.append({**row, 'compiled in': f'{facts["compile_seconds"]:.0f} s'})
    return table


def compiled_links(records: Sequence[Record]) -> list[Row]:
    """A row for each compiled step: the count of each collective, and the MB that a device receives by kind of link."""
    table = []
    for record in _by_size(records):
        facts, row = record['compiled'], _devices(record)
        for name, (count, _) in sorted(facts['collectives'].items()):
            moved = facts['links'][name].items()
            parts = [f'{size / 1e6:,.{1 if size > 1e5 else 3}f} {link}' for link, size in moved if size]
            row[name] = f'{count}: {" + ".join(parts) or 0}'
        table.append(row)
    return table


_READERS = {
    'verify': '`verify`',
    'training': 'resuming',
    'load': 'loading the network',
    'best': 'finding the best step',
    'reading': 'opening and reading',
}


def flips(records: Sequence[Record]) -> list[Row]:
    """A row for each class of files in which bits were flipped: what each reader did, and how many are silent alone."""
    (record,), table = records, []
    total = {'bytes': 0, 'flips': 0, 'without_digests': {'flips': 0, 'silent': 0}}
    for kind, found in [*record['kinds'].items(), ('all', total)]:
        row = {'files': kind, 'bytes': f'{found["bytes"]:,}', 'flips': f'{found["flips"]:,}'}
        for name, title in _READERS.items():
            counts = found.get('readers', {}).get(name, {})
            tried = {word: count for word, count in counts.items() if word != 'not tried'}
            row[title] = ', '.join(f'{count:,} {word}' for word, count in sorted(tried.items(), reverse=True))
        without = found['without_digests']
        row['silent without digests'] = f'{without["silent"]:,} of {without["flips"]:,}'
        table.append(row)
        if found is not total:
            total |= {name: total[name] + found[name] for name in ('bytes', 'flips')}
            total['without_digests'] = {key: value + without[key] for key, value in total['without_digests'].items()}
    return table


_LEVELS: dict[str, tuple[str, float, str]] = {
    'pss': ('memory (PSS)', 2**20, ' MiB'),
    'rss': ('memory (RSS)', 2**20, ' MiB'),
    'shared_bytes': ('shared memory', 2**10, ' KiB'),
    'shared_files': ('files in shared memory', 1, ''),
    'files': ('open files', 1, ''),
    'threads': ('threads', 1, ''),
    'processes': ('processes', 1, ''),
    'checkpoint_bytes': ('checkpoints on disk', 2**10, ' KiB'),
}
_PER_UPDATE = {
    'metrics_bytes': ('`metrics.jsonl`', 'bytes per update'),
    'event_bytes': ('TensorBoard events', 'bytes per update'),
    'cpu_ms': ('processor time', 'ms per update'),
}


def long_run(records: Sequence[Record]) -> list[Row]:
    """A row for each quantity of a long run: its level and its rise; and what grows with each update."""
    (record,), table = records, []
    titles = {'run': 'one run', 'resumed': 'resumed run'}
    parts = {part: column for part, column in titles.items() if part in record}
    for name, (title, unit, suffix) in _LEVELS.items():
        row = {'quantity': title}
        for part, column in parts.items():
            trend = record[part]['trends'][name]
            row[column] = f'{trend["median"] / unit:,.{1 if unit > 1 and trend["median"] < 100 * unit else 0}f}{suffix}'
            row[f'{column}, rise'] = f'{trend["rise"]:+.2%}'
            slope = trend.get('per_1000_updates')
            text = '' if slope is None else f'{slope:+,.0f} bytes' if unit > 1 else f'{slope:+.3f}'
            row[f'{column}, per 1,000 updates'] = text
        table.append(row)
    for name, (title, unit_name) in _PER_UPDATE.items():
        row = {'quantity': f'{title}, {unit_name}, in the second and the last quarter'}
        for part, column in parts.items():
            row[column] = ' and '.join(f'{value:.1f}' for value in record[part]['per_update'][name])
        table.append(row)
    return table


def words(records: Sequence[Record]) -> list[Row]:
    """A row for each run of "Do the paper's initial weights train?"."""
    return [
        {
            'config': f'`{record["name"]}`',
            'updates': f'{record["updates"]:,}',
            'below the loss of a guess from': _count(record['below_guess_from']),
            'loss, last 100 updates': f'{record["loss"]:.2f}',
            'training error, last 100 updates': f'{record["training_error"]:.1f}%',
            'validation error': f'{record["validation_error"]:.1f}%',
            'seeds': str(record['seeds']),
        }
        for record in records
    ]


def _count(updates: int | None) -> str:
    return 'not reached' if updates is None else f'{updates:,}'


def _by_size(records: Sequence[Record]) -> list[Record]:
    """Returns compiled steps by device, number of devices and mesh."""
    found = [(record['compiled'], record) for record in records]
    keys = {id(record): (facts['device'], facts['devices'], *facts['mesh_shape'].values()) for facts, record in found}
    return sorted(records, key=lambda record: keys[id(record)])


def _devices(record: Record) -> Row:
    """Returns the devices and the mesh of a compiled step."""
    facts = record['compiled']
    dense = record['mesh'].get('dense', 'replicated')
    shape = '{data}x{tower}'.format(**facts['mesh_shape']) + ('' if dense == 'replicated' else f', dense {dense}')
    return {'devices': f'{facts["devices"]:,}', '`--compile_for`': f'`{facts["target"]}`', 'mesh': shape}


def _name(record: Record) -> str:
    """Returns the name of the network, and the options of the measurement."""
    return ', '.join(filter(None, [record['config'], _options(record)]))


def _options(record: Record) -> str:
    words = [word.removeprefix('--') for word in shlex.split(record['command']) if word.startswith('--')]
    return ', '.join(f'`{word}`' for word in words if word.partition('=')[0] not in _SHOWN)


def _rates(record: Record) -> Row:
    """Returns images/s of each program, as 'median (lowest - highest)', and our ratio to the fastest other program."""
    programs = record['images_per_second']
    row = {}
    for name, program in programs.items():
        values, digits = program['measurements'], 0 if program['median'] >= 1000 else 1
        median, low, high = (f'{value:,.{digits}f}' for value in (program['median'], min(values), max(values)))
        row[_PROGRAMS.get(name, name)] = f'{median} ({low} - {high})'
    if others := [program['median'] for name, program in programs.items() if not name.startswith(_OURS)]:
        row['ratio'] = f'**{programs[_OURS]["median"] / max(others):.2f}**'
    return row


def _share(record: Record) -> Row:
    """Returns our GFLOP/s and, on a CPU, those of a large product and the share that is reached."""
    ours = record['images_per_second'][_OURS]
    row = {'GFLOP/s': f'{ours["median"] * ours["flops"] / 1e9:,.0f}'}
    if limits := record.get('limits'):
        row |= {'of a product': f'{limits[_PRODUCT]["median"]:,.0f}', 'share': f'{limits["share"]:.0%}'}
    return row


def _source(records: Sequence[Record], kind: str) -> str:
    """Returns a sentence on where and when measurements were made; for a suite, which has it elsewhere, nothing."""
    if kind in ('suite', 'figure1', 'errors', 'fuzz', 'faults', 'power_cuts'):
        return ''
    parts = ['; '.join(dict.fromkeys(column)) for column in zip(*map(_environment, records), strict=True)]
    computed = kind in ('communication', 'moved', 'scaling', 'published', 'compiled', 'compiled_links')
    return f'\n{"Computed with" if computed else "Measured on"} {", ".join(parts[1:-1] if computed else parts)}.\n'


def _environment(record: Record) -> list[str]:
    machine, programs = record['machine'], ('jax', 'libtpu', *_PROGRAMS)
    versions = ', '.join(f'{name} {version}' for name in programs if (version := record['versions'].get(name)))
    devices = [device.partition(' ')[2] for device in record['devices'] if not device.startswith('cpu')]
    where = devices or [f'{machine["cpu"]} ({machine["cores"]} cores, {machine["memory_gib"]:.0f} GiB)']
    commit, dirty = re.fullmatch(r'(.{,12}).*?(-dirty)?', record['commit'] or 'unknown').groups()
    return [' + '.join(where), versions, f'commit {commit}{dirty or ""}', record['date'], f'n = {record.get("n", 1)}']


_KINDS: dict[str, tuple[Callable[[Sequence[Record]], list[Row]], tuple[str | None, ...]]] = {  # and the modes
    'suite': (suite, (None,)),
    'figure1': (figure1, (None,)),
    'errors': (errors, (None,)),
    'words': (words, (None,)),
    'fuzz': (fuzz, (None,)),
    'step': (step, ('step', 'train')),
    'communication': (communication, ('step',)),
    'moved': (moved, ('step',)),
    'compiled': (compiled, ('step',)),
    'compiled_links': (compiled_links, ('step',)),
    'rates': (rates, ('input', 'prepare')),
    'inference': (inference, ('inference',)),
    'loop': (loop, ('loop',)),
    'scaling': (scaling, ('scaling',)),
    'faults': (faults, (None,)),
    'power_cuts': (power_cuts, (None,)),
    'published': (published, ('scaling',)),
    'flips': (flips, ('flips',)),
    'long_run': (long_run, ('long_run',)),
}


def read(pattern: str, modes: Sequence[str | None]) -> Iterator[Record]:
    """Yields the measurements of some modes in docs/results, sorted by file name."""
    for path in sorted((DOCS / 'results').glob(pattern)):
        content = json.loads(path.read_text(encoding='utf-8'))
        records = [row['result'] or {} for row in content['commands']] if 'stage' in content else [content]
        yield from (record for record in records if record.get('mode') in modes)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Returns the columns of all rows. One that only later rows have follows the column that precedes it there."""
    columns: list[str] = []
    for row in rows:
        at = 0
        for column in row:
            if column not in columns:
                columns.insert(at, column)
            at = columns.index(column) + 1
    return columns


def render(page: str) -> str:
    """Returns the text of a page with its tables replaced. Raises ValueError if a table has no file."""

    def table(found: re.Match[str]) -> str:
        kind, modes = _KINDS[found[3]]
        if not (records := list(read(found[2], modes))):
            raise ValueError(f'{found[1].strip()}: there is no such file in docs/results')
        rows = kind(records)
        columns = _columns(rows)
        lines = [columns, ['---'] * len(columns), *([row.get(column, '') for column in columns] for row in rows)]
        text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
        return found[1] + text + _source(records, found[3]) + found[4]

    return _MARK.sub(table, page)


def main() -> None:
    for path in sorted(DOCS.glob('*.md')):
        path.write_text(render(path.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
    main()
