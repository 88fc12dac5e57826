"""Reads TFDS datasets as raw images (tfds:NAME), and the ILSVRC-2012 validation labels that TFDS includes."""

import functools

from alexnet_jax.prepare.image_ref import SPLIT_NAMES, ImageRef, Listing
from alexnet_jax.utils.errors import UserError, first_line

PREFIX = 'tfds:'


@functools.cache
def validation_classes() -> tuple[str, ...]:
    """Returns the WordNet IDs of the ILSVRC-2012 validation images, starting with ILSVRC2012_val_00000001.JPEG."""
    import tensorflow_datasets as tfds

    return tuple(tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt').read_text().split())


def list_images(path: str) -> Listing:
    """Lists the images of the splits that have labels. Raises UserError if there are none."""
    builder = open_builder(path)
    for name in ('image', 'label'):
        if name not in builder.info.features:
            raise UserError(f"{path} has no feature {name!r}; expected a dataset with 'image' and 'label'.")
    splits = {}
    for name, info in builder.info.splits.items():
        split = SPLIT_NAMES.get(name)
        # ImageNet's test images have no labels.
        if split and info.num_examples and open_source(path, name)[0]['label'] >= 0:
            splits[split] = [ImageRef(path, i, -1, f'{name}/{i}', -1, name) for i in range(info.num_examples)]
    if not splits:
        raise UserError(f'{path} has no split with labels; expected one of {", ".join(sorted(SPLIT_NAMES))}.')
    return Listing(splits, tuple(builder.info.features['label'].names))


@functools.cache
def open_builder(path: str):
    """Returns the builder of a dataset. Generates a missing dataset, which needs TensorFlow. Raises UserError."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.utils import error_utils

    from alexnet_jax.data import datasets  # loads JAX, which the worker processes of `prepare` do not need

    name = path.removeprefix(PREFIX)
    try:
        with error_utils.reraise_with_context(registered.DatasetNotFoundError):  # the function below requires it
            folder = read_only_builder._find_builder_dir(name)
        if folder:  # TFDS loads datasets that it has no code of from their files
            datasets.check_features(str(folder))
        builder = tfds.builder(name, file_format='array_record')
    except UserError:
        raise
    except Exception as error:  # TFDS raises different exception types for unknown names, configs and versions
        raise UserError(f'{path} cannot be opened: {first_line(error)}') from error
    if not builder.info.splits:
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise UserError(
                f'{path} does not exist in the array_record format ({builder.data_dir}); install TensorFlow to '
                'generate it (pip install tensorflow), or generate it elsewhere and set TFDS_DATA_DIR.'
            ) from None
        builder.download_and_prepare(file_format='array_record')
    return builder


@functools.cache
def open_source(path: str, split: str):
    """Returns the records of a split as a sequence, with images still encoded."""
    import tensorflow_datasets as tfds

    builder = open_builder(path)
    encoded = isinstance(builder.info.features['image'], tfds.features.Image)
    decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
    return builder.as_data_source(split, decoders=decoders)
