"""The optimizer on a CPU against plain formulas in float64, written independently of it."""

from dataclasses import replace
from types import SimpleNamespace

import checkpoint
import pytest
import torch
from checks import check_parameters
from conftest import relative_error, rows_in_use

import train_gpt
from train_gpt import (
    GPT,
    Adam,
    Hyperparameters,
    NorMuon,
    Optimizer,
    Row,
    Slot,
    World,
    join_bits,
    normuon_update,
    polar_express,
    split_bits,
)

CPU = torch.device("cpu")
HP = Hyperparameters(
    vocab_size=120,  # padded to 128
    vocabulary="",
    muon_lr=0.023,  # PlainNorMuon's
    ngram_rows=64,
    num_heads=4,
    head_dim=8,
    val_batch_size=8 * 16,
    stages=(train_gpt.STAGES[0]._replace(tokens=8 * 16),),
)
STEPS = 10

# In relative norm. The formulas themselves, both in float64; measured 2e-14.
EXACT_TOLERANCE = 1e-12
# One step of a few float32 operations; measured below 2e-7.
STEP_TOLERANCE = 1e-6
# The same after Polar Express, of one gradient in several matrices; measured 2e-6.
POLAR_STEP_TOLERANCE = 1e-5
# Ten steps in float32. Rounding turns the sign of an update now and then, where it is next to nothing: then a decay
# comes or does not. Of 24 seeds the most is 3e-7 and 9e-5; without the decay at all it is 1e-2 for banks.
TRAJECTORY_TOLERANCE = {"adam": 5e-5, "normuon": 5e-4}
# Four iterations bring every singular value from 1 to 1/100 of the largest into this band; measured 0.77 to 1.23, in
# bfloat16 too, and their distance from 1 as a root mean square, measured 0.162.
SINGULAR_VALUES = 0.75, 1.25
POLAR_TOLERANCE = 0.18
# Polar Express in bfloat16 against float64, norms of matrices of 8 rows; measured 5.2e-2, of 16 2.4e-2, of 768 3e-3.
BF16_NORM_TOLERANCE = 7e-2

# That of the n-grams: see test_ngram.py
ROWS = {row.name: row for row in rows_in_use() if row.algorithm != "rowwise"}
ADAM = [name for name, row in ROWS.items() if row.algorithm == "adam"]
BANKS = [name for name in ROWS if name not in ADAM]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_model(dtype=torch.float32):
    """None of whose parameters is zero; tokens share spellings."""
    model = GPT(HP, CPU, dtype)
    model.spelling.copy_(3 * torch.arange(len(model.spelling)) % 50)
    model.spelling_order.copy_(model.spelling.argsort())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def optimizer_of(model, **overrides):
    return Optimizer(model, replace(HP, **overrides), World())


def random_gradients(model, change=lambda gradient: gradient):
    """Those of spellings are the sums of their tokens'."""
    parameters = {name: model.get_parameter(name) for name in ROWS}
    gradients = {name: change(torch.randn(p.shape).to(p.dtype)) for name, p in parameters.items()}
    gradients["spellings"] = torch.stack(
        [gradients["embed"][model.spelling == i].sum(0) for i in range(len(model.embed))]
    )
    return gradients


def away_from_zero(gradient):
    """Of the same signs: one that is near zero is not divided by its own size, but by that and epsilon."""
    return gradient + 0.5 * gradient.sign()


def add_gradients(model, gradients):
    """As the backward pass does; the optimizer makes those of spellings."""
    for name, gradient in gradients.items():
        if name != "spellings":
            model.get_parameter(name).grad += gradient


def in_use(name, p):
    """Of a bank its matrices (N, rows, columns) without those that fill it up; another parameter as it is."""
    return p.flatten(0, -3)[: train_gpt.bank_matrices(HP)[name]] if name in BANKS else p


def values_of(model):
    return {name: model.get_parameter(name).detach().clone() for name in ROWS}


def step_tolerance(p, move, tolerance=STEP_TOLERANCE):
    """Of a move: that of its formula, and what is lost as the parameter that moves is rounded to float32."""
    return tolerance + 2**-23 * (p.norm() / move.norm()).item()


