"""The unit under a real systemd, against the simulators: one box for all, the tests in the order of a life."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import socket
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from kit import systemd_box
from kit.infoway_server import Answer, InfowayServer
from kit.mongo import SET_NAME, MongoServer
from kit.platform_server import PlatformServer
from kit.stream_server import Vendor, identity
from kit.systemd_box import Box, BoxError
from rooms.test_settings import OTHERWISE, SYSTEMD_READS

import stockrt

UNIT = ROOT / "stockrt.service"
# Most exposure that `systemd-analyze security` may find, in tenths.
MOST_EXPOSURE = 12
API_KEY = "credential-key-1f9e"
MONGODB_PASSWORD = "hush-hush-8c1d"
CODES = ["TSLA.US", "AAPL.US"]
METRICS = "/var/lib/node_exporter/textfile/stockrt.prom"
SIOCSIFADDR = 0x8916
# Short in place of the unit's own: what they do is the same.
QUICK = "[Service]\nWatchdogSec=2s\nRestartSec=200ms\n"
# Where the program is unpacked and compiled for all units but ours itself, which does that in its cache.
UNPACKED = "/srv/unpacked"


# ------------------------------------------------------------------------------------------- the file alone


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install systemd")
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_unit_grants_little() -> None:
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSURE}", UNIT)
    assert done.returncode == 0, done.stdout


def test_unit_has_no_fault(tmp_path: Path) -> None:
    """The program need not be installed for this: `verify` looks for it, and for nothing else outside."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text()))
    done = analyze("verify", "--man=no", "--recursive-errors=yes", copy)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ the box


def is_over(box: Box, name: str) -> bool:
    """Whether a unit has ended for good: one that will be started again is `auto-restart`."""
    shown = box.run("systemctl", "show", "--property=SubState", "--value", name).stdout
    return shown.strip() in ("dead", "failed")


@dataclass
class Instance:
    """A unit in the box, made from ours, with its own simulators."""

    box: Box
    name: str
    api: InfowayServer
    platform: PlatformServer

    def ctl(self, *arguments: str, check: bool = True) -> str:
        return self.box.run("systemctl", *arguments, self.name, check=check).stdout.strip()

    def show(self, name: str) -> str:
        return self.ctl("show", f"--property={name}", "--value")

    @property
    def state(self) -> str:
        return self.show("ActiveState")

    @property
    def is_over(self) -> bool:
        return is_over(self.box, self.name)

    def journal(self, *arguments: str) -> list[dict[str, Any]]:
        text = self.box.run("journalctl", "--output=json", f"--unit={self.name}", *arguments).stdout
        return [json.loads(line) for line in text.splitlines()]

    def said(self) -> list[str]:
        """What the program itself wrote, since the box was booted."""
        mine = [e for e in self.journal("--boot") if e.get("_TRANSPORT") == "stdout"]
        return [str(entry["MESSAGE"]) for entry in mine]

    def wait(self, holds: Callable[[Instance], object], timeout: float = 60, what: str = "") -> None:
        try:
            systemd_box.until(lambda: holds(self), timeout, what or self.name)
        except BoxError as error:
            said = "\n".join(str(entry["MESSAGE"]) for entry in self.journal()[-20:])
            raise AssertionError(f"{error}\n{self.show('StatusText')}\n{said}") from None

    def start(self) -> None:
        self.ctl("reset-failed", check=False)
        self.ctl("start")
        self.wait(lambda i: i.platform.connected, what="connected to the platform")

    def execute(self, codes: list[str] = CODES) -> str:
        return self.platform.execute(codes)

    def result(self, execution_id: str, timeout: float = 60) -> dict[str, Any]:
        good = self.platform.wait_for(lambda p: p.results_for(execution_id), timeout)
        assert good, "\n".join(self.said()[-20:])
        return self.platform.results_for(execution_id)[0].data

    def count(self) -> int:
        """How many trades are stored."""
        code = "import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM realtime')" \
               ".fetchone()[0])"  # fmt: skip
        path = f"/var/lib/private/{self.name}/stockrt.db"
        return int(self.box.run("/usr/bin/python3", "-c", code, path).stdout)


def platform_in(box: Box, **switches: Any) -> PlatformServer:
    with box.network():
        return PlatformServer(zombies=False, **switches).start()


def derive_unit(box: Box, name: str) -> None:
    """A unit that is ours but for its name, the names of its files, and that it need not unpack the program again."""
    text = UNIT.read_text().replace("/etc/stockrt/stockrt.env", f"/etc/stockrt/{name}.env")
    for place in ("StateDirectory=", "CacheDirectory="):
        text = text.replace(f"{place}stockrt\n", f"{place}{name}\n")
    assert "SHIV_ROOT=%C/stockrt\n" in text
    text = text.replace("SHIV_ROOT=%C/stockrt\n", f"SHIV_ROOT={UNPACKED}\n")
    box.write(f"/etc/systemd/system/{name}.service", text)


def make_instance(box: Box, name: str, drop_in: str = QUICK, **api: Any) -> Instance:
    """A unit of this name, from ours; the one named stockrt is ours itself."""
    platform = platform_in(box)
    with box.network():
        server = InfowayServer(keys={API_KEY}, **api)
        server.start()
    environment = f"SERVER_IP=127.0.0.1\nSERVER_PORT={platform.port}\nINFOWAY_API_BASE_URL={server.url}\n"
    environment += f"INFOWAY_PLAN=0\nMETRICS_FILE={METRICS.replace('stockrt.prom', f'{name}.prom')}\n"
    if name != "stockrt":
        derive_unit(box, name)
    box.write(f"/etc/stockrt/{name}.env", environment, 0o600)
    box.write(f"/etc/systemd/system/{name}.service.d/test.conf", drop_in)
    box.run("systemctl", "daemon-reload")
    return Instance(box, name, server, platform)


