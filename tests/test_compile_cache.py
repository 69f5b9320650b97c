"""What PyTorch keeps of compiled graphs on the disk is not taken for an edited program.

Compiles on the CPU, in a process of its own, as the settings and the folder are the process's.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "train_gpt.py"
PROMOTED = "    dtype = torch.promote_types(logits.dtype, torch.float32)\n    return tuple("
EDITS = {
    "unchanged": [],
    "backward and a constant": [
        ("linear_relu2(grad_out, w_proj, hidden, 2.0)", "linear_relu2(grad_out, w_proj, hidden, 3.0)"),
        ("return grad @ head, grad.T @ x, None, None", "return grad @ head, 5 * (grad.T @ x), None, None"),
        ("MAX_HIDDEN = 448 * FP8_HIDDEN", "MAX_HIDDEN = 1.0"),
    ],
    "an operator's result": [
        (PROMOTED, PROMOTED.replace("torch.promote_types(logits.dtype, torch.float32)", "torch.float64")),
        ("return torch.where(targets >= 0, lse - picked, 0), lse",
         "return torch.where(targets >= 0, lse - picked, 0).double(), lse.double()"),
    ],
}  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_warm_cache_gives_an_edited_program_its_own_results(tmp_path):
    for name, edits in EDITS.items():
        source = SOURCE.read_text()
        for old, new in edits:
            assert source.count(old) == 1, f"{name}: {old}"
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(source)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compile_all(folder: Path) -> None:
    """Loss and gradients of each program, compiled after the others, beside those that are not compiled."""
    import torch
    from torch._dynamo.utils import counters

    def loss_and_gradients(program, region, *inputs):
        def function(x, w_fc, w_proj, head):
            x = x + program.MLP.apply(program.norm(x), w_fc, w_proj)
            weights, left = torch.tensor([1.0, 0.5, 0.25]), torch.arange(len(x))
            return program.head_losses(program.norm(x), targets, left, (), head, weights, prefixes, None, None)

        loss = region(function)(*inputs).double().sum()
        return [loss, *torch.autograd.grad(loss, inputs)]

    torch.manual_seed(0)
    T, C, F, V = 32, 16, 64, 128
    shapes = (T, C), (F, C), (F, C), (V, C)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    targets, prefixes = (torch.randint(V, (n,), dtype=torch.int32) for n in (T, V))
    seen = []
    for name in ("unchanged", *EDITS):  # the first twice: the second time from the cache
        spec = spec_from_file_location("program", folder / f"{name}.py")
        program = sys.modules["program"] = module_from_spec(spec)
        spec.loader.exec_module(program)
        counters.clear()
        compiled = loss_and_gradients(program, program.compiler(True), *inputs)
        plain = loss_and_gradients(program, program.compiler(False), *inputs)
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        assert hits == (len(seen) == 1), f"{name}: {hits} graphs from the cache"
        for a, b in zip(compiled, plain, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5), f"{name}: {a} instead of {b}"
        assert all(any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True)) for other in seen[1:]), name
        seen.append(plain)


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
