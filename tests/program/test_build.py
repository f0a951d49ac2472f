"""What build_pyz.sh promises of stockrt.pyz, and what the locked requirements promise of both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
BUILD_DIR = Path(os.environ.get("STOCKRT_BUILD_DIR") or ROOT / ".build")
SOURCES = ("build_pyz.sh", "stockrt.py", "requirements.txt", ".build-requirements.txt")
LOCKS = ("requirements.txt", "tests/requirements.txt", ".build-requirements.txt")
EXTENSIONS = ("bson/_cbson", "pymongo/_cmessage")
OLDEST = (3, 11)


# ------------------------------------------------------------------------------- the machine's Pythons


class Python(NamedTuple):
    """A CPython found on this machine."""

    version: tuple[int, ...]
    path: str

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def candidates() -> Iterator[Path]:
    """Every file that is named like an interpreter, where interpreters usually are."""
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/*/bin")
    for folder in [*on_path, Path("/usr/bin"), Path("/usr/local/bin"), *sorted(pyenv)]:
        for path in sorted(folder.glob("python[23]*")):
            if re.fullmatch(r"python(2|2\.7|3|3\.\d+)", path.name) and folder.name != "shims":
                yield path.resolve()


# Every worker asks every interpreter, so with as little as a Python 2 can do: it has no sys.implementation.
PROBE = """import sys
print(getattr(getattr(sys, "implementation", None), "name", "PyPy" in sys.version or "cpython"))
print("%d %d %d" % sys.version_info[:3])"""


def probe(path: Path) -> Python | None:
    """The interpreter at `path`, or None where there is no working CPython."""
    try:
        answer = subprocess.run(
            [path, "-S", "-E", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    name, *numbers = answer.stdout.split()
    return Python(tuple(map(int, numbers)), str(path)) if name == "cpython" else None


@cache
def pythons() -> list[Python]:
    """The CPythons of this machine, one for each version."""
    found = {python.version: python for path in dict.fromkeys(candidates()) if (python := probe(path))}
    return [found[version] for version in sorted(found)]


def one_of_each_minor(found: list[Python]) -> list[Python]:
    """The newest of each 3.X."""
    return list({python.version[:2]: python for python in found}.values())


def as_parameters(found: list[Python], lacking: str) -> list[Any]:
    """Test parameters, those that are not the newest 3.X for the long form, or one that says why there are none."""
    skip = pytest.param(None, marks=pytest.mark.skip(reason=lacking), id="none")
    newest = one_of_each_minor(found)
    return [
        pytest.param(python, id=str(python), marks=() if python in newest else pytest.mark.long)
        for python in found
    ] or [skip]


NEW = as_parameters([p for p in pythons() if p.version >= OLDEST], "no CPython 3.11 or newer outside")
OTHERS = [
    p for p in one_of_each_minor(pythons()) if p.version >= OLDEST and p.version[:2] != sys.version_info[:2]
]
OLD = as_parameters([p for p in pythons() if p.version < OLDEST], "no Python older than 3.11 here")


# --------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def archive(pyz: Path) -> Iterator[zipfile.ZipFile]:
    """The inside of the file."""
    with zipfile.ZipFile(pyz) as opened:
        yield opened


def copy_sources(folder: Path) -> Path:
    """A folder with what a build needs, and nothing else."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(
    folder: Path, *arguments: str, umask: int = 0o022, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run the build of `folder`; unless `env` says otherwise, with the tools that are there already."""
    settings = {"STOCKRT_BUILD_DIR": str(BUILD_DIR), "PYTHON": sys.executable, **env}
    return subprocess.run(
        [folder / "build_pyz.sh", *arguments],
        capture_output=True,
        text=True,
        umask=umask,
        env={**os.environ, **settings},
        cwd="/",
        timeout=300,
        check=False,
    )


def run_in_file(python: Python, pyz: Path, shiv_root: Path, code: str) -> str:
    """What `code` prints when the interpreter inside the file runs it."""
    env = {**os.environ, "SHIV_ROOT": str(shiv_root), "SHIV_INTERPRETER": "1"}
    command = [python.path, str(pyz), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True).stdout


class Refuser(BaseHTTPRequestHandler):
    """An index, or a proxy, that has nothing; the server's `asked` holds the request lines."""

    def do_GET(self) -> None:
        self.server.asked.append(self.requestline)  # type: ignore[attr-defined]
        self.send_error(404)

    do_CONNECT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def refuser() -> Iterator[tuple[str, list[str]]]:
    """The URL of one, and what it is asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuser) as server:
        asked: list[str] = []
        server.asked = asked  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def digest(path: Path) -> str:
    """The file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------- reproducible


