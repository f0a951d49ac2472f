"""Why a code failed: every failure has its kind from where it arises, whatever its words are."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import RunPyz
from kit.infoway_server import REFUSALS, Answer, InfowayServer
from kit.ledger import NoLedger

import stockrt
from stockrt import (
    Batch,
    BatchAttempt,
    Collector,
    Failure,
    FailureKind,
    HttpConnection,
    InfowayApi,
    Keeper,
    KeyPool,
    Lease,
    Outcome,
    Plan,
    Report,
    SqliteStore,
    load_settings,
    open_store_file,
)

NO_LIMIT = Plan("0", 0, 0)
CODES = ("AAPL.US", "MSFT.US")


@pytest.fixture
def infoway() -> Iterator[InfowayServer]:
    with InfowayServer() as server:
        yield server


class Hasty(random.Random):
    """Draws the least each time: back-off without waiting."""

    def uniform(self, a: float, b: float) -> float:
        return a


class KnowsNothing:
    """A source to which every code is unknown."""

    def fetch(self, batches: Iterable[Batch], stop: threading.Event) -> Iterator[Outcome | None]:
        """Yield what became of each batch."""
        return (Outcome(batch, unknown=batch.split()) for batch in batches)

    def close(self) -> None:
        """Nothing is open."""


def test_codes_that_failed_for_one_reason_share_its_words(tmp_path: Path) -> None:
    """Of a hundred thousand codes they would take 23 MB."""
    codes = [f"A{number}.US" for number in range(300)]
    with open_store_file(tmp_path) as file:
        report = Collector(KnowsNothing(), SqliteStore(file), Keeper()).run(codes, threading.Event())
    assert len(report.failures) == 300
    assert len({id(failure.words) for failure in report.failures.values()}) == 1


class RawServer:
    """Answers every request with the same bytes, which need be no HTTP, and closes the connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(self._answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # or what is still to be read would become a reset
                        pass

    def close(self) -> None:
        """Listen no longer."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)


def collect(url: str, folder: Path, codes: Sequence[str] = CODES, ledger: NoLedger | None = None) -> Report:
    """Run a collection against whatever listens there, as often tried as it is, but without waiting."""
    pool = KeyPool([("test-key", NO_LIMIT)], ledger or NoLedger())
    with (
        contextlib.closing(InfowayApi(url, pool, rng=Hasty())) as api,
        open_store_file(folder) as file,
    ):
        return Collector(api, SqliteStore(file), Keeper()).run(codes, threading.Event())


def kinds(report: Report) -> set[FailureKind]:
    """Return the kinds of the failures, of which there is one for each code."""
    assert report.failures.keys() == set(CODES)
    assert all(failure.words for failure in report.failures.values())
    return {failure.kind for failure in report.failures.values()}


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"",
    ],
    ids=["no HTTP", "no status", "a long line", "many lines", "no gzip", "cut", "no chunk", "nothing"],
)
def test_what_is_no_whole_http_is_the_networks_fault(answer: bytes, tmp_path: Path) -> None:
    """However Python words it: it is said as a trouble by its kind."""
    with contextlib.closing(RawServer(answer)) as server:
        assert kinds(collect(server.url, tmp_path)) == {FailureKind.NETWORK}


def test_a_server_that_is_away_is_the_networks_fault(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert kinds(collect(url, tmp_path)) == {FailureKind.NETWORK}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (REFUSALS["ret_505"], FailureKind.API),
        (REFUSALS["404_problem"], FailureKind.API),
        (REFUSALS["503_html"], FailureKind.API),
        (REFUSALS["ret_500"], FailureKind.API),
        (Answer.empty(302), FailureKind.API),
        (Answer.html(200), FailureKind.API),
        (Answer.data(7), FailureKind.API),
        (Answer.huge(stockrt.MAX_ANSWER_BYTES + 1), FailureKind.API),
        (REFUSALS["401_token_invalid"], FailureKind.KEY),
        (REFUSALS["ret_502"], FailureKind.KEY),
        (REFUSALS["ret_514"], FailureKind.KEY),
        (Answer.json({"ret": 500, "msg": "Apikey not exists"}), FailureKind.KEY),
        (Answer.json({"ret": 500, "msg": "No permission for it"}), FailureKind.KEY),
        (REFUSALS["ret_508"], FailureKind.UNKNOWN_CODE),
        (Answer.data(None), FailureKind.UNKNOWN_CODE),
        (Answer.rewritten(lambda _, records: [one | {"p": "x"} for one in records]), FailureKind.BAD_RECORD),
    ],
)
def test_what_the_api_answers_has_its_kind(
    infoway: InfowayServer, tmp_path: Path, answer: Answer, kind: FailureKind
) -> None:
    infoway.script = lambda _: answer
    assert kinds(collect(infoway.url, tmp_path)) == {kind}


def test_a_fault_of_this_program_is_nobody_elses(infoway: InfowayServer, tmp_path: Path) -> None:
    class Faulty(NoLedger):
        def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
            raise KeyError(digest)

    report = collect(infoway.url, tmp_path, ledger=Faulty())
    assert kinds(report) == {FailureKind.OTHER}
    assert infoway.request_count == 0


@pytest.mark.parametrize("code", ["AAPL", "../../x", "", "X.XX", "12", "1.5.SH"])
def test_a_code_that_cannot_be_asked_for_is_invalid(
    infoway: InfowayServer, tmp_path: Path, code: str
) -> None:
    report = collect(infoway.url, tmp_path, (code,))
    (failure,) = report.failures.values()
    assert failure.kind is FailureKind.INVALID_CODE
    assert (report.total, infoway.request_count) == (1, 0)


def test_what_the_store_does_not_take_is_its_fault_and_no_more_is_asked_for(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    """Fetched and not stored, or not asked for at all: for the operator the same thing to mend."""
    environ = {"MONGODB_HOST": "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100&timeoutMS=100"}
    settings = load_settings(environ, None, (), is_root=False).settings
    pool = KeyPool([("test-key", Plan("x", 20, 0))], NoLedger())
    codes = [f"A{number}.US" for number in range(1500)]
    with (
        contextlib.closing(InfowayApi(infoway.url, pool)) as api,
        contextlib.closing(stockrt.MongoStore(settings)) as store,
    ):
        report = Collector(api, store, Keeper()).run(codes, threading.Event())
    assert {kind for kind, _ in report.failures.values()} == {FailureKind.STORE}
    words = {words.partition(":")[0] for _, words in report.failures.values()}
    assert words == {"fetched, not stored", "not asked for"}
    assert report.failures.keys() == set(codes)


def test_a_batch_that_was_stopped_is_interrupted_and_nothing_is_said_of_its_codes(
    infoway: InfowayServer,
) -> None:
    stop = threading.Event()
    stop.set()
    batch = Batch("stock", ",".join(CODES))
    with (
        contextlib.closing(InfowayApi(infoway.url, KeyPool([("test-key", NO_LIMIT)], NoLedger()))) as api,
        contextlib.closing(HttpConnection(infoway.url)) as connection,
    ):
        outcome = api.ask(connection, BatchAttempt(batch, stop, Hasty()))
    assert outcome == stockrt.Outcome(batch, interrupted=True)
    assert not (outcome.trades or outcome.unknown or outcome.failures)
    assert infoway.request_count == 0


# ------------------------------------------------------------------------------------------------------
# A report that is still written
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def growing() -> Iterator[Report]:
    """Give a report into which another thread writes failures as long as the test takes."""
    report, stop = Report(total=10**9), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            report.failures[f"A{number}.US"] = Failure(FailureKind.NETWORK, "the words")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=write)
    thread.start()
    yield report
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


def test_an_interrupted_run_tells_what_it_has_while_another_thread_writes(
    growing: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many failures as its summary says, however many there are by then."""
    while len(growing.failures) < 1000:
        assert not threading.Event().wait(0.001)
    settings = load_settings({"STATE_DIRECTORY": str(tmp_path)}, None, (), is_root=False).settings
    assert (
        stockrt._close_run(growing.as_of_now(), finished=False, settings=settings) == stockrt.EXIT_INTERRUPTED
    )
    summary, *failures = capsys.readouterr().err.splitlines()
    ((codes, words),) = [line.split(": ") for line in failures]  # those of one reason are one line
    failed = len(codes.split(","))
    assert failed >= 1000 and words == "the words"
    assert f"failed {failed} " in summary


def test_odd_headers_of_an_answer_are_no_lines_of_a_library(start_pyz: RunPyz, tmp_path: Path) -> None:
    """It would say them of each answer, for months, with a traceback."""
    body = b'{"ret": 500, "msg": "System error", "data": null}'
    length = b"Content-Length: %d" % len(body)

    def run(name: str, odd: bytes) -> subprocess.CompletedProcess[str]:
        server = RawServer(b"\r\n".join([b"HTTP/1.1 200 OK", length, odd, b"", body]))
        env = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": server.url, "INFOWAY_PLAN": "0"}
        done = start_pyz("--once", "--codes", "AAPL.US", env=env | {"STATE_DIRECTORY": str(tmp_path / name)})
        server.close()
        return done

    odd = {"none": b"no colon here", "two": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"}
    with ThreadPoolExecutor(2) as pool:  # each waits between its tries
        runs = [*pool.map(run, odd, odd.values())]
    for done in runs:
        assert done.returncode == 1 and "AAPL.US: " in done.stderr
        assert "Traceback" not in done.stderr and "WARNING" not in done.stderr, done.stderr
