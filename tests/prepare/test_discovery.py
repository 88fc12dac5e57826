"""ImageNet's official archives and their extracted forms, and damaged or malicious archives."""

import io
import os
import tarfile

import pytest

from alexnet_jax.data import datasets, image_io, imagenet_classes
from alexnet_jax.prepare import discovery, prepare
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def official(tmp_path):
    """Small archives in the official layout: train contains an archive per class, val is flat."""
    classes = imagenet_classes.wordnet_ids()
    root = tmp_path / 'official'
    root.mkdir()
    inner = {}
    for k in (0, 500, 999):
        files = {f'{classes[k]}_{i}.JPEG': helpers.encode(helpers.picture(k + i)) for i in range(2)}
        inner[f'{classes[k]}.tar'] = _tar(tmp_path / 'inner.tar', files)
    _tar(root / 'ILSVRC2012_img_train.tar', inner)
    _tar(
        root / 'ILSVRC2012_img_val.tar',
        {f'ILSVRC2012_val_{i:08}.JPEG': helpers.encode(helpers.picture(i)) for i in (3, 1, 2)},
    )
    return root


# The first three lines of the validation ground truth published with the data set.
FIRST_VALIDATION_CLASSES = {1: 'n01751748', 2: 'n09193705', 3: 'n02105855'}


def _check_official(out, train=True):
    classes = imagenet_classes.wordnet_ids()
    if train:
        found = helpers.read_back(out, 'train')
        assert len(found) == 6
        assert {c for _, c in found.values()} == {classes[0], classes[500], classes[999]}
        assert all(os.path.basename(name).startswith(c) for name, (_, c) in found.items())
    val = {os.path.basename(name): c for name, (_, c) in helpers.read_back(out, 'val').items()}
    assert val == {f'ILSVRC2012_val_{i:08}.JPEG': c for i, c in FIRST_VALIDATION_CLASSES.items()}
    assert len(datasets.open_dataset(out).class_names) == 1000


