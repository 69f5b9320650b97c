"""What depends on the step alone: stages, learning rate, momentum, windows, multi-token weights, untying."""

import pytest

from train_gpt import FINAL_WINDOWS, PRESETS, Hyperparameters, TrainingSchedule

SPEEDRUN = TrainingSchedule(Hyperparameters())
SHORTER = TrainingSchedule(Hyperparameters(num_scheduled_iterations=380))


@pytest.mark.parametrize(
    "schedule, firsts, last",
    [(SPEEDRUN, (0, 505, 1010, 1515), 1554), (SHORTER, (0, 126, 252, 380), 419)],
    ids=["1515 scheduled steps", "380 scheduled steps"],
)
def test_three_equal_stages_are_followed_by_the_extension(schedule, firsts, last):
    assert schedule.hp.total_steps == last + 1
    for i, first in enumerate(firsts):
        assert schedule.stage_index(first) == i
        assert schedule.stage_index(max(0, first - 1)) == max(0, i - 1)
        assert schedule.stage(first) is schedule.hp.stages[i]
    assert schedule.stage_index(last) == 3


@pytest.mark.parametrize("step", [0, 504])
def test_stage_1_has_the_small_batch_and_the_short_windows(step):
    assert SPEEDRUN.tokens(step) == 16_384
    assert SPEEDRUN.windows(step) == {"short": 128, "long": 384}


@pytest.mark.parametrize("step", [505, 1009])
def test_stage_2_has_twice_the_batch(step):
    assert SPEEDRUN.tokens(step) == 32_768
    assert SPEEDRUN.windows(step) == {"short": 384, "long": 896}


@pytest.mark.parametrize("step", [1010, 1514])
def test_stage_3_has_three_times_the_batch(step):
    assert SPEEDRUN.tokens(step) == 49_152
    assert SPEEDRUN.windows(step) == {"short": 640, "long": 1408}


@pytest.mark.parametrize("step", [1515, 1554])
def test_the_extension_keeps_the_batch_and_widens_the_windows(step):
    assert SPEEDRUN.tokens(step) == 49_152
    assert SPEEDRUN.windows(step) == {"short": 768, "long": 1664}


def test_the_final_validation_widens_the_long_window_once_more():
    assert SPEEDRUN.window_tokens(*FINAL_WINDOWS) == {"short": 768, "long": 2560}


def test_windows_are_counted_in_blocks():
    schedule = TrainingSchedule(Hyperparameters(window_block=16))
    assert schedule.windows(0) == {"short": 16, "long": 48}
    assert schedule.window_tokens(2, 5) == {"short": 32, "long": 80}


def test_the_tokens_of_all_steps_together():
    assert (
        sum(SPEEDRUN.stage(step).tokens for step in range(1555)) == 505 * (131_072 + 262_144 + 393_216) + 40 * 393_216
    )


@pytest.mark.parametrize("step, factor", [(0, 1.0), (504, 1.0), (505, 1.52), (680, 1.52)])
def test_the_learning_rate_is_the_stages_multiplier_until_the_cooldown(step, factor):
    assert SPEEDRUN.lr(step) == factor


@pytest.mark.parametrize("step, multiplier", [(681, 1.52), (682, 1.52), (1009, 1.52), (1010, 1.73), (1514, 1.73)])
def test_in_the_cooldown_the_learning_rate_moves_linearly_to_a_tenth(step, multiplier):
    t = (step - 681) / (1515 - 681)
    assert SPEEDRUN.lr(step) == pytest.approx((1 - t) * multiplier + 0.1 * t, rel=1e-12)


def test_the_cooldown_begins_at_step_681_without_a_jump():
    assert SPEEDRUN.lr(681) == 1.52
    assert SPEEDRUN.lr(682) == pytest.approx(1.52 - 1.42 / 834, rel=1e-12)
    assert SPEEDRUN.lr(1514) == pytest.approx(0.1 + 1.63 / 834, rel=1e-9)


@pytest.mark.parametrize("step", [1515, 1530, 1554])
def test_in_the_extension_the_learning_rate_is_a_tenth(step):
    assert SPEEDRUN.lr(step) == 0.1


def test_a_shorter_run_cools_down_over_the_same_fraction():
    start = int(380 * (1 - 0.55))
    assert start in (170, 171)
    assert SHORTER.lr(125) == 1.0
    assert SHORTER.lr(126) == SHORTER.lr(start) == 1.52
    t = (252 - start) / (380 - start)
    assert SHORTER.lr(252) == pytest.approx((1 - t) * 1.73 + 0.1 * t, rel=1e-12)
    assert SHORTER.lr(379) == pytest.approx(0.1 + 1.63 / (380 - start), rel=1e-9)
    assert SHORTER.lr(380) == SHORTER.lr(419) == 0.1


