# SPDX-License-Identifier: Apache-2.0
import dataclasses
from pathlib import Path

import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.run import RunConfig, load_config, make_config
from pfnas_fast.run.config import SEARCH_SETTINGS, recipe_names


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_are_valid(recipe: str) -> None:
    assert isinstance(make_config(recipe=recipe), RunConfig)


def test_later_settings_win() -> None:
    config = make_config(
        recipe="demo", preset="ofa", overrides={"seed": 3, "data": None}, assignments=["train_steps=7"]
    )
    assert (config.schedule, config.sampler) == ("progressive", "uniform")
    assert (config.seed, config.data, config.train_steps) == (3, "digits", 7)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train_stepz=7", "got 'train_stepz'"),
        ("train_steps=many", "expected int for train_steps, got 'many'"),
        ("train_steps=1.5", "expected int for train_steps, got 1.5"),
        ("train_steps=0", "at least 1 for train_steps, got 0"),
        ("train_steps", "expected key=value for --set, got 'train_steps'"),
        ("keep=1.5", r"fraction in \(0, 1\] for keep, got 1.5"),
        ("pretrain=3", "expected bool for pretrain, got 3"),
        ("schedule=zigzag", "sandwich, progressive, single for schedule, got 'zigzag'"),
        ("sampler=best", "for sampler, got 'best'"),
        ("learning_rate=-1", "positive number for learning_rate"),
        ("epsilon=2", "for epsilon, got 2.0"),
        ("keep=", "expected float for keep, got None"),
        ("keep=true", "expected float for keep, got True"),
        ("seed=-1", "at least 0 for seed, got -1"),
        ("search_flood=-1", "at least 0 for search_flood, got -1"),
        ("search_flood=1e6", "expected int for search_flood"),
        ("batch_size=1", "at least 2 for batch_size, got 1"),
        ("labels_per_bin=1", r"at least 10 for num_bins x labels_per_bin .* got 8 x 1"),
        ("data=[a", r"expected YAML in --set data, got '\[a'"),
    ],
)
def test_mistakes_are_named(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(assignments=[assignment])


def test_unknown_recipe_and_preset() -> None:
    with pytest.raises(InputError, match="for recipe, got 'lunch'"):
        make_config(recipe="lunch")
    with pytest.raises(InputError, match="expected one of ofa for preset, got 'bignas'"):
        make_config(preset="bignas")


def test_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train_steps: 7")
    assert make_config(recipe=str(file)).train_steps == 7
    file.write_text("train_steps: [7")
    with pytest.raises(InputError, match="expected YAML in recipe") as caught:
        make_config(recipe=str(file))
    assert "\n" not in str(caught.value)
    file.write_text("- 7")
    with pytest.raises(InputError, match=r"expected a mapping of settings in recipe .* got list"):
        make_config(recipe=str(file))


def test_search_settings_are_settings() -> None:
    assert set(SEARCH_SETTINGS) < {field.name for field in dataclasses.fields(RunConfig)}


def test_scientific_notation_is_a_number() -> None:
    assert make_config(assignments=["learning_rate=1e-3"]).learning_rate == 1e-3


def test_round_trip(tmp_path: Path) -> None:
    from pfnas_fast.run import Run

    config = make_config(recipe="demo", assignments=["max_macs_m=20"])
    run = Run(tmp_path, config=config)
    assert load_config(run.folder / "config.yaml") == config