def states_of(optimizer):
    """Every tensor and count of every algorithm, by parameter and name."""
    out = {}
    for name, slot in optimizer.slots.items():
        for state in ("m", "v", "second_moment", "low_bits", "updates", "average"):
            value = getattr(slot.algorithm, state, None)
            if value is not None:
                out[name, state] = value.clone() if isinstance(value, torch.Tensor) else value
    return out


def schedule_of(step):
    """A learning-rate factor and a momentum that differ from step to step."""
    return 1.0 + 0.1 * step, 0.85 + 0.01 * step


# ---------------------------------------------------------------------------- the plain formulas


def multipliers_along(lr, p):
    """A row's multipliers, in turn, along the first dimension of p, in a shape to multiply it by."""
    return torch.tensor([lr[i % len(lr)] for i in range(len(p))], dtype=torch.float64).view(-1, *[1] * (p.dim() - 1))


class PlainAdam:
    """Kingma & Ba 2015 with bias correction, and weight decay where it points the way the update goes."""

    def __init__(self, p, row):
        (self.b1, self.b2), self.wd_multiplier = row.betas, row.wd
        self.p, self.lr_multiplier = p, multipliers_along(row.lr, p)
        self.m, self.v, self.t = torch.zeros_like(p), torch.zeros_like(p), 0

    def step(self, g, factor):
        self.t += 1
        lr = 0.008 * factor * self.lr_multiplier
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        corrected_m, corrected_v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        # eps is added to the root ahead of its correction, as in the formula with one step size
        u = lr * corrected_m / (corrected_v.sqrt() + 1e-10 / (1 - self.b2**self.t) ** 0.5)
        u = u + (u * self.p > 0) * lr**2 * 0.005 * self.wd_multiplier * self.p
        self.p = self.p - u


COEFFICIENTS = [
    (8.089257077256764, -22.29778961176275, 15.747758643528782),
    (3.9404580091358694, -2.7839205238875935, 0.5039305903778444),
    (3.4500246431021866, -2.4844234308824102, 0.477172045301001),
    (2.506069553283399, -1.8478249362118586, 0.4383240658418055),
]


def plain_polar_express(g):
    """The polynomials applied to the singular values themselves."""
    left, values, right = torch.linalg.svd(g / (1.02 * torch.linalg.matrix_norm(g) + 1e-6), full_matrices=False)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


class PlainNorMuon:
    """One matrix."""

    def __init__(self, p, multiplier):
        self.p, self.multiplier = p, multiplier
        self.m, self.average = torch.zeros_like(p), 0.0
        self.dim = 1 if p.shape[0] >= p.shape[1] else 0

    def step(self, g, factor, momentum):
        self.m = momentum * self.m + (1 - momentum) * g
        u = plain_polar_express(momentum * self.m + (1 - momentum) * g)
        self.average = 0.95 * self.average + 0.05 * u.square().mean(self.dim, keepdim=True)
        even = u / self.average.sqrt()
        u = even * torch.linalg.matrix_norm(u) / torch.linalg.matrix_norm(even)
        lr = 0.023 * factor
        decay = lr * 1.2 * self.p * (u * self.p >= 0)
        self.p = self.p - lr * self.multiplier * (u + decay)


def multipliers_of(name, matrices):
    """A bank's matrices take the row's multipliers in turn; tall ones step further by the root of rows over columns."""
    lr, (count, rows, columns) = ROWS[name].lr, matrices.shape
    return [lr[i % len(lr)] * max(1, rows / columns) ** 0.5 for i in range(count)]


def plain_bank(name, start):
    """A bank's matrices, in order."""
    matrices = start.flatten(0, -3)
    return [PlainNorMuon(p, m) for p, m in zip(matrices, multipliers_of(name, matrices), strict=True)]