def test_official_archives_and_extracted_forms(official, tmp_path):
    out = str(tmp_path / 'both')
    prepare.prepare(str(official), out, size=16, workers=1)
    _check_official(out)

    extracted = tmp_path / 'extracted'
    with tarfile.open(official / 'ILSVRC2012_img_train.tar') as tar:
        tar.extractall(extracted / 'train', filter='data')
    with tarfile.open(official / 'ILSVRC2012_img_val.tar') as tar:
        tar.extractall(extracted / 'val', filter='data')
    out = str(tmp_path / 'once')  # train holds one archive per class
    prepare.prepare(str(extracted), out, size=16, workers=1)
    _check_official(out)

    for path in sorted((extracted / 'train').iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(extracted / 'train' / path.stem, filter='data')
        path.unlink()
    out = str(tmp_path / 'twice')  # train holds one folder per class
    prepare.prepare(str(extracted), out, size=16, workers=1)
    _check_official(out)


def test_archive_next_to_its_extraction_is_refused(official, tmp_path):
    with tarfile.open(official / 'ILSVRC2012_img_train.tar') as tar:
        tar.extractall(tmp_path / 'twice', filter='data')
    for path in (tmp_path / 'twice').iterdir():
        with tarfile.open(path) as tar:
            tar.extractall(official / 'train' / path.stem, filter='data')
    with pytest.raises(UserError, match='the train images exist both in archives .* and as files'):
        prepare.prepare(str(official), str(tmp_path / 'out'))


def test_class_may_be_named_like_a_split(tmp_path, capfd):
    helpers.write_files(
        tmp_path / 'in',
        {f'{c}/{i}.png': helpers.encode(helpers.picture(i), 'PNG') for c in ('train', 'bus') for i in range(2)},
    )
    assert discovery.find_images(str(tmp_path / 'in')).class_names == ('bus', 'train')
    names = ('train/cat/a.png', 'train/dog/a.png', 'extra/cat/a.png', 'loose.png')
    helpers.write_files(tmp_path / 'split', {name: helpers.encode(helpers.picture(0), 'PNG') for name in names})
    found = discovery.find_images(str(tmp_path / 'split'))
    assert set(found.splits) == {'train'} and len(found.splits['train']) == 2
    said = capfd.readouterr().err
    assert (
        'skipped 1 folders that are not splits with class folders: extra (1 images)' in said
        and 'skipped 1 images outside' in said
    )


def test_validation_archive_alone(official, tmp_path):
    out = str(tmp_path / 'out')
    prepare.prepare(str(official / 'ILSVRC2012_img_val.tar'), out, size=16, workers=1)
    _check_official(out, train=False)
    assert datasets.open_dataset(out).image_stats is None


def test_damaged_archive_is_refused(official, tmp_path):
    path = official / 'ILSVRC2012_img_train.tar'
    path.write_bytes(b'\0' * 100 + path.read_bytes()[100:3000])
    with pytest.raises(UserError, match='the archive .*ILSVRC2012_img_train.tar.* cannot be read'):
        prepare.prepare(str(path), str(tmp_path / 'out'))
    other = tmp_path / 'other.tar'
    other.write_bytes(b'')
    with pytest.raises(UserError, match=r'other.tar.* is not ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar'):
        prepare.prepare(str(other), str(tmp_path / 'out'))


def test_imagenet_photos(imagenet_tar, tmp_path):
    """The official train archive: 1,000 originals, one per class; every 25th is read, to take only seconds."""
    refs = discovery.find_images(str(imagenet_tar)).splits['train']
    assert len(refs) == 1000 and [r.label for r in refs] == list(range(1000))
    classes = imagenet_classes.wordnet_ids()
    for ref in refs[::25]:
        assert ref.name.startswith(classes[ref.label])
        pixels = image_io.resize_center_crop(discovery.read_image(ref)[0], 256)
        assert pixels.shape == (256, 256, 3) and pixels.std() > 5


def test_archives_are_never_unpacked(tmp_path):
    """Paths outside the folder, links and devices: only images are read, and only from the archive."""
    root = tmp_path / 'in'
    root.mkdir()
    with tarfile.open(root / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for i, name in ((1, '../../ILSVRC2012_val_00000001.JPEG'), (2, f'{tmp_path}/ILSVRC2012_val_00000002.JPEG')):
            info, content = tarfile.TarInfo(name), helpers.encode(helpers.picture(i))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for i, kind in ((3, tarfile.SYMTYPE), (4, tarfile.LNKTYPE), (5, tarfile.FIFOTYPE), (6, tarfile.DIRTYPE)):
            info = tarfile.TarInfo(f'../ILSVRC2012_val_{i:08}.JPEG')
            info.type, info.linkname = kind, '/etc/passwd'
            tar.addfile(info)
    prepare.prepare(str(root), str(tmp_path / 'out'), size=16, workers=1)
    assert sorted(os.listdir(tmp_path)) == ['in', 'out'] and os.listdir(root) == ['ILSVRC2012_img_val.tar']
    assert sorted(helpers.read_back(str(tmp_path / 'out'), 'val')) == [
        f'ILSVRC2012_val_0000000{i}.JPEG' for i in (1, 2)
    ]


def test_archive_with_late_damage_is_refused(official):
    """tarfile treats an unreadable header as the end of the archive and the entries before it as complete."""
    path = official / 'ILSVRC2012_img_val.tar'
    whole = path.read_bytes()
    second = whole.index(b'ILSVRC2012_val_00000001')
    for damaged, reason in (
        (whole[:second] + b'\xff' + whole[second + 1 :], f'damaged at byte {second}'),
        (whole[:second] + bytes(512) + whole[second + 512 :], f'damaged at byte {second}'),
        (whole[:second], f'truncated after {second} bytes'),
        (whole[: second + 700], 'unexpected end of data'),
        (whole[: second + 124] + b'\x80' + whole[second + 125 :], 'damaged at byte'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'the archive .*ILSVRC2012_img_val.tar.* cannot be read: .*{reason}'):
            discovery.find_images(str(path))
    # The same holds for archives inside the archive.
    path = official / 'ILSVRC2012_img_train.tar'
    whole = path.read_bytes()
    second = whole.index(b'n01440764_1.JPEG')
    path.write_bytes(whole[:second] + b'\xff' + whole[second + 1 :])
    with pytest.raises(UserError, match='the archive .* cannot be read: damaged at byte'):
        discovery.find_images(str(path))


def test_archive_declaring_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / 'ILSVRC2012_img_val.tar'
    name = 'ILSVRC2012_val_00000001.JPEG'
    for member, size, reason in (
        (name, -512, 'declares a member of -512 bytes'),  # would lead back to itself forever
        (name, 2**62, 'unexpected end of data'),
        ('././@LongLink', 2**40, 'declares its own size as 1099511627776 bytes'),  # a name, which is read into memory
    ):
        info = tarfile.TarInfo(member)
        info.type = tarfile.GNUTYPE_LONGNAME if '@' in member else tarfile.REGTYPE
        info.size = size
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(UserError, match=f'the archive .* cannot be read: .*{reason}'):
            discovery.find_images(str(path))
    with tarfile.open(path, 'w') as tar:
        tar.addfile(tarfile.TarInfo('ILSVRC2012_val_²².JPEG'))
    with pytest.raises(UserError, match='is not an image of the ILSVRC-2012 val set'):
        discovery.find_images(str(path))


@pytest.mark.parametrize(
    ('folders', 'names'),
    [
        (['10', '2', '0', '1'], ('0', '1', '2', '10')),
        (['10', '02', '1', '01'], ('01', '1', '02', '10')),
        (['002', '010', '001'], ('001', '002', '010')),
        (['10', '2', 'other'], ('10', '2', 'other')),
        (['c10', 'c2'], ('c10', 'c2')),
        (['²', '10', '2'], ('10', '2', '²')),
    ],
)
def test_class_folders_that_are_numbers_keep_their_order(tmp_path, folders, names):
    content = helpers.encode(helpers.picture(0), 'PNG')
    root = helpers.write_files(tmp_path, {f'{split}/{c}/a.png': content for c in folders for split in ('train', 'val')})
    found = discovery.find_images(root)
    assert found.class_names == names
    for split in ('train', 'val'):  # the folder of each image is the class of its label
        assert {ref.name: names[ref.label] for ref in found.splits[split]} == {f'{split}/{c}/a.png': c for c in folders}
