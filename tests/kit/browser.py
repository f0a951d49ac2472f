"""A headless Chromium, driven over its DevTools protocol: opens a page, clicks, types, hears its complaints."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import websocket

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# For whatever it is asked; long, because a busy machine is slow, not wrong.
PATIENCE = 60.0


class NoBrowser(Exception):
    """There is none on this machine."""


def find_browser() -> str:
    """Return the program. Raises NoBrowser."""
    for name in PROGRAMS:
        found = shutil.which(name)
        if found:
            return found
    raise NoBrowser("no Chromium: install chromium")


class Browser:
    """One browser with one page; `complaints` are its console's errors and warnings, `asked` every URL it loaded."""

    def __init__(self, folder: Path) -> None:
        self._profile = folder / "profile"
        command = [
            find_browser(), "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={self._profile}",
            "--no-sandbox", "about:blank",  # root and most containers have none, and the page is our own
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._number = 0
        self.complaints: list[str] = []
        self.asked: list[str] = []
        try:
            self._socket = websocket.create_connection(self._address(), timeout=PATIENCE)
        except BaseException:
            self.close()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _address(self) -> str:
        """Return the page's own address, once the browser has written where it listens."""
        told = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE
        while not told.exists() or len(told.read_text().splitlines()) < 2:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError(f"the browser did not start: {self._process.poll()}")
            time.sleep(0.02)
        port = told.read_text().splitlines()[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
            pages = [one for one in json.load(answer) if one["type"] == "page"]
        return str(pages[0]["webSocketDebuggerUrl"])

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(told["args"]))
        elif message.get("method") == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    def open(self, url: str, language: str = "en-US", width: int = 1100, dark: bool = False) -> None:
        """Open a page as a reader of this language with a screen of this width does; returns when it is loaded."""
        self.call("Emulation.setUserAgentOverride", userAgent="Chromium", acceptLanguage=language)
        self.look(width, dark)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while self.tell("document.readyState === 'complete' && location.href !== 'about:blank'") is not True:
            assert time.monotonic() < deadline, url
            time.sleep(0.02)

    def look(self, width: int = 1100, dark: bool = False, media: str = "screen") -> None:
        """Have the page shown on such a screen, or printed."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def tell(self, expression: str) -> Any:
        """Return what an expression is on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.tell(f"{element}.scrollIntoView({{block: 'center'}})")
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        place = self.tell(f"({middle})({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def press(self, key: str, code: int) -> None:
        """Press a key, such as Enter (13)."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        """Keep a picture of what is shown, the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 2500), "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))
