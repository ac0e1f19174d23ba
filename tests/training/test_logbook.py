"""metrics.jsonl: rows that are none are set aside, so that a run goes on; the plot of it."""

import json

import pytest
from matplotlib.axes import Axes

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


@pytest.mark.parametrize(("rows", "marked"), [(1, True), (100, False)])
def test_a_single_row_is_visible_in_the_plot(tmp_path, monkeypatch, rows, marked):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **o: lines.extend(plot(*a, **o)))
    logbook = Logbook(tmp_path, step=0, steps=rows)
    for step in range(rows):
        logbook.scalars(step + 1, {"loss": 1.0, "loss_t0001-0100": 2.0})
    logbook.plot()
    assert [line.get_marker() != "None" for line in lines] == [marked, marked]
    assert (tmp_path / "losses.png").stat().st_size > 5000
    logbook.plot()
    assert len(lines) == 2  # there is nothing new
    logbook.close()


def test_the_time_left_says_what_follows(tmp_path, capsys):
    logbook = Logbook(tmp_path, step=0, steps=100, then="64 samples")
    logbook.scalars(50, {"loss": 1.0})
    assert capsys.readouterr().err.endswith(" left, then 64 samples\n")
    logbook.expect("64 samples, 0:00:12 the last time")
    logbook.scalars(60, {"loss": 1.0})
    logbook.close()
    assert capsys.readouterr().err.endswith(" left, then 64 samples, 0:00:12 the last time\n")
