"""The documentation: its examples run, its links lead somewhere, its options exist."""

import re
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAGES = [
    ROOT / "README.md",
    *sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "studies").rglob("*.md")]),
]
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_EXAMPLES = [page for page in PAGES[1:] if EXAMPLE.search(page.read_text())]
GROUPS = sorted(
    {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/**/*.yaml")}
    - {"wandb_sweep"}  # W&B's files, not Hydra's
)


def run_examples(page, names):
    for example in EXAMPLE.findall(page.read_text()):
        exec(compile(example, page.name, "exec"), names)


def test_every_guide_has_an_example():
    guides = {"continual_learning", "fisher", "statistics"}
    assert guides <= {page.stem for page in WITH_EXAMPLES}
    topics = {path.parent for path in (ROOT / "studies").glob("*/study.py")}
    assert topics <= {page.parent for page in WITH_EXAMPLES}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow)
        if page.is_relative_to(ROOT / "studies")
        else page
        for page in WITH_EXAMPLES
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_run(page):
    torch.manual_seed(0)
    run_examples(page, {"__name__": "example"})


def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [
        DataLoader(TensorDataset(torch.randn(20, 6), torch.randint(3, (20,))), batch_size=10)
        for _ in range(2)
    ]
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    names = {
        "tasks": tasks,
        "data": tasks[0],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "cross_entropy": nn.functional.cross_entropy,
        "criterion": nn.CrossEntropyLoss(),
        "v": {name: torch.ones_like(p) for name, p in model.named_parameters()},
    }
    run_examples(ROOT / "README.md", names)
    assert names["penalty"].remembered_examples == 40
    assert names["plugin"] in names["strategy"].plugins
    assert names["fisher"].shapes.keys() == names["v"].keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), target
        assert not heading or heading in headings(goal), target


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


# --- docs/command_line.md against configs/ ------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_choices_of_a_group_are_documented(group):
    documented = [
        choice
        for line in re.findall(r"^Choices[^:]*: (.*?)\.(?:\s|$)", section(group), re.DOTALL | re.M)
        for choice in re.findall(r"`(\w+)`", line)
    ]
    assert sorted(documented) == choices(group)


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in ("experiment", "sweep")])
def test_options_of_a_group_are_documented_with_their_defaults(group):
    expected = {}
    for choice in choices(group):
        for option, default in options_of(group, choice).items():
            expected.setdefault(option, set()).add(default)
    assert documented_options(section(group)) == expected


def test_general_options_are_documented_with_their_defaults():
    config = flat(OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml")))
    general = {o: {d} for o, d in config.items() if not o.startswith(("hydra.", "defaults"))}
    assert documented_options(section("General")) == general


def section(title):
    """What stands on the page under a heading, up to the next one."""
    page = (ROOT / "docs" / "command_line.md").read_text()
    found = re.search(rf"^### `?{re.escape(title)}`?\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.M)
    assert found, f"docs/command_line.md has no section {title}"
    return found[1]


def documented_options(text):
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", text, re.MULTILINE)
    return {option: set(re.findall(r"`([^`]*)`", defaults)) for option, defaults in rows}


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def options_of(group, choice):
    """The options of a choice with their defaults; those of inner groups are not among them."""
    place = group.replace("/", ".")
    if group.startswith("hydra/"):  # of plugins, which need not be installed
        file = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")
        given = flat(OmegaConf.to_container(file, resolve=False), f"{place}.")
        return {o: d for o, d in given.items() if o not in (f"{place}.defaults", f"{place}.params")}
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"{group}={choice}"])
    inner = tuple(
        f"{other.replace('/', '.')}." for other in GROUPS if other.startswith(f"{group}/")
    )
    values = flat(OmegaConf.to_container(config, resolve=False))
    return {
        option: default
        for option, default in values.items()
        if option.startswith(f"{place}.") and not option.startswith(inner)
    }


def flat(node, prefix=""):
    values = {}
    for key, value in node.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            values[f"{prefix}{key}"] = shown(value)
    return values


def shown(value):
    """A value as the page writes it, as in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
