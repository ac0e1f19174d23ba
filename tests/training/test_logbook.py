"""metrics.jsonl: rows that are none are set aside, so that a run goes on."""

import json

from ddpm.training.logbook import Logbook, read_metrics

GOOD = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
ODD = [b"[1, 2]", b"7", b'"text"', b'{"step": 2}', b'{"loss": 1.0}', b'{"step": "2", "loss": 1.0}',
       b'{"step": 2, "loss": null}', b"\xff\xfe", b'{"step": 2, "lo']  # fmt: skip


def lines(rows):
    return [json.dumps(row).encode() for row in rows]


def test_odd_rows_are_set_aside_and_reported(tmp_path, capsys):
    first, *others = lines(GOOD)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([first, *ODD, *others, b""]))
    assert read_metrics(path) == GOOD
    Logbook(tmp_path, step=2, steps=8).close()
    assert path.read_bytes().split() == b"\n".join(lines(GOOD[:2])).split()
    aside = tmp_path / "metrics_unreadable.jsonl"
    assert aside.read_bytes().splitlines() == ODD
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"9 lines are no rows with a step and a loss; they are now in {aside}" in printed


def test_a_last_line_that_a_kill_cut_off_is_nothing_to_report(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines(GOOD), b'{"step": 4, "lo']))
    Logbook(tmp_path, step=8, steps=8).close()
    assert read_metrics(path) == GOOD
    assert not capsys.readouterr().err
    assert not (tmp_path / "metrics_unreadable.jsonl").exists()
