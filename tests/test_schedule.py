"""What depends on the step alone: stages, learning rate, momentum, windows, multi-token weights.

On tables of one to five rows of its own; the record's values stand in test_record_values.py.
"""

import pytest

from train_gpt import Hyperparameters, TrainingSchedule, TrainingStage

FIRST = TrainingStage(2, 800, 1, 3, 1.0, (1.0, 0.5, 0.25), (1.0, 0.5, 0.0))
SECOND = TrainingStage(1, 1600, 3, 7, 1.5, (1.0, 0.5), (1.0, 0.0))
THIRD = TrainingStage(1, 2400, 5, 11, 1.7, (1.0,), (1.0,))
EXTENSION = TrainingStage(None, 2400, 6, 13, 1.7, (1.0,), (1.0,))
THREE = (FIRST, SECOND, THIRD, EXTENSION)
LAST = 10  # steps of the extension


def schedule_of(*stages, scheduled=400, **values):
    return TrainingSchedule(
        Hyperparameters(
            stages=stages, num_scheduled_iterations=scheduled, **{"num_extension_iterations": LAST, **values}
        )
    )


RUN = schedule_of(*THREE, muon_momentum_warmup=100, muon_momentum_cooldown=20)


def with_shares(*shares):
    return (*(FIRST._replace(share=share) for share in shares), EXTENSION)


# ---------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    "shares, scheduled, starts",
    [
        ((1,), 400, (0, 400)),
        ((1, 1), 401, (0, 200, 401)),
        ((2, 1, 1), 400, (0, 200, 300, 400)),
        ((0.5, 0.3, 0.2), 380, (0, 190, 304, 380)),
        ((1 / 3, 1 / 3, 1 / 3), 1515, (0, 505, 1010, 1515)),
        ((0.29, 0.71), 100, (0, 29, 100)),  # 0.29 x 100 is a little less than 29 in floating point
        ((1, 1, 1), 380, (0, 126, 252, 380)),
        ((0.7, 0.1, 0.1, 0.1), 100, (0, 70, 80, 90, 100)),
    ],
)
def test_stages_share_the_scheduled_steps_and_the_extension_follows(shares, scheduled, starts):
    schedule = schedule_of(*with_shares(*shares), scheduled=scheduled)
    assert schedule.starts == starts
    assert schedule.ends == (*starts[1:], scheduled + LAST) and schedule.hp.total_steps == scheduled + LAST


@pytest.mark.parametrize("shares", [(1,), (1, 1, 1), (3, 1, 2, 0.5), (0.2, 0.2, 0.2, 0.2, 0.2)])
@pytest.mark.parametrize("scheduled", [20, 21, 29, 380, 1515])
def test_every_length_of_run_has_a_value_at_every_step(shares, scheduled):
    schedule = schedule_of(*with_shares(*shares), scheduled=scheduled)
    steps = range(schedule.hp.total_steps)
    indices = [schedule.stage_index(step) for step in steps]
    assert indices == sorted(indices) and set(indices) == set(range(len(shares) + 1))
    for i, share in enumerate(shares):
        assert abs(indices.count(i) - scheduled * share / sum(shares)) < len(shares)
    assert indices.count(len(shares)) == LAST
    for step in steps:
        assert 0.1 <= schedule.lr(step) <= 1.7
        assert 0.85 <= schedule.momentum(step) <= 0.93
        assert schedule.stage(step) is schedule.hp.stages[indices[step]]
        assert len(schedule.target_weights(step)) == len(schedule.stage(step).target_weights) + 1  # the prefix's


@pytest.mark.parametrize("step, i", [(0, 0), (199, 0), (200, 1), (299, 1), (300, 2), (399, 2), (400, 3), (409, 3)])
def test_a_stages_row_says_batch_and_windows(step, i):
    assert RUN.stage_index(step) == i
    assert RUN.size(step)[0] == THREE[i].tokens / 8
    assert RUN.windows(step) == {"short": 128 * THREE[i].short_window, "long": 128 * THREE[i].long_window}


def test_windows_are_counted_in_blocks():
    schedule = schedule_of(*THREE, window_block=16)
    assert schedule.windows(0) == {"short": 16, "long": 48}
    assert schedule.window_tokens(2, 5) == {"short": 32, "long": 80}


# ---------------------------------------------------------------------------- the same run in small


