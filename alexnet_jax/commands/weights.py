"""Lists the published weights that other commands take by name.

    alexnet_jax weights [--json]
    alexnet_jax predict --checkpoint=caffenet photo.jpg

The weights are fetched and converted on first use, and kept in the cache that this command names. The errors are those
that the sources publish, for the ILSVRC-2012 validation set and center crops. A file fetched by hand is found under its
published name in the cache or in the folder named by the environment variable ALEXNET_JAX_WEIGHTS. The column `cached`
says `converted` for weights that are ready, and `file` for files that are found but not yet checked and converted.
"""

import json
import os
from typing import Any

from absl import flags

from alexnet_jax.commands.flag import Flag

FLAGS = (Flag('json', False, 'Print one JSON object, by name.'),)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.convert import loading, published

    rows: dict[str, dict[str, Any]] = {}
    for name, entry in published.PUBLISHED.items():
        files = [file for file in (entry.weights, entry.mean) if file]
        converted = os.path.isdir(loading.converted_path(name))
        cached = 'converted' if converted else 'file' if all(map(published.find, files)) else ''
        rows[name] = {
            'network': entry.network, 'source': entry.source, 'license': entry.license,
            'mebibytes': round(entry.mebibytes), 'top1_error': entry.errors[0], 'top5_error': entry.errors[1],
            'cached': cached, 'urls': [file.url for file in files],
        }  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return
    print(f'{"name":12} {"MiB":>4}  top-1, top-5 error  {"license":16}  {"cached":9}  network; source')
    for name, row in rows.items():
        errors = f'{row["top1_error"]:.2f}%, {row["top5_error"]:.2f}%'
        line = f'{name:12} {row["mebibytes"]:4}  {errors:18}  {row["license"]:16}  {row["cached"] or "no":9}'
        print(f'{line}  {row["network"]}; {row["source"]}', *row['urls'], sep='\n    ')
    print(f'Cache: {published.cache()}. Trained on ImageNet, whose terms allow non-commercial research and education.')