def test_same_bytes_wherever_it_is_built_and_no_wheel_is_fetched_twice(pyz: Path, tmp_path: Path) -> None:
    """Directory, umask, time zone, locale and SOURCE_DATE_EPOCH leave no trace; no index is asked."""
    folder = copy_sources(tmp_path / "with a space")
    env = {"TZ": "Asia/Shanghai", "LC_ALL": "C", "SOURCE_DATE_EPOCH": "1"}
    env |= {"UV_DEFAULT_INDEX": "http://127.0.0.1:1/simple", "UV_NO_CACHE": "true"}
    run = build(folder, umask=0o077, env=env)
    assert run.returncode == 0, run.stderr
    assert digest(folder / "stockrt.pyz") == digest(pyz), (
        f"{pyz} is not what ./build_pyz.sh makes of the sources now"
    )


@pytest.mark.long  # makes the tools of every Python
@pytest.mark.parametrize("python", as_parameters(OTHERS, "no other CPython 3.11 or newer here"))
def test_same_bytes_whichever_python_builds(python: Python, pyz: Path, tmp_path: Path) -> None:
    """From the same wheels; nothing of the building Python is in the file."""
    name = "python{}.{}".format(*python.version)
    folder, tools = copy_sources(tmp_path / name), BUILD_DIR / name
    tools.mkdir(exist_ok=True)
    if not (tools / "wheels").exists():
        (tools / "wheels").symlink_to("../wheels")
    env = {"TZ": "America/New_York", "PYTHON": python.path, "STOCKRT_BUILD_DIR": str(tools)}
    run = build(folder, env=env)
    assert run.returncode == 0, run.stderr
    assert digest(folder / "stockrt.pyz") == digest(pyz)


def test_nothing_inside_tells_where_or_when_it_was_built(archive: zipfile.ZipFile) -> None:
    """Fixed order, dates and modes; shiv's own settings hold no path."""
    names = archive.namelist()
    assert names == sorted(names)
    assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}
    settings = json.loads(archive.read("environment.json"))
    assert re.fullmatch(r"[0-9a-f]{64}", settings.pop("build_id"))
    assert settings["entry_point"] == "stockrt:main"
    assert settings["built_at"].startswith("1980-01-01")
    assert "/" not in json.dumps(settings)


# ------------------------------------------------------------------------------------------- contents


def test_extensions_of_every_interpreter_and_machine_are_inside(archive: zipfile.ZipFile) -> None:
    """One file serves CPython 3.11 to 3.15 on both machines."""
    expected = {
        f"site-packages/{name}.cpython-3{minor}-{machine}-linux-gnu.so"
        for name in EXTENSIONS
        for minor in range(11, 16)
        for machine in ("x86_64", "aarch64")
    }
    assert {name for name in archive.namelist() if name.endswith(".so")} == expected


def test_nothing_useless_is_inside(archive: zipfile.ZipFile) -> None:
    """No scripts, no sources of extensions, no records of an installation; METADATA stays."""
    names = [Path(name) for name in archive.namelist()]
    assert not [name for name in names if name.parts[:2] == ("site-packages", "bin")]
    assert not [name for name in names if name.suffix in {".c", ".h", ".pyc"}]
    assert not [name for name in names if name.name in {"RECORD", "WHEEL", "INSTALLER", "REQUESTED"}]
    inside = {name.parent.name for name in names if name.name == "METADATA"}
    assert {name.split("-")[0] for name in inside} == {
        name.replace("-", "_") for name, lock in locked("requirements.txt").items() if applies(lock)
    }