def plain_run(start, gradients):
    """Parameters after each step, in float64, by the formulas; `gradients` by step."""
    start = {name: p.double() for name, p in start.items()}
    adams = {name: PlainAdam(start[name], ROWS[name]) for name in ADAM}
    banks = {name: plain_bank(name, start[name]) for name in BANKS}
    after, waiting = [], {name: 0.0 for name in ADAM}
    for step, new in enumerate(gradients):
        factor, momentum = schedule_of(step)
        for name in BANKS:
            for matrix, g in zip(banks[name], new[name].double().flatten(0, -3), strict=True):
                matrix.step(g, factor, momentum)
        waiting = {name: waiting[name] + new[name].double() for name in ADAM}
        if step % 2:
            for name, adam in adams.items():
                adam.step(waiting[name], factor)
            waiting = {name: 0.0 for name in ADAM}
        values = {name: adam.p for name, adam in adams.items()}
        values.update({n: torch.stack([m.p for m in banks[n]]).view(start[n].shape) for n in BANKS})
        after.append(values)
    return after


@pytest.fixture(scope="module")
def both_runs():
    """Start, and parameters after each step: of the optimizer and of the plain formulas."""
    torch.manual_seed(1)
    model = random_model()
    optimizer = optimizer_of(model)
    start, after = values_of(model), []
    gradients = [random_gradients(model) for _ in range(STEPS)]
    for step, new in enumerate(gradients):
        add_gradients(model, new)
        optimizer.step(step, *schedule_of(step))
        after.append(values_of(model))
    return start, after, plain_run(start, gradients)


@pytest.mark.parametrize("name", ROWS)
def test_each_parameter_follows_the_plain_formulas_through_ten_steps(both_runs, name):
    start, after, plain = both_runs
    for step, (ours, formula) in enumerate(zip(after, plain, strict=True)):
        if step == 0 and name in ADAM:
            assert torch.equal(ours[name], start[name])
            continue
        before, ours, formula = (in_use(name, values[name].double()) for values in (start, ours, formula))
        moved, should_move = ours - before, formula - before
        # Each of the steps rounds the parameter.
        tolerance = step_tolerance(STEPS * before, should_move, TRAJECTORY_TOLERANCE[ROWS[name].algorithm])
        assert relative_error(moved, should_move) < tolerance, f"step {step}"


# ---------------------------------------------------------------------------- the tables


def test_a_parameter_without_a_row_is_refused_and_an_empty_one_needs_none():
    model = random_model()
    model.forgotten = torch.nn.Parameter(torch.zeros(0, 3))
    check_parameters(train_gpt, model.tensors())
    assert "forgotten" not in optimizer_of(model).slots
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(train_gpt.UserError, match="one row for each of the model's parameters: forgotten has 0"):
        check_parameters(train_gpt, model.tensors())


# ---------------------------------------------------------------------------- Adam


def test_adams_parameters_rest_on_even_steps_and_normuons_never_do():
    model = random_model()
    optimizer = optimizer_of(model)
    for step in range(4):
        before = values_of(model)
        add_gradients(model, random_gradients(model))
        optimizer.step(step, *schedule_of(step))
        for name, p in values_of(model).items():
            moves = name in BANKS or step % 2 == 1
            assert torch.equal(p, before[name]) != moves, f"{name} at step {step}"


def test_adam_steps_with_the_sum_of_two_steps_gradients():
    apart, at_once = random_model(), random_model()
    at_once.load_state_dict(apart.state_dict())
    first, second = random_gradients(apart), random_gradients(apart)
    optimizers = optimizer_of(apart), optimizer_of(at_once)
    add_gradients(apart, first)
    for optimizer in optimizers:
        optimizer.step(0, 1.0, 0.9)
    add_gradients(apart, second)
    add_gradients(at_once, {name: first[name] + second[name] for name in ADAM})
    for optimizer in optimizers:
        optimizer.step(1, 1.0, 0.9)
    for name in ADAM:
        assert torch.equal(apart.get_parameter(name), at_once.get_parameter(name)), name


def test_gradients_are_cleared_once_they_are_used_and_no_sooner():
    model = random_model()
    optimizer = optimizer_of(model)
    gradients = random_gradients(model)
    add_gradients(model, gradients)
    parameters = {name: model.get_parameter(name) for name in ROWS}
    places = {name: p.grad.data_ptr() for name, p in parameters.items()}
    optimizer.step(0, 1.0, 0.9)
    for name, p in parameters.items():
        none = name in BANKS or name == "spellings"  # it is made when Adam is due
        assert torch.equal(p.grad, torch.zeros_like(p) if none else gradients[name]), name
    optimizer.step(1, 1.0, 0.9)
    for name, p in parameters.items():
        assert not p.grad.any() and p.grad.data_ptr() == places[name], name  # captured graphs add to the same place


