"""Finds the image files in folders, by suffix and by content, and counts what is left out."""

import collections
import dataclasses
import os
import warnings
from collections.abc import Iterable

from absl import logging
from PIL import Image

from alexnet_jax.data import image_io
from alexnet_jax.data.image_io import HEIF_EXTRA, HEIF_SUFFIXES, SUFFIXES
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import as_utf8

# Files of these kinds are not opened to see whether they are images: data sets have as many of them as images.
_TEXT_SUFFIXES = ('.txt', '.xml', '.json', '.csv', '.tsv')
# Copies that editors keep, and parts of downloads.
_PARTIAL_SUFFIXES = ('~', '.bak', '.tmp', '.part', '.partial', '.crdownload', '.download')
_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz', '.zst', '.7z', '.rar')
_UP = 'links to a folder above'
# Images of formats that are not read (HEIF and AVIF: unless `image_io.formats` finds a decoder).
_CONVERTIBLE = (
    '.heic .heif .hif .avif .jxl .jp2 .j2k .tga .psd .ico .svg .pdf .exr .dng .nef .cr2 .cr3 .arw .raf .orf .rw2 .dcm'
).split()
# Folders of Synology, QNAP, Windows, ext4 and macOS archives: thumbnails, deleted files, metadata.
_SYSTEM_FOLDERS = (
    '@eadir', '#recycle', '#snapshot', '@recycle', '@recently-snapshot', '$recycle.bin', 'system volume information',
    'lost+found', '__macosx',
)  # fmt: skip


@dataclasses.dataclass
class FileCounts:
    """Counts of what a search for images skips, and of images that only their content shows; files by suffix."""

    hidden: list[str] = dataclasses.field(default_factory=list)  # paths of images and folders
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    by_content: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    spelled: dict[str, str] = dataclasses.field(default_factory=dict)  # a suffix of `skipped`, as the first file has it

    def log(self, folder: str) -> None:
        """Logs the counts, with a remedy for images of formats that are not read."""
        if self.hidden:
            logging.warning(
                '%s: skipped %d hidden images or folders, such as %s', folder, len(self.hidden), self.hidden[0]
            )
        if self.by_content:
            logging.warning('%s: files read as images because of their content: %s', folder, _listed(self.by_content))
        if self.skipped:
            formats = [suffix for suffix, _ in self.skipped.most_common() if suffix in _CONVERTIBLE]
            remedy = ''
            if formats:
                remedy = f'; to use them, convert them (magick mogrify -format jpg *{self.spelled[formats[0]]})'
            if any(suffix in _ARCHIVES for suffix in self.skipped):
                remedy += '; unpack the archives to use their images'
            if any(suffix in formats for suffix in HEIF_SUFFIXES):
                remedy += f', or read HEIC with {HEIF_EXTRA}'
            skipped = _listed(self.skipped)
            logging.warning('%s: skipped files that are not images of a known format: %s%s', folder, skipped, remedy)


def _listed(counts: collections.Counter[str]) -> str:
    most = [f'{count} {suffix}' for suffix, count in counts.most_common(8)]
    more = f', {counts.total() - sum(n for _, n in counts.most_common(8))} others' if len(counts) > 8 else ''
    return ', '.join(most) + more


def iter_image_files(folder: str, counts: FileCounts | None = None, _parents: tuple[str, ...] = ()) -> Iterable[str]:
    """Yields the paths of all image files below a folder, sorted by name. Raises UserError if it cannot be read."""
    counts = counts or FileCounts()
    real_path = os.path.realpath(folder)
    if real_path in _parents:  # a cycle of links through other folders
        counts.skipped[_UP] += 1
        return
    if len(_parents) > 100:
        raise UserError(f'{_parents[0]!r} has folders nested more than 100 deep; use a folder closer to the images.')
    for entry in list_entries(folder, counts):
        if is_folder(entry):
            yield from iter_image_files(entry.path, counts, (*_parents, real_path))
        elif is_image(entry, counts):
            yield entry.path


def relative_to(folder: str, path: str) -> str:
    """Returns a path that was found below a folder, relative to it. Takes a tenth of the time of `os.path.relpath`."""
    return path.removeprefix(os.path.join(folder, ''))


def is_image(entry: os.DirEntry, counts: FileCounts) -> bool:
    """Returns whether a file is an image by its suffix or, for other suffixes, by its content. Counts the file.

    Camera raw files are TIFF files whose first image is a thumbnail. TIFF is therefore not recognized by content if
    the name has a suffix.
    """
    if entry.name.lower().endswith(image_io.suffixes()):
        return True
    suffix = as_utf8(os.path.splitext(entry.name)[1].lower())
    formats = [name for name in image_io.formats() if name != 'TIFF' or not suffix]
    # isfile is False for pipes, which must not be opened.
    if (
        not entry.name.lower().endswith((*_TEXT_SUFFIXES, *_PARTIAL_SUFFIXES))
        and os.path.isfile(entry.path)
        and _has_format(entry.path, formats)
    ):
        counts.by_content[suffix or 'without suffix'] += 1
        return True
    counts.skipped[suffix or 'without suffix'] += 1
    counts.spelled.setdefault(suffix, as_utf8(os.path.splitext(entry.name)[1]))
    return False


def _has_format(path: str, formats: list[str]) -> bool:
    with warnings.catch_warnings(action='ignore'):
        try:
            with Image.open(path, formats=formats):
                return True
        except Image.DecompressionBombError:  # an image; reading it raises an error with the reason
            return True
        except Exception:  # Pillow raises undocumented exception types
            return False


def is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one. `entry.is_dir` raises OSError for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def partition(entries: Iterable[os.DirEntry]) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Returns (folders, files) in the order of the entries. Links count as what they lead to."""
    folders: list[os.DirEntry] = []
    files: list[os.DirEntry] = []
    for entry in entries:
        (folders if is_folder(entry) else files).append(entry)
    return folders, files


def list_entries(folder: str, counts: FileCounts | None = None) -> list[os.DirEntry]:
    """Returns the entries of a folder sorted by name.

    Leaves out hidden ones, folders of operating systems, and links to a folder above, whose images would count twice.
    They are added to `counts`. Raises UserError if the folder cannot be read.
    """
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder!r}: {error.strerror}.') from error
    counts = counts or FileCounts()
    kept = []
    for entry in entries:
        if entry.name.startswith('.'):
            if entry.name.lower().endswith(SUFFIXES) or is_folder(entry):
                counts.hidden.append(as_utf8(entry.path))
        elif entry.name.lower() in _SYSTEM_FOLDERS:
            counts.skipped[f'{entry.name}/'] += 1
        elif _leads_up(entry):
            counts.skipped[_UP] += 1
        else:
            kept.append(entry)
    return kept


def _leads_up(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a link to a folder that contains it."""
    if not (entry.is_symlink() and is_folder(entry)):
        return False
    target = os.path.realpath(entry.path)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(entry.path))]) == target