@pytest.mark.parametrize("length, scheduled, extension", [(0.25, 100, 2), (0.5, 200, 5), (2.0, 800, 20), (0.01, 4, 1)])
def test_length_multiplies_every_count_of_steps_down_to_one(length, scheduled, extension):
    schedule = schedule_of(*THREE, length=length, muon_momentum_warmup=100, muon_momentum_cooldown=20)
    assert schedule.starts == (0, scheduled // 2, 3 * scheduled // 4, scheduled)
    assert schedule.hp.total_steps == scheduled + extension
    assert schedule.warmup == 100 * length and schedule.cooldown == max(1, round(20 * length))


@pytest.mark.parametrize("length", [0.25, 0.5, 4.0])
def test_at_the_same_share_of_the_run_a_run_in_small_is_where_the_whole_is(length):
    values = dict(num_extension_iterations=8, muon_momentum_warmup=100, muon_momentum_cooldown=20, cooldown_frac=0.5)
    whole, small = schedule_of(*THREE, **values), schedule_of(*THREE, **values, length=length)
    for step in range(0, 408, 4):
        at = int(step * length)
        for value in ("lr", "momentum", "target_weights", "windows", "size"):
            assert getattr(small, value)(at) == pytest.approx(getattr(whole, value)(step), rel=1e-12), (value, step)


def test_what_is_not_there_is_not_made_by_length():
    none = dict(num_extension_iterations=0, muon_momentum_warmup=0, muon_momentum_cooldown=0)
    schedule = schedule_of(*THREE, length=0.3, **none)
    assert schedule.hp.total_steps == 120 and (schedule.warmup, schedule.cooldown) == (0, 0)


# ---------------------------------------------------------------------------- learning rate, momentum, weights


def test_the_learning_rate_is_the_stages_multiplier_until_the_cooldown():
    schedule = schedule_of(*THREE, cooldown_frac=0.3)  # from step 280 on
    assert [schedule.lr(step) for step in (0, 199, 200, 279, 280)] == [1, 1, 1.5, 1.5, 1.5]
    assert schedule.lr(281) < 1.5


@pytest.mark.parametrize("cooldown_frac, lr_end", [(0.55, 0.1), (0.3, 0.0), (1.0, 0.2)])
def test_in_the_cooldown_it_moves_linearly_to_its_end_and_stays_there_in_the_extension(cooldown_frac, lr_end):
    schedule = schedule_of(*THREE, cooldown_frac=cooldown_frac, lr_end=lr_end)
    start = int(400 * (1 - cooldown_frac))
    for step in range(start, 400):
        t = (step - start) / (400 - start)
        assert schedule.lr(step) == pytest.approx((1 - t) * schedule.stage(step).lr + lr_end * t, rel=1e-12)
    assert {schedule.lr(step) for step in range(400, 410)} == {lr_end}


@pytest.mark.parametrize(
    "step, momentum",
    [
        (0, 0.85),
        (50, 0.89),
        (99, 0.9292),
        (100, 0.93),
        (101, 0.93),
        (390, 0.93),
        (391, 0.926),
        (400, 0.89),
        (409, 0.854),
    ],
)
def test_momentum_rises_over_its_warm_up_and_falls_back_over_its_cool_down(step, momentum):
    assert RUN.momentum(step) == pytest.approx(momentum, rel=1e-12)


def test_momentum_can_do_without_warm_up_and_cool_down():
    schedule = schedule_of(*THREE, muon_momentum_warmup=0, muon_momentum_cooldown=0)
    assert {schedule.momentum(step) for step in (0, 1, 408, 409)} == {0.93}


@pytest.mark.parametrize(
    "step, weights",
    [
        *[(0, [1, 0.5, 0.25]), (40, [1, 0.5, 0.2]), (199, [1, 0.5, 0.25 / 200])],
        *[(200, [1, 0.5]), (220, [1, 0.4]), (299, [1, 0.5 / 100])],
        *[(300, [1]), (399, [1]), (400, [1]), (409, [1])],
    ],
)
def test_multi_token_weights_move_linearly_inside_a_stage(step, weights):
    assert RUN.target_weights(step) == pytest.approx([*weights, 0], rel=1e-9)


WITH_PREFIXES = FIRST._replace(prefix=(0.2, 0.4)), SECOND._replace(prefix=(0.4, 0.0)), THIRD, EXTENSION


@pytest.mark.parametrize(
    "step, weight",
    [(0, 0.2), (50, 0.25), (199, 0.399), (200, 0.4), (225, 0.3), (299, 0.004), (300, 0), (399, 0), (400, 0), (409, 0)],
)
def test_the_prefixs_weight_comes_last_and_moves_linearly_inside_a_stage(step, weight):
    schedule = schedule_of(*WITH_PREFIXES)
    assert schedule.target_weights(step) == pytest.approx([*RUN.target_weights(step)[:-1], weight], rel=1e-9)


# ---------------------------------------------------------------------------- averages


def weights_of(steps, average_frac):
    schedule = schedule_of(*THREE, scheduled=steps - LAST, average_frac=average_frac)
    return {step: weight for step in range(steps) if (weight := schedule.average_weight(step))}


def test_an_average_begins_with_its_first_parameters_and_ends_with_the_last():
    assert weights_of(100, 0.2) == {83: 1.0, 87: 0.4, 91: 0.4, 95: 0.4, 99: 0.4}
    assert weights_of(100, 0.01) == {99: 1.0}  # the last alone: nothing is averaged
    assert weights_of(100, 0.06) == {95: 1.0, 99: 1.0}


def test_without_a_share_nothing_is_averaged():
    assert weights_of(100, 0.0) == {}
