"""The manual page: complete, and made without composing anything."""

import re
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from experiments.configuration.manual import GROUPS, manual, read_choice, read_group

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def page():
    return manual([CONFIGS])


def groups_on_disk():
    files = CONFIGS.glob("*/**/*.yaml")
    found = {path.parent.relative_to(CONFIGS).as_posix() for path in files}
    return found - {"wandb_sweep"}  # files for W&B's agent, no choices


def entries(page, pattern):
    return re.findall(rf"^    ({pattern})", page, re.MULTILINE)


def test_every_group_on_disk_is_explained(page):
    assert groups_on_disk() <= GROUPS.keys()
    headings = {line.partition(":")[0].lower() for line in re.findall(r"^[A-Z/]+: .*", page, re.M)}
    assert groups_on_disk() <= headings


@pytest.mark.parametrize("group", sorted(groups_on_disk()))
def test_every_choice_is_explained(group, page):
    choices = read_group([CONFIGS], group)
    assert [name for name, choice in choices.items() if not choice.about] == []
    shown = entries(page, rf"{group}=\w+")
    assert shown == [f"{group}={name}" for name in choices]


def composed_options(overrides):
    """The names of all options of a composed configuration; a list is one option."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", overrides=overrides)
    waiting = [("", OmegaConf.to_container(config, resolve=False))]
    while waiting:
        parent, node = waiting.pop()
        for key, value in node.items():
            name = f"{parent}{key}"
            if isinstance(value, dict):
                waiting.append((f"{name}.", value))
            elif not key.startswith("_"):
                yield name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["benchmark=permuted_mnist", "optimizer=sgd", "strategy=si"],
        ["strategy=kfac_ewc", "fisher/estimator=monte_carlo"],
        ["strategy=lwf", "fisher/structure=low_rank", "benchmark=permuted_digits"],
        ["strategy=online_ewc", "strategy/update=implicit"],
        ["strategy=avalanche_ewc", "fisher/structure=eigenvalue_corrected"],
    ],
)
def test_every_option_is_explained(overrides, page):
    shown = entries(page, r"[\w.]+(?==)")
    assert [name for name in composed_options(overrides) if name not in shown] == []


def test_explanations_name_the_choices_and_defaults_they_are_of(page):
    text = re.sub(r"\s+", " ", page)
    assert "fisher.estimator.num_samples=1 monte_carlo: targets drawn" in text
    assert "optimizer.lr=1e-3 learning rate (sgd: 1e-2)" in text
    assert "benchmark=split_digits (default)" in text


def test_lines_are_no_longer_than_the_terminal(page):
    assert max(map(len, page.splitlines())) <= 100


def test_reading_a_file_leaves_out_what_is_no_option(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# First line,\n# and second.\n# python -m experiments.run model=mine\n"
        "defaults:\n  - _self_\n_target_: my.Class\ninner:\n  width: 3 # cells\nflag: true\n"
        "# no explanation of the file\nurl: a#b # an address\n"
    )
    choice = read_choice(path, "model")
    assert choice.about == "First line, and second."
    explained = {name: (option.value, option.about) for name, option in choice.options.items()}
    assert explained == {
        "model.inner.width": ("3", "cells"),
        "model.flag": ("true", ""),
        "model.url": ("a#b", "an address"),
    }


def test_help_adds_the_choices_of_a_folder_and_imports_no_torch(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# A network of mine.\ndepth: 3 # layers\n")
    code = (
        "import sys; sys.argv[0] = 'run'; from experiments.job import command; command();"
        "assert 'torch' not in sys.modules"
    )
    for flags in (["--help", f"--config-dir={tmp_path}"], ["-h", "-cd", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", code, *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert "NAME" in done.stdout
        assert re.search(r"model=mine +A network of mine\.", done.stdout)
        assert re.search(r"model\.depth=3 +mine: layers", done.stdout)
