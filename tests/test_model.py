"""The model of train_gpt.py on a CPU, in float64, against plain formulas written independently of it."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check_tables
from conftest import relative_error
from small_run import tables_of
from test_kernels import interpreted

import train_gpt
from train_gpt import (
    GPT,
    LAYERS,
    NGRAMS,
    Documents,
    Hyperparameters,
    Layer,
    MicroBatch,
    UserError,
    Yarn,
)

CPU = torch.device("cpu")
# Only the order of operations differs from the plain formulas, all in float64.
EXACT_TOLERANCE = 1e-12
# Of a scalar's gradient, a sum over all that cancels. Measured in 16 tables of layers: 2.6e-11 once, where parameters
# changed by 1e-16 make as much, else below 1e-12.
GRADIENT_TOLERANCE = 1e-10

T = 40
ENDS = [0, 13, 14, 40]  # three documents, one of a single token
WINDOWS = {"short": 5, "long": 11}
HP = Hyperparameters(
    vocab_size=120,  # padded to 128
    vocabulary="",
    ngram_rows=64,
    copy_width=16,
    train_max_seq_len=16,  # as far as copying sees: less than the third document
    num_heads=4,
    head_dim=8,
    val_batch_size=8 * T,
    stages=(train_gpt.STAGES[0]._replace(tokens=8 * T),),
    micro_batch_tokens=4 * T,
)
TARGET_WEIGHTS = (1.0, 0.5, 0.25, 0.3)  # of three next tokens and the first one's prefix
NEXT_TOKEN = (1.0, 0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model():
    """A float64 model in which no parameter is zero, and all matter; tokens share spellings, half have a prefix."""
    model = GPT(HP, CPU, torch.float32).double()
    model.spelling.copy_(7 * torch.arange(128) % 40)  # 3 or 4 tokens each; 88 rows are no token's
    model.spelling_order.copy_(model.spelling.argsort())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "spellings":  # by a generator of its own: all else as if there were none
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            elif name == "scalars":
                p.add_(0.3 * torch.randn_like(p))
                of_scalars(p)["copy_bias"] -= 13  # else little is copied
            else:
                p.normal_(std=1.0 if "gate" in name else 0.2)
        model.embed.sub_(model.shared_embeddings())  # a token's own and what it shares are as large as one draw
    model.ngrams = (0.2 * torch.randn(HP.ngram_rows, HP.model_dim, dtype=torch.float64)).requires_grad_()
    model.prefixes[: HP.vocab_size : 2] = (7 * torch.arange(0, HP.vocab_size, 2) + 1) % HP.vocab_size
    return model


def of_scalars(p):
    """Views of the learned scalars by name."""
    return dict(zip(train_gpt.SCALARS, p.split([count for count, *_ in train_gpt.SCALARS.values()]), strict=True))


def parameters_of(model):
    """And the table of n-grams."""
    return dict(model.named_parameters(), ngrams=model.ngrams)


def copies_of(model):
    """For the plain formulas: its parameters by name, which take gradients, its signs and its prefixes."""
    copies = {name: value.detach().clone().requires_grad_() for name, value in parameters_of(model).items()}
    return copies | dict(model.named_buffers())


def documents(ends=ENDS):
    lengths = torch.tensor([b - a for a, b in pairwise(ends)])
    return Documents(*(torch.tensor(t, dtype=torch.int32).repeat_interleave(lengths) for t in (ends[:-1], ends[1:])))


def random_tokens():
    """Some occur several times in a document, some once."""
    tokens = torch.randint(HP.vocab_size, (T + 1,), dtype=torch.int32)
    return torch.where(torch.rand(T + 1) < 0.5, tokens, tokens % 6)


def batch_of(inputs, targets):
    """For a model that has the whole table of n-grams."""
    starts = documents().starts.numpy()
    rows = train_gpt.hashed_ngrams(inputs.numpy(), starts, HP.ngram_rows)
    ngrams = map(torch.from_numpy, (rows, train_gpt.sorting_order(rows)))
    return MicroBatch(inputs, targets, documents(), *ngrams, inputs.argsort())


def losses_of(model, inputs, targets, weights=TARGET_WEIGHTS, **options):
    batch = batch_of(inputs, targets)
    return model(batch, WINDOWS, torch.tensor(weights, dtype=torch.float64), **options)


# ---------------------------------------------------------------------------- the whole model, row by row


def plain_rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def plain_rotate(x, positions, frequencies):
    """x (..., D) at positions (...): as many pairs (a, b), as a + ib, as frequencies turn by -position x frequency."""
    angles = (positions[..., None] * torch.tensor(frequencies)).float()  # the tables are rounded to bf16
    cos, sin = angles.cos().bfloat16().double(), angles.sin().bfloat16().double()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned, still = pairs[..., : len(frequencies)], pairs[..., len(frequencies) :]
    return torch.view_as_real(torch.cat((turned * torch.complex(cos, -sin), still), -1)).flatten(-2)


def plain_attention(q, k, v, paired, window, scale):
    """(T, H, D) each, rotated already. Pairs of heads share keys, the first one's position before the second's."""
    (T, H, D), D_v = q.shape, v.shape[-1]
    t, h = torch.arange(T).repeat_interleave(H), torch.arange(H).repeat(T)  # of the queries, and of the keys
    document = torch.bucketize(t, torch.tensor(ENDS[1:]), right=True)
    position, group = (2 * t + h // (H // 2), h % (H // 2)) if paired else (t, h)
    ago = position[:, None] - position
    seen = (document[:, None] == document) & (group[:, None] == group) & (ago >= 0) & (ago <= window)
    scores = scale * q.reshape(T * H, D) @ k.reshape(T * H, D).T
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.reshape(T * H, D_v)).view(T, H, D_v)


def plain_gates(p, j, x, layers):
    """Of each of a network's layers: XSA's, the heads', value embeddings' (T, H); values' and adds' by name, (T, 1)."""
    hidden = x @ p["gate_in"][j].T
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    gates = list((train_gpt.GATE_SCALE * (hidden @ p["gate_out"][j].T + p["gate_bias"][j])).T[:, :, None])

    def take(n):
        return [gates.pop(0) for _ in range(n)]

    def of_heads(layer):
        used = layer.xsa, layer.head_gates, layer.value_embed
        return [torch.cat(take(HP.num_heads), 1) if u else None for u in used]

    sums = [
        [dict(zip(names, take(len(names)), strict=True)) for names in (layer.values, layer.adds)] for layer in layers
    ]
    return [(*of_heads(layer), *of_layer) for layer, of_layer in zip(layers, sums, strict=True)]


def gates_of_the_table(p, j, x, layers):
    """What plain_gates gives before the first step, whatever the network reads."""
    one = torch.ones(T, HP.num_heads, dtype=torch.float64)
    xsa, heads = train_gpt.XSA_GATE * one, train_gpt.HEAD_GATE * one
    return [
        (a.xsa and xsa, a.head_gates and heads, a.value_embed and train_gpt.VALUE_GATE * one, a.values, a.adds)
        for a in layers
    ]


def plain_embeddings(p):
    """Of all tokens, (V, C)."""
    return torch.stack([own + p["spellings"][i] for own, i in zip(p["embed"], p["spelling"].tolist(), strict=True)])


def plain_output(p, inputs, gate_network=plain_gates):
    """Normed, (T, C), of the model that train_gpt.LAYERS describes, from copies_of it."""
    C, H, D, layers = HP.model_dim, HP.num_heads, HP.head_dim, train_gpt.LAYERS
    lambdas = of_scalars(p["scalars"])
    frequencies = [(1 / 1024) ** (i / (D // 4 - 1)) for i in range(D // 4)]
    numbers = inputs.tolist()

    def matrices(bank, n):
        """The next n, as one that lists all their rows."""
        return torch.cat([next(bank) for _ in range(n)])

    x = plain_rms_norm(plain_embeddings(p)[inputs])
    ngrams = sum(p["ngrams"][rows] for rows in plain_ngrams(numbers, HP.ngram_rows))
    kept = {"x0": x, "ngrams": torch.stack([row * p["signs"][i] for row, i in zip(ngrams, numbers, strict=True)])}
    wide, narrow, vo, mlps = (iter(p[name]) for name in ("qk_bank", "narrow_qk_bank", "vo_bank", "mlp_bank"))
    value_embeds = iter(p["value_embeds"].split(128))
    starts = [i for i, layer in enumerate(layers) if layer.gates]
    gates = [(None, None, None, {}, {})] * len(layers)
    for i, layer in enumerate(layers):
        if layer.gates:
            j, end = starts.index(i), [*starts, len(layers)][starts.index(i) + 1]
            gates[i:end] = gate_network(p, j, x, layers[i:end])
            sources = dict(kept)
        xsa, head_gates, value_gate, of_values, of_adds = gates[i]
        if layer.window:
            h = plain_rms_norm(x if layer.reads is None else kept[layer.reads])
            qk = narrow if layer.narrow else wide
            w_q, w_k, w_v, w_o = matrices(qk, H // 2), matrices(qk, H // 2), next(vo), next(vo)
            q, k, v = ((h @ (lambdas["qkv_lambda"][i] * w).T).view(T, H, -1) for w in (w_q, w_k, w_v))
            positions, head = torch.arange(T)[:, None].expand(T, H), torch.arange(H)
            positions = 2 * positions + head // (H // 2) if layer.paired else positions
            q, k = (plain_rotate(plain_rms_norm(t), positions, frequencies) for t in (q, k))
            if layer.key_offset:  # from the token before; in pairs from the head that comes before in both's sequence
                before = [t - (t not in ENDS) for t in range(T)]  # a document's first token keeps its own
                earlier = k[before]
                if layer.paired:
                    wrapped = [k[t, : H // 2] if t in ENDS else k[t - 1, H // 2 :] for t in range(T)]
                    earlier = torch.cat((torch.stack(wrapped), k[:, : H // 2]), 1)
                k = torch.cat((k[:, :, : D // 2], earlier[:, :, D // 2 :]), -1)
            if layer.value_embed:
                v = v + value_gate[:, :, None] * next(value_embeds)[inputs].view(T, H, D)
            for name, gate in of_values.items():
                v = v + (gate * sources[name]).view(T, H, D)
            y = plain_attention(q, k, v, layer.paired, WINDOWS[layer.window], 0.12 if layer.narrow else 0.1)
            if layer.xsa:
                share = (y * v).sum(-1) / (v * v).sum(-1).clamp(min=1e-8)
                y = y - (torch.tanh(xsa) * share)[:, :, None] * v
            if layer.head_gates:
                y = y * head_gates[:, :, None]
            x = lambdas["attn_resid"][i] * x + y.reshape(T, C) @ w_o.T
        for name, gate in of_adds.items():
            x = x + gate * sources[name]
        if layer.mlp:
            w_fc, w_proj = next(mlps)
            hidden = (plain_rms_norm(x) @ w_fc.T).clamp(min=0) ** 2
            x = x + lambdas["mlp_out"][i] * hidden @ w_proj
        if layer.keep:
            kept[layer.keep] = x
    return plain_rms_norm(x)


def plain_softmax(p, h, classes=slice(None)):
    """Probabilities of the tokens, (T, V), that add up to 1 over these classes."""
    z = (23 * torch.sigmoid((h @ plain_embeddings(p).T + 5) / 7.5)).exp()
    return z / z[:, classes].sum(1, keepdim=True)


def plain_copying(p, h, targets):
    """Probability of the model's own distribution (T,), and of copying from each position, (T, T); no gradient to h."""
    h = h.detach()
    scalars = of_scalars(p["scalars"])
    q, k = (plain_rms_norm(h @ w.T) for w in p["copy_qk"].split(HP.copy_width))
    scores = (scalars["copy_gain"] / HP.copy_width**0.5 * q @ k.T).exp()
    rows = []
    for start, end in pairwise(ENDS):
        for t in range(start, end):
            rows.append([scores[t, s] * (start <= s < t and t - s <= HP.train_max_seq_len) for s in range(T)])
    scores = torch.stack([torch.stack(row) for row in rows])
    sentinel = (h @ p["copy_sentinel"][0] + scalars["copy_bias"]).exp()
    total = sentinel + scores.sum(1)
    return sentinel / total, scores / total[:, None]


