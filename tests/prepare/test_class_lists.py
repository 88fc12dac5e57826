"""Lists of class names in the forms that data sets use."""

import unicodedata

import pytest

from alexnet_jax.prepare import class_lists
from alexnet_jax.utils.errors import UserError


def _names(tmp_path, content, classes=('n01', 'n02'), name='classes.tsv'):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return class_lists.class_names((str(tmp_path), str(tmp_path)), classes)


@pytest.mark.parametrize(
    'content',
    [
        'n01\tcrane, a bird\nn02\tkit fox\n',
        '\ufeffn01\tcrane\r\nn02\tkit  fox\r\n',
        'n01 crane, a bird\nn02 kit fox, Vulpes macrotis\n',  # LOC_synset_mapping.txt, synset_words.txt
        'n01 1 crane\nn02 2 kit fox\n',  # map_clsloc.txt
        'n01\t1\tcrane\nn02\t2\tkit fox\n',
        '1\tn01\tcrane\n2\tn02\tkit fox\n',
        '0 n01 crane\n1 n02 kit fox, Vulpes\n',
        'folder,name\nn01,crane\nn02,"kit fox, Vulpes macrotis"\n',
        'n01;crane\nn02;kit fox\n',
        'id,wnid,words\n1,n01,crane\n2,n02,kit fox\n',
        '\n\t\t\n,,\n;\n \n1\n"\nn01\tcrane\nn02\tkit fox',
        '# comment\nn00\tentity\nn01\tcrane\nn02\tkit fox\nn99\tn01\n',
        'n01\tcrane\nn02\tkit fox\n'.encode('utf-16'),
    ],
)
@pytest.mark.parametrize('name', [name for name in class_lists.CLASS_LISTS if not name.endswith('.json')])
def test_usual_forms(content, name, tmp_path, capfd):
    assert _names(tmp_path, content, name=name) == ('crane', 'kit fox')
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    'content, count',
    [
        ('cat\tn01\ndog\tn02\n', 0),  # the columns exchanged
        ('crane\nfox\n', 0),  # names alone
        ('0\tn01\n1\tn02\n', 0),  # indices
        ('n01\t0\nn02\t1\n', 0),
        ('', 0),
        ('n01\tcrane', 1),
        ('n01\tcrane\nn02\t\n', 1),
        ('n01 \tcrane\nN02\tfox', 1),
    ],
)
def test_classes_without_a_name_are_counted(content, count, tmp_path, capfd):
    assert _names(tmp_path, content) == (('crane', 'n02') if count else ('n01', 'n02'))
    assert f'classes.tsv names {count} of 2 classes; the others keep' in capfd.readouterr().err


@pytest.mark.parametrize(
    'content, classes',
    [
        ('{"n01440764": "crane", "n01443537": "kit fox, Vulpes macrotis"}', ('n01440764', 'n01443537')),
        ('{"0": ["n01440764", "crane"], "1": ["n01443537", "kit fox"]}', ('n01440764', 'n01443537')),  # Keras
        ('{"0": ["n01440764", "crane"], "1": ["n01443537", "kit fox"]}', ('0', '1')),
        ('{"id2label": {"1": "kit fox", "0": "crane, a bird"}, "label2id": {"crane": 0}}', ('0', '1')),  # Hugging Face
        ('{"crane": 0, "kit fox": 1, "eel": 2}', ('0', '1')),
        ('["crane", "kit fox", "eel"]', ('0', '1')),
        ('["crane", "kit fox"]', ('1', '2')),
        ('["eel", "crane", "kit fox"]', ('001', '002')),
        ('[["n01", "crane"], ["n02", "kit  fox"]]', ('n01', 'n02')),
        ('\ufeff{"n01": "crane", "n02": "kit fox", "n03": {"a": []}, "n04": null}', ('n01', 'n02')),
        ('{"é": "crane", "b": "kit fox"}', ('é', 'b')),
    ],
)
def test_json_forms(content, classes, tmp_path, capfd):
    assert _names(tmp_path, content, classes, 'classes.json') == ('crane', 'kit fox')
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    'content', ['["crane", "kit fox"]', '{"crane": 0}', '{', '[[[', '3', '[' * 100_000, '{"a": NaN}', '']
)
def test_json_that_names_no_class_is_reported(content, tmp_path, capfd):
    assert _names(tmp_path, content, name='labels.json') == ('n01', 'n02')
    said = capfd.readouterr().err
    assert 'labels.json names 0 of 2 classes; the others keep the names of their folders. Expected {"CLASS"' in said
    assert ('is not JSON' in said) == (content[:3] in ('', '{', '[[['))


def test_damaged_characters_are_counted(tmp_path, capfd):
    assert _names(tmp_path, 'n01\tcafé\nn02\tthé\n'.encode('latin-1')) == ('caf\ufffd', 'th\ufffd')
    assert '2 names have characters that are not UTF-8; save it as UTF-8' in capfd.readouterr().err


def test_names_with_numbers_and_of_numeric_folders(tmp_path, capfd):
    assert _names(tmp_path, 'n01\t747 airplane\nn02\t2 CV') == ('747 airplane', '2 CV')
    assert _names(tmp_path, '0 red deer\n1 kit fox', ('0', '1')) == ('red deer', 'kit fox')
    assert _names(tmp_path, '0,red deer\n1,kit fox', ('0', '1')) == ('red deer', 'kit fox')
    decomposed = unicodedata.normalize('NFD', 'é')
    assert _names(tmp_path, f'{decomposed}\tE acute\nb\tB', ('é', 'b')) == ('E acute', 'B')
    assert not capfd.readouterr().err


def test_equal_names_get_their_folders(tmp_path):
    assert _names(tmp_path, 'n01\tcrane\nn02\tcrane') == ('crane (n01)', 'crane (n02)')
    with pytest.raises(UserError, match="class name ' n01': expected one line without outer spaces"):
        _names(tmp_path, '', (' n01', 'n02'))