@pytest.fixture(scope="module")
def box(pyz: Path) -> Iterator[Box]:
    """The booted box, with our files in /srv/stockrt."""
    if reason := systemd_box.why_not():
        pytest.skip(reason)  # also where nothing else may be skipped: a box takes a machine of its own
    try:
        running = Box().__enter__()
    except (BoxError, OSError) as error:
        pytest.skip(f"no box can be booted here: {error}")
    try:
        source = running.root / "srv/stockrt"
        source.mkdir(parents=True)
        for path in (
            pyz,
            *(ROOT / n for n in ("build_pyz.sh", "stockrt.py", "stockrt.service", "stockrt.env.example")),
        ):
            shutil.copy(path, source / path.name)
        textfile = running.root / "var/lib/node_exporter/textfile"
        textfile.mkdir(parents=True)
        textfile.chmod(0o1777)
        running.write("/home/person/diary", "private")
        yield running
    finally:
        running.close()


def install(box: Box, *arguments: str) -> str:
    return box.run("/srv/stockrt/build_pyz.sh", *(arguments or ("install",))).stdout


@pytest.fixture(scope="module")
def installed(box: Box) -> str:
    """What the install said."""
    said = install(box)
    as_the_unit = (f"SHIV_ROOT={UNPACKED}", "PYTHONOPTIMIZE=2", "STATE_DIRECTORY=/tmp/none")
    nobody = (
        "INFOWAY_API_KEY=none",
        "INFOWAY_API_BASE_URL=http://127.0.0.1:1",
        "MONGODB_HOST=mongodb://127.0.0.1:1",
    )
    box.run("env", *as_the_unit, *nobody, "/opt/stockrt/stockrt.pyz", "--check", check=False)
    return said


@pytest.fixture(scope="module")
def helpers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def dripping(box: Box, installed: str) -> tuple[Instance, str, float]:
    """An execution whose first answer never ends; what comes of it is looked at later."""
    first = iter([Answer.drip("body", 0.5)])
    instance = make_instance(box, "stockrt-drip", script=first)
    instance.start()
    return instance, instance.execute(), time.monotonic()


@pytest.fixture(scope="module")
def slow_stop(box: Box, installed: str, helpers: ThreadPoolExecutor) -> tuple[Instance, str, Future[str]]:
    """A stop in the middle of a fetch of 10 s, going on beside the other tests."""
    instance = make_instance(box, "stockrt-slow", latency=lambda request: 10.0 if request.codes else 0.0)
    instance.start()
    execution_id = instance.execute()
    instance.api.wait_for(lambda api: api.in_flight == 1)

    return instance, execution_id, helpers.submit(instance.ctl, "stop")


@pytest.fixture(scope="module")
def service(box: Box, installed: str, dripping: object, slow_stop: object) -> Instance:
    """The installed unit, its API key in a credential."""
    box.write("/etc/stockrt/credentials/infoway_api_key", API_KEY + "\n", 0o600)
    return make_instance(box, "stockrt")


@pytest.fixture(scope="module", autouse=True)
def key_for_all(box: Box) -> None:
    box.write("/etc/stockrt/credentials/infoway_api_key", API_KEY + "\n", 0o600)


@pytest.fixture
def running(service: Instance) -> Instance:
    if service.state != "active" or not service.platform.connected:
        service.start()
    return service


def test_install_says_the_next_three_commands(installed: str, box: Box) -> None:
    *_, first, second, third = installed.splitlines()
    assert installed.splitlines()[-4] == "next:"
    assert "stockrt.env" in first
    assert "systemctl enable --now stockrt" in second
    assert "systemctl status stockrt" in third
    assert (box.root / "etc/stockrt/stockrt.env").stat().st_mode & 0o777 == 0o600
    assert (box.root / "opt/stockrt/stockrt.pyz").stat().st_mode & 0o777 == 0o755


def test_newer_systemd_gets_the_growing_wait(box: Box, installed: str) -> None:
    unit = box.root / "etc/systemd/system/stockrt.service"
    before = unit.read_text()
    assert "\n#RestartSteps=" in before
    box.write("/srv/newer/systemctl", "#!/bin/sh\necho 'systemd 255 (255.4-1)'\n", 0o755)
    box.run("env", "PATH=/srv/newer:/usr/bin:/bin", "/srv/stockrt/build_pyz.sh", "install")
    after = unit.read_text()
    assert "\nRestartSteps=8\nRestartMaxDelaySec=1min\n" in after
    install(box)
    assert unit.read_text() == before


