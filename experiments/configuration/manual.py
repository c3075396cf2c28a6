"""The text of ``--help``: a manual page made from the comments of the configuration files.

The first comment of ``configs/GROUP/CHOICE.yaml`` describes the choice, and the comment behind an
option describes the option.  Nothing is composed, and neither Hydra nor torch is imported.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GROUPS = {
    "benchmark": "the stream of tasks",
    "strategy": "the method against forgetting",
    "strategy/update": "how a training step takes the penalty of EWC",
    "fisher": "how the Fisher information is taken",
    "fisher/estimator": "how the expectation over labels is taken",
    "fisher/structure": "what is kept of the matrix",
    "fisher/likelihood": "what the outputs of the network mean",
    "model": "the network",
    "optimizer": "the optimizer",
    "training": "how each task is trained",
    "wandb": "how the run appears in Weights & Biases",
    "hydra/launcher": "where and how many at a time the jobs of a sweep run",
    "hydra/sweeper": "which jobs a sweep runs; without one, all combinations",
    "hydra/sweeper/sampler": "how a search chooses the next job",
    "sweep": "a named set of jobs",
    "experiment": "a named recipe, which overrides all other groups",
}
"""What each group of configurations is, in the order of the manual."""

COMMAND = "python -m experiments.run"

PAGE = f"""\
NAME
    experiments.run - train a network on one task after another, and measure what it forgets

SYNOPSIS
    {COMMAND} [GROUP=CHOICE ...] [OPTION=VALUE ...]
    {COMMAND} -m OPTION=VALUE,VALUE ... [GROUP=CHOICE,CHOICE ...]
    {COMMAND} resume=DIR

DESCRIPTION
    Trains on the tasks of a benchmark, tests on all of them after each, and writes results,
    pictures, checkpoints and a W&B run into a folder. Without options it takes a minute and no
    download. Later options win over earlier ones, and options over the files in configs/.

EXAMPLES
    {COMMAND} strategy=kfac_ewc seed=1
    {COMMAND} experiment=permuted_mnist data_root=DIR
    {COMMAND} -m strategy=naive,ewc,joint seed=0,1,2 hydra/launcher=joblib
    {COMMAND} --config-dir=configs trusted=[my_package] model=my_network

FLAGS
    -m, --multirun         one job for each combination of values, and a report over them
    -c, --cfg job          print the configuration and run nothing; -p PART prints a part of it
    -cd, --config-dir DIR  a folder with your own choices, DIR/GROUP/CHOICE.yaml
    -sc, --shell-completion install=bash
                           print the completion of a shell: bash, zsh or fish
    --info                 say where the configuration comes from
    --hydra-help           more flags, of Hydra
    -h, --help             print this page
"""

END = """\
FILES
    outputs/DATE/TIME      the folder of a run; hydra.run.dir=DIR chooses another one
    multirun/DATE/TIME     the folder of a sweep; hydra.sweep.dir=DIR chooses another one
    DIR/results.json       accuracies, forgetting, seconds, configuration and versions
    DIR/metrics.jsonl      a record for each step and each task

ENVIRONMENT
    EWC_DATA               the folder of the data, where data_root is null
    WANDB_MODE             the default of wandb.mode

EXIT STATUS
    0 done; 1 a wrong option, a run that diverged, or failed jobs of a sweep; 130 ended by Ctrl-C,
    143 by a signal: resume=DIR goes on.

SEE ALSO
    docs/command_line.md, docs/continual_learning.md