@pytest.mark.parametrize("step", [1, 41])
def test_the_first_adam_update_moves_by_the_learning_rate_at_whatever_step(step):
    model = random_model()
    optimizer = optimizer_of(model, adam_wd=0.0)
    before = values_of(model)
    gradients = random_gradients(model, away_from_zero)
    add_gradients(model, gradients)
    optimizer.step(step, 0.5, 0.9)
    for name in ADAM:
        moved = model.get_parameter(name) - before[name]
        # with t = 1 the corrections leave g / |g|
        expected = -0.008 * 0.5 * multipliers_along(ROWS[name].lr, moved) * gradients[name].sign()
        assert relative_error(moved, expected) < step_tolerance(before[name], expected), name


def test_adam_decays_by_the_learning_rate_squared_and_only_where_the_update_shrinks_the_value():
    row = Row("some", "adam", False, (75.0,), 5.0, (0.75, 0.95))
    before, gradient = 0.1 * torch.randn(64, 32), away_from_zero(torch.randn(64, 32))
    p, signs = before.clone(), gradient.sign()
    Adam(row, replace(HP, adam_wd=3.0), p, first=0).update(gradient, 0.5, 0.9)
    lr = 0.008 * 0.5 * 75
    shrinking = signs == before.sign()
    assert 0.4 < shrinking.double().mean() < 0.6
    expected = -lr * signs - shrinking * lr**2 * 3.0 * 5 * before.double()
    assert relative_error(p.double() - before.double(), expected) < step_tolerance(before, expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_adam_takes_several_learning_rates_along_the_first_dimension_in_whichever_ranks_slice(size):
    row = Row("some", "adam", True, (1.0, 3.0, 20.0), 50.0, (0.75, 0.95))
    start, gradients = torch.randn(16, 5), torch.randn(4, 16, 5)
    p = torch.nn.Parameter(start.clone())
    plain = PlainAdam(start.double(), row)
    slots = [Slot(row, p, HP, World(rank, size), lambda function: function) for rank in range(size)]
    for step, gradient in enumerate(gradients):
        plain.step(gradient.double(), 1.0 + step)
        for slot in slots:  # each moves its slice of the same tensor
            slot.algorithm.update(slot.communication.own(gradient), 1.0 + step, 0.9)
    should_move = plain.p - start.double()
    assert relative_error(p.double() - start.double(), should_move) < step_tolerance(4 * start, should_move)


def test_adams_moments_are_float32_but_for_the_tables_whose_type_they_have():
    model = random_model(torch.bfloat16)
    optimizer = optimizer_of(model)
    for name in ADAM:
        algorithm = optimizer.slots[name].algorithm
        expected = torch.bfloat16 if name in train_gpt.TABLES else torch.float32
        assert algorithm.m.dtype == algorithm.v.dtype == expected


# ---------------------------------------------------------------------------- NorMuon

SHAPES = {"square": (32, 32), "tall": (96, 24), "wide": (24, 96)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def with_singular_values(shape, values):
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return left @ torch.diag(values) @ right, left @ right


@by_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_polar_express_brings_singular_values_near_1_and_keeps_the_directions(shape, dtype):
    count = min(shape)
    # From the largest to a hundredth of it
    g, nearest = with_singular_values(shape, torch.logspace(0, -2, count, dtype=torch.float64))
    out = polar_express(g[None].to(dtype))[0].double()
    values = torch.linalg.svdvals(out)
    low, high = SINGULAR_VALUES
    assert low < values.min() and values.max() < high
    assert relative_error(out, nearest) < POLAR_TOLERANCE


@by_shape
def test_polar_express_is_four_polynomials_of_the_singular_values(shape):
    g = torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.stack([plain_polar_express(matrix) for matrix in g])
    assert relative_error(polar_express(g), expected) < EXACT_TOLERANCE


def test_polar_express_does_not_depend_on_the_gradients_scale_nor_fail_at_zero():
    g = torch.randn(1, 24, 96, dtype=torch.float64)
    assert relative_error(polar_express(1e4 * g), polar_express(g)) < 1e-6  # the 1e-6 beside a norm of 48
    assert not polar_express(torch.zeros(1, 24, 96)).any()


def variance_reduced(u, second_moment, beta2=0.95):
    """What normuon_update makes of u: its step from zero at learning rate 1."""
    p = torch.zeros_like(u)
    normuon_update(p, None, u, second_moment, beta2, torch.ones(len(u), 1, 1), torch.tensor(0.0))
    return -p


def second_moment_of(shape):
    row = Row("bank", "normuon", True, (1.0,), 1.0)
    return NorMuon(row, HP, torch.zeros(2, *shape), first=0, compiled=lambda function: function).second_moment


@by_shape
def test_variance_reduction_evens_out_the_longer_sides_vectors_and_keeps_the_norm(shape):
    u = torch.randn(2, *shape) * torch.logspace(0, 1, shape[1]) * torch.logspace(0, 1, shape[0])[:, None]
    second_moment = second_moment_of(shape)
    out = variance_reduced(u, second_moment)
    dim = -1 if shape[0] >= shape[1] else -2  # rows of tall and square matrices, columns of wide ones
    norms = out.norm(dim=dim)
    assert relative_error(norms, norms.mean(-1, keepdim=True).expand_as(norms)) < STEP_TOLERANCE
    assert relative_error(out.norm(dim=(-2, -1)), u.norm(dim=(-2, -1))) < STEP_TOLERANCE
    assert relative_error(second_moment, 0.05 * u.square().mean(dim, keepdim=True)) < STEP_TOLERANCE
    # Later the average over time decides, and the norm is still kept.
    v = torch.randn(2, *shape)
    expected_moment = 0.95 * second_moment + 0.05 * v.square().mean(dim, keepdim=True)
    out = variance_reduced(v, second_moment)
    assert relative_error(second_moment, expected_moment) < STEP_TOLERANCE
    even = v / expected_moment.sqrt()
    expected = even * (v.norm(dim=(-2, -1)) / even.norm(dim=(-2, -1)))[:, None, None]
    assert relative_error(out, expected) < STEP_TOLERANCE


def test_variance_reduction_of_a_zero_update_is_zero():
    out = variance_reduced(torch.zeros(2, 8, 8), second_moment_of((8, 8)))
    assert not out.any()


def test_normuon_decays_only_where_the_update_shrinks_the_value_or_is_zero():
    p = torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [2.0, -2.0]]])
    u = torch.tensor([[[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]]])
    second_moment = torch.full((1, 3, 1), 1.0)
    moved = p.clone()
    # beta2 = 1: the second moment stays 1, so that u is left alone
    normuon_update(moved, None, u, second_moment, 1.0, torch.full((1, 1, 1), 0.5), torch.tensor(0.1))
    expected = p - 0.5 * (u + 0.1 * p * torch.tensor([[[1, 0], [0, 1], [1, 1]]]))
    assert torch.allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("name", BANKS)
