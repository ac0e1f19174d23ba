"""A short run of `tests.fuzz`: the seeds and numbers of its first cases, of each kind."""

import pytest

from ddpm.errors import InputError
from tests import fuzz

COUNTS = {"config": 40, "image": 120, "npz": 120, "weights": 8}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutations_are_read_rightly_or_refused_in_one_line(kind):
    said = {number: fuzz.run(kind, 0, number) for number in range(COUNTS[kind])}
    assert {n: text for n, text in said.items() if text not in ("right", "refused")} == {}
    assert set(said.values()) == {"right", "refused"}


def test_a_fault_is_found(monkeypatch):
    """A reader that is wrong, one that fails in its own way, a message too long, and one that
    hangs."""

    def hangs(*_):
        while True:
            pass

    def long(*_):
        error = InputError()
        error.args = ("x" * 301,)
        raise error

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for case, said in (
        (lambda *_: np_wrong(), "AssertionError"),
        (lambda *_: [].pop(), "IndexError"),
        (long, "not one short line"),
        (hangs, "TooLong: more than 1 s"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(fuzz.KINDS, "npz", case)
            assert said in fuzz.run("npz", 0, 0)


def np_wrong():
    fuzz.same({"x": 1}, {"x": 2})