def test_starts_executes_and_says_so(service: Instance) -> None:
    service.start()
    assert service.state == "active"
    service.wait(
        lambda i: (
            i.show("StatusText")
            == f"connected to 127.0.0.1:{i.platform.port} · 1 key · no execute yet · 0 waiting"
        )
    )
    data = service.result(execution_id := service.execute())
    assert (data["status"], data["result"]["success_count"]) == ("success", 2)
    assert service.count() == 2
    pattern = (
        rf"connected to 127\.0\.0\.1:{service.platform.port} · 1 key · "
        r"last execute 2/2 in \d\.\d s, [1-9]\d* s ago · 0 waiting"
    )
    service.wait(lambda i: re.fullmatch(pattern, i.show("StatusText")), what="the age goes on by itself")
    lines = [line for line in service.said() if execution_id in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(
        rf"execution {execution_id} of .+: total 2, stored 2, duplicates 0, failed 0, \d+ ms", lines[0]
    )


def test_journal_has_priorities_and_no_times_of_ours(running: Instance) -> None:
    running.result(running.execute(["NOPE1.US", "NOPE1.XX"]))

    def lines(instance: Instance) -> list[dict[str, object]]:
        return [entry for entry in instance.journal("--boot") if entry.get("_TRANSPORT") == "stdout"]

    running.wait(lambda i: {entry["PRIORITY"] for entry in lines(i)} >= {"6", "4"})
    mine = lines(running)
    assert {entry["SYSLOG_IDENTIFIER"] for entry in mine} == {"stockrt"}
    assert not [e for e in mine if re.match(r"<\d>|\d\d:\d\d|(INFO|WARNING)", str(e["MESSAGE"]))]
    assert not [e for e in mine if "may not be read" in str(e["MESSAGE"])]


def test_migrated_before_its_first_start_it_is_the_older_module(box: Box, installed: str) -> None:
    """What root's --migrate writes is the service's when that starts: no new module, and files of its own user."""
    name = "stockrt-moved"
    instance = make_instance(box, name)
    ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
    query = "name=old&input_data=%5B%5D&output_data=%5B%5D&modelHash=old"
    url = f"{instance.platform.url}/module/register?{query}"
    answer = json.loads(box.run("/usr/bin/python3", "-c", ask, url).stdout)
    module_hash = answer["result"]["hash"]
    odd = 'it\'s "A" 股\\B #1 $HOME'  # to systemd it must be the same as to us
    box.write("/srv/older/config/.env", f"MODULE_DESCRIPTION={stockrt.env_line('', odd)[1:]}SERVER_PORT=1\n")
    box.write("/srv/older/config/module_hash.txt", module_hash)
    env_file = f"/etc/stockrt/{name}.env"
    command = ("/opt/stockrt/stockrt.pyz", "--env-file", env_file, "--migrate", "/srv/older")
    said = box.run("env", f"STATE_DIRECTORY=/var/lib/{name}", "HOME=/root", *command).stdout
    assert "kept      SERVER_PORT" in said and f"into /var/lib/{name}/module_hash" in said
    instance.start()
    environment = box.run("cat", f"/proc/{instance.show('MainPID')}/environ").stdout
    assert f"MODULE_DESCRIPTION={odd}" in environment.split("\0")
    assert instance.platform.connected == [module_hash]
    assert len(instance.platform.register_calls) == 1
    owner = box.run(
        "stat", "-c", "%u", f"/var/lib/private/{name}", f"/var/lib/private/{name}/module_hash"
    ).stdout
    assert len(set(owner.split())) == 1 and "0" not in owner.split()
    instance.ctl("stop")


def test_migrated_by_hand_settings_go_where_its_user_may_write(box: Box, installed: str) -> None:
    """The service's for root, a file in the folder where it was called for anybody else."""
    box.write("/srv/older/config/.env", "SERVER_PORT=1\n")
    program = "/opt/stockrt/stockrt.pyz --migrate /srv/older"
    roots = box.run("env", "HOME=/root", *program.split(), "--dry-run").stderr
    assert "settings: /etc/stockrt/stockrt.env;" in roots
    script = f"mkdir /tmp/person && cd /tmp/person && HOME=$PWD {program} && stat -c %a stockrt.env && cat stockrt.env"
    said = box.run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script)
    assert "settings: stockrt.env;" in said.stderr
    assert said.stdout.splitlines()[-3:] == ["600", "# From /srv/older/config/.env:", "SERVER_PORT=1"]


def test_migrated_by_hand_a_credential_of_the_unit_is_set_already(box: Box, installed: str) -> None:
    box.write("/srv/keyed/config/.env", "INFOWAY_API_KEY=an-older-key-5\n")
    said = box.run("/opt/stockrt/stockrt.pyz", "--migrate", "/srv/keyed", "--dry-run").stdout
    assert "kept      INFOWAY_API_KEY: it is set already; the older one differs\n" in said


def test_mongodb_and_tls_work_inside(box: Box, installed: str, mongod: Path) -> None:
    """The connection string is a credential; the authority of the test's certificate comes with the unit."""
    drop_in = f"{QUICK}Environment=SSL_CERT_FILE=/etc/stockrt/ca.pem\n"
    instance = make_instance(box, "stockrt-mongo", drop_in, tls=True)
    assert instance.api.ca_file is not None
    box.write("/etc/stockrt/ca.pem", instance.api.ca_file.read_text())
    with box.network(), MongoServer(mongod, replica_set=SET_NAME) as mongo:
        credential = box.write("/etc/stockrt/credentials/mongodb_host", mongo.uri, 0o600)
        try:
            instance.start()
            assert instance.result(instance.execute())["result"]["success_count"] == 2
            assert mongo.client()["forecast_platform"]["realtime"].count_documents({}) == 2
        finally:
            credential.unlink()
            instance.ctl("stop")
            instance.platform.stop()
            instance.api.stop()


@pytest.fixture
def vendor(box: Box) -> Iterator[Vendor]:
    """The whole API, inside the box; each code is traded at all times."""
    with contextlib.ExitStack() as stack:
        with box.network():
            made = stack.enter_context(Vendor(keys={API_KEY}))
        yield made


def test_without_a_platform_it_collects_from_install_to_the_gap_of_a_stop(
    box: Box, installed: str, vendor: Vendor
) -> None:
    """Every trade that was pushed is in the store, what came while it was down is a gap, the journal is quiet."""
    name, codes = "stockrt-alone", ("BTCUSDT", "ETHUSDT")
    urls = "".join(f"{key}={value}\n" for key, value in vendor.settings.items() if key != "INFOWAY_API_KEY")
    derive_unit(box, name)
    collect = f"COLLECT=stream\nCOLLECT_CODES='{' '.join(codes)}'\n"
    box.write(f"/etc/stockrt/{name}.env", f"{urls}{collect}INFOWAY_PLAN=pro\n", 0o600)
    box.write(f"/etc/systemd/system/{name}.service.d/test.conf", QUICK)
    box.run("systemctl", "daemon-reload")

    def show(what: str) -> str:
        return box.run("systemctl", "show", f"--property={what}", "--value", name).stdout.strip()

    def asked(query: str) -> list[list[Any]]:
        code = "import json, sqlite3, sys; db = sqlite3.connect(sys.argv[1])\n"
        code += "print(json.dumps(db.execute(sys.argv[2]).fetchall()))"
        path = f"/var/lib/private/{name}/stockrt.db"
        return list(json.loads(box.run("/usr/bin/python3", "-c", code, path, query).stdout))

    def subscribed() -> bool:
        return show("StatusText").startswith("collecting: 1 of 1 connection, 2 codes subscribed")

    def stored(ids: Collection[str]) -> bool:
        return {*ids} <= {row[0] for row in asked("SELECT _id FROM realtime")}

    def said(*arguments: str) -> str:
        return box.run("journalctl", "--output=cat", f"--unit={name}", *arguments).stdout

    box.run("systemctl", "start", name)
    systemd_box.until(subscribed, 60, "subscribed")
    first = vendor.stream.trade(*codes)
    systemd_box.until(lambda: stored(first), 60, "stored")
    box.run("systemctl", "stop", name)
    assert (show("ActiveState"), show("Result")) == ("inactive", "success")
    missed = identity(vendor.stream.new_trade(codes[0]))
    latest = identity(vendor.stream.new_trade(codes[0]))
    box.run("systemctl", "start", name)
    systemd_box.until(subscribed, 60, "subscribed again")
    systemd_box.until(lambda: stored([latest]), 60, "the latest trade after the gap is asked for")
    second = vendor.stream.trade(*codes)
    systemd_box.until(lambda: stored(second), 60, "stored again")
    assert not stored([missed])
    (gap,) = asked('SELECT product, codes, "from", "to", why FROM stream_gaps')
    assert gap[0] == "crypto" and json.loads(gap[1]) == [*codes] and gap[4]
    assert gap[2] <= int(missed.split("|")[1]) <= gap[3]
    assert (show("ActiveState"), show("NRestarts")) == ("active", "0")
    assert said("--priority=warning", "_TRANSPORT=stdout") == "" and "Traceback" not in said()
    box.run("systemctl", "stop", name)


