"""The rules of the house: which package may know which, and that every name is explained."""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ewc

ROOT = Path(__file__).parents[2]
PACKAGES = ("ewc", "experiments", "studies")
LAZY = {"import_module", "__import__"}
"""Imports by a name that is made at run time, which no test can follow."""


@cache
def modules():
    """The files of all packages, by the names of their modules."""
    return {
        module_name(path.relative_to(ROOT)): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports():
    """The modules that every module imports: lazily, and for types, too."""
    return {name: set(imported(path)) for name, path in modules().items()}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test cannot follow"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def users_of(name):
    """The modules that import a package or something in it."""
    return {
        user
        for user, used in imports().items()
        if any(other == name or other.startswith(f"{name}.") for other in used)
    }


def inside(name):
    return {module for module in modules() if module == name or module.startswith(f"{name}.")}


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_knows_itself_through_others():
    graph = {name: used & modules().keys() - {name} for name, used in imports().items()}
    assert circle(graph) is None


def test_no_package_knows_itself_through_others():
    """The rooms beside each other, in every folder."""
    for package in {name.rpartition(".")[0] for name in modules()} - {""}:
        rooms = {}
        for user in inside(package) - {package}:
            room = user.removeprefix(f"{package}.").partition(".")[0]
            for other in imports()[user] & (inside(package) - {package}):
                rooms.setdefault(room, set()).add(
                    other.removeprefix(f"{package}.").partition(".")[0]
                )
        assert circle({room: others - {room} for room, others in rooms.items()}) is None, package


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ewc.matrices", "ewc.pullback"),
        ("ewc.pullback", "ewc.matrices"),
        ("ewc.consolidation", "ewc.fisher"),
        ("ewc.fisher", "ewc.consolidation"),
        ("ewc.linalg", "ewc.matrices"),
        ("ewc.linalg", "ewc.pullback"),
        ("ewc", "experiments"),
        ("ewc", "studies"),
        ("experiments", "studies"),
    ],
)
def test_packages_that_do_not_know_each_other(one, other):
    assert not inside(one) & users_of(other)


def test_only_the_plugin_imports_avalanche():
    assert inside("ewc") & users_of("avalanche") == {"ewc.plugin"}


@pytest.mark.parametrize("package", ["hydra", "omegaconf", "wandb"])
def test_the_library_knows_no_application(package):
    assert not inside("ewc") & users_of(package)


def test_the_library_imports_nothing_by_a_name_made_at_run_time():
    for name in inside("ewc"):
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(modules()[name].read_text()))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert not names & LAZY, name


def test_no_folder_of_code_is_crowded():
    folders = {path.parent for path in modules().values()}
    folders |= {path.parent for path in (ROOT / "tests").rglob("*.py")} | {ROOT / "scripts"}
    sizes = {str(d.relative_to(ROOT)): len(list(d.glob("*.py"))) for d in folders}
    assert {folder: size for folder, size in sizes.items() if size > 16} == {}


def test_every_folder_of_the_library_is_a_package():
    folders = {path.parent for path in (ROOT / "ewc").rglob("*.py")}
    assert [str(d) for d in folders if not (d / "__init__.py").exists()] == []


def test_public_names_are_few():
    assert len(ewc.__all__) <= 25
    assert all(hasattr(ewc, name) for name in ewc.__all__)


def test_every_public_method_is_explained():
    """By its own docstring, or by that of the method that it overrides."""
    silent = []
    for info in pkgutil.walk_packages(ewc.__path__, "ewc."):
        module = importlib.import_module(info.name)
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != info.name:
                continue
            for name, member in vars(kind).items():
                if name.startswith("_") or not (
                    inspect.isfunction(member) or isinstance(member, property)
                ):
                    continue
                if not inspect.getdoc(getattr(kind, name)):
                    silent.append(f"{info.name}.{kind.__name__}.{name}")
    assert silent == []
