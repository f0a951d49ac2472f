#!/usr/bin/env bash
# Builds stockrt.pyz, checks the code, and moves the locked versions: see usage() below.
#
# Promises:
# - the same sources give the same bytes, whatever the directory, umask, time zone, locale,
#   SOURCE_DATE_EPOCH and CPython that builds (one zlib release assumed: it does the packing);
# - nothing is installed that a hash in the repository does not vouch for;
# - stockrt.pyz is either the old file or the complete new one, never a half-written one;
# - besides stockrt.pyz only the build directory (and uv's cache) is written;
# - install replaces the program at once and whole, and never touches a configuration that is there.
set -euo pipefail

UV_VERSION=0.13.9
SHIV_VERSION=1.0.8
# pymongo's C extensions carry the interpreter's version and the machine in their file names, so
# those of all of these live side by side in one file.
PYTHONS=(3.11 3.12 3.13 3.14 3.15)
MACHINES=(x86_64 aarch64)

unset CDPATH
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
build=${STOCKRT_BUILD_DIR:-$here/.build}
python=${PYTHON:-python3}
out=$here/stockrt.pyz
tool_lock=$here/.build-requirements.txt
wheels=$build/wheels
locked=
work=

# Whether who runs this reads Chinese: as stockrt.py finds out. What is written here is UTF-8, and the console's font
# has no Chinese.
reads_chinese() {
    local named=${STOCKRT_LANG:-} locale=${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}
    [[ $named =~ ^[[:space:]]*([zZ][hH]|[eE][nN])[[:space:]]*$ ]] || named=$locale
    [[ ${named,,} == *zh* && ${locale,,} =~ ^([^.]*|.*\.utf-?8.*)$ ]] || return 1
    [[ ${named,,} =~ ^[[:space:]]*zh ]] && ! { [ "${TERM-}" = linux ] && [ -t 2 ]; }
}
chinese=
! reads_chinese || chinese=1

# say ENGLISH CHINESE
say() {
    if [ "$chinese" ]; then printf '%s\n' "$2"; else printf '%s\n' "$1"; fi
}

usage() {
    if [ "$chinese" ]; then usage_in_chinese; else usage_in_english; fi
}

usage_in_chinese() {
    cat <<'TEXT'
用法：./build_pyz.sh                  构建 stockrt.pyz，适用于 CPython 3.11 至 3.15、x86_64 和 aarch64
      ./build_pyz.sh --native         只为本机和当前的 Python 构建 stockrt.pyz（较快）
      ./build_pyz.sh test [ARG ...]   检查代码和类型、构建、测试；ARG 传给 pytest（三分钟）
      ./build_pyz.sh test --long [ARG ...]  另外：每种故障测试更多轮次、用本机的每个 Python 构建、
                                      简短的性能测试（五分钟）
      ./build_pyz.sh bench [ARG ...]  构建，然后与简单循环对比性能；退出码 1：有目标未达到
      sudo ./build_pyz.sh install     安装 stockrt.pyz 及其 systemd 单元
      sudo ./build_pyz.sh uninstall   卸载二者；配置和状态保留
      ./build_pyz.sh lock [--upgrade] 重新生成依赖锁定文件；--upgrade 升级版本
      ./build_pyz.sh --help

环境变量：
  PYTHON             用于构建和测试的 Python，3.11 及以上  （默认：python3）
  STOCKRT_BUILD_DIR  工具、测试环境和临时文件的目录        （默认：.build）
  DESTDIR            加在 install、uninstall 写入的路径之前（默认：无）

运行时依赖写在 stockrt.py 开头，测试工具写在 tests/requirements.in；改动之后请运行
“./build_pyz.sh lock”。pip 关于下载来源的设置（PIP_INDEX_URL、PIP_CONFIG_FILE、pip.conf 等：
index-url、extra-index-url、find-links、no-index、trusted-host、cert、proxy）对整个构建有效，
除非设置了 uv 自己的变量。
TEXT
}