def test_the_file_is_executable_and_finds_its_interpreter(pyz: Path) -> None:
    """`./stockrt.pyz` works wherever python3 is."""
    assert os.access(pyz, os.X_OK)
    with pyz.open("rb") as file:
        assert file.readline() == b"#!/usr/bin/env python3\n"


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("python", NEW)
def test_runs_with_the_extensions_of_pymongo(python: Python, pyz: Path, shiv_root: Path) -> None:
    """Every CPython here runs the file, with its own packages and their C extensions."""
    env = {**os.environ, "SHIV_ROOT": str(shiv_root)}
    command = [python.path, str(pyz), "--version"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("stockrt ")
    code = "import bson, pymongo; print(bson.has_c(), pymongo.has_c(), bson.__file__)"
    bson_c, pymongo_c, path = run_in_file(python, pyz, shiv_root, code).split(maxsplit=2)
    assert (bson_c, pymongo_c) == ("True", "True")
    assert Path(path.strip()).is_relative_to(shiv_root)


@pytest.mark.parametrize("python", OLD)
def test_older_python_gets_one_line(python: Python, pyz: Path, tmp_path: Path) -> None:
    """It says what is needed and what was found, and nothing is unpacked."""
    env = {**os.environ, "SHIV_ROOT": str(tmp_path / "shiv")}
    command = [python.path, str(pyz), "--version"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.startswith(f"stockrt needs Python 3.11 or newer; this is {python} ({python.path}).")
    assert run.stderr.count("\n") == 1
    chinese = subprocess.run(
        [python.path, str(pyz), "--version"],
        capture_output=True,
        env={**env, "LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"},
        timeout=60,
        check=False,
    )
    words = f"stockrt 需要 Python 3.11 或更高版本；当前是 {python}（{python.path}）。请这样运行：python3.X {pyz}\n"
    assert (chinese.returncode, chinese.stderr.decode()) == (1, words)
    assert not (tmp_path / "shiv").exists()


# ------------------------------------------------------------------------------------- the build itself


def test_native_build_runs_here(tmp_path: Path) -> None:
    """`--native` makes the same file for this interpreter and machine alone."""
    folder = copy_sources(tmp_path / "native")
    run = build(folder, "--native")
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(folder / "stockrt.pyz") as archive:
        assert len([name for name in archive.namelist() if name.endswith(".so")]) == len(EXTENSIONS)
    python = Python(sys.version_info[:3], sys.executable)
    code = "import bson, pymongo; print(bson.has_c(), pymongo.has_c())"
    assert run_in_file(python, folder / "stockrt.pyz", tmp_path / "shiv", code) == "True True\n"


# How an operator names a mirror to pip: {url} is the mirror, {file} a configuration file of pip with what follows.
MIRRORS = {
    "pip.conf": ({"HOME": "{home}"}, "[global]\nindex-url = {url}/simple\n"),
    "pip.conf, install": (
        {"HOME": "{home}"},
        "[global]\nindex-url = http://127.0.0.1:1\n[install]\nindex-url = {url}/simple\n",
    ),
    "PIP_CONFIG_FILE": ({"PIP_CONFIG_FILE": "{file}"}, "[global]\nindex-url = {url}/simple\n"),
    "PIP_INDEX_URL": (
        {"HOME": "{home}", "PIP_INDEX_URL": "{url}/simple"},
        "[global]\nindex-url = http://127.0.0.1:1\n",
    ),
    "PIP_EXTRA_INDEX_URL": (
        {"PIP_INDEX_URL": "{url}/simple", "PIP_EXTRA_INDEX_URL": "{url}/simple/more"},
        "",
    ),
    "PIP_PROXY": (
        {"PIP_INDEX_URL": "http://mirror.invalid/simple", "PIP_PROXY": "{url}", "NO_PROXY": ""},
        "",
    ),
}


def tools_alone(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing but the tools is there yet, and nothing says where packages come from."""
    tools = tmp_path / "build"
    tools.mkdir()
    (tools / "tool").symlink_to(BUILD_DIR / "tool")
    silent = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "PIP_FIND_LINKS", "PIP_INDEX_URL",
              "PIP_EXTRA_INDEX_URL", "XDG_CONFIG_HOME")  # fmt: skip
    nothing = dict.fromkeys(silent, "") | {"HOME": str(tmp_path), "NO_PROXY": "*"}
    return {"STOCKRT_BUILD_DIR": str(tools), "UV_NO_CACHE": "true", "UV_HTTP_RETRIES": "0", **nothing}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.long) if way in ("pip.conf", "PIP_CONFIG_FILE") else way
        for way in MIRRORS
    ],
)
def test_wheels_come_by_the_mirror_of_pip(way: str, tmp_path: Path) -> None:
    """Whatever names a mirror for pip holds for uv too: every request goes where the operator's settings say."""
    folder, env = copy_sources(tmp_path / "sources"), tools_alone(tmp_path)
    variables, text = MIRRORS[way]
    settings = tmp_path / "home/.config/pip/pip.conf"
    settings.parent.mkdir(parents=True)
    with refuser() as (url, asked):
        settings.write_text(text.format(url=url))
        for name, value in variables.items():
            env[name] = value.format(url=url, home=tmp_path / "home", file=settings)
        run = build(folder, "--native", env=env)
    assert run.returncode != 0
    begins = "GET http://mirror.invalid/simple/" if way == "PIP_PROXY" else "GET /simple/"
    assert asked and all(line.startswith(begins) for line in asked), (asked, run.stderr)
    assert way != "PIP_EXTRA_INDEX_URL" or any("/simple/more/" in line for line in asked)


def test_wheels_come_by_the_proxy(tmp_path: Path) -> None:
    """HTTPS_PROXY holds for the build as for everything else."""
    folder, env = copy_sources(tmp_path / "sources"), tools_alone(tmp_path)
    with refuser() as (url, asked):
        env |= {"NO_PROXY": "", "HTTPS_PROXY": url, "UV_DEFAULT_INDEX": "https://mirror.invalid/simple"}
        run = build(folder, "--native", env=env)
    assert run.returncode != 0
    assert asked and all(line.startswith("CONNECT mirror.invalid:443 ") for line in asked), (
        asked,
        run.stderr,
    )


@pytest.mark.long  # that what is set for pip holds for the build is tried by the mirrors
def test_a_folder_of_wheels_is_enough(tmp_path: Path) -> None:
    """Without any network: pip's no-index and find-links, and the same bytes as from an index."""
    wheels = [str(tmp_path / "wheels"), "-r", str(ROOT / "requirements.txt")]
    pip = [
        str(BUILD_DIR / "tool/bin/python"),
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--require-hashes",
        "-d",
    ]
    subprocess.run([*pip, *wheels], check=True, timeout=120)
    folder, env = copy_sources(tmp_path / "sources"), tools_alone(tmp_path)
    mine = build(copy_sources(tmp_path / "mine"), "--native")
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels[0],
        "HTTPS_PROXY": "http://127.0.0.1:1",
        "NO_PROXY": "",
    }
    run = build(folder, "--native", env=env)
    assert (mine.returncode, run.returncode) == (0, 0), run.stderr
    assert digest(folder / "stockrt.pyz") == digest(tmp_path / "mine/stockrt.pyz")


def test_wheel_that_no_hash_vouches_for_stops_the_build(tmp_path: Path) -> None:
    """The old file stays as it was, and no half-made one is left."""
    folder = copy_sources(tmp_path / "tampered")
    lock = folder / "requirements.txt"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", lock.read_text("utf-8")), "utf-8")
    (folder / "stockrt.pyz").write_text("old", "utf-8")
    run = build(folder, "--native")
    assert run.returncode != 0
    assert "hash" in run.stderr.lower()
    assert (folder / "stockrt.pyz").read_text("utf-8") == "old"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SOURCES, "stockrt.pyz"])


