"""What ``pip install ewc`` brings: the library alone, which needs four packages."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

NEEDED = {"torch", "numpy", "scipy", "safetensors"}

IMPORT_ALONE = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())

import ewc, ewc.statistics, ewc.natural_gradient

try:
    import ewc.plugin
except ModuleNotFoundError as error:
    print(ewc.__file__, error.name)
"""


def requirements(metadata):
    """The packages that a distribution needs here, without its extras."""
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def with_their_requirements(names):
    """The distributions ``names``, what they need, what that needs, and so on."""
    known, unseen = set(), set(names)
    while unseen:
        name = unseen.pop()
        known.add(name)
        unseen |= set(requirements(distribution(name).metadata)) - known
    return known


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


def pip(*arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--no-input", *arguments],
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=200,
    )


def test_wheel_holds_the_library_alone(wheel):
    names = [Path(name) for name in ZipFile(wheel).namelist()]
    in_wheel = {name for name in names if name.parts[0] == "ewc"}
    in_repository = {file.relative_to(ROOT) for file in (ROOT / "ewc").rglob("*.py")}
    assert in_wheel == in_repository | {Path("ewc/py.typed")}
    others = {name.parts[0] for name in names} - {"ewc"}
    assert {Path(name).suffix for name in others} == {".dist-info"}


def test_wheel_needs_four_packages_and_imports_without_any_other(wheel, tmp_path):
    pip("install", "--no-deps", f"--target={tmp_path}", str(wheel))
    (installed,) = distributions(path=[str(tmp_path)])
    assert set(requirements(installed.metadata)) == NEEDED
    allowed = with_their_requirements(NEEDED)
    refused = {
        module
        for module, providers in packages_distributions().items()
        if module != "ewc" and allowed.isdisjoint(map(canonicalize_name, providers))
    }
    assert {"avalanche", "hydra", "wandb", "sklearn", "torchvision", "matplotlib"} <= refused
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE.format(refused=refused)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "ewc" / "__init__.py"), "avalanche"]


COMPLETE = """
eval "$(ewc-run -sc install=bash)"
complete -p ewc-run
for COMP_LINE in "ewc-run strategy=k" "ewc-run training.i" "ewc-run fisher/structure=low"; do
    COMP_CWORD=1
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""


def test_editable_install_has_a_command_whose_options_the_shell_completes(tmp_path):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, timeout=100)
    (path,) = tmp_path.glob("*.whl")
    (name,) = (name for name in ZipFile(path).namelist() if ".data/scripts/" in name)
    assert Path(name).name == "ewc-run"
    assert (ZipFile(path).getinfo(name).external_attr >> 16) & 0o111 == 0o111
    script = tmp_path / "ewc-run"
    # An installer writes the path of Python in place of the first line's word.
    script.write_text(ZipFile(path).read(name).decode().replace("#!python", f"#!{sys.executable}"))
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", COMPLETE],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    rule, *replies = done.stdout.splitlines()
    assert rule.endswith("-F hydra_bash_completion ewc-run")
    assert replies == ["strategy=kfac_ewc", "training.iterations=", "fisher/structure=low_rank"]