usage_in_english() {
    cat <<'TEXT'
usage: ./build_pyz.sh                  build stockrt.pyz for CPython 3.11 to 3.15, x86_64 and aarch64
       ./build_pyz.sh --native         build stockrt.pyz for this interpreter and machine alone (fast)
       ./build_pyz.sh test [ARG ...]   lint, check types, build, test; ARGs go to pytest (3 minutes)
       ./build_pyz.sh test --long [ARG ...]  as well: every fault in more rounds, builds by every Python here,
                                       the bench in short (5 minutes)
       ./build_pyz.sh bench [ARG ...]  build, then measure side by side with a plain loop; exit 1: a target missed
       sudo ./build_pyz.sh install     put stockrt.pyz and its systemd unit in place
       sudo ./build_pyz.sh uninstall   take both away; configuration and state stay
       ./build_pyz.sh lock [--upgrade] write the requirements files anew; --upgrade moves versions
       ./build_pyz.sh --help

environment:
  PYTHON             the interpreter that builds and tests, 3.11 or newer   (default: python3)
  STOCKRT_BUILD_DIR  tools, test environment, temporary files              (default: .build)
  DESTDIR            put in front of every path that (un)install writes    (default: none)

The run-time dependencies are declared at the top of stockrt.py, the test tools in
tests/requirements.in; after a change there run "./build_pyz.sh lock". pip's settings of where packages
come from (PIP_INDEX_URL, PIP_CONFIG_FILE, pip.conf …: index-url, extra-index-url, find-links, no-index,
trusted-host, cert, proxy) hold for the whole build, unless uv's own are set.
TEXT
}

# fail ENGLISH CHINESE [STATUS]
fail() {
    say "build_pyz.sh: $1" "build_pyz.sh：$2" >&2
    exit "${3:-1}"
}

fail_of_usage() {
    fail "unknown argument '$1'; see ./build_pyz.sh --help" "未知参数“$1”；请看 ./build_pyz.sh --help" 64
}

# fail_of_fetch WHAT_IN_ENGLISH WHAT_IN_CHINESE: behind the words of who fetched it.
fail_of_fetch() {
    fail "could not fetch $1: see above; is the network there, HTTPS_PROXY right, or pip's mirror (PIP_INDEX_URL)?" \
        "无法获取$2：原因见上；请检查网络、HTTPS_PROXY 或 pip 的镜像（PIP_INDEX_URL）"
}

# ---------------------------------------------------------------------------------- environments

check_python() {
    local version
    version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) ||
        fail "no Python at '$python': install python3 (3.11 or newer) and python3-venv, or set PYTHON" \
            "找不到 Python（$python）：请安装 python3（3.11 及以上）和 python3-venv，或设置 PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "'$python' is Python $version: install 3.11 or newer and name it, as in PYTHON=python3.12" \
            "“$python” 是 Python $version：请安装 3.11 或更高版本并指定它，例如 PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' (Python $version) has no venv: install python3-venv (python${version%.*}-venv)" \
            "“$python”（Python $version）没有 venv：请安装 python3-venv（python${version%.*}-venv）"
}

# What an environment was made from; a change makes it anew.
stamp() {
    "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
    cat -- "$1"
}

# Two builds at once share one build directory: the second waits while the first makes the tools.
ensure_tools() {
    local tool=$build/tool
    mkdir -p "$build"
    (
        flock 9
        [ "$(stamp "$tool_lock")" != "$(cat "$tool/stamp" 2>/dev/null)" ] || exit 0
        say "making the build tools in $tool" "正在 $tool 中准备构建工具" >&2
        "$python" -m venv --clear "$tool"
        "$tool/bin/python" -I -m pip --disable-pip-version-check install --quiet --no-deps \
            --require-hashes --only-binary :all: -r "$tool_lock" || fail_of_fetch "the build tools" "构建工具"
        stamp "$tool_lock" >"$tool/stamp"
    ) 9>"$build/lock"
    tell_uv_of_pip
}