@pytest.mark.parametrize("arguments", [("--nativ",), ("--native", "x"), ("tests",), ("lock", "--upgarde")])
def test_unknown_argument_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    """One line, exit 64."""
    run = build(ROOT, *arguments)
    assert run.returncode == 64
    assert "unknown argument" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("python", OLD)
def test_older_python_is_not_built_with(python: Python) -> None:
    """One line that names the version found and how to name another one."""
    run = build(ROOT, env={"PYTHON": python.path})
    assert run.returncode == 1
    assert f"is Python {python}: install 3.11 or newer" in run.stderr
    assert run.stderr.count("\n") == 1


def test_python_that_is_not_there_is_named() -> None:
    """One line that says what to install."""
    run = build(ROOT, env={"PYTHON": "no-such-python"})
    assert run.returncode == 1
    assert "no Python at 'no-such-python'" in run.stderr
    assert run.stderr.count("\n") == 1
    run = build(ROOT, env={"PYTHON": "no-such-python", "STOCKRT_LANG": "zh", "LC_ALL": "C.UTF-8"})
    assert "build_pyz.sh：找不到 Python（no-such-python）：请安装 python3" in run.stderr


@pytest.mark.parametrize(
    ("language", "has_tools", "words"),
    [
        (
            "en",
            True,
            "\nbuild_pyz.sh: could not fetch the wheels for 3.11: see above; is the network there, ",
        ),
        ("zh", True, "\nbuild_pyz.sh：无法获取 Python 3.11 的依赖包：原因见上；请检查网络、HTTPS_PROXY 或 "),
        ("zh", False, "\nbuild_pyz.sh：无法获取构建工具：原因见上；请检查网络、HTTPS_PROXY 或 "),
    ],
)
def test_what_cannot_be_fetched_is_said(tmp_path: Path, language: str, has_tools: bool, words: str) -> None:
    (tmp_path / "build").mkdir()
    if has_tools:
        (tmp_path / "build" / "tool").symlink_to(BUILD_DIR / "tool")
    env = {"STOCKRT_BUILD_DIR": str(tmp_path / "build"), "STOCKRT_LANG": language, "LC_ALL": "C.UTF-8"}
    env |= {"UV_DEFAULT_INDEX": "http://127.0.0.1:1/simple", "UV_NO_CACHE": "true", "UV_HTTP_RETRIES": "0"}
    env |= {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "0"}
    run = build(copy_sources(tmp_path / "sources"), env=env)
    assert run.returncode == 1 and words in run.stderr, run.stderr


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_the_bench_is_shown_without_a_build(tmp_path: Path, flag: str) -> None:
    run = build(ROOT, "bench", flag, env={"STOCKRT_BUILD_DIR": str(tmp_path / "build")})
    assert run.returncode == 0 and "--write-readme" in run.stdout
    assert not (tmp_path / "build").exists()