def test_killed_comes_back_and_answers_what_it_had_accepted(running: Instance) -> None:
    restarts = int(running.show("NRestarts"))
    running.api.latency = 1.0
    execution_id = running.execute()
    running.api.wait_for(lambda api: api.in_flight >= 1)
    running.api.latency = 0.0
    running.ctl("kill", "--signal=KILL", "--kill-whom=main")
    assert running.result(execution_id)["status"] == "success"
    assert len(running.platform.results_for(execution_id)) == 1
    assert int(running.show("NRestarts")) == restarts + 1


def test_frozen_is_restarted_by_the_watchdog(running: Instance) -> None:
    restarts = int(running.show("NRestarts"))
    running.wait(lambda i: i.platform.connected)
    running.ctl("kill", "--signal=STOP", "--kill-whom=main")
    running.wait(lambda i: int(i.show("NRestarts")) == restarts + 1, what="restarted")
    assert any("Watchdog timeout" in str(entry["MESSAGE"]) for entry in running.journal("--boot"))
    running.platform.kill_connections()
    running.wait(lambda i: i.platform.connected)
    assert running.result(running.execute())["status"] == "success"


PROBE = """
import json, os, socket, sqlite3, ssl
def able(step):
    try:
        return [True, str(step())]
    except BaseException as error:
        return [False, f"{type(error).__name__}: {error}"]
def write(path):
    with open(path, "w") as file:
        file.write("x")
def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock: sock.sendto(b"", (address, 9))
def sqlite():
    db = sqlite3.connect(os.environ["STATE_DIRECTORY"] + "/probe.db")
    return db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    **{f"write {p}": able(lambda: write(p + "/probe")) for p in
       ("/etc", "/usr", "/var/lib", "/opt/stockrt", "/var", "/", "/run", "/srv", "/tmp",
        os.environ["STATE_DIRECTORY"], os.environ["CACHE_DIRECTORY"], "/var/lib/node_exporter/textfile")},
    "read /etc/shadow": able(lambda: open("/etc/shadow").read()),
    "read env file": able(lambda: open("/etc/stockrt/stockrt.env").read()),
    "list /home": able(lambda: os.listdir("/home")),
    "see others": able(lambda: open("/proc/1/cmdline").read()),
    "send to link-local": able(lambda: send("169.254.9.9")),
    "send to loopback": able(lambda: send("127.0.0.1")),
    "connect": able(lambda: socket.create_connection(("127.0.0.1", int(os.environ["SERVER_PORT"])), 5).close()),
    "resolve": able(lambda: socket.getaddrinfo("localhost", 80)[0][4]),
    "tls": able(ssl.create_default_context),
    "sqlite": able(sqlite),
    "netlink": able(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "capabilities": [any(int(status[c], 16) for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")), ""],
    "root": [os.getuid() == 0, ""],
}))
"""


def add_link_local_address(box: Box) -> None:
    """Make 169.254.9.9 an address of the box, so that nothing but the unit stands between."""
    request = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton("169.254.9.9"))
    with box.network(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFADDR, request)


def test_sandbox_holds_and_lets_the_work_through(running: Instance, box: Box) -> None:
    add_link_local_address(box)
    box.write("/srv/probe.py", PROBE)
    derive_unit(box, "stockrt-probe")
    shutil.copy(box.root / "etc/stockrt/stockrt.env", box.root / "etc/stockrt/stockrt-probe.env")
    box.write(
        "/etc/systemd/system/stockrt-probe.service.d/test.conf",
        "[Service]\nType=oneshot\nRestart=no\nExecStart=\nExecStart=/usr/bin/python3 /srv/probe.py\n"
        "WatchdogSec=0\n",
    )
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", "stockrt-probe")
    said = box.run("journalctl", "--output=cat", "--unit=stockrt-probe", "_TRANSPORT=stdout").stdout
    found = json.loads(said)
    may = {
        "write /tmp", "write /var/lib/stockrt-probe", "write /var/cache/stockrt-probe",
        "write /var/lib/node_exporter/textfile", "connect", "resolve", "tls", "sqlite",
        "send to loopback",
    }  # fmt: skip
    assert {name for name, (able, _) in found.items() if able} == may, said
    assert "Operation not permitted" in found["send to link-local"][1]


def test_no_secret_can_be_read_outside(running: Instance, box: Box) -> None:
    pid = running.show("MainPID")
    assert API_KEY not in running.ctl("show")
    assert API_KEY not in running.ctl("cat")
    environment = box.run("cat", f"/proc/{pid}/environ").stdout
    assert "CREDENTIALS_DIRECTORY" in environment and API_KEY not in environment
    assert API_KEY not in json.dumps(running.journal())


