"""The lock file: every package that the application needs, at versions that fit together."""

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def locked():
    """The versions of ``constraints.txt`` on this machine, by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): pin.specifier for pin in here}


def needed(name, extras, seen):
    """Every requirement that an installed package has here, and those of these."""
    for text in requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        yield requirement
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key not in seen:
            seen.add(key)
            try:
                yield from needed(requirement.name, requirement.extras, seen)
            except PackageNotFoundError:
                assert key[0] in locked(), f"{requirement.name} is neither installed nor locked"


def test_every_package_that_the_tests_need_is_locked_at_an_allowed_version():
    pins, checked = locked(), 0
    for requirement in needed("ewc", {"dev"}, set()):
        name = canonicalize_name(requirement.name)
        if name in ("ewc", "pip", "setuptools"):
            continue
        assert name in pins, f"constraints.txt lacks {requirement}: make lock"
        (version,) = [pin.version for pin in pins[name]]
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement}: {version}"
        )
        checked += 1
    assert checked > 50
