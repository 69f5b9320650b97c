"""The list of faults that tests/mutants.py plants fits the program as it is; planting them takes too long for CI."""

import mutants
import pytest


def test_every_fault_can_be_planted_once():
    assert mutants.misfits() == []
    assert all((mutants.ROOT / "tests" / fault.tests.split()[0]).is_file() for fault in mutants.FAULTS)


def test_every_fault_has_tests_that_are_to_see_it():
    assert all(mutants.select(mutants.ROOT, mutants.FAULTS).values())
    unseen = mutants.FAULTS[0]._replace(tests="test_mutants.py no_such_test")
    with pytest.raises(SystemExit, match=r"no tests are called test_mutants\.py no_such_test"):
        mutants.select(mutants.ROOT, [unseen])


@pytest.mark.parametrize("old, new", [("no such text", "x"), ("import", "x"), ("import re\n", "import re\n")])
def test_a_fault_that_cannot_be_planted_is_named(monkeypatch, old, new):
    monkeypatch.setattr(mutants, "FAULTS", [mutants.Fault("train_gpt.py", "a fault", old, new, "test_mutants.py")])
    (line,) = mutants.misfits()
    assert line.startswith("train_gpt.py, a fault: ") and repr(old) in line


def test_a_fault_is_seen_if_a_test_fails_and_if_python_dies_or_hangs_but_not_if_nothing_ran():
    told = {0: "SURVIVED", 1: "seen", -9: "seen (SIGKILL)", None: "seen (hangs)"}
    assert {status: mutants.verdict(status) for status in told} == told
    for status in (2, 3, 4, 5):  # pytest's own trouble
        assert mutants.verdict(status).startswith("ERROR")
