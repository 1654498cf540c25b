"""Recipes: their checks, and the paper's and the official code's formulas."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet.errors import ArgumentError, UnknownNameError
from effnet.training.recipe import RECIPES, Recipe, read_recipe, recipe_value

PAPER = RECIPES["paper"]


def test_the_papers_rate_is_256_for_4096_images() -> None:
    assert dataclasses.replace(PAPER, batch=4096).scaled_lr == pytest.approx(0.256)
    assert PAPER.scaled_lr == 0.016  # the official code's, for 256


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0.5, 0.1), (2.5, 0.5), (4.9, 0.98), *((epoch, 0.97 ** int(epoch / 2.4)) for epoch in (5.1, 7.3, 100, 349.9))],
)
def test_the_papers_rate_rises_for_five_epochs_and_falls_in_stairs(epoch: float, share: float) -> None:
    assert PAPER.lr_at(epoch / 350) == pytest.approx(share)


def test_the_head_goes_first_and_the_schedule_begins_behind_it() -> None:
    recipe = Recipe(warmup=0.1, head_first=0.2, head_lr=7.0)
    assert recipe.lr_at(0.0) == recipe.lr_at(0.199) == 7.0
    plain = dataclasses.replace(recipe, head_first=0.0)
    assert recipe.lr_at(0.2) == 0.0
    for share in (0.05, 0.4, 1.0):
        assert recipe.lr_at(0.2 + 0.8 * share) == pytest.approx(plain.lr_at(share))


def test_adams_rate_grows_with_the_root_of_the_batch() -> None:
    adam = Recipe(lr=1e-3, lr_batch=64)
    assert dataclasses.replace(adam, batch=256).scaled_lr == pytest.approx(2e-3)
    assert dataclasses.replace(adam, batch=256, optimizer="sgd").scaled_lr == pytest.approx(4e-3)


def test_cosine_ends_where_it_should() -> None:
    recipe = Recipe(warmup=0.1, final_lr=0.02, head_first=0.0)
    assert recipe.lr_at(0.05) == pytest.approx(0.5)
    assert recipe.lr_at(0.1) == pytest.approx(1)
    assert recipe.lr_at(0.55) == pytest.approx((1 + 0.02) / 2)
    assert recipe.lr_at(1) == pytest.approx(0.02)


@given(st.sampled_from(sorted(RECIPES)), st.floats(0, 1))
def test_rates_stay_within_bounds(name: str, progress: float) -> None:
    recipe = RECIPES[name]
    assert 0 <= recipe.lr_at(progress) <= (recipe.head_lr if progress < recipe.head_first else 1)


def test_the_average_grows_as_tensorflows_does() -> None:
    assert [PAPER.ema_at(step) for step in (0, 90, 10**7)] == [0.1, 0.91, 0.9999]


def test_the_papers_numbers() -> None:
    named = (PAPER.momentum, PAPER.weight_decay, PAPER.label_smoothing, PAPER.bn_momentum, PAPER.crop_area)
    assert named == (0.9, 1e-5, 0.1, 0.01, 0.08)
    assert (PAPER.optimizer, PAPER.augmentation, PAPER.decay_biases) == ("rmsprop", "autoaugment", True)
    assert PAPER.dropout is None  # each variant's own
    assert RECIPES["finetune"].optimizer != "rmsprop"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("lr", -1), ("batch", 1.5), ("optimizer", "adam"), ("schedule", "linear"), ("dropout", 1),
        ("augmentation", "auto"), ("ema", 1), ("warmup", 1.0), ("flip", 1.1), ("crop_area", 0), ("mixup", -0.1),
        ("lr", math.nan), ("clip", math.inf), ("patience", True), ("class_weights", 1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=field):
        read_recipe("finetune", **{field: value})


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: scratch\nlr: 1e-3\n")  # which YAML takes for text
    recipe = read_recipe(tmp_path / "mine.yaml", batch=8, weight_decay=recipe_value("1e-5"))
    assert recipe == dataclasses.replace(RECIPES["scratch"], name="mine", lr=1e-3, batch=8, weight_decay=1e-5)
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.5\n")
    with pytest.raises(UnknownNameError, match="learning_rate"):
        read_recipe(tmp_path / "mine.yaml")