def test_a_banks_matrices_step_as_far_as_their_multipliers_say(name):
    model = random_model()
    optimizer = optimizer_of(model, muon_wd=0.0)
    p = model.get_parameter(name)
    whole, g = values_of(model)[name].flatten(0, -3), torch.randn(p.shape[-2:])
    before = in_use(name, whole)
    add_gradients(model, {name: g.expand_as(p)})
    optimizer.step(0, 0.5, 0.9)
    size = 0.023 * 0.5 * polar_express(g[None]).norm()
    multipliers = multipliers_of(name, before)
    for moved, start, multiplier in zip(in_use(name, p) - before, before, multipliers, strict=True):
        assert moved.any()
        tolerance = step_tolerance(start, moved, POLAR_STEP_TOLERANCE)
        assert relative_error(moved.norm(), multiplier * size) < tolerance
    assert torch.equal(p.flatten(0, -3)[len(before) :], whole[len(before) :])  # what fills the bank up stays


def test_each_pair_of_heads_is_made_orthogonal_and_evened_out_by_itself():
    model = random_model()
    optimizer = optimizer_of(model, muon_wd=0.0)
    p, rows = model.qk_bank, 2 * HP.head_dim
    wide = sum(bool(layer.window) and not layer.narrow for layer in train_gpt.LAYERS)
    assert p.shape[1:] == (rows, HP.model_dim) and len(p) >= HP.num_heads * wide
    before, gradient = values_of(model)["qk_bank"], torch.zeros_like(p)
    gradient[3], gradient[4] = torch.randn(rows, HP.model_dim), 1e3 * torch.randn(rows, HP.model_dim)
    add_gradients(model, {"qk_bank": gradient})
    optimizer.step(0, 0.5, 0.9)
    moved = (p - before).double()
    assert [i for i, pair in enumerate(moved) if pair.any()] == [3, 4]
    for i in (3, 4):
        direction = plain_polar_express(gradient[i].double())
        even = direction / direction.square().mean(0, keepdim=True).sqrt()
        even *= torch.linalg.matrix_norm(direction) / torch.linalg.matrix_norm(even)
        assert relative_error(moved[i], -0.023 * 0.5 * even) < step_tolerance(before[i], moved[i], POLAR_STEP_TOLERANCE)
    assert optimizer.slots["qk_bank"].algorithm.second_moment.shape == (len(p), 1, HP.model_dim)


