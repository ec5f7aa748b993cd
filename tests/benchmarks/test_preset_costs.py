"""Tests of the costs in the first lines of the presets: they are those that the program computes."""

from pathlib import Path

import pytest

from benchmarks.preset_costs import PRESETS, cost_lines, table_rows
from benchmarks.speedrun_runs import NEW
from job import config as settings
from job.model.flops import parameter_counts
from job.model.spec import ModelSpec

pytestmark = pytest.mark.benchmarks

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_begins_with_what_it_costs(name):
    path = CONFIGS / f"{name}.yaml"
    head, _, _ = path.read_text(encoding="utf-8").partition("\n\n")
    assert "\n".join(cost_lines(settings.load(str(path)))) in head


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_readme_shows_the_computed_costs(page):
    text = (CONFIGS.parent / page).read_text(encoding="utf-8")
    assert all(row in text for row in table_rows())


def test_presets_have_the_parameters_of_their_names():
    for name, entries in zip(PRESETS, (16_384, 16_384, 151_646), strict=True):
        config = settings.load(str(CONFIGS / f"{name}.yaml"))
        total = parameter_counts(ModelSpec(**config.model.model_dump()), entries).total
        assert abs(total / 1e6 - int(name.removeprefix("wiki-").removesuffix("m"))) < 1


@pytest.mark.parametrize("name", ["wiki-54m", "wiki-110m", "laptop"])
def test_preset_has_the_recipe_that_the_speedrun_measures(name):
    config = settings.load(str(CONFIGS / f"{name}.yaml"))
    recipe = settings.load(None, [(f"train.{key}", value) for key, value in NEW.train.items()]).train
    assert {key: getattr(config.train, key) for key in NEW.train} == {key: getattr(recipe, key) for key in NEW.train}
    assert config.model.init == NEW.init


def test_recommended_presets_differ_only_in_their_size():
    small, large = (settings.load(str(CONFIGS / f"{name}.yaml")) for name in ("wiki-54m", "wiki-110m"))
    assert small.train == large.train
    assert small.data == large.data
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert small.model == large.model.model_copy(update={name: getattr(small.model, name) for name in sizes})
    head_dims = [one.model.hidden_size // one.model.num_attention_heads for one in (small, large)]
    assert head_dims == [64, 64]