def test_the_cooldown_can_take_all_scheduled_steps_and_end_elsewhere():
    schedule = TrainingSchedule(Hyperparameters(cooldown_frac=1.0, lr_end=0.2))
    assert schedule.lr(0) == 1.0
    assert schedule.lr(303) == pytest.approx(0.8 * 1.0 + 0.2 * 0.2, rel=1e-12)
    assert schedule.lr(1515) == 0.2


@pytest.mark.parametrize(
    "step, momentum",
    [
        *[(0, 0.85), (150, 0.90), (299, 0.85 + 0.1 * 299 / 300), (300, 0.95), (301, 0.95), (1000, 0.95)],
        *[(1504, 0.95), (1505, 0.95), (1506, 0.948), (1530, 0.90), (1554, 0.852)],
    ],
)
def test_momentum_rises_over_300_steps_and_falls_back_over_the_last_50(step, momentum):
    assert SPEEDRUN.momentum(step) == pytest.approx(momentum, rel=1e-12)


def test_momentum_takes_as_long_in_a_shorter_run():
    assert SHORTER.momentum(150) == pytest.approx(0.90)
    assert SHORTER.momentum(300) == SHORTER.momentum(370) == 0.95
    assert SHORTER.momentum(419) == pytest.approx(0.852)


def test_momentum_can_do_without_warm_up_and_cool_down():
    schedule = TrainingSchedule(Hyperparameters(muon_momentum_warmup=0, muon_momentum_cooldown=0))
    assert {schedule.momentum(step) for step in (0, 1, 1553, 1554)} == {0.95}


@pytest.mark.parametrize(
    "step, weights",
    [
        *[(0, [1, 0.5, 0.25]), (101, [1, 0.5, 0.2]), (504, [1, 0.5, 0.25 / 505])],
        *[(505, [1, 0.5]), (606, [1, 0.4]), (1009, [1, 0.5 / 505])],
        *[(1010, [1]), (1514, [1]), (1515, [1]), (1554, [1])],
    ],
)
def test_multi_token_weights_move_linearly_inside_a_stage(step, weights):
    assert SPEEDRUN.target_weights(step) == pytest.approx(weights, rel=1e-9)


def test_multi_token_weights_of_a_shorter_run_move_over_its_shorter_stages():
    assert SHORTER.target_weights(63) == pytest.approx([1, 0.5, 0.125])
    assert SHORTER.target_weights(126) == [1, 0.5]
    assert SHORTER.target_weights(251) == pytest.approx([1, 0.5 / 126])
    assert SHORTER.target_weights(252) == SHORTER.target_weights(379) == [1]


@pytest.mark.parametrize("scheduled, step", [(1515, 1011), (380, 253), (1512, 1009), (1518, 1013), (3, 3), (6, 5)])
def test_embedding_and_head_untie_at_the_first_odd_step_of_stage_3(scheduled, step):
    assert TrainingSchedule(Hyperparameters(num_scheduled_iterations=scheduled)).untie_step == step


@pytest.mark.parametrize("scheduled", range(3, 40))
def test_every_length_of_run_has_a_value_at_every_step(scheduled):
    schedule = TrainingSchedule(Hyperparameters(num_scheduled_iterations=scheduled, num_extension_iterations=2))
    steps = range(scheduled + 2)
    indices = [schedule.stage_index(step) for step in steps]
    assert indices == sorted(indices) and set(indices) == {0, 1, 2, 3}
    assert indices.count(0) == indices.count(1) == scheduled // 3 <= indices.count(2) <= scheduled // 3 + 2
    assert indices.count(3) == 2
    for step in steps:
        assert 0.1 <= schedule.lr(step) <= 1.73
        assert 0.85 <= schedule.momentum(step) <= 0.95
        assert len(schedule.target_weights(step)) == len(schedule.stage(step).target_weights)


def test_the_smoke_run_goes_through_the_same_stages_with_a_256th_of_the_tokens():
    schedule = TrainingSchedule(Hyperparameters(**PRESETS["smoke"]))
    assert [schedule.tokens(step) for step in (0, 12, 24, 36)] == [64, 128, 192, 192]
    assert [schedule.stage_index(step) for step in (11, 12, 23, 24, 35, 36, 39)] == [0, 1, 1, 2, 2, 3, 3]
    assert schedule.windows(0) == {"short": 16, "long": 48}
