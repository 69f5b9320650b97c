"""Whole runs on one GPU and on two: the same bits each time, and what test_faults.py shows of faults on CPUs.

Where bits differ, pytest -vv names all parameters in which they do.
"""

import signal

import fault_run
import pytest
import small_run
import test_faults
from fault_run import REAL_STEPS
from test_faults import (  # noqa: F401 - fixtures and tests, whose runs are on GPUs here
    RESUMED,
    Result,
    data,
    finish,
    killed,
    one_of_two_killed,
    run,
    start,
    test_a_killed_run_goes_on_and_ends_to_the_bit_as_one_that_went_through,
    test_a_number_that_is_not_finite_ends_the_run_and_is_named,
    test_a_rank_that_dies_is_named_and_all_others_end,
    test_sigterm_leaves_a_checkpoint_a_line_and_a_run_to_go_on_with,
    test_two_processes_go_on_to_the_bit_too,
    whole,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpus():
    """Where test_faults.start starts the runs of this file; those of more processes than there are GPUs are skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(test_faults.ENVIRONMENT, "CUDA_VISIBLE_DEVICES")
        yield


# ---------------------------------------------------------------------------- the same seed, the same bits
# Compiled, in FP8, by CUDA graphs. What a compiler takes that may time its kernels differs from one time to the next:
# runs that must have compiled for themselves have empty caches.

REAL = ["--preset=real"]
REAL_KEPT = [*REAL, "--run_id=kept", "--checkpoint_every=6", "--save_checkpoint=true"]
SECONDS = 500  # a run of two processes that compiles everything takes a fifth of it


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    small_run.write_text(folder, scale=fault_run.REAL_SCALE)
    return folder


def caches(folder):
    """As an environment: all compiled code is kept in the folder."""
    places = {f"{name}_CACHE_DIR": folder / name.lower() for name in ("TORCHINDUCTOR", "TRITON")}
    return {name: str(place) for name, place in places.items()}


@pytest.fixture(scope="module")
def compiled_anew(text, tmp_path_factory):
    """The folders of two runs of one process that were started at the same time, each with empty caches of its own."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    started = [(start(folder, text, arguments=REAL_KEPT, environ=caches(folder)), folder) for folder in folders]
    for status, said in [finish(process, folder, SECONDS) for process, folder in started]:
        assert status == 0, said
    return folders


def test_two_runs_that_compile_for_themselves_end_with_the_same_bits(compiled_anew):
    first, second = (Result(folder, REAL_STEPS) for folder in compiled_anew)
    assert second == first
    assert len(first.exact) == len(fault_run.REAL["val_steps"])  # the losses were compared to their last digits
    assert first.losses[REAL_STEPS] < first.losses[0] - 0.5


def test_a_killed_run_that_is_compiled_ends_with_the_same_bits_as_one_that_went_through(compiled_anew, text, tmp_path):
    first, _ = compiled_anew
    status, said = run(tmp_path, text, 1, ("die", 0, 9), REAL_KEPT, environ=caches(first), seconds=SECONDS)
    assert status == -signal.SIGKILL, said
    status, said = run(tmp_path, text, arguments=[*REAL, *RESUMED], environ=caches(first), seconds=SECONDS)
    assert status == 0 and "resumed at step 6 from" in said, said
    assert Result(tmp_path, REAL_STEPS) == Result(first, REAL_STEPS)


def test_two_runs_on_two_gpus_end_with_the_same_bits(text, tmp_path):
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:  # one after the other: on one GPU, ranks of two runs would wait for each other's turns
        folder.mkdir()
        status, said = run(folder, text, 2, arguments=REAL_KEPT, environ=caches(tmp_path), seconds=SECONDS)
        assert status == 0, said
    first, second = (Result(folder, REAL_STEPS) for folder in folders)
    assert second == first


# ---------------------------------------------------------------------------- faults
# Most are shown by the tests of test_faults.py that are imported above, without compiling.


def test_out_of_memory_on_a_gpu_says_what_was_asked_and_what_to_change(data, tmp_path):  # noqa: F811
    words = ["CUDA out of memory. Tried to allocate", "GiB is free"]
    test_faults.test_out_of_memory_says_what_was_asked_and_what_to_change(data, tmp_path, "fill_the_gpu", words)
