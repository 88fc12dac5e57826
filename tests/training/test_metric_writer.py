"""Resuming metrics.jsonl."""

import json

from alexnet_jax.training import metric_writer


def test_damaged_line_is_dropped_and_others_kept(tmp_path, capsys):
    def line(step, split='train'):
        return json.dumps({'step': step, 'split': split}) + '\n'

    path = tmp_path / 'metrics.jsonl'
    path.write_text(line(1) + line(2)[1:] + line(30) + line(4) + line(5) + line(5, 'val') + line(6) + '{"st')
    metric_writer.MetricWriter(str(tmp_path), 5, validated=False).close()
    assert path.read_text() == line(1) + line(4) + line(5)
    assert capsys.readouterr().err == f'warning: {path}: line 2 cannot be read and is removed.\n'
