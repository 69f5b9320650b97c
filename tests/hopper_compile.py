"""Compiles every kernel for a Hopper GPU, as a run on one would, where there is none; prints a line a kernel.

Launches compile and return. What the kernels compute is looked at by Triton's interpreter, which takes much that a
compiler does not. With a folder as argument it lists, instead, what records/precompile.py would compile for a small
run on a GPU, and whether any was to be launched.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "records"))
import precompile
import small_run

import train_gpt
from train_gpt import CausalSelfAttention, CopySums, Documents, Projection, SplitHeads, WeighedSums, World

T, C, H, V = 96, 768, 6, 512
bf16 = partial(torch.zeros, dtype=torch.bfloat16)
number = partial(torch.zeros, dtype=torch.float32)
index = partial(torch.zeros, dtype=torch.int32)


class NoGpu:
    """What Triton asks its driver for before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(kernel, *args, grid, **options):
    """In place of a launch."""
    if "INTERPRETED" in options:
        options["INTERPRETED"] = False
    made = kernel.run(*args, grid=grid, warmup=True, **options)
    shared = made.metadata.shared
    assert shared <= 227 * 1024, f"{kernel.__name__}: {shared} bytes of shared memory"
    ptxas = [triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", "--verbose", "--output-file=/dev/null", "-"]
    said = subprocess.run(ptxas, input=made.asm["ptx"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "serialized" not in said.stderr, f"{kernel.__name__}: products wait for each other: {said.stderr}"
    print(kernel.__name__, shared)


def projection(fp8: bool) -> Projection:
    weight, x = bf16(3 * C, C).requires_grad_(), bf16(T, C).requires_grad_()
    if not fp8:
        return Projection(weight, x=x)
    fp8_weight, x_fp8 = weight.detach().to(torch.float8_e4m3fn), x.detach().to(torch.float8_e4m3fn)
    return Projection(weight, fp8_weight, fp8_weight.T.contiguous(), 0.25, number(()), x, x_fp8)


def main() -> None:
    driver.set_active(NoGpu())
    JITFunction.__getitem__ = lambda kernel, grid: partial(compiled, kernel, grid=grid)
    for matrices in (bf16(2, C, C), bf16(2, C, 2 * C), bf16(2, 4 * C, C).mT):
        train_gpt.symmetric_product_triton(matrices, number(2))
    train_gpt.symmetric_product_triton(bf16(2, C, C), number(2), 3.0, -2.0, 0.5)
    for regrouped in (False, True):
        train_gpt.transposed_triton(bf16(T, C).to(torch.float8_e4m3fn), regrouped)
    weight, hidden = bf16(4 * C, C), bf16(T, 4 * C)
    for dtype, grad_dtype in ((torch.bfloat16,) * 2, (torch.float8_e4m3fn, torch.float8_e5m2)):
        train_gpt.linear_relu2_triton(bf16(T, C).to(dtype), weight.to(dtype))
        train_gpt.linear_relu2_triton(bf16(T, C).to(grad_dtype), weight.to(dtype), hidden.to(dtype))
    for gate in (None, bf16(T, H)):
        train_gpt.add_rows_triton(bf16(V, C), index(T), index(T), bf16(T, C), gate)
    for tensors, n in (([bf16(V, C)] * 4, 1), ([bf16(V, C)] * 2 + [number(V, C)] * 2, 1), ([number(V)] * 4, V)):
        train_gpt.adam_triton(*tensors, number(n), 0.1, 1.0, 0.9, 0.99, 1e-10, 0.1)
    train_gpt.nesterov_triton(bf16(2, C, C), number(2, C, C), 0.9, torch.bfloat16)
    rows = number(V), index(V), index(T), bf16(T, C)
    train_gpt.update_rows_triton(bf16(V, C), *rows, 7, 0.95, 0.1, 0.1, 1e-10)
    train_gpt.sum_rows_triton(bf16(T, C), index(8, V))
    train_gpt.cross_entropy_triton(bf16(T, V), index(3, T))
    for dtype in (torch.bfloat16, torch.float8_e5m2):
        train_gpt.cross_entropy_backward_triton(bf16(T, V), number(T), index(3, T), number(3, T), 1.0, dtype)
    for paired, key_offset, fp8 in ((False, True, True), (True, False, False)):
        added, gate = (bf16(T, C), bf16(T, H).requires_grad_()) if fp8 else (None, None)
        table, rotary, documents = torch.nn.Parameter(bf16(V, C)), bf16(2 * T, 1, 64), (index(T),) * 2
        args = added, gate, table, index(T), index(T), rotary, rotary, documents if key_offset else None, H, paired
        sum(out.sum() for out in SplitHeads.apply(*args, *projection(fp8))).backward()
    sources = (bf16(T, C).requires_grad_() for _ in range(4))
    *sums, _, after = WeighedSums.apply(bf16(T, 6), ((0, 1, 2, 3), (-1, 4, -1, 5)), *sources)[:4]
    sum(out.sum() for out in (*sums, after)).backward()
    for gates in (None, bf16(T, H).requires_grad_()):
        q, k, v = (bf16(T, H, 128).requires_grad_() for _ in range(3))
        CausalSelfAttention.apply(q, k, v, index(T), index(T), 384, 0.1, gates).sum().backward()
    q, k = bf16(T, 2, 128).requires_grad_().unbind(1)
    CopySums.apply(q, k, index(T), Documents(index(T), index(T)), 384).sum().backward()


def ahead_of_a_warm_up(folder: Path) -> None:
    small_run.write_text(folder, scale=8)
    sizes = dict(head_dim=32, window_block=16, train_max_seq_len=256, micro_batch_tokens=128, dtype="bfloat16")
    stages = tuple(stage._replace(tokens=8 * 64) for stage in small_run.SMALL["stages"])
    hp = small_run.small_hyperparameters(folder, **sizes, stages=stages)
    trainer = train_gpt.Trainer(hp, World())
    trainer.fp8_loss_scale = trainer.loss_scale
    batches = trainer.batch_of_each_stage(train_gpt.find_files(hp.train_files))[:2]
    torch.Tensor.is_cuda = True  # by which the program takes its kernels
    JITFunction.run = lambda kernel, *_, warmup, **__: print(kernel.__name__, "compiled" if warmup else "launched")
    precompile.compile_kernels(trainer, batches)
    train_gpt.transposed_triton(bf16(16, 16).to(torch.float8_e4m3fn))


if __name__ == "__main__":
    ahead_of_a_warm_up(Path(sys.argv[1])) if sys.argv[1:] else main()