# What pip's settings (environment, files; of its own sections [install] is stronger than [global]) say about where
# packages come from, as uv's variables; what is set for uv itself is left as it is.
pip_settings_for_uv() {
    "$build/tool/bin/python" -I - <<'PYTHON'
import ast
import os
import subprocess
import sys

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "no-index": "no_index",
}
listed = subprocess.run(
    [sys.executable, "-I", "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
)
settings = {}
for line in listed.stdout.splitlines():
    place, found, value = line.partition("=")
    if found:
        settings[place] = str(ast.literal_eval(value)).split()
for pip_name, uv_name in UV_NAMES.items():
    places = [section + pip_name for section in (":env:.", "install.", "global.")]
    words = next((settings[place] for place in places if settings.get(place)), None)
    if words is None or os.environ.get(uv_name):
        continue
    print(f"{uv_name}={(',' if pip_name == 'find-links' else ' ').join(words)}")
    if pip_name == "extra-index-url":  # as pip has it, all indexes are equal; the locked hashes vouch for what comes
        print("UV_INDEX_STRATEGY=unsafe-best-match")
PYTHON
}

# uv does not read pip's settings; on a machine behind a mirror or an own authority only pip's exist.
tell_uv_of_pip() {
    local setting bundle
    while IFS= read -r setting; do
        export "${setting?}"
    done < <(pip_settings_for_uv)
    for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
        [ ! -s "$bundle" ] || export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
    done
}

# uv has no variable for "no-index".
uv() {
    local more=()
    [ "$1" != pip ] || [[ ! ${no_index-} =~ ^(1|true|yes|on|y|t)$ ]] || more=(--no-index)
    "$build/tool/bin/uv" --quiet "${@:1:2}" "${more[@]}" "${@:3}"
}

# ----------------------------------------------------------------------------------------- build

start_work() {
    mkdir -p "$build"
    work=$(mktemp -d "$build/work.XXXXXX")
    trap 'rm -rf -- "$work" "$out.new.$$"' EXIT
}

# fetch NAME [UV-ARGUMENT ...]: unpacks the locked wheels of one interpreter on one machine into work/abi/NAME.
# They are kept as long as the lock stays the same: later builds, whichever Python builds, fetch nothing.
fetch() {
    local name=$1 kept=$wheels/$locked/$1
    shift
    if [ ! -d "$kept" ]; then
        uv pip install --no-deps --require-hashes --only-binary :all: --link-mode copy \
            --python "$build/tool/bin/python" --target "$work/fetched/$name" "$@" -r "$here/requirements.txt"
        # whole at once; where another build was first, its folder is as good
        mv -T -- "$work/fetched/$name" "$kept" 2>/dev/null || [ -d "$kept" ]
    fi
    ln -s -- "$kept" "$work/abi/$name"
}

# What was fetched for other locks goes when it was of no use for a month.
keep_wheels() {
    locked=$( (echo "$UV_VERSION"; cat -- "$here/requirements.txt") | sha256sum | cut -c1-16)
    mkdir -p "$wheels/$locked" "$work/abi"
    touch -- "$wheels/$locked"
    find "$wheels/" -mindepth 1 -maxdepth 1 -mtime +30 -exec rm -rf -- {} +
}

fetch_native() { fetch "native-$(stamp /dev/null | sha256sum | cut -c1-16)"; }

# The machines of one version at once: measured, more at a time only wait for one another.
fetch_all() {
    local version machine pid pids
    for version in "${PYTHONS[@]}"; do
        pids=()
        for machine in "${MACHINES[@]}"; do
            fetch "$version-$machine" \
                --python-version "$version" --python-platform "$machine-manylinux_2_28" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            wait "$pid" || fail_of_fetch "the wheels for $version" " Python $version 的依赖包"
        done
    done
}