def plain_losses(p, inputs, targets, weights, gate_network=plain_gates, classes=None):
    """Loss by position; the last weight is that of the next token's prefix. classes: of the softmax, None for all."""
    h = plain_output(p, inputs, gate_network)
    classes = range(len(p["embed"])) if classes is None else classes
    softmax = plain_softmax(p, h, [*classes])
    own, copied = plain_copying(p, h, targets)
    next_token = own * softmax[range(T), targets.tolist()] + (copied * (targets[:, None] == targets)).sum(1)
    log_p, losses = softmax.log(), [0] * T
    for start, end in pairwise(ENDS):
        for t in range(start, end):
            for k, weight in enumerate(weights[:-1]):
                if t + 1 + k <= end:  # the token that begins the next document is told by its inputs
                    log_p_k = log_p[t, int(targets[t + k])] if k else next_token[t].log()  # the next one may be copied
                    losses[t] = losses[t] - weight * log_p_k
            prefix = int(p["prefixes"][targets[t]])
            if prefix in classes:  # -1, for none, is not
                losses[t] = losses[t] - weights[-1] * log_p[t, prefix]
    return torch.stack(losses)


def changed(**changes):
    """The program's table with other values in some columns: row5=dict(...), or all=dict(...)."""
    return [a._replace(**changes.get("all", {}), **changes.get(f"row{i}", {})) for i, a in enumerate(LAYERS)]