def test_python_without_venv_is_named(tmp_path: Path) -> None:
    """Debian's python3 alone cannot make an environment: the package that it lacks is named."""
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\nexec "{sys.executable}" "$@"\n', "utf-8"
    )
    python.chmod(0o755)
    run = build(ROOT, env={"PYTHON": str(python)})
    assert run.returncode == 1
    assert "install python3-venv" in run.stderr
    assert run.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------- requirements


class Lock(NamedTuple):
    """One line of a requirements file, as uv writes it."""

    requirement: Requirement
    hashes: list[str]


def locked(name: str) -> dict[str, Lock]:
    """The lines of a requirements file by the package that each is about."""
    lines = (ROOT / name).read_text("utf-8").replace("\\\n", " ").splitlines()
    locks: dict[str, Lock] = {}
    for requirement, *hashes in (line.split("--hash=") for line in lines if not line.startswith("#")):
        parsed = Requirement(requirement)
        locks[canonicalize_name(parsed.name)] = Lock(parsed, [each.strip() for each in hashes])
    return locks


def applies(lock: Lock) -> bool:
    """Whether the package is for this kind of machine."""
    return lock.requirement.marker is None or lock.requirement.marker.evaluate()


def version_of(lock: Lock) -> Version:
    """The one version that the line pins."""
    (pin,) = lock.requirement.specifier
    assert pin.operator == "==", f"{lock.requirement} is no pin"
    return Version(pin.version)


