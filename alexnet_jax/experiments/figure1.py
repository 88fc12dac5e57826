"""Figure 1 of the paper: epochs until 25% training error with ReLU and with tanh, each with its best learning rate."""

from typing import Any

from absl import logging

from alexnet_jax.data import datasets
from alexnet_jax.experiments import trials
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.experiments.cifar10 import ACTIVATIONS
from alexnet_jax.experiments.trials import Suite, Trial


def search_rate(activation: str, suite: Suite, dataset: datasets.Dataset) -> tuple[Variant, list[dict]]:
    """Finds the learning rate with which the first seed needs the fewest epochs.

    The search starts in the middle of `RATES` and moves to the faster neighbor until both neighbors are slower. A run
    ends early once it has trained for as many epochs as the fastest one. Returns (network, rows of all tried rates).
    """
    networks = _networks(activation, suite)
    rows: dict[int, dict[str, Any]] = {}
    epochs: dict[int, int] = {}
    best = len(networks) // 2
    while True:
        for i in (best, best + 1, best - 1):  # the higher rate first: it is faster or diverges early
            if 0 <= i < len(networks) and i not in rows:
                changes = networks[i].changes
                changes = {**changes, 'num_epochs': float(min((*epochs.values(), changes['num_epochs'])))}
                (trial,) = trials.make_trials([networks[i]._replace(changes=changes)], suite.base, 1, suite.output)
                rows[i] = trials.run_trial(trial, suite.name, dataset)
                if rows[i].get('reached'):
                    epochs[i] = max(1, int(rows[i]['epochs']))  # the last batch of an epoch extends into the next epoch
            fastest = min(epochs, key=lambda i: epochs[i], default=best)
            if fastest != best:
                best = fastest
                break
        else:
            return networks[best], list(rows.values())


def run(suite: Suite, dataset: datasets.Dataset) -> tuple[list[Trial], list[dict]]:
    """Trains ReLU and tanh networks, each with its best learning rate. Returns (trials to compare, all rows)."""
    compared, rows = [], []
    for activation in ACTIVATIONS:
        network, tried = search_rate(activation, suite, dataset)
        logging.info('%s: the learning rate is the fastest of %d tried.', network.name, len(tried))
        best = trials.make_trials([network], suite.base, suite.seeds, suite.output)
        rows += [row for row in tried if row['variant'] != network.name]
        rows += [trials.run_trial(trial, suite.name, dataset) for trial in best]
        compared += best
    return compared, rows


def max_trials(suite: Suite) -> list[Trial]:
    """Returns the most trials that the suite can need: all rates with the first seed, one rate with the others."""
    most = []
    for activation in ACTIVATIONS:
        networks = _networks(activation, suite)
        best = networks[0]._replace(name=f'{activation}, best rate')
        most += trials.make_trials(networks, suite.base, 1, suite.output)
        most += trials.make_trials([best], suite.base, suite.seeds, suite.output)[1:]
    return most


def _networks(activation: str, suite: Suite) -> list[Variant]:
    """Returns the networks with one activation, one for each of `RATES`."""
    return [variant for variant in suite.variants() if variant.name.startswith(activation)]