X0 = dict(x0=0.0)
ALL = Layer("short", value_embed=True, xsa=True, head_gates=True, adds=dict(x0=0.1), gates=True)
EDITED_LAYERS = {
    "the program's": list(LAYERS),
    "no value embeddings": changed(all=dict(value_embed=False)),
    "no XSA": changed(all=dict(xsa=False)),
    "no narrow queries and keys": changed(all=dict(narrow=False)),
    "a narrow one with a long window": changed(row4=dict(narrow=True, key_offset=False)),
    "one more layer": [*LAYERS[:5], Layer("short", xsa=True, adds=X0 | NGRAMS), *LAYERS[5:]],
    "another skip": changed(row2=dict(keep="second"), row8=dict(adds=X0 | NGRAMS | dict(second=0.3))),
    "attention reads another output": changed(
        row3=dict(reads="x0"), row9=dict(reads="early"), row11=dict(reads="start")
    ),
    "outputs added to another layer's values": changed(row8=dict(values=dict(early=0.2, x0=-0.1))),
    "outputs added to the values of pairs": changed(row6=dict(values=dict(early=0.2, ngrams=-0.1))),
    "an MLP at the end": changed(row12=dict(mlp=True)),
    "no MLP": changed(all=dict(mlp=False)),
    "attention at the end": [*LAYERS, Layer("long", reads="late", head_gates=True, adds=X0, keep="end")],
    "no gate network": [Layer("short", paired=True, keep="a"), Layer(None), Layer("long", reads="a")],
    "rows that only add, behind an MLP": [
        Layer("short", adds=X0, gates=True),
        Layer(None, mlp=False, adds=NGRAMS, keep="a"),
        Layer(None),
        Layer(None, mlp=False, keep="b"),
        Layer("long", reads="b", adds=dict(a=0.2), gates=True),
    ],
    "one layer": [ALL],
    "a network each layer": [
        ALL,
        ALL._replace(paired=True, narrow=True),
        ALL._replace(key_offset=True, keep="a"),
        ALL._replace(window="long", paired=True, key_offset=True, reads="a", adds=dict(a=0.2)),
    ],
}


@pytest.mark.parametrize("layers", EDITED_LAYERS.values(), ids=EDITED_LAYERS)
def test_losses_and_gradients_are_those_of_the_plain_formulas(monkeypatch, layers):
    for name, table in tables_of(layers).items():
        monkeypatch.setattr(train_gpt, name, table)
    check_tables(train_gpt, Hyperparameters())
    model, tokens = random_model(), random_tokens()
    losses = losses_of(model, tokens[:-1], tokens[1:])
    p = copies_of(model)
    expected = plain_losses(p, tokens[:-1], tokens[1:], TARGET_WEIGHTS)
    assert relative_error(losses - losses.mean(), expected - expected.mean()) < EXACT_TOLERANCE
    assert relative_error(losses, expected) < EXACT_TOLERANCE

    slopes = torch.randn(T, dtype=torch.float64)  # so that no position's gradient is another's
    (losses * slopes).sum().backward()
    model.add_spellings_gradient()
    leaves = [p[name] for name in parameters_of(model)]
    gradients = torch.autograd.grad((expected * slopes).sum(), leaves, materialize_grads=True)
    for (name, parameter), gradient in zip(parameters_of(model).items(), gradients, strict=True):
        if gradient.any():
            assert relative_error(parameter.grad, gradient) < GRADIENT_TOLERANCE, name
        else:  # of what this table does not use
            assert parameter.grad is None or not parameter.grad.any(), name
            assert layers != list(LAYERS), name