def test_gradient_rows_go_to_their_owners_the_first_and_the_last_of_a_shard_too(monkeypatch):
    counts = []

    def exchange(received, values, sizes, sent, async_op):
        counts.append((sizes, sent, values.tolist()))

    monkeypatch.setattr(train_gpt.dist, "all_to_all_single", exchange)
    grad = torch.arange(8.0)[:, None]
    for rank, looked_up, received in ((0, [3, 4, 5], [0, 3]), (1, [0, 3, 7], [4, 5])):
        rows = train_gpt.ShardedRows(torch.zeros(8, 1), World(rank, 2), vocabulary=8)
        rows.mark_lookups(0, [3, 4, 5])
        rows.mark_lookups(1, [0, 3, 7])
        rows.reduce(grad)
        own = range(4 * rank, 4 * rank + 4)
        assert (rows.received_rows + own[0]).tolist() == received
        sizes, sent, values = counts.pop()
        assert (sizes[1 - rank], sent[1 - rank], sizes[rank], sent[rank]) == (2, 2, 0, 0)
        assert values == [[row] for row in looked_up if row not in own]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_matrix_keeps_its_multiplier_whichever_ranks_slice_it_is_in(size):
    # Of eight ranks each has three of the 24 matrices: every other slice begins with one that takes the second value.
    row = Row("bank", "normuon", True, (1.0, 3.0), 1.0)
    p = torch.nn.Parameter(torch.zeros(12, 2, 16, 4))
    slots = [Slot(row, p, HP, World(rank, size), lambda function: function) for rank in range(size)]
    assert all(len(slot.algorithm.p) == 24 // size for slot in slots)
    multipliers = torch.cat([slot.algorithm.multipliers for slot in slots]).flatten()
    assert multipliers.tolist() == [2.0, 6.0] * 12  # the root of rows over columns


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_bank_is_shared_out_by_the_matrix_under_adam_too(size):
    row = Row("bank", "adam", True, (1.0,), 1.0, (0.9, 0.99))  # 12 layers of two matrices
    p = torch.nn.Parameter(torch.randn(12, 2, 16, 4))
    slices = [Slot(row, p, HP, World(rank, size), lambda function: function).algorithm.p for rank in range(size)]
    assert {len(slice) for slice in slices} == {24 // size}
    assert torch.equal(torch.cat(slices), p.flatten(0, 1))


# ---------------------------------------------------------------------------- the master value's further bits


def random_bits(n=100_000):
    return torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)


def test_joining_is_the_inverse_of_splitting_for_every_pattern_of_bits():
    bits = torch.cat((random_bits(), torch.tensor([0, -1, 0x8000, 0xFFFF, -0x80000000, -0x7FFF8001]).to(torch.int32)))
    high, low = split_bits(bits.view(torch.float32))
    assert high.dtype == torch.bfloat16 and low.dtype == torch.uint16
    assert torch.equal(join_bits(high, low).view(torch.int32), bits)


def test_splitting_is_the_inverse_of_joining_for_every_pattern_of_bits():
    high = random_bits().to(torch.int16).view(torch.bfloat16)
    low = (random_bits().to(torch.int32) & 0xFFFF).to(torch.uint16)
    again_high, again_low = split_bits(join_bits(high, low))
    assert torch.equal(again_high.view(torch.int16), high.view(torch.int16))
    assert torch.equal(again_low.to(torch.int32), low.to(torch.int32))


@pytest.mark.parametrize(
    "value, high, low",
    [
        (1.0, 1.0, 0),
        (-1.0, -1.0, 0),
        (1 + 2**-23, 1.0, 1),
        (-(1 + 2**-23), -1.0, 1),
        (1 + 2**-7 - 2**-23, 1.0, 0xFFFF),  # bf16 is cut, not rounded: the further bits count up from it
        (-(1 + 2**-7 - 2**-23), -1.0, 0xFFFF),
    ],
)
def test_known_values_split_into_bf16_and_further_bits(value, high, low):
    parts = split_bits(torch.tensor([value]))
    assert (parts[0].item(), int(parts[1].item())) == (high, low)


def test_a_bf16_bank_follows_its_float32_master_through_updates_bf16_would_lose():
    shape = (3, 16, 8)
    master = torch.randn(shape) + 3 * torch.randn(shape).sign()
    with_bits, low_bits = split_bits(master)
    with_bits, low_bits = with_bits.clone(), low_bits.clone()
    bf16_alone = with_bits.clone()
    begin = master.clone()
    moments = [torch.zeros(3, 16, 1) for _ in range(3)]
    lr, decay = torch.full((3, 1, 1), 1e-6), torch.tensor(0.01)
    direction = torch.randn(shape)
    for _ in range(300):
        u = (direction + 0.3 * torch.randn(shape)).bfloat16()
        for p, low, moment in zip((master, with_bits, bf16_alone), (None, low_bits, None), moments, strict=True):
            normuon_update(p, low, u, moment, 0.95, lr, decay)
        assert torch.equal(join_bits(with_bits, low_bits), master)
    assert torch.equal(bf16_alone, split_bits(begin)[0])  # each step alone is lost
    assert (with_bits != bf16_alone).any() and (master != begin).double().mean() > 0.9


def test_banks_in_bf16_have_further_bits_and_nothing_else_has():
    optimizer = optimizer_of(random_model(torch.bfloat16))
    for name, slot in optimizer.slots.items():
        low_bits = getattr(slot.algorithm, "low_bits", None)
        assert (low_bits is not None) == (name in BANKS)
        if low_bits is not None:
            assert low_bits.dtype == torch.uint16 and low_bits.shape == slot.p.view(slot.shape).shape
    for name in BANKS:
        assert optimizer_of(random_model()).slots[name].algorithm.low_bits is None


def test_the_optimizer_moves_a_bf16_bank_by_steps_smaller_than_a_bf16_step():
    model = random_model(torch.bfloat16)
    optimizer = optimizer_of(model)
    before = {name: model.get_parameter(name).detach().float() for name in BANKS}
    gradients = random_gradients(model)
    for step in range(0, 20, 2):
        add_gradients(model, {name: gradients[name] for name in BANKS})
        optimizer.step(step, 1e-3, 0.9)
    for name in BANKS:
        slot = optimizer.slots[name]
        master = join_bits(slot.p.detach().view(slot.shape), slot.algorithm.low_bits)
        moved = in_use(name, master - before[name].view(slot.shape))
        # ten steps the same way, each of 0.001 x the learning rate
        multipliers = slot.algorithm.multipliers[: len(moved)]
        sizes = (moved / multipliers).norm(dim=(-2, -1)) / (10 * 1e-3 * 0.023)
        expected = torch.stack([plain_polar_express(g.double()).norm() for g in in_use(name, gradients[name])])
        assert relative_error(sizes, expected) < BF16_NORM_TOLERANCE


# ---------------------------------------------------------------------------- averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_averaged_ends_as_its_average_and_all_else_as_it_is(dtype):
    model = random_model(dtype)
    optimizer, averages = optimizer_of(model, average_frac=0.5), {}
    for weight in (1.0, 0.4, 0.4, 0.7):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        values = values_of(model)
        averages = {name: (1 - weight) * averages.get(name, 0) + weight * p.double() for name, p in values.items()}
        optimizer.average(weight, settle=False)
        assert all(torch.equal(p, values[name]) for name, p in values_of(model).items())
    optimizer.average(0.0, settle=True)
    for name, p in values_of(model).items():
        if ROWS[name].averaged:
            assert relative_error(p.double(), averages[name]) < (1e-6 if dtype == torch.float32 else 4e-3), name
        else:
            assert torch.equal(p, values[name]), name


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_several_ranks_are_added_unsorted_whatever_pytorch_is_to_be(deterministic):
    table, modes = torch.ones(4, 2, dtype=torch.bfloat16), []

    def parts():
        for rows in ([3, 1], [], [1, 0]):
            modes.append(torch.are_deterministic_algorithms_enabled())
            yield torch.tensor(rows, dtype=torch.int32), torch.full((len(rows), 2), 0.5, dtype=torch.bfloat16)

    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic)
    try:
        train_gpt.add_different_rows(table, parts())
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert table.tolist() == [[1.5, 1.5], [2.0, 2.0], [1.0, 1.0], [1.5, 1.5]]
    assert modes == [False] * 3 and after == (deterministic, deterministic)