def declared() -> list[Requirement]:
    """The dependencies in the script metadata at the top of stockrt.py."""
    found = re.search(r"^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script(), re.M)
    assert found, "stockrt.py has no script metadata"
    lines = found["content"].splitlines()
    block = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert block["requires-python"] == ">=3.11"
    return [Requirement(line) for line in block["dependencies"]]


def script() -> str:
    """The text of stockrt.py."""
    return (ROOT / "stockrt.py").read_text("utf-8")


def needed_by(name: str) -> Iterator[str]:
    """The package and all that it needs, on any machine, as its installed metadata says."""
    yield canonicalize_name(name)
    for line in (metadata.requires(name) or []) if name != "colorama" else []:
        requirement = Requirement(line)
        if "extra" not in str(requirement.marker):
            yield from needed_by(requirement.name)


def check_lock(lock: Mapping[str, Lock], wanted: list[Requirement]) -> None:
    """The lock holds what is wanted, each at a version that is allowed."""
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{name} is not locked: run ./build_pyz.sh lock"
        version = version_of(lock[name])
        assert requirement.specifier.contains(version), f"{name} {version} is locked, {requirement} declared"


def test_requirements_agree_with_the_script() -> None:
    """What stockrt.py declares is locked, and nothing else but what that needs."""
    lock = locked("requirements.txt")
    check_lock(lock, declared())
    needed = {name for requirement in declared() for name in needed_by(requirement.name)}
    assert set(lock) == needed, "run ./build_pyz.sh lock"


def test_test_requirements_agree_with_their_source_and_the_script() -> None:
    """What is tested is what is shipped: the same versions, with the same hashes."""
    lock = locked("tests/requirements.txt")
    lines = (ROOT / "tests" / "requirements.in").read_text("utf-8").splitlines()
    check_lock(lock, [Requirement(line) for line in lines if line and line[0] not in "#-"])
    for name, shipped in locked("requirements.txt").items():
        assert (name, version_of(lock[name]), lock[name].hashes) == (
            name,
            version_of(shipped),
            shipped.hashes,
        )


def test_tool_requirements_agree_with_the_build() -> None:
    """The versions that build_pyz.sh names are the ones that it installs."""
    lock = locked(".build-requirements.txt")
    text = (ROOT / "build_pyz.sh").read_text("utf-8")
    for name in ("uv", "shiv"):
        (version,) = re.findall(rf"^{name.upper()}_VERSION=(\S+)$", text, re.M)
        assert version_of(lock[name]) == Version(version)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_line_is_hashed_and_names_no_index(name: str) -> None:
    """The hashes vouch for the files, so any mirror may serve them."""
    for lock in locked(name).values():
        assert version_of(lock)
        assert lock.hashes, f"{lock.requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in lock.hashes)
    text = (ROOT / name).read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, re.M)


@pytest.mark.parametrize(
    ("named", "is_chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN"}, True),
        ({"LANG": "zh_CN.GBK"}, False),  # what the script says is UTF-8
        ({"LANG": "en_US.UTF-8"}, False),
        ({}, False),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"STOCKRT_LANG": "zh", "LANG": "en_US.UTF-8"}, True),
        ({"STOCKRT_LANG": "en", "LANG": "zh_CN.UTF-8"}, False),
    ],
)
def test_it_speaks_the_readers_language(named: dict[str, str], is_chinese: bool) -> None:
    said = []
    for argument in ("--helpp", "--help"):
        done = subprocess.run(
            [ROOT / "build_pyz.sh", argument],
            env={"PATH": os.environ["PATH"], **named},
            capture_output=True,
            text=True,
        )
        said.append(done.stderr + done.stdout)
    assert ["未知参数" in said[0], "用法" in said[1]] == [is_chinese, is_chinese]
    assert ["unknown argument" in said[0], "usage" in said[1]] == [not is_chinese, not is_chinese]


def test_both_languages_of_its_help_name_the_same() -> None:
    said = [
        subprocess.run(
            [ROOT / "build_pyz.sh", "--help"],
            env={"PATH": os.environ["PATH"], "STOCKRT_LANG": language},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for language in ("en", "zh")
    ]
    english, chinese = (
        re.findall(r"--\w+|[A-Z]+_[A-Z_]+|\b[a-z_]+\.(?:py|pyz|sh|in)\b", text) for text in said
    )
    assert english == chinese
