"""What all tests share. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import os
import signal
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

# Before anything imports triton: it reads the variable when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell starts what runs in its background with SIGINT ignored, and programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]


def pytest_xdist_auto_num_workers(config):
    """How many processes `./run.sh test` shares the files out to: at most 4, of 1 GB each; with a GPU one."""
    return 0 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_assertrepr_compare(op, left, right):
    """What test_faults's Result, and whatever else has a method for it, knows about why it is not equal."""
    return ["they differ:", *left.differences(right)] if op == "==" and hasattr(left, "differences") else None


@cache
def records_sample():
    """records/sample.py, under another name: data/sample.py is a module that tests import."""
    spec = spec_from_file_location("records_sample", ROOT / "records" / "sample.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_in_use():
    """The rows of PARAMETERS, but those of parameters that LAYERS leaves empty."""
    from train_gpt import GPT, PARAMETERS, Hyperparameters

    parameters = GPT(Hyperparameters(), torch.device("meta"), torch.float32).tensors()
    return [row for row in PARAMETERS if parameters[row.name].numel()]


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; infinite where a NaN is. A reference of zero or infinite norm is an error."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    out, ref = out.detach().cpu().double(), ref.detach().cpu().double()
    size = ref.norm().item()
    assert 0 < size < float("inf"), f"a reference of norm {size} tests nothing"
    error = ((out - ref).norm() / size).item()
    return error if error == error else float("inf")
