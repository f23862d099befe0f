"""Open every page of the built site in headless Chromium, and say what a reader would see broken.

Usage: ``mkdocs build``, then ``python docs/check_in_browser.py site --screenshots DIR``. Each page is opened at two
widths, in light and in dark. A fault is a line of text: sideways scroll, cut code, a missing picture, a formula that
MathJax could not set, an error in the console, a request to another server, text that is hard to read, or a search
without results. The exit code is 1 if there is a fault.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import websocket

PROBES = Path(__file__).with_name("check_in_browser.js")
WIDTHS = (1400, 390)
#: What a reader prefers, and what the theme calls it.
SCHEMES = {"light": "default", "dark": "slate"}
#: Words that a reader may look for. Each stands on some page.
QUERIES = ("epistemic", "horseshoe", "save a posterior", "k-hat")
#: How long a page may take, in seconds.
PATIENCE = 30.0


def chromium() -> str | None:
    """Path of Chromium or Chrome on this machine, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome"))
    return next(filter(None, found), None)


class Browser:
    """One page of a headless browser, steered over the DevTools protocol."""

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.events: list[dict] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Result of a command. Events that arrive before it are kept in ``events``."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def run(self, script: str):
        """Value of a JavaScript expression. A promise is awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait_for(self, script: str) -> bool:
        """Whether an expression becomes true in time."""
        end = time.monotonic() + PATIENCE
        while not (value := bool(self.run(script))) and time.monotonic() < end:
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        """Go to a page, and wait until its scripts, pictures and formulas are there."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        here = f"document.readyState === 'complete' && location.href === {json.dumps(url)}"
        if not self.wait_for(here):
            raise RuntimeError(f"{url} did not load within {PATIENCE} s")
        self.run("window.MathJax?.startup?.promise")

    def look(self, width: int, scheme: str) -> None:
        """Set the width of the window, and whether the reader prefers light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        command = [str(chromium()), *flags, "--no-first-run", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file, end = Path(profile, "DevToolsActivePort"), time.monotonic() + PATIENCE
            while not (port_file.exists() and port_file.read_text().count("\n")):
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"{command[0]} did not start")
                time.sleep(0.05)
            port = port_file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = json.load(answer)
            yield Browser(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
        finally:
            process.terminate()
            process.wait()


class Silent(http.server.SimpleHTTPRequestHandler):
    """A server of files that writes no log."""

    def log_message(self, *args) -> None:
        """Say nothing."""


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """Address under which a folder is served, on this machine only."""
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def errors(events: list[dict], address: str) -> Iterator[str]:
    """What the browser complained about, and what it asked another server for."""
    for event in events:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield f"error in a script: {details.get('exception', {}).get('description', details['text'])}"
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                yield f"error in the console: {[a.get('value', a.get('description')) for a in params['args']]}"
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                yield f"error in the console: {params['entry']['text']} {params['entry'].get('url', '')}"
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith((address, "data:", "blob:")):
                    yield f"request to another server: {url}"


def check_page(page: Browser, address: str, name: str, screenshots: Path | None) -> list[str]:
    """Faults of one page at every width and in both schemes."""
    faults = []
    for width in WIDTHS:
        page.look(width, "light")
        page.open(f"{address}/{name}")
        for scheme in SCHEMES:
            page.look(width, scheme)
            page.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)))")
            where = f"{name}, {width} px, {scheme}"
            found = [*page.run(PROBES.read_text("utf-8")), *errors(page.events, address)]
            if page.run("document.body.dataset.mdColorScheme") not in (None, SCHEMES[scheme]):
                found.append(f"the page does not follow a reader who prefers {scheme}")
            faults += [f"{where}: {fault}" for fault in dict.fromkeys(found)]
            page.events.clear()
            if screenshots is not None:
                page.picture(screenshots / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png")
    return faults


def check_search(page: Browser, address: str) -> list[str]:
    """Queries that give no result."""
    faults = []
    for query in QUERIES:
        page.look(WIDTHS[0], "light")
        page.open(f"{address}/index.html")
        page.run("document.querySelector('.md-search__input').focus()")
        page.call("Input.insertText", text=query)
        if not page.wait_for("document.querySelectorAll('.md-search-result__item a').length"):
            faults.append(f"index.html: the search for {query!r} gives nothing")
    return faults


def check(site: Path, screenshots: Path | None = None, *, search: bool = True) -> list[str]:
    """Faults of all pages of a built site.

    Args:
        site: Folder that ``mkdocs build`` wrote.
        screenshots: Folder for one PNG per page, width and scheme.
        search: Whether to try the search as well.

    Raises:
        FileNotFoundError: If the folder holds no page.
    """
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    if not names:
        raise FileNotFoundError(f"{site} holds no HTML page: run mkdocs build")
    with server(site) as address, browser() as page:
        faults = [fault for name in names for fault in check_page(page, address, name, screenshots)]
        return faults + (check_search(page, address) if search else [])


def main() -> int:
    """Print each fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder that mkdocs build wrote")
    parser.add_argument("--screenshots", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    if chromium() is None:
        sys.stderr.write("Chromium was not found: apt-get install chromium\n")
        return 2
    faults = check(options.site, options.screenshots)
    sys.stdout.write("\n".join([*faults, f"{len(faults)} faults"]) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
