"""Plants faults in the program, one at a time, and tells which of them the tests let through.

    python tests/mutants.py [-k WORD] [--jobs N] [--list]

Every fault of FAULTS goes into a copy of the repository's files, and the tests that should see it run there. It is seen
if one of them fails, or if Python dies or hangs. All these tests run once without a fault first: one that fails anyway
sees nothing. Ends with a table by room; the exit status is 1 if a fault survived. It takes some twenty minutes on one
core, so CI only checks that every fault can still be planted (test_mutants.py). A fault that survives asks for a test.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that the tests of a fault may take; they take about ten


class Fault(NamedTuple):
    """One that a person could make."""

    file: str
    name: str
    old: str  # occurs once in the file
    new: str
    tests: str  # a file of tests/, and words that all stand in the names of the tests that should see it


# By file, and in its order.
# fmt: off
PLANTED = {
    "train_gpt.py": [
        # Hyperparameters
        ("a count of steps becomes 0 in a short run", "return max(min(count, 1), round(self.length * count))",
         "return round(self.length * count)", "test_schedule.py test_length_multiplies_every_count"),
        ("rounds up a multiple, too", "return -(-n // multiple) * multiple", "return (n // multiple + 1) * multiple",
         "test_command_line.py test_padding"),
        ("a copy without records/bench.py ends in a stack trace", "require(not argument, f", "require(True, f",
         "test_errors.py test_a_copy_without"),
        ("a tool that imports the program loads it a second time",
         'sys.modules.setdefault("train_gpt", sys.modules[__name__])', "pass", "test_bench.py test_the_bench_is_given"),
        ("a copy alone is refused", "require(not argument, f", "require(False, f", "test_errors.py test_a_copy_alone"),
        ("the preset wins over what is given", '**{**PRESETS[preset], **overrides, "preset": preset}',
         '**{**overrides, **PRESETS[preset], "preset": preset}',
         "test_command_line.py test_a_value_that_is_given_wins"),
        # Distributed
        ("takes the GPU of its rank over all hosts", 'visible.split(",")[local_rank]', 'visible.split(",")[rank - 4]',
         "test_command_line.py test_it_takes_its_own_of_the_gpus"),
        ("takes the first GPU where CUDA sees all", "min(local_rank, seen - 1)", "0",
         "test_command_line.py test_it_takes_its_own_gpu_where_cuda_has_begun"),
        # Kernels
        ("symmetric product: b is lost in the reference", "product + b * x if b else", "product + x if b else",
         "test_kernels.py test_symmetric_product_reference"),
        ("symmetric product: no tile on the diagonal", "if tile_col > tile_row:", "if tile_col >= tile_row:",
         "test_kernels.py test_symmetric_product_kernel_is_scale shape0-cpu-float32"),
        ("symmetric product: a row's first tile is left out", "tile_col - tile_row - 1", "tile_col - tile_row",
         "test_kernels.py test_symmetric_product_kernel_is_scale shape2-cpu-float32"),
        ("symmetric product: b is lost", "acc += b * tile_desc", "acc += tile_desc",
         "test_kernels.py test_symmetric_product_kernel_is_a_polynomial shape0-cpu-float32"),
        ("symmetric product: a is added to a whole tile", "tl.where(rows[:, None] == cols[None, :], a, 0.0)",
         "tl.where(tile_row == tile_col, a, 0.0)",
         "test_kernels.py test_symmetric_product_kernel_is_a_polynomial shape0-cpu-float32"),
        ("symmetric product: all have the first one's scale", "tl.load(scale_ptr + matrix)", "tl.load(scale_ptr)",
         "test_kernels.py test_symmetric_product_kernel_is_scale shape1-cpu-float32"),
        ("transposed: two bytes of a word change places", "(c >> 8 * i & 255) << 16 | d >> 8 * i << 24",
         "(d >> 8 * i & 255) << 16 | c >> 8 * i << 24", "test_kernels.py test_transposed_kernel"),
        ("transposed: regrouped rows of other tiles", "*(8, 64) if regrouped", "*(8, 32) if regrouped",
         "test_kernels.py test_transposed_kernel"),
        ("weight gradients: tokens in two orders", "transposed(b, True).T", "transposed(b).T",
         "test_kernels.py test_weight_gradient_in_fp8"),
        ("linear_relu2: two bytes of the transpose change places", "pack_fp8(a, b, c, d, BACKWARD",
         "pack_fp8(a, c, b, d, BACKWARD", "test_kernels.py test_linear_relu2_kernel_in_fp8"),
        ("linear_relu2: the reference forgets the derivative's root", "product * hidden.to(wide).sqrt()",
         "product * hidden.to(wide)", "test_kernels.py test_mlp_has_the_value cpu-float32"),
        ("linear_relu2: the last group of tiles counts as full", "group = min(tiles_t - first_t, GROUP)",
         "group = GROUP", "test_kernels.py test_linear_relu2_kernel_is_relu 135-264-72-cpu-float32"),
        ("linear_relu2: the derivative's root is lost",
         "acc *= tl.sqrt(hidden.to(tl.float32))", "acc *= hidden.to(tl.float32)",
         "test_kernels.py test_linear_relu2_kernel_with_hidden 128-256-64-cpu-float32"),
        ("linear_relu2: a NaN becomes 0", "acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)",
         "acc = tl.where(acc > 0.0, acc, 0.0)", "test_kernels.py test_linear_relu2_kernel nan cpu-float32"),
        ("linear_relu2: not squared", "        acc *= acc\n", "",
         "test_kernels.py test_linear_relu2_kernel_is_relu 128-256-64-cpu-float32"),
        ("MLP: the derivative of a square without its 2", "linear_relu2(grad_out, w_proj, hidden, 2.0)",
         "linear_relu2(grad_out, w_proj, hidden, 1.0)", "test_kernels.py test_mlp_has_the_value cpu-float32"),
        ("MLP: in bf16 hidden activations have no end", "hidden = linear_relu2(x, w_fc)[0].clamp(max=MAX_HIDDEN)",
         "hidden = linear_relu2(x, w_fc)[0]", "test_kernels.py test_hidden_activations cpu-float32"),
        ("MLP in FP8: the scale of hidden activations is not undone",
         "fp8_t[1].T, FP8_HIDDEN, FP8_WEIGHT * gain,", "fp8_t[1].T, 1.0, FP8_WEIGHT * gain,",
         "test_kernels.py test_mlp_in_fp8_is_the_plain"),
        ("cross-entropy: the reference adds the targets' terms", "clamp(min=0).long(), -grad.T)",
         "clamp(min=0).long(), grad.T)", "test_kernels.py test_cross_entropy_references 6-300"),
        ("cross-entropy: in the reference targets that are none weigh on the softmax",
         "grad = torch.where(targets >= 0, grad.to(lse.dtype), 0) * cap", "grad = grad.to(lse.dtype) * cap",
         "test_kernels.py test_cross_entropy_references 6-300"),
        ("cross-entropy: a target that is none is one", "        if target >= 0:\n", "        if True:\n",
         "test_kernels.py test_cross_entropy_kernel_is 6-2051-4-cpu-float32"),
        ("cross-entropy: the shift's sign", "- SHIFT * LOG2_E / TEMPERATURE", "+ SHIFT * LOG2_E / TEMPERATURE",
         "test_kernels.py test_cross_entropy_kernel_is 6-2051-1-cpu-float32"),
        ("cross-entropy: a NaN becomes finite", "tl.minimum(y, 64.0, propagate_nan=tl.PropagateNan.ALL)",
         "tl.where(y < 64.0, y, 64.0)", "test_kernels.py test_cross_entropy_kernels nan cpu-float32"),
        ("cross-entropy: targets beyond the end have gradients",
         "sums = torch.where(targets >= 0, grad, 0).sum(0)", "sums = grad.sum(0)",
         "test_kernels.py test_cross_entropy_backward_kernel 2-300-3-cpu-float32"),
        ("cross-entropy: equal targets do not add up", "for j in tl.static_range(N_TARGETS):  # equal",
         "for j in tl.static_range(k, N_TARGETS):  # equal",
         "test_kernels.py test_cross_entropy_backward_kernel 3-cpu-float32"),
        ("cross-entropy: all of a row's targets have the first one's gradient",
         "tl.load(grad_ptr + j * T + rows,", "tl.load(grad_ptr + rows,",
         "test_kernels.py test_cross_entropy_backward_kernel 3-cpu-float32"),
        ("cross-entropy: losses of further targets at the first one's place",
         "tl.store(losses_ptr + k * T + row, loss)", "tl.store(losses_ptr + row, loss)",
         "test_kernels.py test_cross_entropy_kernel_is 6-2051-3-cpu-float32"),
        ("cross-entropy: compiled code takes the losses of all targets for one's",
         "for shape in (targets.shape, len(logits))", "for shape in (len(logits), len(logits))",
         "test_kernels.py test_cross_entropy_operator"),
        ("head in FP8: the gradient's scale forgets grad_scale", "scale = ctx.loss_scale * FP8_HEAD_GRAD",
         "scale = FP8_HEAD_GRAD", "test_kernels.py test_fp8_gradient_does_not_depend"),
        ("lookup: a row that goes on beyond its chunk is cut off there",
         "tl.max((row == last).to", "tl.max((row == -2).to", "test_kernels.py test_add_rows_kernel mixed float32"),
        ("lookup: a row that goes on counts again", "order_ptr, place - 1, T)",
         "order_ptr, tl.where(place > start, place - 1, -1), T)",
         "test_kernels.py test_add_rows_kernel mixed float32"),
        ("lookup: gates of other positions", "weight *= tl.load(gate_ptr + t *", "weight *= tl.load(gate_ptr + place *",
         "test_kernels.py test_add_rows_kernel mixed float32"),
        ("n-grams: of several ranks' gradients the last one's counts", "total += tl.load(received_ptr",
         "total = tl.load(received_ptr", "test_ngram.py test_gradients_of_a_row_are kernel"),
        ("n-grams: in the reference, too", "total[there] += received", "total[there] = received",
         "test_ngram.py test_gradients_of_a_row_are reference"),
        ("n-grams: of several ranks' gradients of a row one is added", "np.repeat(np.arange(len(by_rank)), given)",
         "0", "test_ngram.py test_gradients_of_a_row_are reference"),
        ("lookup: the last of several equal rows wins on the CPU", "total.index_add_(0, rows, grad.to(total.dtype))",
         "total.index_put((rows.long(),), total[rows] + grad)", "test_kernels.py test_lookup_adds cpu-float32"),
        ("lookup: sums of bf16 rows get stuck", "total = widened(table)", "total = table",
         "test_kernels.py test_lookup_adds cpu-float16"),
        ("q, k, v: the reference's keys look back beyond their document",
         "stationary[torch.maximum(position - 1, documents.starts)]", "stationary[(position - 1).clamp(min=0)]",
         "test_model.py test_a_token_changes_losses_of_its_own True-False"),
        ("q, k, v: pairs have the documents of single tokens",
         "documents[layer.paired] if layer.key_offset else None", "documents[False] if layer.key_offset else None",
         "test_model.py test_joined_micro_batches 2-True-True-dtype0"),
        ("q, k, v: a paired head at the other's position", "position = 2 * t + head // (H // 2) if PAIRED else t",
         "position = 2 * t + head % 2 if PAIRED else t",
         "test_kernels.py test_split_heads_kernels False-True-False-cpu-float32"),
        ("q, k, v: the first key's second half is lost",
         "tl.store(out_ptr + out, x, mask=mask & (~stationary | is_first[:, None]))",
         "tl.store(out_ptr + out, x, mask=mask & ~stationary)",
         "test_kernels.py test_split_heads_kernels False-False-True-cpu-float32"),
        ("q, k, v: a key's second half goes to the next document", "x, mask=has_next[:, None] & stationary)",
         "x, mask=(has_next | (position + 1 < T))[:, None] & stationary)",
         "test_kernels.py test_split_heads_kernels False-False-True-cpu-float32"),
        ("q, k, v: a gradient comes from the next document", "mask=has_next[:, None] & stationary, other=0.0)",
         "mask=(has_next | (position + 1 < T))[:, None] & stationary, other=0.0)",
         "test_kernels.py test_split_heads_kernels False-False-True-cpu-float32"),
        ("q, k, v: the gradient turns the wrong way", "grad = rotate_tile(grad, cos, -sin)",
         "grad = rotate_tile(grad, cos, sin)",
         "test_kernels.py test_split_heads_kernels False-False-False-cpu-float32"),
        ("q, k, v: the norm's gradient keeps the part along x",
         "grad_x = inverse_rms * (grad - x * (tl.sum(grad * x, 1) / D_QK)[:, None])", "grad_x = inverse_rms * grad",
         "test_kernels.py test_split_heads_kernels False-False-False-cpu-float32"),
        ("q, k, v: nothing is added to the values", "v += tl.load(added_ptr", "0 + tl.load(added_ptr",
         "test_kernels.py test_split_heads_kernels True-False-False-False-cpu-float32"),
        ("q, k, v: gates are read as if they lay alone", "else t.contiguous() for t in (", "else t for t in (",
         "test_kernels.py test_split_heads_kernels True-False-False-False-cpu-float32"),
        ("XSA adds a token's own value", "return y - torch.tanh(xsa)", "return y + torch.tanh(xsa)",
         "test_model.py test_losses_and_gradients program's"),
        ("attention: the reference's window is one short", "torch.maximum(documents.starts, position - window)\n",
         "torch.maximum(documents.starts, position - window + 1)\n", "test_kernels.py test_attention_sees_the_window"),
        ("attention: blocks at the window's end are not masked",
         "full_begin = tl.cdiv(max(tl.load(starts_ptr + last), last - window), BLOCK_K) * BLOCK_K",
         "full_begin = tl.cdiv(tl.load(starts_ptr + last), BLOCK_K) * BLOCK_K",
         "test_kernels.py test_attention_kernels_are 31-cpu-float32"),
        ("attention: masked keys have a share", "(cols <= rows[:, None]), p, 0.0)\n        row_sum",
         "(cols <= rows[:, None]), p, 1.0)\n        row_sum",
         "test_kernels.py test_attention_kernels_are 127-cpu-float32"),
        ("attention: products wait for each other", "tl.assume(begin < end)  # if", "tl.assume(begin <= last)  # if",
         "test_hopper.py compiles_for_hopper"),
        ("attention: a block of the next head's", "delta_desc.load([head * N + col])", "delta_desc.load([head * N])",
         "test_kernels.py test_attention_kernels_are 64-cpu-float32"),
        ("attention: delta is lost", "(p * (grad_p - delta[:, None])).to(k.dtype)", "(p * grad_p).to(k.dtype)",
         "test_kernels.py test_attention_kernels_are 64-cpu-float32"),
        ("attention: gradients cross into the next document",
         "tl.load(ends_ptr + rows, mask=rows < N, other=0) - 1, rows + window)\n",
         "tl.load(ends_ptr + rows, mask=rows < N, other=0), rows + window)\n",
         "test_kernels.py test_attention_kernels_are 1000-cpu-float32"),
        ("attention: XSA's least square of a value has a gradient", "(tl.where(square < 1e-8, 0, 1) - t)", "(1 - t)",
         "test_kernels.py test_attention_kernels_with_xsa_of_values cpu-float32"),
        ("attention: keys and values get the gradient behind XSA", 'attention_tiles(tiles["BLOCK_Q"], q, before_xsa)',
         'attention_tiles(tiles["BLOCK_Q"], q, grad_y)',
         "test_kernels.py test_attention_kernels_with_xsa_are 64-cpu-float32"),
        ("copying: the reference's window is one short",
         "torch.maximum(documents.starts, position - window)[rows, None]",
         "torch.maximum(documents.starts, position - window + 1)[rows, None]",
         "test_kernels.py test_copy_sums_are_those_of_the_plain"),
        ("copying: a position copies its own target", "seen = (position >= first) & (position < rows[:, None])",
         "seen = (position >= first) & (position <= rows[:, None])",
         "test_kernels.py test_copy_sums_are_those_of_the_plain"),
        ("copying: the sum of matches does not follow the largest score", "matching = matching * rescale + tl.sum(",
         "matching = matching + tl.sum(", "test_kernels.py test_copy_kernels_are cpu-float32"),
        ("copying: the largest score is not taken off",
         "new_max = tl.maximum(row_max, tl.max(s, 1))\n        p, rescale",
         "new_max = tl.zeros_like(row_max)\n        p, rescale",
         "test_kernels.py test_copy_kernels_are scores-cpu-float32"),
        ("copying: where nothing matches the logarithm is of 0", "tl.log2(tl.maximum(matching, 1e-30))",
         "tl.log2(matching)", "test_kernels.py test_copy_kernels_tell_that_nothing_matches cpu-float32"),
        ("copying: the gradient of matches goes to all that is seen", "grad + tl.where(same, of_same, 0.0), 0.0)",
         "grad + of_same, 0.0)", "test_kernels.py test_copy_kernels_are cpu-float32"),
        ("copying: gradients of keys cross into the next document",
         "first = tl.maximum(tl.load(starts_ptr + t, mask=t < N, other=0), t - window)", "first = t - window",
         "test_kernels.py test_copy_kernels_are cpu-float32"),
        ("copying: the model learns to be searched", "x = x.detach()  # the stream", "x = x  # the stream",
         "test_model.py test_losses_and_gradients program's"),
        ("rows: v does not decay while a row rests", "v * tl.exp2(log2_beta2 * missed.to(tl.float32))",
         "v * tl.exp2(log2_beta2)", "test_ngram.py test_rows_follow_the_plain kernel-float32"),
        ("rows: v of the reference decays once only", "beta2 ** (update - last[rows])", "beta2",
         "test_ngram.py test_rows_follow_the_plain reference-float32"),
        ("rows: the last update is not noted", "    tl.store(last_ptr + row, update)\n", "",
         "test_ngram.py test_rows_follow_the_plain kernel-float32"),
        ("rows: decay whatever the update's direction", "u += tl.where(u * master > 0, decay * master, 0.0)",
         "u += decay * master", "test_ngram.py test_rows_follow_the_plain kernel-float32"),
        ("rows: a sum instead of a mean of squares", "mean_square = tl.sum(grad * grad, 0) / C",
         "mean_square = tl.sum(grad * grad, 0)", "test_ngram.py test_rows_follow_the_plain kernel-float32"),
        # Model
        ("what fills a bank up is updated, too", "self.used = min(N, bank_matrices(hp).get(row.name, N))",
         "self.used = N", "test_optimizer.py test_a_banks_matrices"),
        ("narrow layers take the wide ones' queries and keys", "banks = self.qk_bank, self.narrow_qk_bank",
         "banks = self.narrow_qk_bank, self.qk_bank", "test_model.py test_losses_and_gradients program's"),
        ("narrow layers have the others' scale", "NARROW_SCALE if layer.narrow else 1", "1",
         "test_model.py test_losses_and_gradients program's"),
        ("Yarn: fast frequencies are stretched, slow ones kept", "kept = ((rotations - 1) / (32 - 1)).clamp(0, 1)",
         "kept = 1 - ((rotations - 1) / (32 - 1)).clamp(0, 1)", "test_model.py test_yarn_stretches"),
        ("Yarn: attention flattens as the window grows", "float(np.log(new_window / old_window)) + 1",
         "float(np.log(old_window / new_window)) + 1", "test_model.py test_yarn_stretches"),
        ("MLP in FP8: the gradient forgets the gain of W_proj", "pre_scale = scale * gain", "pre_scale = scale",
         "test_kernels.py test_mlp_in_fp8_is cpu"),
        ("the MLP's result is added without its scalar", "scaled(w.mlp_out, w_proj), *fp8)", "w_proj, *fp8)",
         "test_model.py test_losses_and_gradients program's"),
        ("sums of kept outputs: who reads a source later is left out", "if added[i] is not None:", "if False:",
         "test_kernels.py test_weighed_sums cpu-float32"),
        ("sums of kept outputs: a source is the next reader's, too", "results[len(columns) :], strict=True))",
         "(kept[name].detach() for name in read), strict=True))", "test_model.py test_losses_and_gradients program's"),
        ("gates are not scaled", "gates = GATE_SCALE * (F.linear(hidden", "gates = 1.0 * (F.linear(hidden",
         "test_model.py test_losses_and_gradients program's"),
        ("value embeddings: gates start at 0", '("value_embed", VALUE_GATE)', '("value_embed", 0.0)',
         "test_model.py test_gates_start program's"),
        ("value embeddings: gates and heads' change places", "xsa, head_gates, value_gate,",
         "xsa, value_gate, head_gates,", "test_model.py test_losses_and_gradients program's"),
        ("W_fc and attention start with a third of their variance", "bound = 3**0.5 * 0.5 * C**-0.5",
         "bound = 0.5 * C**-0.5", "test_model.py test_matrices_start_uniform mlp_bank"),
        ("biases of gates start without regard to the gates' scale", "= torch.tensor(values) / GATE_SCALE",
         "= torch.tensor(values)", "test_model.py test_gates_start"),
        ("q, k, v in FP8: the scale of the weight forgets its lambda", "w.qkv_lambda.detach() * FP8_WEIGHT",
         "0 * w.qkv_lambda.detach() + FP8_WEIGHT", "test_model.py test_layers_multiply_by_the_same"),
        ("late layers read the stream", "layer.reads in (None, keep):", "True:",
         "test_model.py test_losses_and_gradients program's"),
        ("paired layers get the documents of single ones", "documents[layer.paired], windows",
         "documents[False], windows", "test_model.py test_losses_and_gradients program's"),
        ("every layer's window is short", "windows[layer.window], scale", 'windows["short"], scale',
         "test_model.py test_losses_and_gradients program's"),
        ("targets: the second next one is of the next document", "torch.where(left >= k,", "torch.where(left >= 0,",
         "test_model.py test_targets_end_with"),
        ("targets: the first token behind a document is only the nearest one's", "torch.where(left >= k,",
         "torch.where(left > k - (k == 0),", "test_model.py test_targets_end_with"),
        ("a target left out of the softmax counts as the last class",
         "torch.where(classes[places] == rows, places, -1)", "places",
         "test_model.py test_a_softmax_over_some"),
        ("the prefix is that of the last target", "[*ahead, prefixes[targets]]", "[*ahead, prefixes[ahead[-1]]]",
         "test_model.py test_the_next_tokens_prefix"),
        ("n-grams are without signs", "(widened(ngrams).sum(0) * F.embedding(inputs, signs)).to",
         "widened(ngrams).sum(0).to", "test_model.py test_losses_and_gradients program's"),
        ("n-grams: signs are the run's own", ", generator=torch.Generator().manual_seed(0))", ")",
         "test_model.py test_signs_are_the_same"),
        ("n-grams: signs differ with a token's case", "(2 * signs - 1)[canonical.long()]", "(2 * signs - 1)",
         "test_model.py test_signs_are_the_same"),
        ("the gradient of some classes is added to the first rows", "Lookup.apply(self.embed, classes,",
         "Lookup.apply(self.embed, every_row[: len(classes)],", "test_model.py test_a_softmax_over_some"),
        ("spellings: inputs have none", "x = norm(x + F.embedding(spelling[inputs], spellings))", "x = norm(x)",
         "test_model.py test_losses_and_gradients program's"),
        ("spellings: the head has none", " + self.shared_embeddings(classes)", "",
         "test_model.py test_losses_and_gradients program's"),
        ("spellings: each token keeps its gradient for itself",
         "add_rows(table_gradient(self.spellings), self.spelling,",
         "add_rows(table_gradient(self.spellings), self.spelling_order.sort().values.int(),",
         "test_model.py test_losses_and_gradients program's"),
        ("spellings: the optimizer forgets their gradient", 'if name == "spellings":', "if False:",
         "test_optimizer.py test_each_parameter_follows spellings"),
        ("head: what is at hand in FP8 is converted again", "if x_fp8 is None else x_fp8", "if True else x_fp8",
         "test_kernels.py test_head_loss_takes_x"),
        ("copying: queries lack the gain", "(gain * q.size(-1) ** -0.5 * q)", "(q.size(-1) ** -0.5 * q)",
         "test_kernels.py test_losses_with_copying_are cpu-float64"),
        ("copying: the model's own distribution is mixed in unscaled",
         "torch.logaddexp(sentinel - first, matching)", "torch.logaddexp(-first, matching)",
         "test_kernels.py test_losses_with_copying_are cpu-float64"),
        ("copying: further targets are copied, too", "torch.stack((first, *others))",
         "torch.stack((first, *(other - losses[0] + first for other in others)))",
         "test_model.py test_losses_and_gradients program's"),
        ("copying: does not reach the beginning of the longest document",
         'self.copy_window = H, hp.fp8 == "auto", hp.train_max_seq_len',
         'self.copy_window = H, hp.fp8 == "auto", hp.train_max_seq_len - 1', "test_model.py test_a_target_is_copied"),
        ("copying: without it there is one", "        if len(self.copy_qk):\n", "        if True:\n",
         "test_model.py test_without_copying"),
        ("copying: what it looks for starts too large", "self.copy_qk.normal_(std=C**-0.5)", "self.copy_qk.normal_()",
         "test_model.py test_what_copying"),
        ("logits: what stood there is copied, not what followed", "p.scatter_add_(-1, batch.targets.long()",
         "p.scatter_add_(-1, batch.inputs.long()", "test_model.py test_logits_are_those"),
        ("logits lack the softcap", "z = softcapped(x[rows]",
         "z = widened(x[rows]", "test_model.py test_logits_are_those"),
        # Optimizer
        ("Polar Express: coefficients in the other order", "symmetric_product(gram, scale, *coefficients)",
         "symmetric_product(gram, scale, *coefficients[::-1])", "test_optimizer.py test_polar_express_is_four"),
        ("Polar Express: X is divided by its norm each time", "        scale = square = one\n", "",
         "test_optimizer.py test_polar_express_is_four"),
        ("Adam: decay grows weights where the update grows them",
         "torch.where(update * master > 0, lr * lr * wd * master, 0)",
         "torch.where(update * master < 0, lr * lr * wd * master, 0)", "test_optimizer.py test_adam_decays"),
        ("Adam: decay by the learning rate, not its square", "lr * lr * wd * master, 0)\n", "lr * wd * master, 0)\n",
         "test_optimizer.py test_adam_decays"),
        ("n-grams: gradients stay for the next step", "grad[:rows].zero_()", "pass",
         "test_ngram.py test_gradients_are_cleared"),
        ("n-grams: the table stays after the warm-up", 'row_states = ("p", "v", "last")', 'row_states = ("v", "last")',
         "test_ngram.py test_the_warm_up_leaves_no_trace"),
        ("n-grams: a step moves what the step before took", "self.exchange, self.filled = exchange, None",
         "self.filled = None", "test_ngram.py test_gradients_are_cleared"),
        ("n-grams: rows that have been fetched ahead are fetched again", "if exchange is not self.filled:", "if True:",
         "test_ngram.py test_rows_come_from_their_owners 2-"),
        ("rows of several ranks: another mode stays on", "torch.use_deterministic_algorithms(True, warn_only=True)",
         "pass", "test_optimizer.py test_rows_of_several_ranks"),
        ("n-grams: rows fetched ahead of a reset are the next step's", "if whole:  # as the table is reset, too",
         "if False:", "test_ngram.py test_rows_come_from_their_owners 2-"),
        ("n-grams: rows fetched ahead are those of every step that follows", "= exchange, None", "= exchange, exchange",
         "test_ngram.py test_rows_come_from_their_owners 2-"),
        ("Adam: betas change places", "beta1, beta2 = self.row.betas", "beta2, beta1 = self.row.betas",
         "test_optimizer.py test_each_parameter_follows gate_in"),
        ("Adam's kernel: the first multiplier is for all", "(multipliers_ptr + part)", "(multipliers_ptr)",
         "test_kernels.py test_adams_kernel cpu-float32"),
        ("momentum's kernel: keeps what it was", "m, mask=inside)\n    tl.store(out_ptr",
         "0, mask=i < 0)\n    tl.store(out_ptr", "test_kernels.py test_nesterovs_kernel cpu-float32"),
        ("Adam's kernel: decays whatever the update's sign", "tl.where(u * master > 0, lr", "tl.where(u * u > 0, lr",
         "test_kernels.py test_adams_kernel cpu-float32"),
        ("Adam: bias correction counts from 0", "self.updates += 1\n        beta1", "beta1",
         "test_optimizer.py test_the_first_adam_update"),
        ("momentum: looks ahead from the gradient's side", "return (grad + (m - grad) * momentum)",
         "return (m + (grad - m) * momentum)", "test_optimizer.py test_each_parameter_follows mlp_bank"),
        ("momentum: moves after the look-ahead",
         "m += (grad - m) * (1 - momentum)\n    return (grad + (m - grad) * momentum).to(out_dtype)",
         "ahead = (grad + (m - grad) * momentum).to(out_dtype)\n    m += (grad - m) * (1 - momentum)\n    return ahead",
         "test_optimizer.py test_each_parameter_follows mlp_bank"),
        ("NorMuon: the norm is not kept", "u = u * (scale * (old_norm / new_norm.clamp_min(1e-10)))", "u = u * scale",
         "test_optimizer.py test_variance_reduction_evens"),
        ("NorMuon: decay only where it is against the update", "torch.where(u * master >= 0, decay * master, 0)",
         "torch.where(u * master <= 0, decay * master, 0)", "test_optimizer.py test_normuon_decays"),
        ("NorMuon: evens out the shorter side", "shape = (N, rows, 1) if rows >= columns else (N, 1, columns)",
         "shape = (N, rows, 1) if rows <= columns else (N, 1, columns)",
         "test_optimizer.py test_each_parameter_follows mlp_bank"),
        ("the bits beyond bf16 are lost", "low_bits.copy_(low)", "low_bits.zero_()",
         "test_optimizer.py test_a_bf16_bank_follows"),
        ("a rank's first matrix takes the first multiplier", "row.lr[(first + i) % len(row.lr)]",
         "row.lr[i % len(row.lr)]", "test_optimizer.py test_a_matrix_keeps_its_multiplier"),
        ("reset leaves the bits beyond bf16", "for name in (*self.states, *self.row_states):",
         'for name in {*self.states, *self.row_states} - {"low_bits"}:', "test_optimizer.py test_reset_forgets"),
        ("does not wait for the all-reduce", "    def reduced(self) -> Tensor:\n        self.work.wait()\n",
         "    def reduced(self) -> Tensor:\n", "test_distributed.py test_the_gradient_is_that_of_one_process 2-"),
        ("a shard's rows begin one late", "np.searchsorted(r, share * np.arange(1, size))",
         "np.searchsorted(r, share * np.arange(1, size) + 1)", "test_optimizer.py test_gradient_rows_go_to"),
        ("a rank's own rows are added twice",
         "        by_owner[rank][rank] = by_owner[rank][rank][:0]  # what this rank owns stays\n", "",
         "test_distributed.py test_the_gradient_is_that_of_one_process 2- _embed"),
        ("rows that were sent are sent again", "            grad.index_fill_(0, self.own_lookups, 0)", "",
         "test_distributed.py test_the_steps_taken 2- _embed"),
        ("Adam steps on even steps", "(step + 1) % adam_every == 0", "step % adam_every == 0",
         "test_optimizer.py test_adams_parameters_rest"),
        ("Adam steps on odd steps only in all stages", "adam_every=schedule.stage(step).adam", "adam_every=2",
         "test_training.py test_adam_updates_in_each_step"),
        ("averages: not in checkpoints", 'states = ("m", "second_moment", "low_bits", "average")',
         'states = ("m", "second_moment", "low_bits")', "test_faults.py test_a_killed_run_goes_on"),
        ("averages: the other ranks' shares stay as they are",
         "slice.copy_(average)\n                slot.communication.gather()\n", "slice.copy_(average)\n",
         "test_distributed.py test_all_ranks_begin_and_end 2"),
        ("averages: begin with zeros", "return 1.0 if ahead + AVERAGE_EVERY >= self.averaged",
         "return 0.5 if ahead + AVERAGE_EVERY >= self.averaged", "test_schedule.py test_an_average_begins"),
        # Data
        ("Python waits for a read that nobody wants", "target=work, daemon=True", "target=work",
         "test_loader.py test_python_ends"),
        ("what a read in the background raised is lost", "future.set_exception(error)", "future.set_result(None)",
         "test_loader.py test_python_ends"),
        ("a bracket in the data's folder is a pattern", "root = escape(str(ROOT))", "root = str(ROOT)",
         "test_loader.py test_a_bracket"),
        ("a shard may be longer than its header says", "size == HEADER_BYTES + 2 * tokens",
         "size >= HEADER_BYTES + 2 * tokens", "test_loader.py test_a_file_that_is_not_a_whole_shard"),
        ("the first id beyond the vocabulary is read", "if count and tokens.max() >= vocab_size:",
         "if count and tokens.max() > vocab_size:", "test_loader.py test_an_id_outside"),
        ("a micro-batch lacks its last target", "np.searchsorted(ends, before + num_tokens + 1)",
         "np.searchsorted(ends, before + num_tokens)", "test_loader.py test_any_lengths"),
        ("a document that was cut is dealt again", "            first = last + 1\n", "            first = last\n",
         "test_loader.py test_documents_are_dealt_in_order"),
        ("documents are cut a token late", "np.minimum(self.lengths, max_seq_len)",
         "np.minimum(self.lengths, max_seq_len + 1)", "test_loader.py test_documents_are_cut"),
        ("a run that goes on begins the shard anew", "        self.shard.next_document = document\n", "",
         "test_loader.py test_from_any_steps_position"),
        ("every rank takes the first micro-batches", "join_micro_batches(dealt[rank :: world.size],",
         "join_micro_batches(dealt[:: world.size],", "test_loader.py test_a_rank_takes_every_size_th"),
        ("n-grams: the row for what lacks tokens is given out", "hashed % last)", "hashed % (last + 1))",
         "test_ngram.py test_what_lacks_tokens"),
        ("n-grams: look back beyond a document", "before < order - 1", "np.arange(len(tokens)) < order - 1",
         "test_ngram.py test_rows_are_hashes 65536-4096"),
        ("n-grams: trigrams have the bigrams' rows", "hashed % last) + k * (last + 1)", "hashed % last)",
         "test_ngram.py test_rows_are_hashes 65536-4096"),
        ("n-grams: slots of another rank's rows", "slots, taken = found_in(by_rank[rank], own)",
         "slots, taken = found_in(by_rank[-1], own)", "test_ngram.py test_slots_stand_for 2-1"),
        ("n-grams: ranks are given what others own", "unique(rows[rows // share == rank])", "unique(rows)",
         "test_ngram.py test_slots_stand_for 2-1"),
        ("validation: a document ends a token early", "1 + np.flatnonzero(chunk[1:-1] == hp.bos)",
         "np.flatnonzero(chunk[1:-1] == hp.bos)", "test_loader.py test_the_documents_of_a_validation_chunk"),
        ("validation: ranks overlap", "(dealt[i : i + world.size] for i in range(0, len(dealt), world.size))",
         "(dealt[i : i + world.size] for i in range(0, len(dealt) - world.size))",
         "test_loader.py test_ranks_cover_every_validation_chunk"),
        ("ranks of a vocabulary may be left out", "require(sorted(ids.values()) == [*range(hp.vocab_size - 1)],",
         "require(len(ids) == hp.vocab_size - 1,", "test_loader.py test_a_file_that_is_no_vocabulary"),
        ("a token is its own prefix", "range(len(token) - 1, 0, -1)", "range(len(token), 0, -1)",
         "test_loader.py test_a_tokens_prefix"),
        ("a token's prefix is the shortest", "range(len(token) - 1, 0, -1)", "range(1, len(token))",
         "test_loader.py test_a_tokens_prefix"),
        ("classes of a softmax are the first", "others[(np.arange(more) * len(others) + first) // more]",
         "others[:more]", "test_loader.py test_classes_of_a_softmax"),
        ("more targets than classes: the targets", "return np.flatnonzero(taken) if more >= 0 else None",
         "return np.flatnonzero(taken)", "test_loader.py test_classes_of_a_softmax"),
        ("classes are a rank's own", "tokens[1:] for tokens, _ in dealt]",
         "tokens[1:] for tokens, _ in dealt[rank::ranks]]", "test_loader.py test_all_micro_batches_of_a_step"),
        ("joined: the second one's documents begin where the first one's do", "edges + i * edges[-1]", "edges",
         "test_loader.py test_joined_micro_batches"),
        ("joined: a token more than is allowed", "n * num_tokens <= hp.micro_batch_tokens",
         "n * num_tokens <= hp.micro_batch_tokens + 1", "test_loader.py test_as_many_micro_batches"),
        # Schedule
        ("a stage begins a step late", "if step >= start)", "if step > start or not i)",
         "test_schedule.py test_a_stages_row_says"),
        ("documents are cut as in no stage", "min(stage.max_seq_len, self.hp.train_max_seq_len)",
         "self.hp.train_max_seq_len", "test_loader.py test_a_stage_cuts"),
        ("the learning rate of the first stage", "(1 - t) * self.stage(step).lr", "(1 - t) * self.hp.stages[0].lr",
         "test_schedule.py test_the_learning_rate_is_the_stages"),
        ("the cooldown takes the rest of the run", "start = int(end * (1 - self.hp.cooldown_frac))",
         "start = int(end * self.hp.cooldown_frac)", "test_schedule.py test_in_the_cooldown"),
        ("momentum cools down before the extension", "self.hp.total_steps - self.cooldown)",
         "self.scheduled - self.cooldown)", "test_schedule.py test_momentum_rises"),
        ("multi-token weights move from the run's start", "t = (step - self.starts[i]) / max", "t = step / max",
         "test_schedule.py test_multi_token_weights"),
        ("a stage's last prefix weight is its first", "strict=True), stage.prefix]",
         "strict=True), stage.prefix[:1] * 2]", "test_schedule.py test_the_prefixs_weight"),
        ("short and long window change places", '"short": short * self.hp.window_block, "long": long *',
         '"short": long * self.hp.window_block, "long": short *', "test_schedule.py test_windows_are_counted"),
        ("more classes than there are are taken", "stage.classes if stage.classes < self.hp.padded_vocab else 0",
         "stage.classes", "test_loader.py test_a_step_has_the_classes"),
        # Model
        ("the caches do not hear of what operators return", "inspect.getsource(empty_results).encode()", 'b""',
         "test_compile_cache.py test_a_warm_cache"),
        # Train
        ("all ranks compile the same at the same time", "first = self.world.rank * len(tasks) // self.world.size",
         "first = 0", "test_training.py test_gpus_compile_in_turns"),
        ("a rank compiles what is ahead of its turn only", "for task in tasks[first:] + tasks[:first]:",
         "for task in tasks[first:]:", "test_training.py test_gpus_compile_in_turns"),
        ("the cache keeps a validation's rows", "        self.model.ngrams = self.ngrams.p\n        return losses",
         "        return losses", "test_training.py test_a_run_after_a_warm_up float32"),
        ("the deterministic switch is a setting that Dynamo takes back",
         "torch.use_deterministic_algorithms(hp.deterministic, warn_only=True)",
         "torch._inductor.config.deterministic = hp.deterministic",
         "test_training.py test_the_deterministic_switch True"),
        ("micro-batches with and without classes share a graph", "(self.stage_index, micro_batch.classes is None))",
         "(self.stage_index, False))", "test_training.py test_a_micro_batch_of_too_many"),
        ("grad_scale is taken as 1", "self.loss_scale = hp.grad_scale / MICRO_BATCHES",
         "self.loss_scale = 1.0 / MICRO_BATCHES", "test_distributed.py test_the_optimizer_sees_an_eighth 1-"),
        ("grad_scale is not shared by the micro-batches", "self.loss_scale = hp.grad_scale / MICRO_BATCHES",
         "self.loss_scale = hp.grad_scale / (MICRO_BATCHES // world.size)",
         "test_distributed.py test_the_optimizer_sees_an_eighth 2-"),
        ("a run that goes on has no prefixes", "self.model.prefixes.copy_(prefix_table(self.hp))",
         "progress or self.model.prefixes.copy_(prefix_table(self.hp))",
         "test_training.py test_prefixes_are_looked_up"),
        ("a prefix without a weight is a target", "prefix = any(self.schedule.stage(step).prefix)", "prefix = True",
         "test_training.py test_a_prefix_is_a_target"),
        ("validation counts prefixes", "one, head_chunk=32_768, prefix=False", "one.repeat(2), head_chunk=32_768",
         "test_training.py test_validation_counts"),
        ("frequencies follow the short window",
         "self.long_windows = [stage.long_window * hp.window_block for",
         "self.long_windows = [stage.short_window * hp.window_block for",
         "test_training.py test_rotary_frequencies"),
        ("validation: a rank's own tokens only",
         "        if self.world.size > 1:\n            dist.all_reduce(total)\n", "",
         "test_distributed.py test_two_processes_in_bfloat16"),
        ("the warm-up trains the model", "        self.model.load_state_dict(saved)\n", "",
         "test_training.py test_warm_up_puts_back float32"),
        ("the warm-up leaves the rotary frequencies", "        self.model.yarn.reset()\n        self.stage_index = 0",
         "        self.stage_index = 0", "test_training.py test_warm_up_puts_back float32"),
        ("a validation sees as far as the stage to come", "else self.windows(max(step - 1, 0))",
         "else self.windows(step)", "test_training.py test_validation_sees"),
        ("the final validation has the windows of training", "return self.window_tokens(*FINAL_WINDOWS) if step ==",
         "return self.windows(step - 1) if step ==", "test_training.py test_validation_sees"),
        ("the epoch counts up a file early", "1 + (begun - 1) // files", "1 + begun // files",
         "test_loader.py test_a_run_says_in_its_log"),
        ("steps have no line in the log",
         'self.log.write(f"step:{step + 1}/{self.hp.total_steps} {self.clock.text(step + 1)}", step=step + 1)', "pass",
         "test_faults.py test_a_log_says_what"),
        ("a gradient that is infinite is none of its business", "if not math.isfinite(value)]", "if math.isnan(value)]",
         "test_faults.py test_a_number_that_is_not_finite poison_gradient"),
        ("the clock forgets what it had", "self.elapsed += 1000 * (time.perf_counter() - self.since)",
         "self.elapsed = 1000 * (time.perf_counter() - self.since)", "test_training.py test_the_clock_leaves_out"),
        # main
        ("a copy that stands alone ends in a stack trace", 'sys.exit(f"train_gpt.py: error: {error}")', "raise error",
         "test_errors.py test_a_copy_without_its_tools"),
        ("the plain log is without the source", "head = [source, rule,", "head = [rule,",
         "test_errors.py test_a_copy_alone"),
        ("every rank has a run_id of its own", "dist.broadcast_object_list(of_rank_0, src=0)", "pass",
         "test_faults.py test_a_run_id_that_was_drawn"),
    ],
    "run.sh": [
        ("three processes share a step", "1 | 2 | 4 | 8) ;;", "1 | 2 | 3 | 4 | 8) ;;",
         "test_run_sh.py test_a_wrong_count NGPU-3"),
        ("104 shards", "$shards -le 103 ]]", "$shards -le 104 ]]",
         "test_run_sh.py test_a_wrong_count TRAIN_SHARDS-104"),
        ("takes all of six GPUs", "for n in (1, 2, 4, 8) if n <= max(gpus, 1))",
         "for n in (1, 2, 4, 6, 8) if n <= max(gpus, 1))", "test_run_sh.py test_on_gpus_it_fetches"),
        ("fetches FineWeb for a validation file of one's own", '{"train_files", "val_files"} & overrides.keys()',
         '{"train_files"} & overrides.keys()', "test_run_sh.py test_a_run_that_is_resumed"),
        ("--resume=auto never fetches",
         'hp.resume and (hp.resume != "auto" or tool.checkpoints_of(hp.run_id, Path(hp.log_dir)))',
         "hp.resume", "test_run_sh.py test_resume_auto"),
        ("ranks meet at the host's name", "--rdzv_endpoint=127.0.0.1:0 --local-addr=127.0.0.1 ",
         "--rdzv_endpoint=127.0.0.1:0 --local-addr=$(hostname) ", "test_run_sh.py test_processes_of_one_host"),
    ],
    "data/cached_fineweb10B.py": [
        ("train shards count from 0", "for i in range(1, num_train + 1))", "for i in range(num_train))",
         "test_data_scripts.py test_download_names_shards"),
        ("an expired token is an error like others", "return status in (401, 403)", "return status in (403,)",
         "test_data_scripts.py test_a_token_that_the_hub_refuses"),
        ("a shard that came out wrong is kept", "            if problem is None:\n                os.replace",
         "            if again or problem is None:\n                os.replace",
         "test_data_scripts.py test_download_deletes"),
        ("does not wait for another download",
         '            tell(f"waiting for another download into {folder}")\n            lock.acquire()\n',
         '            tell(f"waiting for another download into {folder}")\n',
         "test_data_scripts.py test_of_two_downloads"),
    ],
    "data/sample.py": [
        ("validation documents are trained on", "if i % VAL_EVERY != VAL_EVERY - 1]", "if i % VAL_EVERY]",
         "test_data_scripts.py test_sample_decodes"),
        ("a byte's id is another's", '*range(ord("¡"), ord("¬") + 1)', '*range(ord("¡"), ord("¬"))',
         "test_data_scripts.py test_sample_ids"),
    ],
    "data/shards.py": [
        ("a shard is written in place", 'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
         "temporary = path", "test_data_scripts.py test_a_failed_write"),
        ("more bytes than promised are no problem", "if size > expected:", "if size > 2 * expected:",
         "test_data_scripts.py test_shard_problem_says"),
        ("the first id beyond the vocabulary is none", "if highest >= vocab_size:", "if highest > vocab_size:",
         "test_data_scripts.py test_shard_problem_finds"),
    ],
    "data/tokenize_text.py": [
        ("a separator across two pieces is not found", "end = len(buffer) - max(longest - 1, 1)",
         "end = len(buffer) - 1", "test_data_scripts.py test_separators_are_found"),
        ("<|endoftext|> in a text begins a document", "encoding.encode_ordinary(piece.text)",
         'encoding.encode(piece.text, allowed_special="all")', "test_data_scripts.py test_a_literal_endoftext"),
        ("workers' results come in another order", "starts, future = waiting.popleft()",
         "starts, future = waiting.pop()", "test_data_scripts.py test_the_result_does_not_depend"),
        ("validation has its share of the training tokens", "args.val_fraction * (val.total + train.total)",
         "args.val_fraction * train.total", "test_data_scripts.py test_validation_gets"),
        ("old shards stay beside new ones", "            path.unlink()\n        for path in existing_shards(staging",
         "            pass\n        for path in existing_shards(staging",
         "test_data_scripts.py test_existing_shards_are_kept"),
    ],
    "data/verify.py": [
        ("what is wrong ends well", "return 1 if verify(args.folder", "return 0 if verify(args.folder",
         "test_verify.py test_a_shard_that_is_wrong"),
        ("a shard need have no document", "goes_on=set_of(path) == sound_set", "goes_on=True",
         "test_verify.py test_a_shard_without_documents"),
        ("a sum without its shard is no matter", 'wrong += 1\n        tell(f"{name!r}', 'tell(f"{name!r}',
         "test_verify.py test_checksums_are_those"),
    ],
    "records/answer.py": [
        ("height and slope of a line are taken as independent", "(x - self.x0) ** 2 / self.spread)",
         "(x**2 + self.x0**2) / self.spread)", "test_race.py test_time_to_the_target_and_its_error"),
        ("two parameters of a line cost one degree of freedom", "math.sqrt(rest / (n - 2))",
         "math.sqrt(rest / (n - 1))", "test_race.py test_time_to_the_target_and_its_error"),
        ("the ratio is the first contestant's to this one's", "ratio = self.seconds / first.seconds",
         "ratio = first.seconds / self.seconds", "test_race.py test_a_race_of_known_laws"),
        ("a run's time is one GPU's", "return run.seconds * max(len(run.gpus), 1)", "return run.seconds",
         "test_race.py test_time_to_the_target_follows"),
        ("the time's own error is left out", "math.hypot(time.slope * at * u_error, time.error_at(at))",
         "time.slope * at * u_error", "test_race.py test_time_to_the_target_and_its_error"),
        ("a target is never outside", "outside = not min(steps) <= at <= max(steps)", "outside = not 0 <= at",
         "test_race.py test_time_to_the_target_and_its_error"),
        ("t-interval with n degrees of freedom", "quantile(s.n - 1) * s.error", "quantile(s.n) * s.error",
         "test_race.py test_a_race_of_known_laws"),
        ("a one-sided interval", "t.ppf(0.975, degrees)", "t.ppf(0.95, degrees)",
         "test_race.py test_a_race_of_known_laws"),
        ("old minus new", "[of(new) - of(old) for new, old in pairs]", "[of(old) - of(new) for new, old in pairs]",
         "test_race.py test_a_race_of_known_laws"),
        ("noise is a difference", "if abs(value) <= half else", "if abs(value) <= half / 9 else",
         "test_race.py test_what_is_not_beyond"),
    ],
    "records/bench.py": [
        ("a time that overlaps counts twice", "total += max(0.0, end - max(start, reached))", "total += end - start",
         "test_bench.py test_time_counts_once"),
        ("W_o is in FP8", "(mlp + attention - outputs)", "(mlp + attention)", "test_bench.py test_a_product_takes"),
        ("the median of even and odd steps together",
         "kinds = [[ms for step, ms in times if step % 2 == odd] for odd in (0, 1)]",
         "kinds = [[ms for _, ms in times]]", "test_bench.py test_even_and_odd"),
        ("a profile counts steps that heat the GPU up", "if begin <= start < end:", "if start < end:",
         "test_bench.py test_a_gpus_profile"),
        ("what runs while the optimizer is launched is its own", "e.name == \"optimizer\" and e.device_type == device",
         "e.name == \"optimizer\" and e.device_type == kind.CPU", "test_bench.py test_a_gpus_profile"),
    ],
    "records/checkpoint.py": [
        ("a run that was stopped has ended well", 'watch.end(143, f"train_gpt.py', 'watch.end(0, f"train_gpt.py',
         "test_faults.py test_sigterm_leaves [1]"),
        ("the vocabulary's file takes part in every checkpoint", "vocabulary=self.vocabulary, rows",
         "vocabulary=vocabulary_in_words(train_gpt, hp), rows", "test_ngram.py test_a_run_whose_vocabulary_is_lost"),
        ("a run goes on with another vocabulary",
         'require(vocabulary_in_words(train_gpt, hp) == content["vocabulary"], told)',
         "require(vocabulary_in_words(train_gpt, hp), told)", "test_faults.py test_a_run_goes_on_with_its_vocabulary"),
        ("a piece that was not written goes unnoticed", "errors = [error for _, error in rows if error]", "errors = []",
         "test_ngram.py test_no_checkpoint_is_left"),
        ("the oldest checkpoints are kept", "for old in done[:-CHECKPOINTS_KEPT] + unfinished:",
         "for old in done[CHECKPOINTS_KEPT:] + unfinished:", "test_faults.py test_the_newest_two_checkpoints"),
        ("pieces outlive their checkpoint", 'if not piece.with_name(f"{piece.stem[: -len(\'_rows0\')]}.pt").exists():',
         "if False:", "test_ngram.py test_pieces_go_with_their_checkpoint"),
        ("a run goes on from its oldest checkpoint", "for path in reversed(checkpoints_of(run_id, folder)):",
         "for path in checkpoints_of(run_id, folder):", "test_faults.py test_the_hyperparameters_are_the_checkpoints"),
        ("a run goes on with another learning rate", "require(getattr(saved, key) == getattr(hp, key), told)",
         "require(hasattr(saved, key), told)", "test_faults.py test_what_contradicts adam_lr"),
        ("a run goes on with other files", 'require(shard in by_words, f"--{name}', 'require(by_words, f"--{name}',
         "test_faults.py test_other_files_than gone-train"),
        ("every rank restores the first pieces", 'checkpoint["rows"][rank * own :][:own]',
         'checkpoint["rows"][:own]', "test_ngram.py test_each_of_several_ranks_takes_its_pieces 2"),
        ("a checkpoint is written in place", 'temporary, digest = path.with_suffix(".part"), hashlib.sha256()',
         "temporary, digest = path, hashlib.sha256()", "test_faults.py test_a_process_killed_at_any_moment"),
        ("any sound piece will do", 'require([checksum] == content["rows"][k : k + 1],', "require(checksum,",
         "test_ngram.py test_a_piece_that_is_missing another"),
        ("a checksum is as good as another", "sound = file.read(33) == digest.digest()",
         "sound = len(file.read(33)) == len(digest.digest())", "test_fuzz.py test_a_checkpoint_with_any_bytes_changed"),
        ("a checkpoint may execute code", "mmap=True, weights_only=True)", "mmap=True, weights_only=False)",
         "test_faults.py test_nothing_in_a_checkpoint"),
    ],
    "records/checks.py": [
        ("a rank may be the number of ranks", 'environment_number(train_gpt, "RANK", 0, size - 1)',
         'environment_number(train_gpt, "RANK", 0, size)', "test_command_line.py test_ranks_count"),
        ("only the rank without a GPU sees that it has none", "max(local_rank + 1, local_size) <= gpus",
         "local_rank + 1 <= gpus", "test_command_line.py test_more_processes_than_gpus"),
        ("infinity is a number", "or math.isfinite(value), f", "or not math.isnan(value), f",
         "test_command_line.py test_a_bad_value_is_refused"),
        ("the first line of stages says where they end", "' '.join(map(str, schedule.starts))",
         "' '.join(map(str, schedule.ends))", "test_command_line.py test_the_summary_says"),
        ("half of what could not be saved stays", "            path.unlink()  # half", "            pass  # half",
         "test_faults.py test_a_state_that_is_not_finite"),
        ("ranks may differ in the guard", "if path.stem in sys.modules]", "if path.stem in ('checks', 'checkpoint')]",
         "test_faults.py test_another_source_version"),
        ("a value embedding takes no network", "any((layer.value_embed, layer.xsa,", "any((layer.xsa,",
         "test_command_line.py test_gates_take_a_network"),
        ("BOS may be one beyond the vocabulary", "require(0 <= hp.bos < hp.vocab_size <= 65536, told)",
         "require(0 <= hp.bos <= hp.vocab_size <= 65536, told)",
         "test_command_line.py test_values_that_could_only_fail_later"),
        ("a run_id may be a path", 'require(Path(value).name == value, f"--{name}',
         'require(Path(value).name, f"--{name}', "test_command_line.py test_a_run_id_with_a_path"),
        ("multi-token weights may differ in number", "require(first == last > 0,",
         "require(first > 0,", "test_command_line.py test_a_row_of_stages_that_fails_later"),
        ("a prefix's weight may be less than none", "0 <= weight < math.inf for weight", "weight < math.inf for weight",
         "test_command_line.py test_a_row_of_stages_that_fails_later"),
        ("numbers of tokens may change", "sorted(train_gpt.read_vocabulary(hp).items())",
         "sorted(train_gpt.read_vocabulary(hp))", "test_faults.py test_a_run_goes_on_with_its_vocabulary"),
        ("a sharded dimension need divide by 2 only", "require(not sharded or len(p) % ranks == 0, told)",
         "require(not sharded or len(p) % 2 == 0, told)", "test_command_line.py test_what_is_sharded"),
        ("the last validation token's target may be missing", "require(val_tokens > hp.val_tokens,",
         "require(val_tokens >= hp.val_tokens,", "test_errors.py short validation set"),
        ("FP8 takes tokens in eights", "fits = stage.tokens % (16 * micro_batches) == 0",
         "fits = stage.tokens % (8 * micro_batches) == 0", "test_command_line.py test_what_a_gpu_run_lacks"),
        ("ranks may differ in grad_scale", 'own = ("log_dir", "vocabulary", *train_gpt.FILES)',
         'own = ("log_dir", "vocabulary", "grad_scale", *train_gpt.FILES)',
         "test_faults.py test_what_differs_between_ranks"),
        ("ranks may differ in the program", "for path in (Path(train_gpt.__file__), *tools):", "for path in tools:",
         "test_faults.py test_another_source_version"),
        ("ranks may differ in the tools", "for path in (Path(train_gpt.__file__), *tools):",
         "for path in (Path(train_gpt.__file__), Path(__file__)):", "test_faults.py test_another_source_version"),
    ],
    "records/describe.py": [
        ("every rank tells what would run", "if rank == 0:", "if True:", "test_describe.py test_of_several_processes"),
        ("where there is no GPU the smoke run is told of", "parse_arguments(arguments, has_gpu=True)",
         "parse_arguments(arguments, has_gpu=False)", "test_describe.py test_the_command_needs"),
        ("a resumed run is told of as if it began", 'train_gpt.require(not hp.resume,', 'train_gpt.require(True,',
         "test_describe.py test_a_bad_argument"),
        ("half of PyTorch's compiler is imported", "dtype=self.parameters[row.name].dtype)",
         'dtype=self.parameters[row.name].dtype, device="meta")', "test_describe.py test_the_command_needs"),
        ("the head has all classes", "return min(stage.classes or self.hp.padded_vocab,", "return max(0,",
         "test_describe.py test_the_head_computes"),
        ("a query does not meet its own key", "2 * widths * C * (windows[name] + 1)", "2 * widths * C * windows[name]",
         "test_describe.py test_a_query_meets"),
        ("a position copies from the whole document", "hp.copy_width * (hp.train_max_seq_len - 1)",
         "2 * hp.copy_width * (hp.train_max_seq_len - 1)", "test_describe.py test_a_position_that_may_copy"),
        ("an MLP in every row", "2 * len(program.MLP_LAYERS) * p", "2 * len(program.LAYERS) * p",
         "test_describe.py test_the_products_are"),
        ("a network without its first matrix", 'hidden = len(p["gate_in"]) * C + sum', "hidden = sum",
         "test_describe.py test_the_products_are"),
        ("backward as long as forward", "{part: 3 * flop for", "{part: 2 * flop for",
         "test_describe.py test_training_takes"),
        ("all states on every process", "own = whole // size if slot.row.sharded else whole", "own = whole",
         "test_describe.py test_gradients_and_states"),
        ("without the positions", "positions * total_bytes((yarn.cos, yarn.sin, yarn.position))",
         "positions * total_bytes((yarn.cos, yarn.sin))", "test_describe.py test_angles_signs"),
        ("without the signs", "(run.hp.model_dim * run.dtype.itemsize + 3 * torch.int32.itemsize)",
         "3 * torch.int32.itemsize", "test_describe.py test_angles_signs"),
        ("a prefix without a weight is told of", 'prefix if any(stage.prefix) else "-"', "prefix",
         "test_describe.py test_a_prefix"),
        ("one gradient of the logits", '(2 if "head" in run.fp8 else size)', '(1 if "head" in run.fp8 else size)',
         "test_describe.py test_the_head_computes"),
        ("the largest micro-batch is the smallest", "return max(sum", "return min(sum",
         "test_record_values.py test_a_run_takes_the_memory"),
        ("a switch is left out", 'if value is True and name != "gates"',
         'if value is True and name not in ("gates", "xsa")', "test_describe.py test_every_layer"),
        ("every network is the first", "            networks += 1\n", "", "test_describe.py test_a_network_gives"),
        ("tall matrices as wide ones", "(hp.muon_lr * tall, hp.muon_wd)", "(hp.muon_lr, hp.muon_wd)",
         "test_describe.py test_learning_rates"),
        ("parameters without tables", 'return f"{title}\\n{aligned(rows, 3)}\\n{count:,}',
         'return f"{title}\\n{aligned(rows, 3)}\\n{count - 1:,}', "test_describe.py test_parameters_add_up"),
        ("the last step of a stage is its first", 'f"{texts[0]} to {texts[-1]}"', 'f"{texts[0]} to {texts[0]}"',
         "test_describe.py test_stages_have"),
        ("a lane ends where it begins", "row_y(max([begin, *uses]))", "row_y(begin)",
         "test_describe.py test_a_kept_output"),
        ("the paper ends with the layers", "top + round(end) + PITCH", "top + round(end) - PITCH",
         "test_describe.py test_all_of_a_picture"),
        ("no corners", "pieces.append([piece[0], *inner, piece[-1]])", "pieces.append([piece[0], piece[-1]])",
         "test_describe.py test_a_line_has_its_corners"),
        ("the schedule without the cut of documents", 'Line("documents are cut at", [schedule.size(step)[1]',
         'Line("documents are cut at", [schedule.size(0)[1]', "test_describe.py test_the_readmes_pictures"),
        ("an edit of the layers is not drawn", "lines += layer_columns(layers) + lane_columns(layers)",
         "lines += lane_columns(layers)", "test_describe.py test_an_edit_of_a_table"),
        ("a folder that is not there ends in a stack trace", "except (OSError, train_gpt.UserError)",
         "except train_gpt.UserError", "test_describe.py test_a_folder_that_is_not_there"),
    ],
    "records/guard.py": [
        ("a letter that the terminal lacks ends the run", 'text.encode(self.stream.encoding, "backslashreplace")',
         "text.encode(self.stream.encoding)", "test_faults.py test_a_terminal_shows_letters"),
        ("a run that failed has ended well",
         "end = 1, self._error(self.rank, self.reason_of(error)), details",
         "end = 0, self._error(self.rank, self.reason_of(error)), details",
         "test_errors.py test_three_processes_are_refused_by"),
        ("the reason is not in the log", "self.log.write(message, console=False)", "pass",
         "test_faults.py test_a_single_process_that_hangs"),
        ("the end of the terminal ends what nohup started", "if signal.getsignal(number) is not signal.SIG_IGN:",
         "if True:", "test_faults.py test_a_terminal_that_goes_away"),
        ("a hang is none", "now - self.moved > self.hang_timeout:", "self.moved - now > self.hang_timeout:",
         "test_faults.py test_a_single_process_that_hangs"),
    ],
    "records/logfile.py": [
        ("the log's lock is not taken", "fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
         "test_faults.py test_a_second_process_that_goes_on"),
        ("a line that a full disk does not take is dropped", 'self.unwritten += text.encode(errors="replace") + b"\\n"',
         'self.unwritten = text.encode(errors="replace") + b"\\n"', "test_faults.py test_when_the_disk_has_room_again"),
        ("a log that was removed comes back empty", "self.unwritten = old.read() + self.unwritten",
         'self.unwritten = b"" + self.unwritten', "test_faults.py test_a_log_folder_that_is_removed"),
        ("the log does not say what it ran on", '        self.write("\\n".join(told), console=False)\n', "",
         "test_faults.py test_a_log_says_what"),
        ("a run fails at its end for a vocabulary that is gone",
         "with suppress(self.train_gpt.UserError, ImportError):", "with suppress(ImportError):",
         "test_faults.py test_a_run_whose_vocabulary_or"),
    ],
    "records/picture.py": [
        ("a lower loss stands higher", "self.height * (self.losses[1] - loss)", "self.height * (loss - self.losses[0])",
         "test_records.py test_the_readmes_picture"),
        ("time of one GPU of several", "(max(gpus) * group.time_at(step), group.loss_at(step))",
         "(group.time_at(step), group.loss_at(step))", "test_records.py test_programs_beside"),
    ],
    "records/precompile.py": [
        ("kernels are launched ahead of the warm-up", "warmup=True", "warmup=False", "test_hopper.py ahead_of"),
        ("kernels are never launched again", "JITFunction.__getitem__ = inherited", "pass", "test_hopper.py ahead_of"),
        ("Adam's kernel is left for the warm-up", "trainer.update(step | 1)", "trainer.update(step & ~1)",
         "test_hopper.py ahead_of"),
        ("what compiles beside a run outlives it", "os.kill(pid, signal.SIGKILL)", "os.kill(pid, 0)",
         "test_precompile.py no_more_use"),
        ("... outlives one that is killed", "ctypes.CDLL(None).prctl(1, signal.SIGKILL)", "pass",
         "test_precompile.py killed"),
        ("every rank has one", 'os.environ.get("LOCAL_RANK", "0") != "0"', "False", "test_precompile.py serves_a_host"),
        ("it compiles updates that take gradients", "with torch.no_grad():", "if True:",
         "test_precompile.py would_compile"),
        ("a run fails where SIGCHLD is ignored", "suppress(ProcessLookupError, ChildProcessError)", "suppress()",
         "test_precompile.py nobody_is_told"),
        ("it begins beside a server", " or os.path.exists(server)", "", "test_precompile.py serves_a_host"),
        ("it takes a GPU that takes one process", "return mode.value == 0", "return True",
         "test_precompile.py one_process"),
        ("it takes memory that the run needs", "free < MEMORY or larger or", "", "test_precompile.py would_compile"),
        ("it compiles updates of all matrices", "len(slot.grad) // world.size", "len(slot.grad)",
         "test_precompile.py would_compile"),
    ],
    "records/race.py": [
        ("counts of steps are cut off, not rounded", "max(round(value * length), min(value, 1))",
         "max(int(value * length), min(value, 1))", "test_race.py test_a_length_is_a_share"),
        ("every round has seed 0", '{"seed": str(job.round)}', '{"seed": "0"}', "test_race.py test_runs_are_dealt"),
        ("pairs with the first round's run", "self.logs[job._replace(name=self.names[0])]",
         "self.logs[job._replace(name=self.names[0], round=0)]", "test_race.py test_a_race_of_known_laws"),
        ("a race that was killed forgets who had which card",
         '                self.count(Job(*entry["job"]), entry["card"], entry["seconds"])\n',
         '                Job(*entry["job"])\n', "test_race.py test_a_card_takes"),
        ("two races at work in one folder", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
         "fcntl.flock(file, fcntl.LOCK_SH)", "test_race.py test_a_killed_race"),
        ("a run that was cut short counts", "if new.complete and old.complete]", "]",
         "test_race.py test_a_contestant_that_fails"),
        ("a race with failures has ended well", "return int(bool(missing))", "return 0",
         "test_race.py test_a_contestant_that_fails"),
        ("one failure and a contestant is out", "LAST_FAILURE = 2", "LAST_FAILURE = 1",
         "test_race.py test_a_contestant_that_fails"),
    ],
    "records/report.py": [
        ("--check never fails", '        return 1\n    print(f"{len(found)} records',
         '        return 0\n    print(f"{len(found)} records', "test_records.py test_history_check_fails"),
        ("a slower run is faster", '"faster" if c.time < 0 else "slower"', '"faster" if c.time > 0 else "slower"',
         "test_records.py test_the_seeds_figures"),
        ("no complete run ends well", "return 0 if group.counted else 1", "return 0",
         "test_records.py test_what_is_no_file"),
    ],
    "records/rerun.py": [
        ("the tools of the revision that replaced a program", "revisions[-1]", "revisions[0]",
         "test_race.py test_beside_a_program"),
        ("settings of one log are all logs'", "alike = set.intersection(", "alike = set.union(",
         "test_race.py test_rerun_uses"),
        ("this repository's data wins over the user's", "return {**settings, **given}", "return {**given, **settings}",
         "test_race.py test_rerun_looks_for_data"),
        ("the first of several sources runs", "if len(sources) > 1:", "if len(sources) > 2:",
         "test_race.py test_rerun_refuses"),
    ],
    "records/runlog.py": [
        ("seconds are read as milliseconds", '"s": 1e3,', '"s": 1.0,',
         "test_records.py test_public_logs_in_other_forms"),
        ("text of a log steers the terminal", 'c if c.isprintable() else "?" for c in text[', "c for c in text[",
         "test_records.py test_text_of_a_log"),
        ("the lost steps of a resumed run count", "if limit and int(m[1]) <= limit else", "if int(m[1]) >= 0 else",
         "test_records.py test_steps_beyond"),
        ("a two-sided p-value", 'alternative="less"', 'alternative="two-sided"',
         "test_records.py test_the_seeds_figures"),
        ("the standard error is the deviation", "return self.std / self.n**0.5 if", "return self.std if",
         "test_records.py test_the_steps_saved"),
        ("n degrees of freedom", "t.sf(distance * n**0.5, n - 1)", "t.sf(distance * n**0.5, n)",
         "test_records.py test_how_many_runs"),
        ("a quarter run is compared with a whole one", "< 1.5 * min(*self.steps, *other.steps)",
         "< 15 * min(*self.steps, *other.steps)", "test_records.py test_records_are_compared"),
        ("a run on seven GPUs is a record", "len(run.gpus) == GPUS and all(", "run.gpus and all(",
         "test_records.py test_gpus_of_the_right_kind"),
        ("overrides are no matter", 'Rule("no overrides", not changed,', 'Rule("no overrides", True,',
         "test_records.py test_each_rule_can_be_broken"),
        ("the oldest record of the setting", "for record in reversed(records):", "for record in records:",
         "test_records.py test_watch_compares"),
    ],
    "records/sample.py": [
        ("the likeliest of the fill, not of the text", "model.logits(batch, windows, n - 1)",
         "model.logits(batch, windows, -1)", "test_sample.py test_greedy"),
        ("a long text is cut at its end", "seen = tokens[15 - len(model.yarn.position) // 2 :]",
         "seen = tokens[: len(model.yarn.position) // 2 - 15]", "test_sample.py test_of_a_text_longer"),
        ("a loaded model has the first stage's frequencies", "        model.yarn.grow(*windows)\n", "        pass\n",
         "test_sample.py test_a_loaded_model"),
        ("a loaded model is in the stage to come", "schedule.stage_index(max(step - 1, 0)) + 1]",
         "schedule.stage_index(step) + 1]", "test_sample.py test_a_loaded_model"),
        ("loading a model draws random numbers", "with torch.random.fork_rng([device] if",
         "with torch.no_grad() if True else ([device] if", "test_sample.py test_loading_leaves"),
        ("text for the smoke preset's model in GPT-2's tokens", "        if self.bytewise:\n", "        if False:\n",
         "test_sample.py test_text_of_the_smoke_preset"),
        ("a character of several tokens is lost", 'decoder.decode(vocabulary.decode(token))',
         'vocabulary.decode(token).decode(errors="replace")', "test_sample.py test_a_character"),
        ("goes on behind the document", "islice(takewhile(lambda token: token != hp.bos, made), options.tokens)",
         "islice(made, options.tokens)", "test_sample.py test_the_text_ends"),
        ("control characters reach the terminal", 'if c.isprintable() or c in "\\n\\t" else', "if c else",
         "test_sample.py test_control"),
    ],
    "records/submit.py": [
        ("logs of different sources are one record", "if run.source != runs[0].source:", "if run.source != run.source:",
         "test_records.py test_refused_with_nothing_left"),
        ("a name may be taken on another day", "if p.name[11:].lower() == name.lower()]",
         'if p.name == f"{day}_{name}"]', "test_records.py test_refused_with_nothing_left"),
        ("of a race the shortest length", "max(told['lengths'])", "min(told['lengths'])",
         "test_race.py test_submit_makes"),
    ],
    "records/watch.py": [
        ("behind is ahead", "'ahead' if ahead >= 0 else 'behind'", "'ahead' if ahead <= 0 else 'behind'",
         "test_records.py test_watch_tells"),
        ("the time left does not follow the pace against the record",
         "return (old.time.mean - there) * run.times[run.step] / 1000 / there", "return old.time.mean - there",
         "test_records.py test_watch_tells"),
        ("giving up ends well", "            return 1\n        time.sleep(interval)",
         "            return 0\n        time.sleep(interval)", "test_records.py test_watch_gives_up"),
    ],
}
# fmt: on
FAULTS = [Fault(file, *fault) for file, faults in PLANTED.items() for fault in faults]


def room(fault: Fault) -> str:
    """Where it stands: in train_gpt.py under which banner, else the file."""
    banners = re.findall(r"^# ={20,}\n# (.*)\n# ={20,}", (ROOT / fault.file).read_text().partition(fault.old)[0], re.M)
    return banners[-1] if fault.file == "train_gpt.py" and banners else fault.file


def misfits() -> list[str]:
    """Faults that cannot be planted, and why."""
    found = []
    for fault in FAULTS:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1 or fault.old == fault.new:
            found.append(f"{fault.file}, {fault.name}: its text occurs {count} times instead of once: {fault.old!r}")
    names = [fault.name for fault in FAULTS]
    return found + [f"two faults are called {name!r}" for name in {*names} if names.count(name) > 1]


def copy_repository(folder: Path) -> Path:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def pytest(folder: Path, *arguments: str, seconds: float = 10 * PATIENCE) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and output; no process is left."""
    basetemp = folder.parent / f"{folder.name}.tmp"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={basetemp}", *arguments]
    # Compiled files are told by their source's second of change and length: a fault may share both.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=folder / "tests", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(basetemp, ignore_errors=True)
    return process.returncode, output


