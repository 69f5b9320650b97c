"""The model of train_gpt.py on a CPU, in float64, against plain formulas written independently of it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, rows_in_use
from small_run import tables_of

import train_gpt
from train_gpt import GPT, Documents, Hyperparameters, Layer, MicroBatch, Yarn

CPU = torch.device("cpu")
# Only the order of operations differs from the plain formulas, all in float64.
EXACT_TOLERANCE = 1e-12
# Central differences with step 1e-5: a truncation error of about its square, and the rounding of a loss of about 200 to
# 1e-16 of itself, over the step. Measured below 1e-8.
DIFFERENCE_TOLERANCE = 1e-7

T = 40
ENDS = [0, 13, 14, 40]  # three documents, one of a single token
WINDOWS = {"short": 5, "long": 11}
HP = Hyperparameters(
    vocab_size=120,  # padded to 128
    bigram_vocab_size=64,
    num_heads=4,
    head_dim=8,
    val_batch_size=8 * T,
    stages=(train_gpt.STAGES[0]._replace(tokens=8 * T),),
)
TARGET_WEIGHTS = (1.0, 0.5, 0.25)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model():
    """A float64 model in which no parameter is zero, and all matter."""
    model = GPT(HP, CPU, torch.float32).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in ("scalars", "x0_lambdas"):
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(std=1.0 if "gate" in name else 0.2)
    return model


def documents(ends=ENDS):
    lengths = torch.tensor([b - a for a, b in pairwise(ends)])
    return Documents(*(torch.tensor(t, dtype=torch.int32).repeat_interleave(lengths) for t in (ends[:-1], ends[1:])))


def random_tokens():
    return torch.randint(HP.vocab_size, (T + 1,), dtype=torch.int32)


def losses_of(model, inputs, targets, weights=TARGET_WEIGHTS, **options):
    batch = MicroBatch(inputs, targets, documents())
    return model(batch, WINDOWS, torch.tensor(weights, dtype=torch.float64), **options)


# ---------------------------------------------------------------------------- the whole model, layer by layer


def plain_rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def plain_rotate(x, position, frequencies):
    """One head's vector x (D,) at a position; the tables are rounded to bf16, as is said of them."""
    out = x.clone()
    for i, frequency in enumerate(frequencies):
        angle = torch.tensor(position * frequency, dtype=torch.float32)
        cos, sin = angle.cos().bfloat16().double(), angle.sin().bfloat16().double()
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * cos + b * sin, b * cos - a * sin
    return out


