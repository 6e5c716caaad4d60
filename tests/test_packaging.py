"""The wheel, the recipes in it, and what the extra `gpu` asks of a resolver."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, clean_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bond_plugin
from bond_plugin import recipe
from bond_plugin.cli import recipes

RECIPES = {path.relative_to(REPOSITORY / "recipes").as_posix(): path for path in REPOSITORY.glob("recipes/**/*.*")}
RECIPES = {name: path for name, path in RECIPES.items() if path.suffix in (".py", ".yaml", ".jinja")}


def environment() -> dict[str, str]:
    """Without a path by which the wheel's environment would find the package of this tree instead."""
    return {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}


def run(*command: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, **options)
    assert done.returncode == 0 or not check, (done.stdout + done.stderr).decode()[-4000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `make wheel` does, of a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("bond_plugin", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    offline = ("--no-build-isolation", "--no-index")  # setuptools is here
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *offline, "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bond_elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bond`` of a new environment that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return folder / "bin" / "bond"


def test_wheel_has_the_entry_points_of_this_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        built, wanted = configparser.ConfigParser(), configparser.ConfigParser()
        built.read_string(archive.read(entries).decode())
    wanted.read(REPOSITORY / "setup.cfg")
    listed = configparser.ConfigParser()
    listed.read_string("\n".join(f"[{group}]{lines}" for group, lines in wanted["options.entry_points"].items()))
    assert len(listed.sections()) >= 6
    assert {name: dict(listed[name]) for name in listed.sections()} == {n: dict(built[n]) for n in built.sections()}


def test_wheel_is_for_the_hosts_pythons_and_its_gpu_extra_builds_nothing(wheel: Path) -> None:
    (found,) = importlib.metadata.Distribution.discover(name="openrlhf-bond", path=[str(wheel)])
    assert set(found.metadata["Requires-Python"].split(",")) == {">=3.10", "<3.13"}
    named = {
        canonicalize_name(wanted.name)
        for wanted in map(Requirement, found.requires)
        if wanted.marker and "gpu" in str(wanted.marker)
    }
    assert "vllm" in named
    assert not named & {"flash-attn", "openrlhf"}
    assert found.version == bond_plugin.__version__
    assert wheel.name in (REPOSITORY / "docs" / "install.md").read_text()


def test_recipes_of_an_installed_wheel_are_the_repositorys(bond_elsewhere: Path, tmp_path: Path) -> None:
    listed = run(bond_elsewhere, "recipes", cwd=tmp_path).stdout.decode().splitlines()
    assert {line.split()[0] for line in listed} == set(RECIPES)
    folder = Path(run(bond_elsewhere, "recipes", "--path", cwd=tmp_path).stdout.decode().strip())
    assert bond_elsewhere.parents[1].resolve() in folder.parents
    for name, path in RECIPES.items():
        assert (folder / name).read_bytes() == path.read_bytes(), name
    for name in ("reviews/jbond-gpu", "reviews/reward.py"):
        printed = run(bond_elsewhere, "recipes", name, cwd=tmp_path)
        assert printed.stdout == RECIPES.get(name, RECIPES.get(f"{name}.yaml")).read_bytes()
        assert (b"recipes/reviews/reward.py" in printed.stderr) == (name == "reviews/jbond-gpu")
    # Where its paths expect them, nothing is missing.
    shutil.copytree(folder, tmp_path / "recipes")
    assert not run(bond_elsewhere, "recipes", "reviews/jbond-gpu", cwd=tmp_path).stderr
    assert b"bond recipes" in run(bond_elsewhere, "--help").stdout
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has seen enough
    ended = subprocess.run(
        [bond_elsewhere, "recipes"], env=environment(), stdout=writer, stderr=subprocess.PIPE, check=True
    )
    os.close(writer)
    assert not ended.stderr


def test_every_file_of_the_recipes_says_what_it_is_for_in_one_line() -> None:
    assert set(recipes.found()) == set(RECIPES)
    for name, path in RECIPES.items():
        purpose = recipes.purpose(path)
        assert 20 < len(purpose) < 130, (name, purpose)
        assert purpose[-1] not in ",'", (name, purpose)


@pytest.mark.parametrize(("name", "nearest"), [
    ("reviews/jbnd-cpu", "reviews/jbond-cpu.yaml"), ("jbond-8gpu-13b", "reviews/jbond-8gpu-7b.yaml"),
    ("reviews/reward", "reviews/reward.py"), ("zzz", None),
])  # fmt: skip
def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str], name: str, nearest: str | None) -> None:
    assert recipes.main([name]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert f"no recipe '{name}'" in printed.err
    assert (f"did you mean '{nearest}'?" in printed.err) if nearest else ("did you mean" not in printed.err)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(".yaml") and "/bench" not in name])
def test_sizes_of_a_recipe_are_the_hosts(name: str) -> None:
    """The host's own assertions, the last of which it makes only when Ray runs."""
    flat: dict[str, Any] = {}
    recipe.flatten(recipe.load(RECIPES[name], typed=True), flat)
    ranks = flat["actor.num_nodes"] * flat["actor.num_gpus_per_node"]
    samples = flat["rollout.batch_size"] * flat["rollout.n_samples_per_prompt"]
    assert samples // flat["rollout.micro_batch_size"] >= ranks
    assert samples % flat["train.batch_size"] == 0
    if flat.get("train.colocate_all"):
        assert flat["vllm.num_engines"] * flat["vllm.tensor_parallel_size"] == ranks
    else:
        assert not flat.get("vllm.enable_sleep")


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_a_resolver_accepts_the_gpu_extra_and_the_host_finds_all_it_requires(python: str, tmp_path: Path) -> None:
    """All but flash-attn, whose build imports torch. Metadata alone is fetched."""
    pytest.importorskip("uv", reason="uv is not installed; it is in the extra `test`")
    done = run(
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--python-version",
        python, "--python-platform", "x86_64-unknown-linux-gnu", "--extra", "gpu", REPOSITORY / "setup.cfg",
        cwd=tmp_path, check=False,
    )  # fmt: skip
    if done.returncode and any(words in done.stderr for words in (b"Failed to fetch", b"dns error", b"connect")):
        pytest.skip(f"no package index can be reached: {done.stderr.decode().splitlines()[0]}")
    assert done.returncode == 0, done.stderr.decode()
    found = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in done.stdout.decode().splitlines())
    }
    assert "flash-attn" not in found
    wanted = map(Requirement, importlib.metadata.requires("openrlhf"))
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "vllm"}):
            continue
        name = canonicalize_name(requirement.name)
        if name != "flash-attn":
            assert name in found, f"{requirement} is in no way required by the extra"
            assert requirement.specifier.contains(found[name]), f"{requirement}: {found[name]}"
    # What flash-attn's build imports.
    assert {"torch", "ninja", "packaging", "psutil", "setuptools", "wheel", "einops"} <= set(found)
