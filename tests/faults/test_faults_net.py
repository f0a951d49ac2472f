"""Fault 9: names that nobody resolves, addresses that swallow packets; a replica set that is found by name."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeWorld, unavailable
from kit.daemons import PATIENCE, number, until
from kit.fault_world import QUICK, ServiceManager, World, balanced, elect_under_load, proc_status
from kit.infoway_server import Answer, Request
from kit.mongo import SET_NAME, ReplicaSet
from kit.mongo_proxy import MongoProxy
from kit.name_server import ZONE, NameServer, NoNamespace

# What systemd gives the service in these tests, in seconds; longer than any name takes to fail there.
WATCHDOG_S = 10.0


@pytest.fixture
def name_server() -> Iterator[NameServer]:
    """A DNS server that answers."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(NameServer())
        except NoNamespace as error:
            unavailable(str(error))
        yield server


@pytest.fixture
def wrapper(name_server: NameServer, tmp_path: Path) -> tuple[str, ...]:
    """The words in front of a command that asks this server alone."""
    try:
        return name_server.wrapper(tmp_path)
    except NoNamespace as error:
        unavailable(str(error))


@contextlib.contextmanager
def swallowed(port: int) -> Iterator[None]:
    """Let a port take no more connections and refuse none: its queue is full, the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hole.bind(("127.0.0.1", port))
        hole.listen(0)
        for _ in range(3):  # more than the queue takes; the last one hangs
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        probe = stack.enter_context(socket.socket())
        probe.settimeout(0.3)
        with pytest.raises(TimeoutError):
            probe.connect(("127.0.0.1", port))
        yield


def _works(world: World) -> None:
    """Wait for a command that ends as it should, all of it in MongoDB."""

    def done() -> bool:
        told = world.result(world.send(10)).data["result"]
        return bool(told["success_count"] == 10)

    assert until(done, 2 * PATIENCE), world.daemon.log[-3000:]


@pytest.mark.long  # waits for name servers that do not answer
def test_names_that_nobody_resolves_are_said_and_survived(
    make_world: MakeWorld,
    mongo_proxy: MongoProxy,
    name_server: NameServer,
    wrapper: tuple[str, ...],
    manager: ServiceManager,
) -> None:
    rounds = number(1, 10)
    world = make_world(
        f"mongodb://db.{ZONE}:{mongo_proxy.port}/{QUICK}&directConnection=true",
        wrapper,
        SERVER_IP=f"platform.{ZONE}",
        INFOWAY_API_BASE_URL=f"http://api.{ZONE}:{{api}}",
        **manager.settings(WATCHDOG_S),
    )
    world.start()
    _works(world)
    for _ in range(rounds):
        name_server.answers = False
        mongo_proxy.cut()
        told = world.result(world.send(10))
        assert told.data["result"]["kept_count"] == 10, told.text
        world.infoway.stop()
        world.infoway.start()
        told = world.result(world.send(10), 2 * PATIENCE)
        assert told.data["result"]["failed_count"] == 10, told.text
        said = len(world.daemon.log)
        world.platform.kill_connections()
        assert until(lambda: "cannot connect" in world.daemon.log[said:]), world.daemon.log[-3000:]  # noqa: B023
        name_server.answers = True
        world.connected()
        _works(world)
    balanced("dns", rounds, world.final_account(), world.daemon.log)
    assert {f"platform.{ZONE} A", f"api.{ZONE} A", f"db.{ZONE} A"} <= set(name_server.asked)
    assert manager.longest_silence() < WATCHDOG_S
    assert "Traceback" not in world.daemon.log


@pytest.mark.parametrize("whose", ["platform", pytest.param("api", marks=pytest.mark.long), "mongodb"])
def test_an_address_that_swallows_packets_is_said_and_survived(
    whose: str, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(1, 5)
    world = make_world(mongo_proxy.uri + QUICK)
    world.start()
    _works(world)
    for _ in range(rounds):
        said = len(world.daemon.log)
        if whose == "platform":
            world.platform.stop()
            with swallowed(world.platform.port):
                assert until(lambda: "no answer in time" in world.daemon.log[said:]), world.daemon.log[said:]  # noqa: B023
            world.platform.start()
            world.connected()
        elif whose == "api":
            world.infoway.stop()
            with swallowed(world.infoway.port):
                told = world.result(world.send(10), 4 * PATIENCE)
                assert told.data["result"]["failed_count"] == 10, told.text
            world.infoway.start()
        else:
            mongo_proxy.down()
            with swallowed(mongo_proxy.port):
                for _ in range(3):
                    told = world.result(world.send(10))
                    assert told.data["result"]["kept_count"] == 10, told.text
            mongo_proxy.up()
        _works(world)
    balanced("packets", rounds, world.final_account(), world.daemon.log)


def test_a_connection_to_the_platform_that_dies_in_silence_is_noticed(
    make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(1, 10)
    world = make_world(mongo_proxy.uri + QUICK, HEARTBEAT_INTERVAL="1")
    world.start()
    for _ in range(rounds):
        _works(world)
        dials = len(world.platform.dials)
        said = len(world.daemon.log)
        world.platform.freeze()
        try:
            assert until(lambda: "nothing came for" in world.daemon.log[said:]), world.daemon.log[-3000:]  # noqa: B023
        finally:
            world.platform.thaw()
        assert world.platform.wait_for(lambda p, n=dials: len(p.dials) > n and p.connected, PATIENCE)  # type: ignore[misc]
    balanced("silence", rounds, world.final_account(), world.daemon.log)


def test_a_replica_set_behind_an_srv_record_survives_elections(
    make_world: MakeWorld,
    replica_set: ReplicaSet,
    replica_db: tuple[str, str],
    name_server: NameServer,
    wrapper: tuple[str, ...],
) -> None:
    rounds = number(4, 50, quick=1)
    ports = {letter: member.proxy.port for letter, member in zip("abc", replica_set.members, strict=True)}
    name_server.records[(f"_mongodb._tcp.db.{ZONE}", "SRV")] = [
        f"0 0 {port} {letter}.{ZONE}." for letter, port in ports.items()
    ]
    name_server.records[(f"db.{ZONE}", "TXT")] = [f'"replicaSet={SET_NAME}"']
    world = make_world(f"mongodb+srv://db.{ZONE}/?tls=false&timeoutMS=4000", wrapper, None, replica_db)
    world.start()
    elect_under_load(world, replica_set, rounds)
    balanced("election_srv", rounds, world.final_account(), world.daemon.log)
    assert f"_mongodb._tcp.db.{ZONE} SRV" in name_server.asked


def test_a_ping_is_answered_while_four_answers_of_16_megabytes_come(make_world: MakeWorld) -> None:
    world = make_world()
    held = threading.Event()

    def held_back(request: Request) -> float:
        held.wait(PATIENCE)
        return 0.0

    world.start()
    world.infoway.latency = 0.3  # so that it asks several at a time from now on
    world.result(world.send(200))
    before = proc_status(world.daemon.pid, "VmHWM")
    record = {"s": "NOBODY.US", "t": 1, "p": "1", "v": "1", "vw": "1", "td": 0}
    huge = Answer.data([record] * ((16 << 20) // len(json.dumps(record))))
    world.feed.trouble = lambda: huge
    world.infoway.latency = held_back
    execution_id = world.send(1000)
    world.infoway.wait_for(lambda api: api.in_flight >= 4, PATIENCE)
    with world.pinged(number(3.0, 1.0), every_s=0.02):
        assert world.platform.wait_for(lambda p: len(p.pings) > 5, PATIENCE)
        held.set()
        told = world.result(execution_id)
    assert "more than 1 MiB" in told.text, told.text[:2000]
    assert proc_status(world.daemon.pid, "VmHWM") - before < 64 * 1024
    world.feed.trouble = lambda: None
    world.infoway.latency = 0.0
    assert world.result(world.send(200)).status == "success"
    world.stop()