# The kernel computes in float32.
@interpreted
@pytest.mark.parametrize("name", ["the program's", "a network each layer"])
def test_gradients_are_the_same_where_sums_of_kept_outputs_are_a_kernels(monkeypatch, name):
    for table, value in tables_of(EDITED_LAYERS[name]).items():
        monkeypatch.setattr(train_gpt, table, value)
    model, tokens, found = random_model(), random_tokens(), []
    slopes = torch.randn(T, dtype=torch.float64)
    for weighed_sums in (train_gpt.weighed_sums, train_gpt.WeighedSums.apply):
        monkeypatch.setattr(train_gpt, "weighed_sums", weighed_sums)
        for p in parameters_of(model).values():
            p.grad = None
        losses = losses_of(model, tokens[:-1], tokens[1:])
        (losses * slopes).sum().backward()
        found.append({"losses": losses.detach(), **{n: p.grad for n, p in parameters_of(model).items()}})
    for key, expected in found[0].items():
        assert (expected is None) == (found[1][key] is None), key
        if expected is not None and expected.any():
            assert relative_error(found[1][key], expected) < 1e-5, key


def test_logits_are_those_of_the_plain_formulas_and_of_the_losses():
    model, tokens = random_model(), random_tokens()
    batch = batch_of(tokens[:-1], tokens[1:])
    with torch.no_grad():
        logits = model.logits(batch, WINDOWS)
        p = copies_of(model)
        h = plain_output(p, tokens[:-1])
        own, copied = plain_copying(p, h, tokens[1:])
        expected = own[:, None] * plain_softmax(p, h)
        for t, s in copied.nonzero().tolist():
            expected[t, tokens[1 + s]] += copied[t, s]
        losses = losses_of(model, tokens[:-1], tokens[1:], weights=NEXT_TOKEN)
    assert logits.shape == (T, 128) and relative_error(logits, expected.log()) < EXACT_TOLERANCE
    assert relative_error(logits.exp().sum(1), torch.ones(T)) < EXACT_TOLERANCE
    assert relative_error(F.cross_entropy(logits, tokens[1:].long(), reduction="none"), losses) < EXACT_TOLERANCE
    for position in (0, 20, T - 1):
        assert relative_error(model.logits(batch, WINDOWS, position), logits[position]) < EXACT_TOLERANCE
    assert relative_error(model.logits(batch, WINDOWS, slice(3, 9)), logits[3:9]) < EXACT_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32_whatever_the_type_of_the_parameters(dtype):
    model, tokens = GPT(HP, CPU, dtype), random_tokens()
    model.ngrams = torch.zeros(HP.ngram_rows, HP.model_dim, dtype=dtype)
    assert model.logits(batch_of(tokens[:-1], tokens[1:]), WINDOWS).dtype == torch.float32


def test_the_next_tokens_prefix_is_one_more_target_where_it_has_one():
    model, tokens = random_model(), random_tokens()
    targets = tokens[1:]
    model.prefixes[targets[5]] = targets[6]  # what is another target of that position, too
    has_one = model.prefixes[targets] >= 0
    with torch.no_grad():
        without, of_it = (
            losses_of(model, tokens[:-1], targets, weights) for weights in ((1.0, 0.5, 0.0), (1.0, 0.5, 0.3))
        )
        log_p = plain_softmax(copies_of(model), plain_output(copies_of(model), tokens[:-1])).log()
    expected = torch.where(has_one, -0.3 * log_p[range(T), model.prefixes[targets].tolist()], 0.0)
    assert has_one.any() and not has_one.all() and has_one[5]
    assert relative_error(of_it - without, expected) < EXACT_TOLERANCE
    assert torch.equal(of_it[~has_one], without[~has_one])


def test_without_prefixes_their_weight_changes_nothing():
    model, tokens = random_model(), random_tokens()
    model.prefixes.fill_(-1)
    with torch.no_grad():
        plain, odd = (losses_of(model, tokens[:-1], tokens[1:], (1.0, 0.5, weight)) for weight in (0.0, 9.0))
    assert relative_error(odd, plain) < EXACT_TOLERANCE


def with_classes(batch, count):
    classes = train_gpt.softmax_classes(batch.targets.numpy(), count, train_gpt.round_up(HP.vocab_size, 128))
    return batch._replace(classes=torch.from_numpy(classes.astype(np.int32)))


@pytest.mark.parametrize("count", [48, 64])
def test_a_softmax_over_some_classes_leaves_out_the_others_and_prefixes_among_them(count):
    model, tokens = random_model(), random_tokens()
    tokens[20:23] = tokens[19]  # a target several times, also as a further token's
    batch = with_classes(batch_of(tokens[:-1], tokens[1:]), count)
    classes = {*batch.classes.tolist()}
    assert {*tokens[1:].tolist()} < classes and len(classes) == count
    prefixes = {*model.prefixes[tokens[1:]].tolist()} - {-1}
    assert 0 < len(prefixes & classes) < len(prefixes)  # some of them, not all
    losses = model(batch, WINDOWS, torch.tensor(TARGET_WEIGHTS, dtype=torch.float64))
    p = copies_of(model)
    expected = plain_losses(p, tokens[:-1], tokens[1:], TARGET_WEIGHTS, classes=classes)
    assert relative_error(losses, expected) < EXACT_TOLERANCE
    slopes = torch.randn(T, dtype=torch.float64)
    model.embed.grad = torch.ones_like(model.embed)  # to which the gradient is added
    (losses * slopes).sum().backward()
    (gradient,) = torch.autograd.grad((expected * slopes).sum(), [p["embed"]])
    assert relative_error(model.embed.grad - 1, gradient) < EXACT_TOLERANCE
    left_out = sorted({*range(len(model.embed))} - classes - {tokens[0].item()})  # all other inputs are targets
    assert len(left_out) > 20 and (model.embed.grad[left_out] == 1).all()


def test_a_softmax_over_as_many_classes_as_there_are_is_the_whole_one():
    model, tokens = random_model(), random_tokens()
    batch = batch_of(tokens[:-1], tokens[1:])
    weights = torch.tensor(TARGET_WEIGHTS, dtype=torch.float64)
    assert torch.equal(model(with_classes(batch, 128), WINDOWS, weights), model(batch, WINDOWS, weights))


