"""All kernels compile for a Hopper GPU, without one: the interpreter takes what a compiler refuses."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from checks import KERNEL_SHARED_MEMORY

TESTS = Path(__file__).parent


pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="no Triton for this platform")
LAUNCHED = {*re.findall(r"^ +(\w+_kernel)\[", (TESTS.parent / "train_gpt.py").read_text(), re.M)}


def hopper_compile(cache, *arguments):
    """What the program says, by line and word."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, TESTS / "hopper_compile.py", *arguments]
    ran = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [line.split() for line in ran.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper(tmp_path):
    kernels = hopper_compile(tmp_path)
    assert {name for name, _ in kernels} == LAUNCHED != set()
    most = max(int(shared) for _, shared in kernels)
    assert 0.9 * KERNEL_SHARED_MEMORY < most <= KERNEL_SHARED_MEMORY  # below which a GPU is refused


def test_every_kernel_is_compiled_and_none_launched_ahead_of_a_warm_up(tmp_path):
    *ahead, after = hopper_compile(tmp_path / "cache", tmp_path)
    of_one_rank = LAUNCHED - {"sum_rows_kernel"}
    assert {(name, what) for name, what in ahead} == {(name, "compiled") for name in of_one_rank}
    assert after == ["transposed_kernel", "launched"]  # as ever
