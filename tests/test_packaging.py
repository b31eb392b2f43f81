"""What ships: the wheel carries the code and the weights, the files keep their limits, the set-up commands are true."""

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minidiff

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
INSTALL = "pip install -r requirements.txt"
COMMANDS = [
    INSTALL + ' && python -m minidiff generate "a large red house on the left, snow, night, stars"',
    INSTALL + " && pytest",
]
WEIGHTS = sorted(DATA.rglob("*.safetensors"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def pinned() -> dict[str, str]:
    """{distribution: version} of requirements.txt."""
    lines = [line for line in read("requirements.txt").splitlines() if line and line[0] not in "#-"]
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    texts = [*project()["dependencies"], *chain(*project()["optional-dependencies"].values())]
    return [Requirement(text) for text in texts]


def locked() -> dict[str, list[str]]:
    """{distribution: its line and its hashes} of requirements.lock."""
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", read("requirements.lock"), flags=re.MULTILINE))
    return {canonicalize_name(re.match(r"[\w.-]+", entry)[0]): [line.strip(" \\") for line in entry.splitlines()]
            for entry in entries}


def needed(names: list[str]) -> set[str]:
    """These distributions and all that they need here."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found.add(name)
            wants = map(Requirement, importlib.metadata.requires(name) or [])
            names += [want.name for want in wants if want.marker is None or want.marker.evaluate({"extra": ""})]
    return found


def test_the_lock_has_the_exact_set_and_all_that_it_needs_with_hashes():
    lock = locked()
    for name, version in pinned().items():
        assert lock[name][0].split(" ")[0] == f"{name}=={version}"
    assert needed(list(pinned())) <= lock.keys()
    for name, (line, *hashes) in lock.items():
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), (name, line)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = folder.glob("minidiff-*-py3-none-any.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_module_weight_and_notebook(wheel):
    modules = {path.relative_to(ROOT) for path in (ROOT / "minidiff").rglob("*.py")}
    weights = {Path("minidiff/_weights") / path.relative_to(DATA) for path in WEIGHTS}
    assert Path("minidiff/_weights/mini-sd/unet/diffusion_pytorch_model.safetensors") in weights
    notebooks = {Path("minidiff/_notebooks") / path.relative_to(ROOT / "notebooks")
                 for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert Path("minidiff/_notebooks/01_forward_noising.ipynb") in notebooks
    files = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    looks = {Path("minidiff/teach/web") / name for name in ("common.css", "page.css", "deck.css", "deck.js")}
    assert modules | weights | notebooks | looks <= files
    extra = {path for path in files - modules - weights - notebooks - looks if ".dist-info" not in path.parts[0]}
    assert {path.parts[1] for path in extra} == {"_weights"}
    # configs, vocabularies, and the logs and numbers that notebooks show: no pictures, no READMEs
    assert {path.suffix for path in extra} == {".json", ".jsonl", ".txt"}


def test_an_installed_wheel_finds_its_weights_and_draws(wheel, tmp_path):
    code = """
import minidiff as md
from minidiff.io.weights import weights_dir
print(weights_dir())
pipe = md.StableDiffusion.from_pretrained("mini-sd", device="cpu")
print(pipe("a small red house", steps=1)[0].size[0] >= 32)
"""
    environment = os.environ | {"PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(wheel / "minidiff" / "_weights"), "True"]


def test_the_wheel_folder_of_a_classroom_holds_a_wheel_of_this_package(tmp_path):
    """README's command, for this package alone: `pip download` would pack the folder, with the wheels, into itself."""
    (line,) = (line for line in read("README.md").splitlines() if line.endswith(" -w wheels"))
    words = line.replace("-r requirements.txt editables", "--no-deps --no-build-isolation -e .").split()
    run = subprocess.run([sys.executable, "-m", *words[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"minidiff-{minidiff.__version__}-py3-none-any.whl"]


def test_the_wheel_installs_the_console_script(wheel):
    (info,) = wheel.glob("minidiff-*.dist-info")
    assert "minidiff = minidiff.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text(encoding="utf-8").splitlines()
    assert {f"Version: {minidiff.__version__}", "Requires-Python: >=3.11", "License-Expression: MIT"} <= set(metadata)


@pytest.mark.quick
def test_readme_has_the_two_commands_at_its_very_top_and_ci_runs_them():
    lines = read("README.md").splitlines()
    assert [line for line in lines if line.startswith(f"{INSTALL} && ")] == COMMANDS
    assert max(lines.index(command) for command in COMMANDS) < 25
    script = read(".ci/run")
    assert "< README.md" in script and script.count("pip install") == 1  # the one is the pattern it looks for
    assert "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default pytest -m quick" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"


@pytest.mark.quick
@pytest.mark.parametrize("given, threads", [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_tests_take_one_thread_or_as_many_as_the_user_says(given, threads):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | given
    code = "import os, conftest; print(os.environ['OMP_NUM_THREADS'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == threads, run.stderr


@pytest.mark.quick
def test_an_older_python_is_told_so_also_by_pip():
    """The build executes minidiff/__init__.py for the version, before pip looks for the other requirements."""
    assert 'source = "code"' in read("pyproject.toml") and "import torch" not in read("minidiff/__init__.py")
    code = "import sys; sys.version_info = (3, 10, 4); exec(open('minidiff/__init__.py').read())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "minidiff needs Python 3.11 or newer; this is 3.10\n")


@pytest.mark.quick
def test_binder_takes_the_cpu_build_of_torch():
    assert read(".binder/runtime.txt") == "python-3.11\n" and os.access(ROOT / ".binder" / "postBuild", os.X_OK)
    assert "--torch-backend=cpu -r requirements.txt" in read(".binder/postBuild")


@pytest.mark.quick
def test_requirements_pin_everything_and_install_the_package():
    lines = [line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ." and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9.]+", line) for line in lines[:-1])
    for bound in declared():
        assert bound.specifier.contains(pinned()[canonicalize_name(bound.name)]), bound
    assert pinned()["torch"] == "2.13.0"


@pytest.mark.quick
def test_every_library_that_the_package_imports_is_declared():
    files = (ROOT / "minidiff").rglob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"minidiff"}
    available = {{"pillow": "PIL"}.get(bound.name, bound.name) for bound in declared()}
    elsewhere = {"IPython", "huggingface_hub", "pygments"}  # with ipykernel; only where download=True; with nbconvert
    assert "torch" in imported and imported <= available | elsewhere


@pytest.mark.quick
def test_every_version_number_is_the_same():
    assert f"\nversion: {minidiff.__version__}\n" in read("CITATION.cff")


@pytest.mark.quick
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_in_git_is_over_16_mib():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listing.split("\0") if (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 16 * 2**20} == {}


@pytest.mark.quick
def test_shipped_text_encoder_tells_transformers_to_compute_in_float32():
    """Else diffusers' pipeline, loaded without a dtype, mixes its float16 with the U-Net's float32, and fails."""
    config = json.loads(read("data/mini-sd/text_encoder/config.json"))
    assert (config["dtype"], config["bos_token_id"]) == ("float32", config["eos_token_id"] - 1)


@pytest.mark.quick
def test_all_of_data_is_at_most_90_mib():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 90 * 2**20


@pytest.mark.quick
def test_data_readme_lists_every_weight_file_with_its_sha256():
    """On one line: the path below data/, and the 64 digits."""
    lines = read("data/README.md").splitlines()
    listed = {sha: line for line in lines for sha in re.findall(r"\b[0-9a-f]{64}\b", line)}
    found = {hashlib.sha256(path.read_bytes()).hexdigest(): path.relative_to(DATA).as_posix() for path in WEIGHTS}
    assert set(listed) == set(found)
    assert [name for sha, name in found.items() if name not in listed[sha]] == []
