"""Evaluates a checkpoint, or several as an ensemble, on a split of prepared data.

    alexnet_jax evaluate --checkpoint=runs/paper --data=DIR [--split=val] [--views=10] [--json]

Give --checkpoint several times to average the softmax outputs of several networks (section 6). --weights=2,1,1 sets the
weights of the average. --weights=tuned searches for the weights with the lowest top-5 error on the val split.
"""

import json
import math
from typing import Any

from absl import flags, logging

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
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
    Flag('json', False, 'Print one JSON object as the last line.'),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    import jax

    from alexnet_jax.checkpoints.loading import load_checkpoint
    from alexnet_jax.core import architecture, sharding
    from alexnet_jax.data import datasets
    from alexnet_jax.inference import evaluate

    weights = _parse_weights(args.weights, len(args.checkpoint))
    dataset = datasets.open_dataset(args.data)
    records = dataset.split(args.split)
    tune_on = dataset.split('val') if args.weights == 'tuned' else None
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    for path, checkpoint in zip(args.checkpoint, checkpoints, strict=True):
        evaluate.check_data(checkpoint, dataset, path)
        architecture.infer_shapes(checkpoint.network, checkpoint.image_size, towers=args.tower)
        if args.views == 10 and not checkpoint.augmentation.reflect:
            logging.warning('%s was trained without reflections; five of the ten views are reflections.', path)
    mesh = sharding.make_mesh(data=max(1, len(jax.devices()) // args.tower), tower=args.tower)
    options = {'views': args.views, 'batch_size': args.batch_size, 'max_unreadable': args.max_unreadable}
    keys = ['top1_error', 'top5_error', 'loss', 'count']
    if len(checkpoints) == 1:
        result = evaluate.evaluate(checkpoints[0], records, mesh, **options)
        name = f'{args.checkpoint[0]} (step {checkpoints[0].step})'
    else:
        result = evaluate.evaluate_ensemble(checkpoints, records, mesh, weights=weights, tune_on=tune_on, **options)
        keys.append('weights')
        name = _describe_ensemble(args, result)
    crops = 'center crop' if args.views == 1 else 'ten views'
    few = len(dataset.class_names) <= 10  # with ten classes, guessing has 50% top-5 error
    top5 = '' if few else f'top-5 error {result["top5_error"]:.2f}%, '
    print(
        f'{name}, {args.split} of {args.data}, {result["count"]} images, {crops}: '
        f'top-1 error {result["top1_error"]:.2f}%, {top5}loss {result["loss"]:.4f}'
    )
    if args.json:
        print(json.dumps({**{key: result[key] for key in keys}, 'views': args.views}))


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