# Merges the folders of work/abi into work/site. Two wheels may share a file only if it is the same.
merge() {
    "$build/tool/bin/python" -I - "$work" <<'PYTHON'
import shutil
import sys
from pathlib import Path

# They differ from wheel to wheel, or from machine to machine, and nothing needs them at run time.
LEFT_OUT = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json", ".lock", "uv_cache.json"}
LEFT_OUT_SUFFIXES = {".pyc", ".c", ".h"}

work = Path(sys.argv[1])
site = work / "site"
for wheels in sorted((work / "abi").iterdir()):
    for source in sorted(wheels.rglob("*")):
        name = source.relative_to(wheels)
        if source.is_dir() or name.parts[0] == "bin":
            continue
        if name.name in LEFT_OUT or name.suffix in LEFT_OUT_SUFFIXES:
            continue
        target = site / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        elif target.read_bytes() != source.read_bytes():
            sys.exit(f"build_pyz.sh: {name} differs between the wheels")
PYTHON
    cp -- "$here/stockrt.py" "$work/site/"
}

# SOURCE_DATE_EPOCH would go into the file.
pack() {
    env -u SOURCE_DATE_EPOCH "$build/tool/bin/python" -I -W ignore::DeprecationWarning -m shiv.cli \
        --reproducible --uncompressed --site-packages "$work/site" --entry-point stockrt:main \
        --output-file "$work/shiv.pyz"
}

