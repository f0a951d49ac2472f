"""The stream and its REST side as a process that is told what to push: for measuring clients.

    python tests/bench/quick_stream.py [PLAN]    # prints both URLs, ends when its input does

Lines of its input, each answered by a line when it is done: `wait CODES` until so many are subscribed (their number of
connections) · `rate N` trades a second of each code from now on (0) · `burst N` as fast as the sockets take them, all
made before (when the first one was pushed, by the clock that all processes of a machine share).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a program
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.infoway_server import PLANS
from kit.stream_server import StreamServer, Vendor

KEY = "test-key"


class Feed:
    """Such a process; `close` ends it."""

    def __init__(self, plan: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-B", __file__, *filter(None, [plan])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.url, self.rest = self._line(), self._line()

    @property
    def settings(self) -> dict[str, str]:
        """The settings of who collects from it."""
        return {"INFOWAY_API_KEY": KEY, "INFOWAY_STREAM_URL": self.url, "INFOWAY_API_BASE_URL": self.rest}

    def wait(self, codes: int) -> int:
        """Wait until so many codes are subscribed, and return on how many connections."""
        return int(self._ask(f"wait {codes}"))

    def rate(self, rate: float) -> None:
        """Let each code trade so often in a second."""
        self._ask(f"rate {rate}")

    def burst(self, count: int) -> float:
        """Push so many trades, and return when that began (time.monotonic())."""
        return float(self._ask(f"burst {count}"))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the stream's process has ended")
        return line


def _do(stream: StreamServer, action: str, number: float) -> str:
    if action == "wait":
        stream.wait_for(lambda it: len(it.subscribed) >= number)
        return str(len(stream.open))
    if action == "rate":
        stream.rate = number
        return "0"
    return str(stream.burst(int(number)))


def main() -> None:
    """Serve until the input ends."""
    plans = {KEY: PLANS[sys.argv[1]]} if sys.argv[1:] else {}
    # a bare loop sends no heartbeats
    with Vendor(keys={KEY}, plans=plans, heartbeat_s=86_400.0, rest={"record": False}) as vendor:
        print(vendor.stream.url, vendor.rest.url, sep="\n", flush=True)
        for line in sys.stdin:
            action, number = line.split()
            print(_do(vendor.stream, action, float(number)), flush=True)


if __name__ == "__main__":
    main()