def plain_attention(q, k, v, paired, window, scale):
    """(T, H, D) each, rotated already. Pairs of heads share keys, the first one's position before the second's."""
    H = q.shape[1]
    out = torch.zeros_like(v)
    for start, end in pairwise(ENDS):
        for t in range(start, end):
            for h in range(H):
                if paired:
                    now = 2 * t + h // (H // 2)
                    keys = [(s, g) for s in range(start, t + 1) for g in (h % (H // 2), h % (H // 2) + H // 2)]
                    keys = [(s, g) for s, g in keys if now - window <= 2 * s + g // (H // 2) <= now]
                else:
                    keys = [(s, h) for s in range(max(start, t - window), t + 1)]
                scores = torch.stack([scale * (q[t, h] @ k[s, g]) for s, g in keys])
                values = torch.stack([v[s, g] for s, g in keys])
                out[t, h] = torch.softmax(scores, 0) @ values
    return out


def plain_losses(model, inputs, targets, weights):
    """Loss by position, loops and all."""
    C, H, D = HP.model_dim, HP.num_heads, HP.head_dim
    p = {name: value.detach() for name, value in model.named_parameters()}
    counts = [count for count, _ in train_gpt.SCALARS.values()]
    lambdas = dict(zip(train_gpt.SCALARS, p["scalars"].split(counts), strict=True))
    frequencies = [(1 / 1024) ** (i / (D // 4 - 1)) for i in range(D // 4)]

    def gate(x, w):
        return torch.sigmoid(x[:, : train_gpt.GATE_DIMS] @ w.T)

    raw = p["embed"][inputs]
    x = raw.clone()
    x[1:] += lambdas["smear"] * gate(raw[1:], p["smear_gate"]) * raw[:-1]
    x = x0 = plain_rms_norm(x)
    bigram = p["bigram_embed"][plain_bigram_hash(inputs.numpy(), HP.bigram_vocab_size)]
    value_tables = p["value_embeds"].view(-1, 128, C)
    outputs, a, j = [], 0, 0  # the next layer's place among those with attention, and among those with values
    for i, layer in enumerate(train_gpt.LAYERS):
        if layer.skip_from is not None:
            weight = torch.sigmoid(lambdas["skip"][0]) * 2 * gate(x0, p["skip_gate"])
            x = x + weight * outputs[layer.skip_from]
        x = lambdas["resid"][i] * x + p["x0_lambdas"][i] * x0 + lambdas["bigram"][i] * bigram
        if layer.window:
            h = plain_rms_norm(x)
            w_q, w_k, w_v, w_o = p["attn_bank"][a]
            q, k, v = (h @ (lambdas["qkv"][i] * w).T for w in (w_q, w_k, w_v))
            q, k, v = (t.view(T, H, D) for t in (q, k, v))
            q, k = plain_rms_norm(q), plain_rms_norm(k)
            for t in range(T):
                for head in range(H):
                    position = 2 * t + head // (H // 2) if layer.paired else t
                    q[t, head] = plain_rotate(q[t, head], position, frequencies)
                    k[t, head] = plain_rotate(k[t, head], position, frequencies)
            if layer.key_offset and layer.paired:  # from the head that comes before in the sequence of both
                first, second = k[:, : H // 2, D // 2 :].clone(), k[:, H // 2 :, D // 2 :].clone()
                k[:, H // 2 :, D // 2 :], k[1:, : H // 2, D // 2 :] = first, second[:-1]
            elif layer.key_offset:
                k[1:, :, D // 2 :] = k[:-1, :, D // 2 :].clone()
            if layer.value_embed:
                v = v + 2 * gate(h, p["value_gates"][j])[:, :, None] * value_tables[j][inputs].view(T, H, D)
            y = plain_attention(q, k, v, layer.paired, WINDOWS[layer.window], 0.1)
            y = y * gate(h, p["attn_gates"][a])[:, :, None]
            x = x + y.reshape(T, C) @ (lambdas["out"][i] * w_o).T
            a, j = a + 1, j + layer.value_embed
        w_fc, w_proj = p["mlp_bank"][i]
        x = x + (plain_rms_norm(x) @ w_fc.T).clamp(min=0) ** 2 @ w_proj
        outputs.append(x)
    logits = plain_rms_norm(x - lambdas["backout"] * outputs[train_gpt.BACKOUT_LAYER]) @ p["head"]
    log_p = F.log_softmax(23 * torch.sigmoid((logits + 5) / 7.5), dim=-1)
    losses = torch.zeros(T, dtype=torch.float64)
    for t in range(T):
        for k, weight in enumerate(weights):
            if t + k < T:
                losses[t] -= weight * log_p[t, targets[t + k]]
    return losses


OTHER_LAYERS = {
    "the record's": None,
    "without values": [Layer("short", paired=True), Layer("long", key_offset=True), Layer(None, skip_from=0)],
    "nothing but attention": [Layer("long"), Layer("short")],
    "one layer": [Layer("short", value_embed=True)],
    "all flags": [Layer("long", paired=True, key_offset=True, value_embed=True)] * 3 + [Layer(None, skip_from=1)],
}


@pytest.mark.parametrize("layers", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_model_computes_the_plain_formulas_layer_by_layer(monkeypatch, layers):
    for name, table in tables_of(layers).items() if layers else ():
        monkeypatch.setattr(train_gpt, name, table)
    model, tokens = random_model(), random_tokens()
    losses = losses_of(model, tokens[:-1], tokens[1:])
    expected = plain_losses(model, tokens[:-1], tokens[1:], TARGET_WEIGHTS)
    assert relative_error(losses - losses.mean(), expected - expected.mean()) < EXACT_TOLERANCE
    assert relative_error(losses, expected) < EXACT_TOLERANCE


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [row.name for row in rows_in_use()])
def test_gradient_of_each_parameter_equals_central_differences(name):
    model, tokens = random_model(), random_tokens()
    parameter = dict(model.named_parameters())[name]
    losses_of(model, tokens[:-1], tokens[1:]).sum().backward()
    gradient = parameter.grad

    @torch.no_grad()
    def loss_at(shifted):
        parameter.copy_(shifted)
        return losses_of(model, tokens[:-1], tokens[1:]).sum().item()

    here, step = parameter.detach().clone(), 1e-5
    for _ in range(3):
        # along the gradient, so that the slope is not small by chance, and one's own way as well
        direction = gradient / gradient.norm() + torch.randn_like(gradient) / gradient.numel() ** 0.5
        slope = (loss_at(here + step * direction) - loss_at(here - step * direction)) / (2 * step)
        expected = (gradient * direction).sum().item()
        assert abs(expected) > 1e-3, "no slope to compare"
        assert abs(slope - expected) < DIFFERENCE_TOLERANCE * abs(expected)


# ---------------------------------------------------------------------------- what a position may look at


def changed_positions(model, inputs, other_inputs, targets):
    return (losses_of(model, inputs, targets) != losses_of(model, other_inputs, targets)).nonzero().flatten().tolist()


def with_other_tokens(inputs, start, end):
    other = inputs.clone()
    other[start:end] = (inputs[start:end] + 1 + torch.arange(end - start, dtype=torch.int32) % 7) % HP.vocab_size
    return other


@pytest.mark.parametrize("t", [0, 5, 13, 20, T - 1])
def test_a_token_changes_its_own_loss_and_no_earlier_one(t):
    model, tokens = random_model(), random_tokens()
    inputs, targets = tokens[:-1], tokens[1:]
    changed = changed_positions(model, inputs, with_other_tokens(inputs, t, t + 1), targets)
    assert min(changed) == t


def change_attention(monkeypatch, **change):
    layers = [layer._replace(**change) if layer.window else layer for layer in train_gpt.LAYERS]
    monkeypatch.setattr(train_gpt, "LAYERS", tuple(layers))


def test_attention_stays_inside_a_document(monkeypatch):
    change_attention(monkeypatch, key_offset=False)
    model, tokens = random_model(), random_tokens()
    inputs, targets = tokens[:-1], tokens[1:]
    # All of the first document but its last token, which the smear and the bigram hash of the next one see.
    changed = changed_positions(model, inputs, with_other_tokens(inputs, 0, 12), targets)
    assert changed == list(range(13))


def test_smear_and_bigram_hash_look_back_one_token_across_a_document_start(monkeypatch):
    change_attention(monkeypatch, key_offset=False)
    model, tokens = random_model(), random_tokens()
    inputs, targets = tokens[:-1], tokens[1:]
    changed = changed_positions(model, inputs, with_other_tokens(inputs, 12, 13), targets)
    assert changed == [12, 13]  # the document of one token at 13 passes nothing on: only its own token is seen at 14


def test_key_offset_looks_back_across_a_document_start(monkeypatch):
    change_attention(monkeypatch, key_offset=True, paired=False)
    model, tokens = random_model(), random_tokens()
    inputs, targets = tokens[:-1], tokens[1:]
    # The first token of a document attends to itself alone, whatever its key: that of 14 holds half of 13's, to which
    # 12 was added by the smear, and is looked at from 15 on.
    changed = changed_positions(model, inputs, with_other_tokens(inputs, 12, 13), targets)
    assert changed[:3] == [12, 13, 15]


def first_attention_inputs(monkeypatch, model, tokens, **change):
    """q, k, v of the first attention of a forward pass in which all layers with attention are changed."""
    seen, attend = [], train_gpt.attend
    with monkeypatch.context() as patch:
        change_attention(patch, **change)
        patch.setattr(train_gpt, "attend", lambda q, k, v, *rest: (seen.append((q, k, v)), attend(q, k, v, *rest))[1])
        losses_of(model, tokens[:-1], tokens[1:])
    return seen[0]


def test_key_offset_takes_the_second_half_of_a_key_from_the_token_before(monkeypatch):
    model, tokens, half = random_model(), random_tokens(), HP.head_dim // 2
    q, k, v = first_attention_inputs(monkeypatch, model, tokens, paired=False, key_offset=False)
    q2, shifted, v2 = first_attention_inputs(monkeypatch, model, tokens, paired=False, key_offset=True)
    assert torch.equal(shifted[:, :, :half], k[:, :, :half])
    assert torch.equal(shifted[1:, :, half:], k[:-1, :, half:])
    assert torch.equal(shifted[0], k[0])  # the very first has no token before it
    assert torch.equal(q2, q) and torch.equal(v2, v)


def test_paired_heads_see_the_keys_of_both_heads_and_no_later_ones(monkeypatch):
    inputs = first_attention_inputs(monkeypatch, random_model(), random_tokens(), paired=True, key_offset=False)
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    window, H = 3, HP.num_heads
    gate = torch.ones(2 * T, H // 2).double()
    out = train_gpt.attend(q, k, v, gate, documents().paired(), window, 0.1).reshape(T, H, -1)
    pair = {(0, 20): {(20, 0), (19, 0), (19, 2)}, (2, 20): {(20, 0), (20, 2), (19, 0), (19, 2)}}
    pair |= {(1, 20): {(20, 1), (19, 1), (19, 3), (18, 3)}}
    pair[0, 20] |= {(18, 2)}
    for (head, t), keys in pair.items():
        (gradient,) = torch.autograd.grad(out[t, head].sum(), v, retain_graph=True)
        gradient = gradient.view(T, H, -1)  # a value's gradient is its attention weight
        assert {tuple(index) for index in gradient.abs().sum(-1).nonzero().tolist()} == keys


# ---------------------------------------------------------------------------- inputs


def plain_bigram_hash(tokens, rows):
    with np.errstate(over="ignore"):
        tokens = tokens.astype(np.int32)
        mixed = (np.int32(36313) * tokens[1:]) ^ (np.int32(27191) * tokens[:-1])
    return np.concatenate(([rows - 1], np.mod(mixed.astype(np.int64), rows - 1)))


def test_bigram_hash_wraps_like_int32_and_is_never_negative():
    rows, tokens = Hyperparameters.bigram_vocab_size, torch.randint(65536, (20_000,), dtype=torch.int32)
    assert 36313 * tokens.max().item() > 2**31  # GPT-2's ids stay below it; other vocabularies of 16 bits do not
    hashed = train_gpt.bigram_hash(tokens, rows)
    assert np.array_equal(hashed.numpy(), plain_bigram_hash(tokens.numpy(), rows))
    assert hashed[0] == rows - 1  # reserved: no predecessor
    assert hashed[1:].min() >= 0 and hashed[1:].max() < rows - 1


def test_bigram_hash_of_known_pairs():
    # 36313 x 3 = 108939 and 27191 x 2 = 54382 fit; 36313 x 60000 is between 2^31 and 2^32 and wraps once
    tokens = torch.tensor([2, 3, 60000], dtype=torch.int32)
    second, third = 108939 ^ 54382, (36313 * 60000 - 2**32) ^ (27191 * 3)
    assert third < 0
    assert train_gpt.bigram_hash(tokens, 251_520).tolist() == [251_519, second % 251_519, third % 251_519]


# ---------------------------------------------------------------------------- Yarn


def assert_turns_by(yarn, angles):
    """angles (T, 32): pairs (1, 0) of the first half become (cos, -sin) in bf16's accuracy; the second half stays."""
    ones = torch.zeros(len(angles), 1, 128)
    ones[:, :, ::2] = 1
    turned = train_gpt.rotate(ones, yarn.cos, yarn.sin)[:, 0]
    # half a unit in the last place of a bf16 below 1, and twice what float32 leaves of the angle
    assert (turned[:, :64:2] - angles.cos()).abs().max() < 2**-9 + 2e-5
    assert (turned[:, 1:64:2] + angles.sin()).abs().max() < 2**-9 + 2e-5
    assert torch.equal(turned[:, 64:], ones[:, 0, 64:])


def test_yarn_has_32_frequencies_from_1_to_1_over_1024_in_bf16_tables():
    yarn = Yarn(128, 50, CPU)
    expected = torch.tensor([1024 ** (-i / 31) for i in range(32)])
    assert yarn.frequencies[0] == 1 and relative_error(yarn.frequencies, expected) < 1e-6
    angles = torch.arange(50)[:, None] * expected
    assert yarn.cos.dtype == yarn.sin.dtype == torch.bfloat16
    assert_turns_by(yarn, angles)
    assert yarn.scale == 0.1


def test_rotation_turns_adjacent_pairs_of_the_first_half_by_position_times_frequency():
    yarn, x = Yarn(128, 50, CPU), torch.randn(50, 3, 128).double()
    out = train_gpt.rotate(x, yarn.cos, yarn.sin)
    frequencies = yarn.frequencies.tolist()
    expected = torch.stack([torch.stack([plain_rotate(h, t, frequencies) for h in x[t]]) for t in range(50)])
    assert relative_error(out, expected) < EXACT_TOLERANCE
    assert torch.equal(out[:, :, 64:], x[:, :, 64:])
    assert torch.equal(out[0], x[0])


def test_scores_of_rotated_vectors_depend_on_their_distance_only():
    yarn = Yarn(128, 50, CPU)
    q, k = (train_gpt.rotate(torch.randn(128).double().expand(50, 1, 128), yarn.cos, yarn.sin)[:, 0] for _ in range(2))
    scores = q @ k.T
    assert relative_error(scores[1:, 1:], scores[:-1, :-1]) < 4e-3  # bf16 tables
    assert (scores - scores.T).abs().max() > 0.1  # and on its sign


def test_yarn_stretches_slow_frequencies_and_sharpens_attention_as_the_window_grows():
    yarn = Yarn(128, 50, CPU)
    frequencies, scale = [1024 ** (-i / 31) for i in range(32)], 0.1
    for a, b in ((384, 896), (896, 1408)):
        yarn.grow(a, b)
        for i, frequency in enumerate(frequencies):
            kept = min(max((a * frequency / (2 * math.pi) - 1) / 31, 0), 1)
            frequencies[i] *= a / b + kept * (1 - a / b)
        scale *= 0.2 * math.log(b / a) + 1
    expected = torch.tensor(frequencies)
    assert relative_error(yarn.frequencies, expected) < 1e-6
    assert yarn.scale == pytest.approx(scale, rel=1e-12)
    assert expected[0] == 1 and expected[-1] < 0.3 / 1024  # the fastest stays, the slowest goes with the windows
    angles = torch.arange(50)[:, None] * expected
    assert_turns_by(yarn, angles)


def test_yarn_reset_puts_back_tables_and_scale():
    yarn, fresh = Yarn(128, 50, CPU), Yarn(128, 50, CPU)
    yarn.grow(384, 896)
    assert not torch.equal(yarn.cos, fresh.cos)
    yarn.reset()
    assert torch.equal(yarn.cos, fresh.cos) and torch.equal(yarn.sin, fresh.sin) and yarn.scale == fresh.scale
    assert torch.equal(yarn.frequencies, fresh.frequencies)


def test_yarn_has_positions_for_the_longest_paired_micro_batch():
    assert len(GPT(HP, CPU, torch.float32).yarn.cos) == 2 * T


# ---------------------------------------------------------------------------- parameters


WIDE = Hyperparameters(vocab_size=1000, bigram_vocab_size=64, num_heads=2, head_dim=64, val_batch_size=8)


@pytest.fixture(scope="module")
def wide_model():
    torch.manual_seed(0)
    return GPT(WIDE, CPU, torch.float32)


def test_parameters_have_the_shapes_and_types_that_checkpoints_and_optimizer_expect():
    model, C, gates = GPT(WIDE, CPU, torch.bfloat16), WIDE.model_dim, train_gpt.GATE_DIMS
    layers = len(train_gpt.LAYERS)
    attention = sum(layer.window is not None for layer in train_gpt.LAYERS)
    values = sum(layer.value_embed for layer in train_gpt.LAYERS)
    shapes = {
        "scalars": (sum(count for count, _ in train_gpt.SCALARS.values()),),
        "x0_lambdas": (layers,),
        "smear_gate": (1, gates),
        "skip_gate": (1, gates),
        "attn_gates": (attention, 2, gates),
        "value_gates": (values, 2, gates),
        "attn_bank": (attention + attention % 2, 4, C, C),  # matrices in eights
        "mlp_bank": (layers + -layers % 4, 2, 4 * C, C),
        "head": (C, 1024),
        "embed": (1024, C),
        "bigram_embed": (64, C),
        "value_embeds": (values * 1024, C),
    }
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: found[name] for name in shapes} == shapes
    float32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert float32 == {"scalars", "x0_lambdas"}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_scalars_start_at_their_values(wide_model):
    scalars = wide_model.layer_weights()[1]
    assert {name: [value.item() for value in values] for name, values in scalars.items()} == {
        name: pytest.approx([value] * count) for name, (count, value) in train_gpt.SCALARS.items()
    }


def test_gates_tables_and_output_projections_start_at_zero(wide_model):
    p = dict(wide_model.named_parameters())
    for name in ("x0_lambdas", "smear_gate", "skip_gate", "attn_gates", "value_gates", "bigram_embed", "value_embeds"):
        assert not p[name].any(), name
    assert not p["mlp_bank"][:, 1].any()


@pytest.mark.parametrize("name", ["attn_bank", "mlp_bank"])
def test_matrices_start_uniform_with_std_half_over_root_width(wide_model, name):
    C = WIDE.model_dim
    matrices = getattr(wide_model, name).detach().float()
    for matrix in matrices[:, 0] if name == "mlp_bank" else matrices.flatten(0, 1):
        std = 0.5 * C**-0.5
        assert matrix.std().item() == pytest.approx(std, rel=0.03)  # 16,384 numbers or more: 0.4 % of noise
        assert matrix.abs().max().item() == pytest.approx(3**0.5 * std, rel=0.01)  # a uniform distribution's edge
        assert abs(matrix.mean().item()) < 0.05 * std


def test_head_starts_normal_and_the_embedding_as_its_transpose(wide_model):
    head = wide_model.head.detach().float()
    assert head.std().item() == pytest.approx(0.005, rel=0.02)
    assert head.abs().max() > 0.005 * 3.5  # not uniform
    assert torch.equal(wide_model.embed, wide_model.head.T)


def test_an_untrained_model_predicts_almost_uniformly():
    tokens = random_tokens()
    losses = losses_of(GPT(HP, CPU, torch.float32).double(), tokens[:-1], tokens[1:], weights=(1.0,))
    assert losses.mean().item() == pytest.approx(math.log(128), abs=0.02)


# ---------------------------------------------------------------------------- validation


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 64])
def test_validation_loss_in_chunks_equals_the_loss_at_once(chunk):
    model, tokens = random_model(), random_tokens()
    whole = losses_of(model, tokens[:-1], tokens[1:], weights=(1.0,))
    chunks = losses_of(model, tokens[:-1], tokens[1:], weights=(1.0,), head_chunk=chunk)
    assert relative_error(chunks, whole) < EXACT_TOLERANCE