"""


@dataclass(frozen=True)
class Option:
    """An option as a configuration file has it.

    Attributes:
        value: its default.
        about: its explanation; empty where the file has none.
    """

    value: str
    about: str


@dataclass(frozen=True)
class Choice:
    """A file of configurations.

    Attributes:
        about: its explanation; empty where the file has none.
        options: its options by their whole names, without those of Hydra.
    """

    about: str
    options: Mapping[str, Option] = field(default_factory=dict)


LINE = re.compile(r"(?P<indent> *)(?P<key>[\w/@]+):(?: (?P<value>.*?))??(?: *# (?P<about>.*))?$")


def read_choice(path: Path, package: str) -> Choice:
    """The explanations in a configuration file.

    Args:
        path: the file.
        package: the dotted name under which its options stand; empty for the top.
    """
    about: list[str] = []
    options: dict[str, Option] = {}
    is_head = True
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package _global_"):
            package = ""
        elif is_head and line.startswith("# "):
            about.append(line.removeprefix("# "))
        elif match := LINE.fullmatch(line):
            is_head, indent = False, len(match["indent"])
            while parents and parents[-1][0] >= indent:
                parents.pop()
            names = [*filter(None, [package]), *(name for _, name in parents), match["key"]]
            if match["value"]:
                options[".".join(names)] = Option(match["value"], match["about"] or "")
            else:
                parents.append((indent, match["key"]))
    section = "" if package.startswith("hydra") else "|hydra"
    hidden = re.compile(rf"(.*\.)?_\w+_|(defaults{section})\..*")
    texts = (line for line in about if not line.startswith(COMMAND))
    return Choice(" ".join(texts), {n: o for n, o in options.items() if not hidden.fullmatch(n)})


def read_group(folders: Sequence[Path], group: str) -> dict[str, Choice]:
    """The choices of a group, by name, in several folders of configurations."""
    paths = {path.stem: path for folder in folders for path in folder.glob(f"{group}/*.yaml")}
    package = group.replace("/", ".")
    return {name: read_choice(paths[name], package) for name in sorted(paths)}


def manual(folders: Sequence[Path], width: int = 100) -> str:
    """The manual page.

    Args:
        folders: the folders of configurations, the main one first.
        width: the characters of a line.
    """
    general = read_choice(folders[0] / "config.yaml", "")
    defaults = _defaults(folders[0])
    lines = [PAGE, "OPTIONS", *_options({"": general}, [""], width)]
    for group, about in GROUPS.items():
        if not (choices := read_group(folders, group)):
            continue
        lines += ["", f"{group.upper()}: {about}"]
        for name, choice in choices.items():
            is_default = " (default)" if defaults.get(group) == name else ""
            lines += _entry(f"{group}={name}{is_default}", choice.about, width)
        if group not in ("experiment", "sweep"):
            first = [n for n in choices if n == defaults.get(group)]
            lines += _options(choices, [*first, *(n for n in choices if n not in first)], width)
    return "\n".join([*lines, "", END])


def _defaults(folder: Path) -> dict[str, str]:
    """The choice of each group in the main configuration, and in the files that it chooses."""
    chosen: dict[str, str] = {}
    waiting = [(folder / "config.yaml", "")]
    while waiting:
        path, parent = waiting.pop()
        for match in re.finditer(r"^  - ([\w/]+): (\w+)", path.read_text(encoding="utf-8"), re.M):
            group = f"{parent}{match[1]}"
            chosen[group] = match[2]
            if (inner := folder / group / f"{match[2]}.yaml").exists():
                waiting.append((inner, f"{group}/"))
    return chosen


def _options(choices: Mapping[str, Choice], order: Sequence[str], width: int) -> Iterator[str]:
    """The options of a group's choices; each once, with the defaults of other choices."""
    seen: dict[str, dict[str, Option]] = {}
    for name in order:
        for option, found in choices[name].options.items():
            seen.setdefault(option, {})[name] = found
    explained = {option for option, by in seen.items() if any(o.about for o in by.values())}
    for option in (option for option in seen if option in explained):
        by = seen[option]
        first = next(iter(by.values()))
        about = next(o.about for o in by.values() if o.about)
        others = [f"{name}: {o.value}" for name, o in by.items() if o.value != first.value]
        if others:
            about += f" ({', '.join(others)})"
        elif len(by) < len(choices):
            about = f"{', '.join(by)}: {about}"
        yield from _entry(f"{option}={first.value}", about, width)


def _entry(term: str, about: str, width: int) -> Iterator[str]:
    """A term and its explanation beside it, or below it where the term is long."""
    column = 40
    text = textwrap.wrap(about, max(width - column, 30)) or [""]
    head = f"    {term}"
    if len(head) >= column:
        yield head
    else:
        yield f"{head:{column}}{text.pop(0)}".rstrip()
    yield from (" " * column + line for line in text)


def asks_for_manual(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for the manual page."""
    return any(argument in ("-h", "--help") for argument in arguments)


def print_manual(folder: Path, arguments: Sequence[str]) -> None:
    """Print the manual page, with the choices in the folders that the command line adds.

    Args:
        folder: the folder of configurations.
        arguments: the command line.
    """
    added = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, is_assigned, assigned = flag.partition("=")
        if name in ("-cd", "--config-dir"):
            added.append(Path(assigned if is_assigned else value))
    width = min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else 100
    print(manual([folder, *added], width), end="")
