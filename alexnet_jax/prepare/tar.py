"""Lists the images in the official ILSVRC-2012 archives, without unpacking them."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from alexnet_jax.prepare.image_ref import ImageRef
from alexnet_jax.prepare.tfds import validation_classes
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import MAX_PAX_HEADERS, MAX_TAR_HEADER_BYTES, as_utf8, describe_damage

TRAIN_TAR, VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
VAL_PREFIX = 'ILSVRC2012_val_'
_MAX_END_BYTES = 2**24  # of zeros after the last member


def validation_class(name: str) -> str:
    """Returns the class of a validation image from its file name. Raises UserError for other names."""
    number = name.removeprefix(VAL_PREFIX).split('.')[0]
    # The length is checked because int() raises for thousands of digits.
    if not (number.isdecimal() and len(number) <= 8 and 1 <= int(number) <= len(validation_classes())):
        raise UserError(f'{name!r} is not an image of the ILSVRC-2012 val set; expected {VAL_PREFIX}NUMBER.JPEG.')
    return validation_classes()[int(number) - 1]


def list_images(path: str) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for an archive. The train archive contains an archive per class, val contains images.

    Raises UserError for other archives and for damaged archives.
    """
    name = os.path.basename(path)
    archive_class = class_of_tar(name)
    if not is_archive(name):
        raise UserError(f'{path!r} is not {TRAIN_TAR} or {VAL_TAR}; extract other archives and use their folder.')
    try:
        with open(path, 'rb') as file:
            for member in _iter_files(_Window(file, 0, os.path.getsize(path))):
                start = member.offset_data
                if class_name := class_of_tar(member.name):
                    for image in _iter_files(_Window(file, start, member.size)):
                        yield _ref(path, start + image.offset_data, image, 'train'), class_name
                elif archive_class:
                    yield _ref(path, start, member, 'train'), archive_class
                elif name == VAL_TAR:
                    yield _ref(path, start, member, 'val'), validation_class(os.path.basename(member.name))
    except UserError:
        raise
    except Exception as error:  # tarfile raises many exception types for invalid headers
        raise UserError(f'the archive {describe_damage(path, error)}') from error


class _Window:
    """A read-only part of a file, for tarfile. Limits the size of a read, which a damaged header could make huge."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f'a header at byte {self._position} declares its own size as {size} bytes')
        if self._position >= self._size:  # file.seek may fail for a position past the end
            return b''
        self._file.seek(self._start + self._position)
        content = self._file.read(min(size, self._size - self._position))
        self._position += len(content)
        return content


def _iter_files(window: _Window) -> Iterator[tarfile.TarInfo]:
    """Yields the files in an archive. Raises ReadError for damage that tarfile would mistake for the end."""
    with tarfile.open(fileobj=cast(IO[bytes], window), mode='r:') as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members
            if len(archive.pax_headers) > MAX_PAX_HEADERS or member.issparse():  # the size is not that in the file
                raise tarfile.ReadError(f'the header at byte {member.offset} is of an unsupported kind')
            if member.size < 0 or archive.offset <= member.offset:  # would read the same members forever
                raise tarfile.ReadError(f'the header at byte {member.offset} declares a member of {member.size} bytes')
            if member.isfile():
                yield member
        window.seek(archive.offset)
        zeros = 0
        while content := window.read(MAX_TAR_HEADER_BYTES):
            zeros += len(content)
            if content.strip(b'\0') or zeros > _MAX_END_BYTES:
                raise tarfile.ReadError(f'damaged at byte {archive.offset}')
        if not zeros:
            raise tarfile.ReadError(f'truncated after {archive.offset} bytes')


def _ref(path: str, start: int, image: tarfile.TarInfo, split: str) -> ImageRef:
    return ImageRef(path, start, image.size, as_utf8(os.path.basename(image.name)), -1, split)


def class_of_tar(name: str) -> str | None:
    """Returns the class of a one-class archive: 'n01440764' for 'n01440764.tar', None for other names."""
    match = re.fullmatch(r'(n\d+)\.tar', os.path.basename(name))
    return match[1] if match else None


def is_archive(name: str) -> bool:
    """Returns whether a file name is that of an archive of ILSVRC-2012: the train or val set, or one class."""
    return name in (TRAIN_TAR, VAL_TAR) or class_of_tar(name) is not None