def verdict(status: int | None) -> str:
    """What an exit status of pytest says about the fault."""
    if status is None or status < 0:
        return "seen (hangs)" if status is None else f"seen ({signal.Signals(-status).name})"
    return {0: "SURVIVED", 1: "seen"}.get(status, f"ERROR: pytest's exit status is {status}")


def select(folder: Path, faults: list[Fault]) -> dict[str, list[str]]:
    """For what stands in the column `tests` the tests' names, as pytest lists them."""
    files = sorted({fault.tests.split()[0] for fault in faults})
    status, output = pytest(folder, "--collect-only", *files)
    names = [line.removeprefix("tests/") for line in output.splitlines() if "::" in line]
    cases = Counter(name.partition("[")[0] for name in names)
    found = {}
    for text in sorted({fault.tests for fault in faults}):
        file, *words = text.split()
        chosen = [name for name in names if name.startswith(f"{file}::") and all(word in name for word in words)]
        # All cases of a test by its name alone: that of a case may hold anything, and change from time to time.
        whole = {test for test, n in Counter(name.partition("[")[0] for name in chosen).items() if n == cases[test]}
        found[text] = sorted(whole) + [name for name in chosen if name.partition("[")[0] not in whole]
    if status:
        sys.exit(output[-3000:])
    if missing := [text for text, chosen in found.items() if not chosen]:
        sys.exit(f"no tests are called {'; '.join(missing)}")
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="WORD", help="faults with it in name, file or room only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="print the faults, plant none")
    options = parser.parse_args()
    if found := misfits():
        sys.exit("\n".join(found))
    faults = [fault for fault in FAULTS if options.k.lower() in f"{room(fault)} {fault.file} {fault.name}".lower()]
    if options.list or not faults:
        print(*(f"{room(fault)}: {fault.name}: {fault.tests}" for fault in faults), sep="\n")
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants.") as temporary:
        folders: queue.Queue[Path] = queue.Queue()
        for job in range(options.jobs):
            folders.put(copy_repository(Path(temporary, str(job))))
        first = folders.queue[0]
        tests = select(first, faults)
        status, output = pytest(first, *sorted({name for names in tests.values() for name in names}))
        if status:
            sys.exit(f"{output[-6000:]}\nthese tests fail without a fault: nothing planted")
        print(f"without a fault: {output.splitlines()[-1]}", flush=True)

        def plant(fault: Fault) -> str:
            folder, started = folders.get(), time.monotonic()
            path = folder / fault.file
            sound = path.read_text()
            try:
                path.write_text(sound.replace(fault.old, fault.new))
                said = verdict(pytest(folder, "-x", *tests[fault.tests], seconds=PATIENCE)[0])
            finally:
                path.write_text(sound)
                folders.put(folder)
            print(f"{said:8} {room(fault)}: {fault.name} ({time.monotonic() - started:.0f} s)", flush=True)
            return said

        with ThreadPoolExecutor(options.jobs) as pool:
            said = dict(zip(faults, pool.map(plant, faults), strict=True))
    rooms = list(dict.fromkeys(map(room, faults)))
    print("\n| room | planted | seen |\n| --- | --- | --- |")
    for name in [*rooms, "all"]:
        of = [said[fault] for fault in faults if name in (room(fault), "all")]
        print(f"| {name} | {len(of)} | {sum(text.startswith('seen') for text in of)} |")
    through = [fault.name for fault in faults if not said[fault].startswith("seen")]
    print(f"\n{time.monotonic() - begin:.0f} s; survived: {', '.join(through) or 'none'}")
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main())
