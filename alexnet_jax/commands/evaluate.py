"""Evaluates a checkpoint, or several as an ensemble, on a split of prepared data.

    alexnet_jax evaluate --checkpoint=runs/paper --data=DIR [--split=val] [--views=10] [--json]

Give --checkpoint several times to average the softmax outputs of several networks (section 6). --weights=2,1,1 sets the
weights of the average. --weights=tuned searches for the weights with the lowest top-5 error on the val split.

The classes of the data may be some of the network's, in any order: they are matched by name, WordNet id or index.
Errors are over all classes of the network. --per_class prints a table with the accuracy of each class, lowest first.
"""

import json
import math
from typing import Any

from absl import flags, logging

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
from alexnet_jax.data import imagenet_classes
from alexnet_jax.utils import logs
from alexnet_jax.utils.errors import UserError

FLAGS = (
    CHECKPOINT._replace(help=f'{CHECKPOINT.help} Give several for an ensemble.', repeated=True),
    Flag('data', None, "A prepared directory, or 'digits'.", required=True),
    Flag('split', 'val', 'Split to evaluate on.'),
    VIEWS,
    Flag('weights', '', "Ensemble weights: comma-separated numbers, or 'tuned' on the val split; default: equal."),
    Flag('batch_size', 128, 'Images per batch.', at_least=1),
    Flag('tower', 1, 'Devices to split the network over.', choices=(1, 2)),
    Flag('max_unreadable', 0, 'Allowed number of unreadable images.', at_least=0),
    Flag('per_class', False, 'Print the accuracy of each class, lowest first; with --json also in the JSON object.'),
    Flag('json', False, 'Print one JSON object as the last line.'),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    import jax

    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.core import architecture, sharding
    from alexnet_jax.data import datasets
    from alexnet_jax.inference import class_map, evaluate

    weights = _parse_weights(args.weights, len(args.checkpoint))
    dataset = datasets.open_dataset(args.data)
    records = dataset.split(args.split)
    tune_on = dataset.split('val') if args.weights == 'tuned' else None
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    for path, checkpoint in zip(args.checkpoint, checkpoints, strict=True):
        evaluate.check_record_size(checkpoint, dataset, path)
        architecture.infer_shapes(checkpoint.network, checkpoint.image_size, towers=args.tower)
        if args.views == 10 and not checkpoint.augmentation.reflect:
            logging.warning('%s was trained without reflections; five of the ten views are reflections.', path)
    mesh = sharding.make_mesh(data=max(1, len(jax.devices()) // args.tower), tower=args.tower)
    names, path = checkpoints[0].class_names, args.checkpoint[0]
    classes = class_map.match_classes(dataset.class_names, names, path)
    left_out = 0
    if classes.method:
        class_map.log_method(classes, path)
        logging.info('Errors are over all %d classes of the network.', len(names))
        records, left_out = class_map.relabel_split(records, classes, args.split, path)
        if tune_on is not None:
            tune_on = records if args.split == 'val' else class_map.relabel(tune_on, classes.labels)[0]
    options = {'views': args.views, 'batch_size': args.batch_size, 'max_unreadable': args.max_unreadable}
    options['per_class'] = args.per_class
    keys = ['top1_error', 'top5_error', 'loss', 'count']
    if len(checkpoints) == 1:
        result = evaluate.evaluate(checkpoints[0], records, mesh, **options)
        name = f'{args.checkpoint[0]} (step {checkpoints[0].step})'
    else:
        result = evaluate.evaluate_ensemble(checkpoints, records, mesh, weights=weights, tune_on=tune_on, **options)
        keys.append('weights')
        name = _describe_ensemble(args, result)
    crops = 'center crop' if args.views == 1 else 'ten views'
    few = len(names) <= 10  # with ten classes, guessing has 50% top-5 error
    top5 = '' if few else f'top-5 error {result["top5_error"]:.2f}%, '
    print(
        f'{name}, {args.split} of {args.data}, {result["count"]} images, {crops}: '
        f'top-1 error {result["top1_error"]:.2f}%, {top5}loss {result["loss"]:.4f}'
    )
    line: dict[str, Any] = {**{key: result[key] for key in keys}, 'views': args.views}
    if classes.method:
        matched = len(classes.names) - len(classes.missing)
        line['classes'] = {'data': len(classes.names), 'matched': matched, 'network': len(names)}
        line['classes'] |= {'matched_by': classes.method, 'images_left_out': left_out}
    if args.per_class:
        line['per_class'] = _rows(result['per_class'], classes)
        _print_table(line['per_class'], few)
    if args.json:
        print(json.dumps(line))


def _rows(per_class: dict[str, Any], classes) -> list[dict[str, Any]]:
    """Returns one row for each class with images, by accuracy, lowest first, then by label."""
    in_data = {int(label): name for name, label in zip(classes.names, classes.labels, strict=True)}
    columns = (per_class[key].tolist() for key in ('count', 'top1_error', 'top5_error'))
    rows = []
    for index, (count, top1_error, top5_error) in enumerate(zip(*columns, strict=True)):
        if count:
            row = {'class': classes.network_names[index], 'index': index, 'data_class': in_data[index], 'count': count}
            rows.append({**row, 'top1_accuracy': 100 - top1_error, 'top5_accuracy': 100 - top5_error})
    return sorted(rows, key=lambda row: row['top1_accuracy'])


def _print_table(rows: list[dict[str, Any]], few: bool) -> None:
    shown = [logs.one_line(imagenet_classes.with_meaning(row['class'])) for row in rows]
    width = max(map(len, ['class', *shown]))
    print(f'{"class":{width}}  images   top-1{"" if few else "   top-5"}  (accuracy)')
    for name, row in zip(shown, rows, strict=True):
        top5 = '' if few else f'  {row["top5_accuracy"]:5.1f}%'
        print(f'{name:{width}}  {row["count"]:6}  {row["top1_accuracy"]:5.1f}%{top5}')


def _describe_ensemble(args: flags.FlagValues, result: dict[str, Any]) -> str:
    """Returns, for example, '2 networks (weights A 0.500, B 0.500; equal)'."""
    weights = ', '.join(f'{path} {w:.3f}' for path, w in zip(args.checkpoint, result['weights'], strict=True))
    method = {'': 'equal', 'tuned': 'tuned for the top-5 error on val'}.get(args.weights, 'given')
    if args.weights == 'tuned' and args.split == 'val':
        method += ', which is also the split evaluated here'
    return f'{len(args.checkpoint)} networks (weights {weights}; {method})'


def _parse_weights(text: str, count: int) -> list[float] | None:
    """Parses --weights into numbers. Returns None for equal or tuned weights."""
    if count == 1 and text:
        raise UserError(f'--weights={text}: expected several checkpoints; give --checkpoint several times.')
    if text in ('', 'tuned'):
        return None
    try:
        weights = [float(word) for word in text.split(',')]
    except ValueError:
        raise UserError(f"--weights={text}: expected comma-separated numbers or 'tuned'.") from None
    if len(weights) != count or not all(w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(f'--weights={text}: expected {count} weights, none negative and not all 0.')
    return weights