@pytest.mark.parametrize("layers", EDITED_LAYERS.values(), ids=EDITED_LAYERS)
def test_gates_start_as_the_tables_say_whatever_their_network_reads(monkeypatch, layers):
    for name, table in tables_of(layers).items():
        monkeypatch.setattr(train_gpt, name, table)
    fresh, model, tokens = GPT(HP, CPU, torch.float32), random_model(), random_tokens()
    with torch.no_grad():
        for name in ("gate_in", "gate_out", "gate_bias"):
            getattr(model, name).copy_(getattr(fresh, name))
        expected = plain_losses(copies_of(model), tokens[:-1], tokens[1:], TARGET_WEIGHTS, gates_of_the_table)
        losses = losses_of(model, tokens[:-1], tokens[1:])
    assert relative_error(losses - losses.mean(), expected - expected.mean()) < 1e-6  # biases in float32


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
    change = dict(narrow=False) | change
    layers = [layer._replace(**change) if layer.window else layer for layer in train_gpt.LAYERS]
    monkeypatch.setattr(train_gpt, "LAYERS", tuple(layers))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("key_offset", [False, True])
def test_a_token_changes_losses_of_its_own_document_only(monkeypatch, paired, key_offset):
    change_attention(monkeypatch, paired=paired, key_offset=key_offset)
    model, tokens = random_model(), random_tokens()
    inputs, targets = tokens[:-1], tokens[1:]
    for start, end in pairwise(ENDS):
        changed = changed_positions(model, inputs, with_other_tokens(inputs, start, end), targets)
        assert changed == list(range(start, end))
    # Neither n-grams nor a key's second half come from the last token of another document
    assert changed_positions(model, inputs, with_other_tokens(inputs, 12, 13), targets) == [12]