# Writes shiv's archive anew: in a fixed order, with fixed dates and modes (shiv copies those of its
# own files, which follow the umask), and with a first file that any Python can read.
seal() {
    "$build/tool/bin/python" -I - "$work/shiv.pyz" "$out.new.$$" "$here/stockrt.py" <<'PYTHON'
import json
import re
import sys
import zipfile
from pathlib import Path

MAIN = """\
# Python 2.7, and 3.3 and newer, read this file, so the one line that helps comes before any newer syntax.
import os
import sys


# For a Chinese reader, known as in build_pyz.sh, or else, as in a journal, in English.
def leave(status, english, chinese, *values):
    get, stderr = os.environ.get, os.fstat(2)
    journal = get("JOURNAL_STREAM") == "%d:%d" % (stderr.st_dev, stderr.st_ino)
    locale = (get("LC_ALL") or get("LC_MESSAGES") or get("LANG") or "").lower()
    named, charset = get("STOCKRT_LANG", "").strip().lower(), locale.partition(".")[2].replace("-", "")
    reads = (named if named in ("zh", "en") else locale).startswith("zh") and charset[:4] in ("", "utf8")
    words = chinese if reads and not journal and not (get("TERM") == "linux" and os.isatty(2)) else english
    if str is bytes:  # Python 2
        os.write(2, words.encode("utf-8") % values + b"\\n")
    else:
        os.write(2, (("<3>" if journal else "") + words % values + "\\n").encode("utf-8", "surrogateescape"))
    sys.exit(status)


if sys.version_info < ({major}, {minor}):
    leave(
        1,
        u"stockrt needs Python {major}.{minor} or newer; this is %d.%d.%d (%s). Run it as: python3.X %s",
        u"stockrt 需要 Python {major}.{minor} 或更高版本；当前是 %d.%d.%d（%s）。请这样运行：python3.X %s",
        *(sys.version_info[:3] + (sys.executable, sys.argv[0]))
    )

import signal
import zipimport

# Ctrl-C before the program takes signals itself ends quietly, as later.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# What PYTHONPATH names comes last: an older library there must not stand for ours.
others = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path.sort(key=others.__contains__)

# Unpacked by an earlier start, and none of shiv's own switches is set: the rest of what shiv does then, without
# the modules that only its unpacking needs (20 ms and 2 MB of every start).
name = os.path.basename(os.path.realpath(sys.argv[0])) + "_{build_id}"
folder = os.path.join(os.path.expanduser(os.environ.get("SHIV_ROOT") or "~/.shiv"), name)
site = os.path.join(folder, "site-packages")
plain = not [n for n in os.environ if n.startswith("SHIV_") and n != "SHIV_ROOT"]
if plain and os.path.isdir(site):
    places = [n for n, path in enumerate(sys.path) if path.endswith(("site-packages", "dist-packages"))]
    sys.path.insert((places + [len(sys.path)])[0], site)
    # Nothing more is to come from this archive: the list of what it holds would take 0.3 MB for good.
    archive = __loader__.archive
    sys.path.remove(archive)
    getattr(zipimport, "_zip_directory_cache", dict()).pop(archive, dict()).clear()
    try:
        import stockrt
    except ImportError:  # a cleaner of caches has been there
        sys.path.remove(site)
        sys.path.insert(0, archive)
        sys.path_importer_cache.clear()
    else:
        stockrt.main()
if plain and os.path.isdir(folder):  # without a part of it: shiv would take it for whole
    import shutil

    shutil.rmtree(folder, ignore_errors=True)

import _bootstrap

try:
    _bootstrap.bootstrap()
except (OSError, RuntimeError) as error:  # RuntimeError: nobody tells where the home of this user is
    if "stockrt" in sys.modules:  # unpacked, and begun: not the cache's fault
        raise
    no_home = (
        u"it has no home directory: neither HOME nor its name tells one",
        u"当前用户没有主目录（未设置 HOME，按用户名也查不到）",
    )
    reasons = [(getattr(error, "strerror", None) or words).replace("%", "%%") for words in no_home]
    leave(
        78,
        u"stockrt: cannot unpack itself into %s: " + reasons[0] + u"; make room there and let this user write it, "
        u"or name another directory in SHIV_ROOT",
        u"stockrt：无法解压到 %s：" + reasons[1] + u"；请腾出空间并让当前用户可写，或用 SHIV_ROOT 指定其他目录",
        os.path.dirname(os.path.dirname(site)),
    )
"""

source, target, script = map(Path, sys.argv[1:])
found = re.search(r'^# requires-python = ">=(\d+)\.(\d+)"$', script.read_text("utf-8"), re.M)
if not found:
    sys.exit('build_pyz.sh: stockrt.py has no line: # requires-python = ">=3.X"')

with zipfile.ZipFile(source) as old:
    build_id = json.loads(old.read("environment.json"))["build_id"]
main = MAIN.format(major=found[1], minor=found[2], build_id=build_id).encode("ascii", "backslashreplace")

with zipfile.ZipFile(source) as old, target.open("wb") as file:
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in sorted(old.namelist()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix: the modes below count
            entry.external_attr = 0o100644 << 16
            data = main if name == "__main__.py" else old.read(name)
            new.writestr(entry, data, zipfile.ZIP_DEFLATED)
PYTHON
    chmod 755 "$out.new.$$"
    mv -f -- "$out.new.$$" "$out"
}

# build_file FETCH-COMMAND ...
build_file() {
    [ -f "$here/stockrt.py" ] || fail "no stockrt.py in $here" \
            "$here 中没有 stockrt.py"
    check_python
    ensure_tools
    start_work
    keep_wheels
    "$@"
    merge
    pack
    seal
    printf '%s  %s\n' "$(sha256sum <"$out" | cut -d' ' -f1)" "stockrt.pyz ($(wc -c <"$out") bytes)"
}

# --------------------------------------------------------------------------------------- install

DESTDIR=${DESTDIR-}
program=/opt/stockrt/stockrt.pyz
unit=/etc/systemd/system/stockrt.service
config=/etc/stockrt/stockrt.env
credentials=/etc/stockrt/credentials

# With DESTDIR the files are for another system: nothing of this one is asked or told.
systemd_runs() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

need_root() {
    [ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "'$1' needs root: sudo ./build_pyz.sh $1" \
            "“$1” 需要 root 权限：sudo ./build_pyz.sh $1"
}

# place MODE SOURCE PATH: whoever looks sees the old file or the whole new one.
place() {
    local target=$DESTDIR$3
    mkdir -p -- "$(dirname -- "$target")"
    install -m "$1" -- "$2" "$target.new.$$"
    sync -- "$target.new.$$"
    mv -fT -- "$target.new.$$" "$target"
}

# Exit status 0: the built file holds the stockrt.py that lies here.
is_current() {
    "$python" -I -c 'import sys, zipfile
with open(sys.argv[2], "rb") as script:
    sys.exit(zipfile.ZipFile(sys.argv[1]).read("site-packages/stockrt.py") != script.read())' "$@"
}

# The unit as this system's systemd understands it: 254 and newer know the growing wait between restarts.
unit_for_here() {
    local version=0
    ! systemd_runs || version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    if [ "${version:-0}" -ge 254 ]; then
        sed -e 's/^#\(RestartSteps\|RestartMaxDelaySec\)=/\1=/' "$here/stockrt.service"
    else
        cat -- "$here/stockrt.service"
    fi
}

install_files() {
    need_root install
    [ -f "$out" ] || fail "no stockrt.pyz: run ./build_pyz.sh first" \
            "没有 stockrt.pyz：请先运行 ./build_pyz.sh"
    is_current "$out" "$here/stockrt.py" || fail "stockrt.pyz is not of this stockrt.py: run ./build_pyz.sh first" \
            "stockrt.pyz 不是由当前的 stockrt.py 构建的：请先运行 ./build_pyz.sh"
    umask 022
    local text
    text=$(mktemp)
    unit_for_here >"$text"
    place 755 "$out" "$program"
    place 644 "$text" "$unit"
    rm -f -- "$text"
    say "installed $DESTDIR$program" "已安装    $DESTDIR$program"
    say "installed $DESTDIR$unit" "已安装    $DESTDIR$unit"
    if [ -e "$DESTDIR$config" ] || [ -L "$DESTDIR$config" ]; then
        say "kept      $DESTDIR$config" "已保留    $DESTDIR$config"
    else
        place 600 "$here/stockrt.env.example" "$config"
        say "installed $DESTDIR$config" "已安装    $DESTDIR$config"
    fi
    if [ ! -e "$DESTDIR$credentials" ]; then
        install -d -m 700 -- "$DESTDIR$credentials"
        say "made      $DESTDIR$credentials" "已创建    $DESTDIR$credentials"
    fi
    if systemd_runs; then
        systemctl daemon-reload
        if systemctl --quiet is-active stockrt; then
            say "the running daemon is still the old one until: sudo systemctl restart stockrt" \
                "正在运行的守护进程仍是旧版本，重启后更新：sudo systemctl restart stockrt"
            return
        fi
    fi
    say next: 下一步：
    say "  sudoedit $config                  # INFOWAY_API_KEY; SERVER_IP, SERVER_PORT, or COLLECT, COLLECT_CODES" \
        "  sudoedit $config                  # INFOWAY_API_KEY；SERVER_IP、SERVER_PORT，或 COLLECT、COLLECT_CODES"
    cat <<TEXT
  sudo systemctl enable --now stockrt
  systemctl status stockrt
TEXT
}

uninstall_files() {
    need_root uninstall
    ! systemd_runs || systemctl --quiet disable --now stockrt 2>/dev/null || true
    local path
    for path in "$program" "$unit"; do
        [ ! -e "$DESTDIR$path" ] || say "removed $DESTDIR$path" "已删除  $DESTDIR$path"
        rm -f -- "$DESTDIR$path"
    done
    rmdir --ignore-fail-on-non-empty -- "$DESTDIR$(dirname -- "$program")" 2>/dev/null || true
    # what the program unpacked, and systemd's link to it
    rm -rf -- "$DESTDIR/var/cache/private/stockrt" "$DESTDIR/var/cache/stockrt"
    ! systemd_runs || systemctl daemon-reload
    for path in /etc/stockrt "$unit.d" /var/lib/private/stockrt /var/lib/stockrt; do
        [ ! -d "$DESTDIR$path" ] || [ -L "$DESTDIR$path" ] || say "kept    $DESTDIR$path" "已保留  $DESTDIR$path"
    done
}

# ------------------------------------------------------------------------------------------ lock

# compile SOURCE TARGET [ARGUMENT ...]: no name of an index, no path and no date goes into TARGET.
compile() {
    local source=$1 target=$2
    shift 2
    (
        cd -- "$here"
        uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
            "$source" --output-file "$target" "$@" >/dev/null
    )
    say "wrote $target" "已写入 $target" >&2
}

# shiv names pip and setuptools, which it needs only where it is left to fetch packages itself.
lock() {
    check_python
    ensure_tools
    start_work
    printf '%s\n' "uv==$UV_VERSION" "shiv==$SHIV_VERSION" >"$work/tools.in"
    compile "$work/tools.in" .build-requirements.txt \
        --no-emit-package pip --no-emit-package setuptools "$@"
    compile stockrt.py requirements.txt "$@"
    compile tests/requirements.in tests/requirements.txt "$@"
}

# ------------------------------------------------------------------------------------------ test

ensure_test_env() {
    local venv=$build/test
    [ "$(stamp "$here/tests/requirements.txt")" != "$(cat "$venv/stamp" 2>/dev/null)" ] || return 0
    say "making the test environment in $venv" "正在 $venv 中准备测试环境" >&2
    uv venv --clear --python "$build/tool/bin/python" "$venv"
    uv pip install --no-deps --require-hashes --compile-bytecode \
        --python "$venv/bin/python" -r "$here/tests/requirements.txt" || fail_of_fetch "the test tools" "测试工具"
    stamp "$here/tests/requirements.txt" >"$venv/stamp"
}

# As tests/kit/mongo.py looks for it: the wheel's mongod is for Linux on x86_64 and needs two libraries of the system.
has_mongod() {
    [ -n "${MONGODB_TEST_URI-}" ] || command -v mongod >/dev/null || {
        [ "$(uname -sm)" = "Linux x86_64" ] &&
            "$python" -c 'import ctypes; ctypes.CDLL("libcurl.so.4"), ctypes.CDLL("libssl.so.3")' 2>/dev/null
    }
}

# What the tests of this machine need, take and cannot try: said before anything of it begins.
say_what_comes() {
    local form=$1 lacking=()
    local -A minutes=([quick]=3 [long]=5 [hour]=60)
    [ "$(id -u)" = 0 ] || lacking+=("$(say "full disks, files of other users and the systemd unit: run as root" \
        "磁盘写满、其他用户的文件和 systemd 单元：请以 root 运行")")
    has_mongod || lacking+=("$(say "everything with MongoDB: install mongod, or libcurl4 and libssl3, or set MONGODB_TEST_URI" \
        "所有用到 MongoDB 的测试：请安装 mongod，或安装 libcurl4 和 libssl3，或设置 MONGODB_TEST_URI")")
    [ -z "${MONGODB_TEST_URI-}" ] || lacking+=("$(say "what kills or pauses the server of MONGODB_TEST_URI: unset it" \
        "会终止或暂停 MONGODB_TEST_URI 所指服务器的测试：请取消该设置")")
    command -v curl >/dev/null || lacking+=("$(say "the README's tour: install curl" \
        "README 中的演示：请安装 curl")")
    command -v cc >/dev/null || lacking+=("$(say "power cuts and a clock that is set: install gcc and libc6-dev" \
        "断电和调整时钟：请安装 gcc 和 libc6-dev")")
    command -v unshare >/dev/null && command -v setpriv >/dev/null ||
        lacking+=("$(say "names that nobody resolves: install util-linux" \
        "无法解析的域名：请安装 util-linux")")
    command -v prometheus-node-exporter node_exporter >/dev/null ||
        lacking+=("$(say "metrics as the real collector reads them: install prometheus-node-exporter" \
        "由真正的采集器读取指标：请安装 prometheus-node-exporter")")
    command -v chromium chromium-browser google-chrome >/dev/null ||
        lacking+=("$(say "the page in a browser: install chromium" \
        "在浏览器中查看网页：请安装 chromium")")
    command -v systemd-nspawn >/dev/null || lacking+=("$(say "the unit under a real systemd: install systemd-container" \
        "在真正的 systemd 下运行服务单元：请安装 systemd-container")")
    say "tests, $form: all of them take some ${minutes[$form]} minutes on 2 processors, 4 GB of memory, 2 GB in ${TMPDIR:-/tmp}" \
        "测试（$form）：双核机器上全部测试约需 ${minutes[$form]} 分钟，4 GB 内存，${TMPDIR:-/tmp} 中 2 GB 空间"
    [ -d "$build/test" ] || say "first of all: tools and wheels are fetched into $build (600 MB, a minute more)" \
        "首先把工具和依赖包下载到 $build（600 MB，另需约一分钟）"
    for what in "${lacking[@]}"; do say "skipped here: $what" "本机跳过：$what"; done
} >&2

# Most tests wait for other processes, not for the processor: more at a time than there are processors.
# pytest's own caches go where everything else does that is made here.
run_tests() {
    local form=${STOCKRT_TESTS:-quick} arguments=() argument
    for argument in "$@"; do
        case $argument in
        --long) [ "$form" = hour ] || form=long ;;
        *) arguments+=("$argument") ;;
        esac
    done
    [[ $form =~ ^(quick|long|hour)$ ]] || fail "STOCKRT_TESTS is '$form': set quick, long or hour" \
        "STOCKRT_TESTS 的值是“$form”：应为 quick、long 或 hour" 64
    check_python
    say_what_comes "$form"
    ensure_tools
    ensure_test_env
    cd -- "$here"
    local bin=$build/test/bin
    export RUFF_CACHE_DIR=$build/ruff MYPY_CACHE_DIR=$build/mypy
    export HYPOTHESIS_STORAGE_DIRECTORY=$build/hypothesis
    "$bin/ruff" check stockrt.py tests
    "$bin/ruff" format --check stockrt.py tests
    # Goes on beside the tests, and is said behind them: while the file is built it would be waited for.
    "$bin/mypy" --strict stockrt.py tests >"$build/types" 2>&1 &
    local types=$! status=0
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX=$build/pycache
    # Compiled once here, while the file is built, and not by each worker; what is wrong the tests themselves say.
    "$bin/python" -m pytest --collect-only -q tests >/dev/null 2>&1 &
    local compiled=$!
    (unset PYTHONPYCACHEPREFIX; build_file fetch_all)
    wait "$compiled" || true
    STOCKRT_TESTS=$form "$bin/python" -m pytest \
        -n "$((4 * $(nproc)))" --durations 10 tests "${arguments[@]}" || status=$?
    wait "$types" || status=1
    cat -- "$build/types"
    return "$status"
}

# The bench starts servers of the tests; what it measures is the file that users get.
run_bench() {
    check_python
    case " $* " in *" --help "* | *" -h "*) exec "$python" -B "$here/tests/bench/bench.py" --help ;; esac
    ensure_tools
    ensure_test_env
    (build_file fetch_all)
    "$build/test/bin/python" -B "$here/tests/bench/bench.py" "$@"
}

# ------------------------------------------------------------------------------------------ main

main() {
    unset PYTHONPATH PYTHONHOME
    case ${1-} in
    '' | --native | --help | -h | install | uninstall)
        [ $# -le 1 ] || fail_of_usage "$2"
        ;;
    lock)
        [ $# -eq 1 ] || { [ $# -eq 2 ] && [ "$2" = --upgrade ]; } ||
            fail_of_usage "${*: -1}"
        ;;
    test | bench) ;;
    *) fail_of_usage "$1" ;;
    esac
    case ${1-} in
    '') build_file fetch_all ;;
    --native) build_file fetch_native ;;
    --help | -h) usage ;;
    install) install_files ;;
    uninstall) uninstall_files ;;
    lock) lock "${@:2}" ;;
    test) run_tests "${@:2}" ;;
    bench) run_bench "${@:2}" ;;
    esac
}

main "$@"