def test_masked_frames_at_debug(service: Instance) -> None:
    service.box.write(
        "/etc/systemd/system/stockrt.service.d/debug.conf", "[Service]\nEnvironment=LOG_LEVEL=debug\n"
    )
    service.box.run("systemctl", "daemon-reload")
    service.ctl("restart")
    service.wait(lambda i: i.platform.connected)
    module_hash = service.platform.registrations[-1].module_hash
    service.platform.send_text(json.dumps({"message": f"key {API_KEY} hash {module_hash}"}))
    service.wait(lambda i: any("frame received" in line and "key ***" in line for line in i.said()))
    (service.box.root / "etc/systemd/system/stockrt.service.d/debug.conf").unlink()
    service.box.run("systemctl", "daemon-reload")
    service.ctl("restart")
    service.wait(lambda i: i.platform.connected)
    assert not [line for line in service.said() if API_KEY in line or module_hash in line]


def test_reload_reads_env_file_and_credentials_anew_under_systemd(running: Instance, box: Box) -> None:
    """Files of root's that the service itself may not read; with a fault in them `systemctl reload` fails."""
    env_file, credential = "/etc/stockrt/stockrt.env", "/etc/stockrt/credentials/infoway_api_key"
    good = (box.root / env_file.lstrip("/")).read_text()
    new_key = "credential-key-2a0f"
    running.api.keys = {new_key, API_KEY}
    pid = running.show("MainPID")
    try:
        box.write(credential, new_key + "\n", 0o600)
        box.write(env_file, good + "LOG_LEVEL=debug\n", 0o600)
        reloaded = box.run("systemctl", "reload", "stockrt", check=False)
        assert reloaded.returncode == 0, running.said()[-5:]
        running.wait(lambda i: "settings read anew; changed: INFOWAY_API_KEY, LOG_LEVEL" in i.said())
        running.wait(lambda i: i.state == "active")
        assert running.result(running.execute())["status"] == "success"
        assert running.api.asked("batch_trade")[-1].key == new_key
        box.write(credential, "another-key-77\n", 0o600)
        box.write(env_file, good + "LOG_LEVEL=loud\n", 0o600)
        failed = box.run("systemctl", "reload", "stockrt", check=False)
        assert failed.returncode != 0
        assert any("LOG_LEVEL='loud'" in line for line in running.said())
        assert running.result(running.execute())["status"] == "success"
        assert running.api.asked("batch_trade")[-1].key == new_key
        assert (running.state, running.show("MainPID")) == ("active", pid)
        assert not box.run("ls", "-A", "/run/stockrt").stdout
        box.write(env_file, good + "LOG_LEVEL=debug\n", 0o600)
        running.ctl("reload")  # with a key that the API refuses
        assert running.result(running.execute())["status"] == "failure"
        running.wait(lambda i: "· 1 key, 1 out ·" in i.show("StatusText"))
    finally:
        box.write(env_file, good, 0o600)
        box.write(credential, API_KEY + "\n", 0o600)
    running.ctl("reload")
    running.wait(lambda i: i.said().count("settings read anew; changed: INFOWAY_API_KEY, LOG_LEVEL") == 2)
    assert running.result(running.execute())["status"] == "success"
    assert running.api.asked("batch_trade")[-1].key == API_KEY
    assert new_key not in json.dumps(running.journal())
    running.ctl("stop")
    assert not box.run("sh", "-c", "ls -d /run/stockrt* || true").stdout


def test_starts_after_the_clock_is_set_where_systemd_waits_for_it(service: Instance, box: Box) -> None:
    waits = "[Unit]\nWants=time-sync.target\nBefore=time-sync.target\n[Service]\nType=oneshot\nExecStart=/bin/sh -c " \
            "'until [ -e /run/clock-is-set ]; do sleep 0.1; done'\n"  # fmt: skip
    box.write("/etc/systemd/system/clock.service", waits)
    box.run("systemctl", "daemon-reload")
    service.ctl("stop")
    box.run("systemctl", "start", "--no-block", "clock.service")
    box.run("systemctl", "start", "--no-block", "stockrt")
    assert re.search(r"stockrt\.service +start +waiting", box.run("systemctl", "list-jobs").stdout)
    box.run("touch", "/run/clock-is-set")
    service.wait(lambda i: i.state == "active" and i.platform.connected)


def test_registration_by_root_does_not_lock_the_service_out(service: Instance, box: Box) -> None:
    service.ctl("stop")
    place = box.root / "var/lib/private/stockrt/module_hash"
    service.platform.forget(place.read_text().strip())
    said = box.run("env", "HOME=/root", "/opt/stockrt/stockrt.pyz", "--register", "--force").stdout
    assert "registered" in said
    assert place.stat().st_uid == place.parent.stat().st_uid != 0
    service.start()
    assert service.platform.connected == [place.read_text().strip()]


def test_status_by_hand_is_the_services_own(running: Instance, box: Box) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^sudo (/opt/.* --status)\b", readme, re.MULTILINE)
    assert found is not None
    running.result(running.execute())
    said = box.run("env", "HOME=/root", *found[1].split()).stdout
    assert re.search(r"^status +well$", said, re.MULTILINE), said
    assert re.search(r"^daemon +running", said, re.MULTILINE), said
    assert re.search(r"^API key .*ready$", said, re.MULTILINE), said
    assert re.search(r"^store +/var/lib/stockrt/stockrt.db$", said, re.MULTILINE), said