@pytest.mark.parametrize("t, changed", [(11, [9, 10, 11]), (12, [10, 11, 12]), (13, [13]), (14, [14]), (15, [14, 15])])
def test_targets_end_with_the_first_token_behind_a_document(t, changed):
    # The target at 12 is the token that begins the document at 13: the nearest one's, and the second and third one's
    model, tokens = random_model(), 2 * torch.randperm(HP.vocab_size // 2, dtype=torch.int32)[: T + 1]  # none twice
    inputs, targets = tokens[:-1], tokens[1:]
    losses, others = (losses_of(model, inputs, of) for of in (targets, with_other_tokens(targets, t, t + 1)))
    assert (losses != others).nonzero().flatten().tolist() == changed


@pytest.mark.parametrize(
    "s, t, copied", [(20, 30, True), (29, 30, True), (14, 30, True), (14, 31, False), (12, 13, False), (31, 30, False)]
)
def test_a_target_is_copied_from_earlier_ones_of_its_document_as_far_as_the_longest_one_goes(s, t, copied):
    model, tokens = random_model(), torch.randperm(HP.vocab_size, dtype=torch.int32)[: T + 1]  # none twice
    inputs, targets, others = tokens[:-1], tokens[1:], tokens[1:].clone()
    others[s] = targets[t]
    losses, of_others = (losses_of(model, inputs, of) for of in (targets, others))
    changed = {*(losses != of_others).nonzero().flatten().tolist()} - {
        s,
        s - 1,
        s - 2,
    }  # without those it is a target of
    assert changed == ({t} if copied else set())
    assert of_others[t] < losses[t] or not copied


def test_without_copying_there_are_no_parameters_of_it_and_losses_are_the_softmaxs():
    copying, tokens = random_model(), random_tokens()
    hp = replace(HP, copy_width=0)
    model = GPT(hp, CPU, torch.float32).double()
    kept = {name: p for name, p in copying.state_dict().items() if not name.startswith("copy_")}
    unset = model.load_state_dict(kept, strict=False).missing_keys
    model.spelling.copy_(copying.spelling)
    model.ngrams = copying.ngrams
    assert {*unset} == {"copy_qk", "copy_sentinel"} and not any(model.get_parameter(name).numel() for name in unset)
    logits = model.logits(batch_of(tokens[:-1], tokens[1:]), WINDOWS)
    p = copies_of(model)
    h = plain_output(p, tokens[:-1])
    assert relative_error(logits, 23 * torch.sigmoid((h @ plain_embeddings(p).T + 5) / 7.5)) < EXACT_TOLERANCE
    losses = losses_of(model, tokens[:-1], tokens[1:], weights=NEXT_TOKEN)
    assert relative_error(losses, F.cross_entropy(logits, tokens[1:].long(), reduction="none")) < EXACT_TOLERANCE
    losses.sum().backward()
    slots = train_gpt.Optimizer(model, hp, train_gpt.World(), 0).slots
    assert not {*unset} & {*slots}


# Four micro-batches, with documents of one and of two tokens at either end; the last of one may hold its target only.
DEALT_ENDS = [[0, 1, 3, 20], [0, 17, 18, 20], [0, 20, 20], [0, 9, 18, 20]]


def dealt_micro_batches():
    tokens = np.random.default_rng(0).integers(HP.vocab_size, size=(4, 21)).astype(np.uint16)
    return [(of_one, np.array(ends)) for of_one, ends in zip(tokens, DEALT_ENDS, strict=True)]


def exact_tables(yarn, dtype):
    """Not rounded to bf16, where scores depend a little on where two tokens are, not on their distance alone."""
    angles = yarn.position.double()[:, None, None] * yarn.frequencies.double()
    still = torch.ones_like(angles)
    yarn.cos = torch.cat((angles.cos(), still), -1).to(dtype)
    yarn.sin = torch.cat((angles.sin(), 0 * still), -1).to(dtype)


# Measured: 2e-13 and 4e-5.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT_TOLERANCE), (torch.float32, 2e-4)])
@pytest.mark.parametrize("paired, key_offset", [(None, None), (False, True), (True, True)])
@pytest.mark.parametrize("together", [2, 4])
def test_joined_micro_batches_have_the_losses_and_gradients_that_they_have_apart(
    monkeypatch, together, paired, key_offset, dtype, tolerance
):
    if paired is not None:  # None: as the table says
        change_attention(monkeypatch, paired=paired, key_offset=key_offset)
    model, dealt = random_model(), dealt_micro_batches()
    table = model.ngrams.detach()
    exact_tables(model.to(dtype).yarn, dtype)
    targets = np.concatenate([tokens[1:] for tokens, _ in dealt])
    classes = train_gpt.to_device([train_gpt.softmax_classes(targets, 96, 128)], CPU)
    weights = torch.tensor(TARGET_WEIGHTS, dtype=dtype)
    slopes = torch.randn(80, dtype=dtype)  # so that no position's gradient is another's

    def losses_and_gradients(joined):
        model.zero_grad()
        model.ngrams = table.to(dtype).requires_grad_()
        spelled, places = np.arange(HP.padded_vocab), np.empty(HP.ngram_rows, np.int32)
        batches, exchange = train_gpt.make_micro_batches(
            dealt, joined, spelled, places, train_gpt.World(), classes, True
        )
        model.ngrams = model.ngrams.detach()[exchange.rows].requires_grad_()
        assert [len(batch.inputs) for batch in batches] == [20 * joined] * (4 // joined)
        losses = [model(batch, WINDOWS, weights) for batch in batches]
        for of_batch, slope in zip(losses, slopes.split(20 * joined), strict=True):
            (of_batch * slope).sum().backward()
        gradients = {name: p.grad.clone() for name, p in parameters_of(model).items() if p.grad is not None}
        return torch.cat(losses).detach(), gradients

    (losses, gradients), (apart, gradients_apart) = losses_and_gradients(together), losses_and_gradients(1)
    assert relative_error(losses - losses.mean(), apart - apart.mean()) < tolerance
    assert gradients.keys() == gradients_apart.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, gradients_apart[name]) < tolerance, name


def first_attention_inputs(monkeypatch, tokens, **change):
    """q, k, v of the first attention in a model whose layers with attention are all changed; else always the same."""
    seen, attend = [], train_gpt.attend
    with monkeypatch.context() as patch:
        change_attention(patch, **change)
        torch.manual_seed(0)
        model = random_model()
        patch.setattr(train_gpt, "attend", lambda q, k, v, *rest: (seen.append((q, k, v)), attend(q, k, v, *rest))[1])
        losses_of(model, tokens[:-1], tokens[1:])
    return seen[0]


def test_key_offset_takes_the_second_half_of_a_key_from_the_token_before(monkeypatch):
    tokens, half = random_tokens(), HP.head_dim // 2
    q, k, v = first_attention_inputs(monkeypatch, tokens, paired=False, key_offset=False)
    q2, shifted, v2 = first_attention_inputs(monkeypatch, tokens, paired=False, key_offset=True)
    assert torch.equal(shifted[:, :, :half], k[:, :, :half])
    firsts = ENDS[:-1]  # of a document have no token before them
    others = [t for t in range(T) if t not in firsts]
    assert torch.equal(shifted[others, :, half:], k[[t - 1 for t in others], :, half:])
    assert torch.equal(shifted[firsts], k[firsts])
    assert torch.equal(q2, q) and torch.equal(v2, v)


def test_paired_heads_see_the_keys_of_both_heads_and_no_later_ones(monkeypatch):
    inputs = first_attention_inputs(monkeypatch, random_tokens(), paired=True, key_offset=False)
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    window, H = 3, HP.num_heads
    out = train_gpt.attend(q, k, v, documents().paired(), window, 0.1).reshape(T, H, -1)
    pair = {(0, 20): {(20, 0), (19, 0), (19, 2)}, (2, 20): {(20, 0), (20, 2), (19, 0), (19, 2)}}
    pair |= {(1, 20): {(20, 1), (19, 1), (19, 3), (18, 3)}}
    pair[0, 20] |= {(18, 2)}
    for (head, t), keys in pair.items():
        (gradient,) = torch.autograd.grad(out[t, head].sum(), v, retain_graph=True)
        gradient = gradient.view(T, H, -1)  # a value's gradient is its attention weight
        assert {tuple(index) for index in gradient.abs().sum(-1).nonzero().tolist()} == keys


# ---------------------------------------------------------------------------- inputs


def int32(x):
    return (x + 2**31) % 2**32 - 2**31


def plain_ngrams(tokens, rows, firsts=ENDS[:-1]):
    """Rows of bigrams and of trigrams, in Python's integers; firsts: where documents begin."""
    half, found = rows // 2, ([], [])
    for t in range(len(tokens)):
        x, y, z = tokens[t], tokens[t - 1], tokens[t - 2]
        bigram, trigram = t not in firsts, t not in firsts and t - 1 not in firsts
        hashed = int32(36313 * x) ^ int32(27191 * y)
        found[0].append(hashed % (half - 1) if bigram else half - 1)
        hashed = int32(17351 * x) ^ int32(60961 * y) ^ int32(45259 * z)
        found[1].append(half + (hashed % (half - 1) if trigram else half - 1))
    return found


def test_signs_are_the_same_whatever_the_seed_and_the_type_and_alike_for_tokens_that_are_spelled_alike():
    hp = Hyperparameters(ngram_rows=64, num_heads=2, head_dim=32)  # with GPT-2's vocabulary
    canonical, ids = train_gpt.canonical_tokens(hp).tolist(), train_gpt.read_vocabulary(hp)
    first = GPT(hp, CPU, torch.float32)
    torch.manual_seed(1)
    signs = GPT(hp, CPU, torch.bfloat16).signs
    assert signs.dtype == torch.bfloat16 and torch.equal(signs.float(), first.signs)
    assert signs.shape == (50304, 64) and torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(signs, signs[canonical]) and len(signs.unique(dim=0)) == len({*canonical})
    assert torch.equal(signs[ids[b" the"]], signs[ids[b"The"]])
    # Two million coins, 33,000 a column and 64 a row: five standard deviations
    coins = first.signs[sorted({*canonical})]
    for mean, n in ((coins.mean(), coins.numel()), (coins.mean(0), len(coins)), (coins.mean(1), 64)):
        assert mean.abs().max() < 5.5 / n**0.5
    # A checkpoint does not hold them: other ones would make what it learned of n-grams noise
    assert "".join("-+"[s > 0] for s in signs[0, :16].tolist()) == "-++-+++++++--+--"
    assert not first.signs.requires_grad and not {"signs", "prefixes"} & {*first.state_dict()}


def test_tokens_that_are_spelled_alike_share_a_row_of_spellings_and_others_do_not():
    hp = Hyperparameters(ngram_rows=64, num_heads=2, head_dim=32)  # with GPT-2's vocabulary
    ids, model = train_gpt.read_vocabulary(hp), GPT(hp, CPU, torch.float32)
    the, that = ({model.spelling[ids[b" " * i + w.encode()]].item() for i in (0, 1) for w in (word, word.title())}
                 for word in ("the", "that"))  # fmt: skip
    assert len(the) == len(that) == 1 and the != that
    assert model.spelling.tolist() == train_gpt.canonical_tokens(hp).tolist()
    assert torch.equal(model.spelling[model.spelling_order.long()], model.spelling.sort().values)
    assert not {"spelling", "spelling_order"} & {*model.state_dict()}


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
    assert relative_error(out, plain_rotate(x, torch.arange(50)[:, None].expand(50, 3), frequencies)) < EXACT_TOLERANCE
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


def test_yarn_has_positions_for_the_longest_paired_micro_batch_alone_or_joined():
    for tokens, positions in ((4 * T, 8 * T), (1, 2 * T)):
        assert len(GPT(replace(HP, micro_batch_tokens=tokens), CPU, torch.float32).yarn.cos) == positions


# ---------------------------------------------------------------------------- parameters


WIDE = Hyperparameters(vocab_size=1000, vocabulary="", ngram_rows=64, num_heads=2, head_dim=64, val_batch_size=8)


@pytest.fixture(scope="module")
def wide_model():
    torch.manual_seed(0)
    return GPT(WIDE, CPU, torch.float32)


def test_parameters_have_the_shapes_and_types_that_checkpoints_and_optimizer_expect():
    model, C, H, D = GPT(WIDE, CPU, torch.bfloat16), WIDE.model_dim, WIDE.num_heads, WIDE.head_dim
    attention = sum(layer.window is not None for layer in LAYERS)
    narrow = sum(layer.window is not None and layer.narrow for layer in LAYERS)
    wide = attention - narrow
    values = sum(layer.value_embed for layer in LAYERS)
    mlps = sum(layer.mlp for layer in LAYERS)
    networks = [[]]  # gates of each; those ahead of the first network's row are none
    for a in LAYERS:
        networks += [[]] * a.gates
        networks[-1] = networks[-1] + [(a.xsa + a.head_gates + a.value_embed) * H + len(a.values) + len(a.adds)]
    most = max(map(sum, networks))
    shapes = {
        "scalars": (sum(count for count, *_ in train_gpt.SCALARS.values()),),
        "gate_in": (len(networks) - 1, train_gpt.GATE_HIDDEN, C),
        "gate_out": (len(networks) - 1, most, train_gpt.GATE_HIDDEN),
        "gate_bias": (len(networks) - 1, most),
        "copy_qk": (2 * WIDE.copy_width, C),
        "copy_sentinel": (1, C),
        "qk_bank": (wide * H + -wide * H % 8, 2 * D, C),  # banks in eights
        "narrow_qk_bank": (narrow * H + -narrow * H % 8, D, C),
        "vo_bank": (2 * attention + -2 * attention % 8, C, C),
        "mlp_bank": (mlps + -mlps % 4, 2, WIDE.mlp_ratio * C, C),
        "embed": (1024, C),
        "spellings": (1024, C),
        "value_embeds": (values * 1024, C),
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {"scalars"}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_scalars_start_at_their_values(wide_model):
    scalars = wide_model.named_scalars()
    assert {name: [value.item() for value in values] for name, values in scalars.items()} == {
        name: pytest.approx([value] * count) for name, (count, value, _) in train_gpt.SCALARS.items()
    }


# e4m3 rounds by 2.6 %, once or in both factors.
@pytest.mark.parametrize("fp8_loss_scale", [None, 0.25])
def test_layers_multiply_by_the_same_in_fp8_and_without(fp8_loss_scale):
    model = random_model()
    weights = model.layer_weights(model.named_scalars(), fp8_loss_scale)
    mlps = [w.mlp for w in weights if w.mlp is not None]
    x = torch.randn(T, 32).double()
    _, normed, x_fp8 = train_gpt.normed_input(x, None, None if fp8_loss_scale is None else train_gpt.FP8_X)
    made = ((w, *train_gpt.qkv_weight(w)) for w in weights if w.qkv)
    qkvs = [w.qkv._replace(weight=weight, scale=scale, x=normed, x_fp8=x_fp8) for w, weight, scale in made]
    assert len(mlps) == len(train_gpt.MLP_LAYERS) and len(qkvs) == len(train_gpt.ATTENTION_LAYERS)
    if fp8_loss_scale is None:
        assert {field for weight, *in_fp8 in mlps for field in in_fp8} == {None}
        assert {field for qkv in qkvs for field in qkv._replace(weight=None, x=None)} == {None}
        return
    for p in mlps + qkvs:
        assert torch.equal(p.fp8_t.float(), p.fp8.float().mT) and p.grad_scale == 0.25 * train_gpt.FP8_GRAD
    for mlp in mlps:
        assert relative_error(train_gpt.FP8_WEIGHT * mlp.fp8.double(), mlp.weight) < 3e-2
    for qkv in qkvs:
        product = train_gpt.FP8_X * qkv.x_fp8.double() @ (qkv.scale * qkv.fp8.double()).T
        assert relative_error(product, qkv.x @ qkv.weight.T) < 5e-2


def test_gates_and_output_projections_start_at_zero(wide_model):
    p = dict(wide_model.named_parameters())
    for name in ("gate_out", "copy_sentinel", "spellings"):
        assert not p[name].any(), name
    assert not p["mlp_bank"][:, 1].any()


@pytest.mark.parametrize(
    "name, std",
    [("qk_bank", 0.5), ("narrow_qk_bank", 0.5), ("vo_bank", 0.5), ("mlp_bank", 0.5), ("gate_in", 3**-0.5)],
)
def test_matrices_start_uniform_with_their_std_over_root_width(wide_model, name, std):
    matrices, std = getattr(wide_model, name).detach().float(), std * WIDE.model_dim**-0.5
    for matrix in matrices[:, 0] if name == "mlp_bank" else matrices:
        assert matrix.std().item() == pytest.approx(std, rel=0.03)  # 8,192 numbers or more: 0.5 % of noise
        assert matrix.abs().max().item() == pytest.approx(3**0.5 * std, rel=0.01)  # a uniform distribution's edge
        assert abs(matrix.mean().item()) < 0.05 * std


def test_value_embeddings_start_normal_with_std_a_hundredth(wide_model):
    for table in wide_model.value_embeds.detach().split(1024):
        assert table.std().item() == pytest.approx(0.01, rel=0.02)
        assert table.abs().max() > 0.01 * 3.5  # not uniform


def test_what_copying_looks_for_starts_normal_with_one_over_root_width(wide_model):
    weights = wide_model.copy_qk.detach()
    assert weights.std().item() == pytest.approx(WIDE.model_dim**-0.5, rel=0.02)
    assert weights.abs().max() > WIDE.model_dim**-0.5 * 3.5  # not uniform


def test_the_embedding_which_is_the_head_too_starts_normal(wide_model):
    embed = wide_model.embed.detach().float()
    assert embed.std().item() == pytest.approx(0.005, rel=0.02)
    assert embed.abs().max() > 0.005 * 3.5  # not uniform


def test_an_untrained_model_predicts_almost_uniformly():
    model, tokens = GPT(HP, CPU, torch.float32).double(), random_tokens()
    model.ngrams = torch.zeros(HP.ngram_rows, HP.model_dim, dtype=torch.float64)
    losses = losses_of(model, tokens[:-1], tokens[1:], weights=NEXT_TOKEN)
    assert losses.mean().item() == pytest.approx(math.log(128), abs=0.02)


# ---------------------------------------------------------------------------- validation


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 64])
def test_validation_loss_in_chunks_equals_the_loss_at_once(chunk):
    model, tokens = random_model(), random_tokens()
    whole = losses_of(model, tokens[:-1], tokens[1:], weights=NEXT_TOKEN)
    chunks = losses_of(model, tokens[:-1], tokens[1:], weights=NEXT_TOKEN, head_chunk=chunk)
    assert relative_error(chunks, whole) < EXACT_TOLERANCE


