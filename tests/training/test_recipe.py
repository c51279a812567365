"""Recipes: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from refusion.errors import ConfigError
from refusion.training.recipe import Recipe, Source, changed_settings, load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").rglob("*.toml"))
MINIMAL = '[model]\nbase = "toy"\n[data]\nsources = [{ toy = 5 }]\n[optimizer]\nlearning_rate = 1e-3\n[run]\noutput = "x"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


def test_the_recipes_of_the_comparison_differ_in_the_objective_alone() -> None:
    paths = [path for path in RECIPES if path.parent.name == "comparison"]
    recipes = [load_recipe(path) for path in paths]
    objectives = ["autoregressive", "block_diffusion", "masked_diffusion", "refusion", "refusion"]
    assert sorted(recipe.objective.name for recipe in recipes) == objectives
    for recipe, path in zip(recipes, paths, strict=True):
        changed = changed_settings(recipes[0].to_table(), recipe.to_table())
        assert all(name.startswith("objective.") or name == "run.output" for name in changed)
        assert recipe.run.output == f"runs/comparison/{path.stem}-0"
    padded = {recipe.objective.name: recipe.objective.pad_answers for recipe in recipes if recipe.objective.pad_answers}
    assert padded == {"masked_diffusion": 256, "block_diffusion": 32}  # the regions that decoding fills


def test_the_paper_recipe_is_the_papers() -> None:
    recipe = load_recipe(next(p for p in RECIPES if p.stem == "paper"))
    objective = recipe.objective
    assert objective.slot_sizes == (4, 8, 16, 32)
    assert (objective.serial_share, objective.text_order_share, objective.distill) == (0, 0, 0)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup_ratio, recipe.optimizer.weight_decay) == (2e-5, 0, 0)
    assert (recipe.run.epochs, recipe.data.pack_length) == (4, 4096)


def test_overrides_take_full_and_bare_names_and_toml_values(minimal: Path) -> None:
    recipe = load_recipe(
        minimal, ["optimizer.learning_rate=1e-4", "seed=3", "base=some/dir", 'data.sources=["a", {path="b", weight=2}]', "compile=true"]
    )
    assert (recipe.optimizer.learning_rate, recipe.run.seed, recipe.model.base, recipe.model.compile) == (1e-4, 3, "some/dir", True)
    assert recipe.data.sources == (Source(path="a"), Source(path="b", weight=2.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learnig_rate=1", "unknown setting learnig_rate; did you mean optimizer.learning_rate?"),
        ("colour=1", "unknown setting colour; known here are model, data, optimizer, run, objective, method"),
        ("objective.slotsizes=[4]", "unknown setting objective.slotsizes; did you mean objective.slot_sizes?"),
        ("optimizer.seed=1", "unknown setting optimizer.seed; did you mean run.seed?"),
        ("objective.name=autoregresive", "must be one of .*; did you mean 'autoregressive'?"),
        ("objective.distill=1.5", r"objective.distill = 1.5 must be in \[0, 1\]"),
        ("slot_sizes=[0]", "objective.slot_sizes = .* must be positive sizes"),
        ("serial_borders=false", "objective.serial_borders = False must be left out: there are no serial rows"),
        ("objective.noise=linear", "objective.noise = 'linear' must be one of 'uniform', 'cosine', 'clipped'"),
        ("seed=x", "run.seed = 'x' must be of type int"),
        ("pack_length=100", "data.pack_length = 100 must be a multiple of 8"),
        ("data.sources=[]", "data.sources = .* must be at least one source"),
        ("name=lora", "say which one, objective.name or method.name"),
        ("seed", "write it as key=value"),
        ("rows_per_step=3.5", "data.rows_per_step = 3.5 must be of type int"),
        ('data.sources=[{path="a", wieght=2}]', r"unknown setting data.sources.wieght; did you mean data.sources.weight\?"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_the_way_out(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(minimal, [override])


def test_noise_is_refused_where_every_slot_is_masked(minimal: Path) -> None:
    assert load_recipe(minimal, ["noise=cosine", "serial_share=0.5"]).objective.noise == "cosine"
    with pytest.raises(ConfigError, match=r"objective.noise = 'cosine' must be left out: all rows are serial"):
        load_recipe(minimal, ["noise=cosine", "serial_share=1"])


def test_an_unreadable_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match=r"broken.toml is not a readable TOML recipe"):
        load_recipe(broken)
    broken.write_text('[model]\nbase = "toy"\n')
    with pytest.raises(ConfigError, match="the recipe lacks data"):
        load_recipe(broken)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("autoregressive", "serial_share=0.5"),
        ("autoregressive", "slot_sizes=[4]"),
        ("masked_diffusion", "distill=0.5"),
        ("masked_diffusion", "block_size=8"),
        ("block_diffusion", "ar_weight=2.0"),
        ("refusion", "block_size=8"),
    ],
)
def test_an_objective_refuses_settings_without_effect_on_it(minimal: Path, name: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.{setting.split('=')[0]} = .* no effect on the {name} objective"):
        load_recipe(minimal, [f"objective.name={name}", f"objective.{setting}"])


def test_changed_settings_are_named_in_full(minimal: Path) -> None:
    old, new = load_recipe(minimal), load_recipe(minimal, ["seed=1", "data.sources=[{toy=6}]"])
    assert changed_settings(old.to_table(), new.to_table()) == ["data.sources", "run.seed"]