def by_hand(
    box: Box, *arguments: str, user: str = "", env: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the installed program as root, or as another user."""
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()
    home = "/tmp/another" if user else "/root"
    return box.run(*become, "env", f"HOME={home}", *env, "/opt/stockrt/stockrt.pyz", *arguments, check=False)


def test_by_hand_a_revoked_credential_is_seen_behind_a_good_key_elsewhere(
    running: Instance, box: Box
) -> None:
    """In the unit's env file and in the caller's environment; the line says which source was used."""
    place = "/etc/stockrt/credentials/infoway_api_key"
    settings = box.root / "etc/stockrt/stockrt.env"
    before = settings.read_text()
    good = by_hand(box, "--check")
    assert good.returncode == 0, good.stdout
    assert (
        f"ok    settings: from credential {place}, /etc/stockrt/stockrt.env, stockrt.service, defaults\n"
        in (good.stdout)
    )
    try:
        settings.write_text(before + f"INFOWAY_API_KEY={API_KEY}\n")
        box.write(place, "revoked-key-77\n", 0o600)
        done = by_hand(box, "--check", env=(f"INFOWAY_API_KEY={API_KEY}",))
        assert done.returncode == 1
        assert re.search(r"^FAIL  API key .*401", done.stdout, re.MULTILINE), done.stdout
        once = by_hand(box, "--once", "--codes", "TSLA.US")
        assert once.returncode == 1 and "401" in once.stderr
    finally:
        box.write(place, API_KEY + "\n", 0o600)
        settings.write_text(before)


def test_by_hand_drop_ins_count_and_what_the_service_does_not_see_is_no_ok(
    running: Instance, box: Box
) -> None:
    drop_in = box.write("/etc/systemd/system/stockrt.service.d/by-hand.conf",
                        "[Service]\nEnvironment=\"MODULE_NAME=of a drop-in\" NO_PROXY=127.0.0.1\n")  # fmt: skip
    box.run("systemctl", "daemon-reload")
    try:
        assert by_hand(box, "--check").returncode == 0
        done = by_hand(box, "--check", env=("HTTP_PROXY=http://10.1.1.1:3128", "NO_PROXY=127.0.0.1"))
        assert done.returncode == 1
        assert re.search(r"^FAIL  settings: .*not as stockrt\.service has them: HTTP_PROXY ", done.stdout)
        assert "NO_PROXY of" not in done.stdout
        own = by_hand(
            box, "--check-settings", "--env-file", "/dev/null", env=("SERVER_IP=h", "SERVER_PORT=1")
        )
        assert own.returncode == 78 and "INFOWAY_API_KEY is not set" in own.stderr
    finally:
        drop_in.unlink()
        box.run("systemctl", "daemon-reload")


def test_to_another_user_the_service_is_unknown_and_not_down(running: Instance, box: Box) -> None:
    box.run("install", "-d", "--owner=65534", "/tmp/another")
    status = by_hand(box, "--status", user="65534")
    assert status.returncode == 4
    assert "status          unknown: this user may not look at it. To do: run as root\n" in status.stdout
    assert not re.search("not running|no daemon|--register|none yet", status.stdout)
    for arguments in (("--executions",), ("--rejects",), ("--drain",), ("--drain", "--retry")):
        done = by_hand(box, *arguments, user="65534")
        assert (done.returncode, done.stdout) == (1, "") and "run as root" in done.stderr
    checked = by_hand(box, "--check", user="65534")
    assert re.search(
        r"^ok    settings: .*stockrt\.service has is not known here: run as root", checked.stdout
    )
    own = by_hand(box, "--once", "--demo", "--codes", "TSLA.US", user="65534")
    assert own.returncode == 0, own.stderr
    assert by_hand(box, "--status", user="65534", env=("STATE_DIRECTORY=/var/lib/stockrt",)).returncode == 4
    there = "/tmp/another/.local/state/stockrt"
    mine = by_hand(box, "--status", user="65534", env=(f"STATE_DIRECTORY={there}",))
    assert mine.returncode == 3 and "--once: 1 of 1 codes stored" in mine.stdout


def of_root(box: Box) -> list[str]:
    """Return what in the service's directory is root's."""
    return [
        path.name for path in (box.root / "var/lib/private/stockrt").rglob("*") if path.lstat().st_uid == 0
    ]


def test_nothing_of_roots_stays_in_the_services_directory_and_it_goes_on(running: Instance, box: Box) -> None:
    """Beside the running service, after a kill in the middle, and where root is the first to make the files."""
    state = box.root / "var/lib/private/stockrt"
    looks = (("--status",), ("--check",), ("--executions", "5"), ("--check-settings",))
    once = ("--once", "--codes", "TSLA.US", "AAPL.US")
    for arguments in (*looks, once):
        done = by_hand(box, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert of_root(box) == []
    assert running.result(running.execute())["status"] == "success"
    running.ctl("stop")
    for path in state.glob("*.db*"):
        path.unlink()
    (state / "lock").unlink()
    before = {path.name for path in state.iterdir()}
    assert [by_hand(box, *arguments).returncode for arguments in looks] == [3, 0, 0, 0]
    assert {path.name for path in state.iterdir()} == before
    asked = running.api.request_count
    running.api.latency = 5.0
    words = f"echo $$ >/srv/by-hand; exec env HOME=/root /opt/stockrt/stockrt.pyz {' '.join(once)}"
    in_box = ["nsenter", "--target", str(box.leader), "--all", "sh", "-c", words]
    killed = subprocess.Popen(in_box, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running.api.wait_for(lambda api: api.request_count > asked)
    assert of_root(box) == []
    box.run("kill", "-KILL", (box.root / "srv/by-hand").read_text().strip())
    killed.wait(15)
    running.api.latency = 0.0
    assert {"stockrt.db", "stockrt.db-wal", "stockrt.db-shm"} <= {path.name for path in state.iterdir()}
    assert of_root(box) == []
    boot = len(running.said())
    running.start()
    assert running.result(running.execute(["BRK.B.US"]))["status"] == "success"
    assert by_hand(box, *once).returncode == 0
    assert running.count() == 3
    assert of_root(box) == []
    assert not [line for line in running.said()[boot:] if "set aside" in line or "cannot" in line]
    status = by_hand(box, "--status")
    assert (status.returncode, "--once: 2 of 2 codes stored" in status.stdout) == (0, True), status.stdout


def another_version(pyz: Path, target: Path) -> None:
    """A program that is the same and unpacks itself into another directory."""
    with zipfile.ZipFile(pyz) as old, target.open("wb") as file:
        build_id = json.loads(old.read("environment.json"))["build_id"].encode()
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                data = old.read(entry)
                if entry.filename in ("environment.json", "__main__.py"):
                    assert build_id in data
                    data = data.replace(build_id, b"0" * 63 + b"1")
                new.writestr(entry, data)
    target.chmod(0o755)


def test_upgrade_under_load_loses_nothing_and_cleans_up(running: Instance, box: Box, pyz: Path) -> None:
    cache = box.root / "var/cache/private/stockrt"
    before = {path.name for path in cache.glob("stockrt.pyz_*")}
    running.api.latency = 0.2
    ids = [running.execute([f"A{n}.US", "TSLA.US"]) for n in range(12)]
    running.result(ids[0])
    another_version(pyz, box.root / "srv/stockrt/stockrt.pyz")
    pid = running.show("MainPID")
    *_, last = install(box).splitlines()  # and not what a first install needs
    assert last.endswith("until: sudo systemctl restart stockrt")
    ids += [running.execute([f"B{n}.US"]) for n in range(5)]
    running.result(ids[2])
    assert running.show("MainPID") == pid
    running.ctl("restart")
    running.wait(lambda i: i.platform.connected)
    running.api.latency = 0.0
    assert [running.result(number)["status"] for number in ids] == ["success"] * len(ids)
    after = {path.name for path in cache.glob("stockrt.pyz_*")}
    assert after == {f"stockrt.pyz_{'0' * 63}1"} and len(before) == 1 and before != after
    assert [path.name for path in cache.glob(".stockrt.pyz_*")] == [f".stockrt.pyz_{'0' * 63}1_lock"]


def test_stop_takes_the_time_that_the_daemon_asks_for(service: Instance, box: Box) -> None:
    """Where the unit gives 1 s alone. (systemd forgets what was asked for at a daemon-reload, so ours gives it.)"""
    drop_in = box.write("/etc/systemd/system/stockrt.service.d/stop.conf", "[Service]\nTimeoutStopSec=1s\n")
    box.run("systemctl", "daemon-reload")
    if service.state != "active":
        service.start()
    service.wait(lambda i: i.platform.connected)
    service.api.latency = 2.5
    execution_id = service.execute()
    service.api.wait_for(lambda api: api.in_flight == 1)
    service.ctl("stop")
    service.api.latency = 0.0
    drop_in.unlink()
    box.run("systemctl", "daemon-reload")
    assert (service.state, service.show("Result")) == ("inactive", "success")
    assert service.result(execution_id)["status"] == "success"


def test_shutdown_by_the_platform_stays_down(running: Instance) -> None:
    restarts = running.show("NRestarts")
    running.platform.shutdown_module()
    running.wait(lambda i: i.is_over)
    assert (running.state, running.show("Result"), running.show("NRestarts")) == (
        "inactive",
        "success",
        restarts,
    )


BAD_LINES = "SERVER_PORT=99999\nMONGODB_NUMERIC_TYPE=roman\nexport KEEP_DAYS=3\n"


def test_bad_settings_fail_once_with_the_reason(service: Instance, box: Box) -> None:
    good = (box.root / "etc/stockrt/stockrt.env").read_text()
    try:
        box.write("/etc/stockrt/stockrt.env", good + BAD_LINES, 0o600)
        box.write("/etc/stockrt/credentials/mongodb_host", f"mongodb://u:{MONGODB_PASSWORD}@h:0/", 0o600)
        service.ctl("stop")
        service.ctl("start", check=False)
        service.wait(lambda i: i.is_over)
        assert (service.state, service.show("ExecMainStatus"), service.show("NRestarts")) == (
            "failed",
            "78",
            "0",
        )
    finally:
        box.write("/etc/stockrt/stockrt.env", good, 0o600)
        (box.root / "etc/stockrt/credentials/mongodb_host").unlink()
    faults = [line for line in service.said() if "expected" in line and "LOG_LEVEL" not in line]
    assert [line.partition(":")[2].split("=")[0].strip() for line in faults] == [
        "MONGODB_HOST", "MONGODB_NUMERIC_TYPE", "SERVER_PORT",
    ]  # fmt: skip
    assert any(": systemd passes over the line, for more than KEEP_DAYS" in line for line in service.said())
    assert "(credential)" in faults[0] and "(environment, which stockrt.service sets)" in faults[2]
    assert MONGODB_PASSWORD not in json.dumps(service.journal())


def test_values_of_an_env_file_are_what_the_tests_of_the_settings_take_them_for(box: Box) -> None:
    names = [f"V{number}" for number in range(len(SYSTEMD_READS))]
    lines = [f"{name}{line.removeprefix('A')}" for name, line in zip(names, SYSTEMD_READS, strict=True)]
    box.write("/srv/values.env", "\n".join(lines) + "\n")
    unit = ("systemd-run", "--wait", "--pipe", "--quiet", "-p", "EnvironmentFile=/srv/values.env")
    read = dict(line.split("=", 1) for line in box.run(*unit, "env").stdout.splitlines())
    assert [read[name] for name in names] == list(SYSTEMD_READS.values())
    for content in OTHERWISE:
        box.write("/srv/values.env", content)
        read = dict(line.split("=", 1) for line in box.run(*unit, "env").stdout.splitlines())
        ours = stockrt.read_env_file(box.root / "srv/values.env")
        assert {name: read.get(name) for name in ours} != ours, content


@pytest.mark.parametrize(
    ("options", "why"), [("size=300k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_bad_cache_directory_is_one_line(box: Box, installed: str, options: str, why: str) -> None:
    drop_in = f"[Service]\nTemporaryFileSystem=/var/lib/tiny:{options},mode=1777\nEnvironment=SHIV_ROOT=/var/lib/tiny\n"
    name = f"stockrt-cache-{options[:2]}"
    derive_unit(box, name)
    box.write(f"/etc/systemd/system/{name}.service.d/test.conf", QUICK + drop_in)
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", name, check=False)
    systemd_box.until(lambda: is_over(box, name), 60, f"{name} has ended")
    said = box.run("journalctl", "--output=json", f"--unit={name}", "_TRANSPORT=stdout").stdout.splitlines()
    assert len(said) == 1, said
    entry = json.loads(said[0])
    assert entry["PRIORITY"] == "3"
    assert f"/var/lib/tiny: {why}; make room there" in entry["MESSAGE"]
    assert box.run("systemctl", "is-failed", name).stdout.strip() == "failed"


def test_stop_during_a_long_fetch_is_clean(slow_stop: tuple[Instance, str, Future[str]]) -> None:
    instance, execution_id, stopping = slow_stop
    stopping.result(120)
    assert (instance.state, instance.show("Result")) == ("inactive", "success")
    assert instance.result(execution_id)["result"]["success_count"] == 2
    assert instance.count() == 2


@pytest.mark.long  # waits for the limits of a request
def test_endless_answer_ends_by_itself(dripping: tuple[Instance, str, float]) -> None:
    """The request's own limit is 30 s; the watchdog's is 2 s here, and stays quiet."""
    instance, execution_id, began = dripping
    assert instance.result(execution_id)["status"] == "success"
    assert time.monotonic() - began > 28
    assert (instance.state, instance.show("NRestarts")) == ("active", "0")


def test_metrics_reach_the_node_exporter(dripping: tuple[Instance, str, float], box: Box) -> None:
    """Written after the execution that took 30 s, so without any wait; readable by everybody."""
    path = box.root / METRICS.lstrip("/").replace("stockrt.prom", "stockrt-drip.prom")
    label = ',instance="stockrt-drip"'
    dripping[0].wait(lambda i: f'outcome="success"{label}}} 1' in path.read_text(), 60, "metrics")
    assert path.stat().st_mode & 0o777 == 0o644
    text = path.read_text().replace(label, "").replace(f"{{{label[1:]}}}", "")
    assert "stockrt_trades_stored_total 2\n" in text
    assert 'stockrt_api_requests_total{answer="no_answer"} 1\n' in text
    assert 'stockrt_api_requests_total{answer="accept"} 1\n' in text
    assert "stockrt_platform_connected 1\n" in text


@pytest.mark.long  # the dearest of all: a second boot
def test_runs_again_after_a_reboot(service: Instance, box: Box) -> None:
    service.start()
    service.ctl("enable")
    known = service.platform.registrations[-1].module_hash
    address = service.platform.port, service.api.port
    service.platform.stop()
    service.api.stop()
    box.reboot()
    with box.network():
        service.platform = PlatformServer(port=address[0], zombies=False).start()
        service.platform.know(known)
        service.api.start()
    service.wait(lambda i: i.platform.connected)
    assert service.state == "active"
    assert service.result(service.execute())["status"] == "success"


def test_commands_by_hand_run_as_they_stand(running: Instance, box: Box) -> None:
    """Those of the README that no other test here runs, without their sudo."""
    shown = {
        "systemctl status stockrt": "Active: active (running)",
        "/opt/stockrt/stockrt.pyz --check": "ok    settings: ",
        "/opt/stockrt/stockrt.pyz --help": "--codes",
        "journalctl -u stockrt -n 100": "connected to 127.0.0.1:",
        "journalctl -u stockrt -p warning": "",
    }
    readme = (ROOT / "README.md").read_text("utf-8")
    for command, words in shown.items():
        assert command in readme
        assert words in box.run(*command.split()).stdout


def as_the_readme_says(box: Box, heading: str) -> list[str]:
    """Return the commands of a section, as the box's root types them in the clone."""
    section = (ROOT / "README.md").read_text("utf-8").partition(f"\n### {heading}\n")[2]
    block = section.partition("```sh\n")[2].partition("```")[0]
    return [
        re.sub(r"\s+#.*", "", line).replace("sudo ", "").replace("./build_pyz.sh && ", "")
        for line in block.splitlines()
    ]


def test_backed_up_and_moved_to_another_machine_it_is_the_same_module(running: Instance, box: Box) -> None:
    """The commands of the README; the other machine is this one without a trace of ours."""
    running.result(running.execute())
    known, stored = running.platform.connected, running.count()
    kept = "/root/stockrt.tar.gz"

    def type_(*commands: str) -> None:
        for command in commands:
            box.run("/bin/bash", "-c", f"cd /srv/stockrt && {command}")

    type_(*as_the_readme_says(box, "Back-up"))
    running.wait(lambda i: i.platform.connected == known, what="connected again after the back-up")
    assert box.run("stat", "-c", "%a", kept).stdout.strip() == "600"
    type_(f"rm {kept}")
    moving = as_the_readme_says(box, "Moving to another machine")
    there = next(number for number, line in enumerate(moving) if line == "./build_pyz.sh install")
    type_(*moving[:there])
    assert running.state == "inactive"
    install(box, "uninstall")
    type_("rm -r /etc/stockrt /var/lib/private /var/lib/stockrt")
    registered = len(running.platform.register_calls)
    type_(*moving[there:])
    running.wait(lambda i: i.platform.connected == known, what="connected on the other machine")
    assert len(running.platform.register_calls) == registered
    assert running.count() == stored > 0
    assert running.result(running.execute())["status"] == "success"
    assert box.run("stat", "-c", "%a", "/var/lib/private").stdout.strip() == "700"


def test_uninstall_keeps_configuration_and_state(running: Instance, box: Box) -> None:
    said = install(box, "uninstall")
    assert running.state == "inactive"
    for path in ("opt/stockrt", "etc/systemd/system/stockrt.service", "var/cache/private/stockrt"):
        assert not (box.root / path).exists()
    for path in ("etc/stockrt/stockrt.env", "var/lib/private/stockrt/stockrt.db"):
        assert (box.root / path).exists()
    assert "kept    /etc/stockrt\n" in said and "kept    /var/lib/private/stockrt\n" in said