# ---------------------------------------------------------------------------- tables of layers that cannot work

GATES = Layer("short", gates=True, keep="a")
NO_WINDOW = "narrow, paired, key_offset, value_embed, xsa, head_gates, reads, values are for layers with a window"
TOO_LATE = "is not kept ahead of the network of its gates: keep it earlier, or give gates=True"
NO_DICT = "values and adds take names with their gates at the start, as dict(x0=0.0)"
NO_DICTS = ("x0", ("x0",), None, dict(x0=None))
NO_NETWORK = "its gates take a network: give this row or an earlier one gates=True"
FLAGS = "paired", "key_offset", "value_embed", "xsa", "head_gates"
REFUSED = [
    ([Layer("wide")], 0, "window is 'short', 'long' or None"),
    *(([GATES, Layer(None, **{column: True})], 1, NO_WINDOW) for column in FLAGS),
    ([GATES, Layer(None, reads="a")], 1, NO_WINDOW),
    ([GATES, Layer(None, values=dict(x0=0.0))], 1, NO_WINDOW),
    *(([GATES, Layer("short", **{name: bad})], 1, NO_DICT) for name in ("values", "adds") for bad in NO_DICTS),
    ([Layer("short", adds=X0)], 0, NO_NETWORK),
    ([Layer("short", xsa=True), GATES], 0, NO_NETWORK),
    ([Layer("short", head_gates=True), GATES], 0, NO_NETWORK),
    ([Layer("short", value_embed=True), GATES], 0, NO_NETWORK),
    ([Layer("short", values=X0), GATES], 0, NO_NETWORK),
    ([GATES, Layer("short", adds=dict(a=0.0))], 1, f"'a' {TOO_LATE}"),
    ([GATES, Layer("short", values=dict(a=0.0))], 1, f"'a' {TOO_LATE}"),
    ([Layer("short", adds=dict(a=0.0), gates=True, keep="a")], 0, f"'a' {TOO_LATE}"),
    ([GATES, Layer("short", adds=dict(x1=0.0), gates=True)], 1, f"'x1' {TOO_LATE}"),
    ([Layer("short", reads="a"), GATES], 0, "reads='a' is kept by no earlier row"),
    ([Layer("short", reads="a", keep="a")], 0, "reads='a' is kept by no earlier row"),
    ([GATES, GATES], 1, "the name 'a' is taken"),
    ([Layer("short", keep="x0")], 0, "the name 'x0' is taken"),
    ([Layer("short", keep="ngrams")], 0, "the name 'ngrams' is taken"),
]


@pytest.mark.parametrize("layers, row, words", REFUSED)
def test_a_row_of_layers_that_cannot_work_is_refused_in_one_line_that_names_it(monkeypatch, layers, row, words):
    monkeypatch.setattr(train_gpt, "LAYERS", tuple(layers))
    with pytest.raises(UserError) as error:
        check_tables(train_gpt, Hyperparameters())
    told, _, weighed = str(error.value).partition("; it weighs ")  # what would be right
    assert told == f"LAYERS, row {row}: {words}" and bool(weighed) == (TOO_LATE in words)