def test_each_rank_averages_its_own_share():
    row, start, more = Row("some", "adam", True, (1.0,), 1.0, (0.9, 0.99), averaged=True), *torch.randn(2, 16, 5)
    p = torch.nn.Parameter(start.clone())
    slots = [Slot(row, p, HP, World(rank, 4), lambda function: function) for rank in range(4)]
    optimizer = SimpleNamespace(slots=dict(enumerate(slots)))
    for slot in slots:
        slot.communication.gather = slot.communication.gathered = lambda: None  # the slices are parts of one tensor
    Optimizer.average(optimizer, 1.0, settle=False)
    p.data.copy_(more)
    Optimizer.average(optimizer, 0.25, settle=True)
    assert torch.allclose(p, 0.75 * start + 0.25 * more)


# ---------------------------------------------------------------------------- reset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_reset_forgets_everything(dtype):
    model = random_model(dtype)
    start = values_of(model)
    gradients = [random_gradients(model) for _ in range(6)]
    optimizer = optimizer_of(model)

    def run(optimizer):
        for step, new in enumerate(gradients):
            add_gradients(model, new)
            optimizer.step(step, *schedule_of(step))
            optimizer.average(0.5, settle=False)
        return SimpleNamespace(values=values_of(model), states=states_of(optimizer))

    first = run(optimizer)
    add_gradients(model, gradients[0])  # gradients left lying are forgotten too
    stepped = [state for (name, _), state in first.states.items() if name in ROWS]
    assert all(torch.as_tensor(state).any() for state in stepped)
    optimizer.reset()
    assert not any(torch.as_tensor(state).any() for state in states_of(optimizer).values())
    assert not any(slot.p.grad.any() for slot in optimizer.slots.values())
    model.load_state_dict(start, strict=False)  # but for empty parameters
    second = run(optimizer)
    for name, value in first.values.items():
        assert torch.equal(second.values[name], value), name
    for key, state in first.states.items():
        assert torch.equal(torch.as_tensor(second.states[key]), torch.as_tensor(state)), key


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("embed.updates", None, r"embed.updates in the checkpoint is no whole number \(None\)"),
        ("embed.updates", "3", r"embed.updates in the checkpoint is no whole number \('3'\)"),
        ("embed.m", 3, r"embed.m in the checkpoint is no tensor \(3\), this program's part \(128, 32\) in"),
        (
            "embed.v",
            torch.zeros(64, 32),
            r"embed.v in the checkpoint is \(64, 32\) in torch.float32, this program's part",
        ),
        ("gate_out.v", None, r"gate_out.v in the checkpoint is no tensor \(None\)"),
        ("other.m", 1, "the checkpoint has states that this program has not: other.m"),
    ],
)
def test_states_of_another_program_are_refused_by_name(name, value, words):
    optimizer = optimizer_of(random_model())
    state = {**checkpoint.optimizer_state(optimizer), name: value}
    with pytest.raises(train_gpt.UserError, match=words):
        checkpoint.load_optimizer(optimizer, {key: value for key, value in state.items() if value is not None})
