"""Runs a prepared folder in onnxruntime-web inside headless Chromium; needs Chromium and the npm package. `run_web.py MATERIAL OUT NODE_MODULES`.

A local server hands the page, the npm package and the folder to the browser; the page posts its answers back. No driver program is needed.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from pathlib import Path

from reading import write_runtime

PAGES = Path(__file__).parent / "web"
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SILENCE_S = 600  # one case of 1,000 frames of 224x224 takes about a minute of one core
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /material, /packages and the page's files, POST answers; `server` holds the folders and the events."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms per answer

    def do_GET(self):
        self.server.heard.set()
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        _, top, *rest = urllib.parse.unquote(url.path).split("/")
        folders = {"material": self.server.material, "packages": self.server.packages, "page": PAGES}
        path = folders.get(top, PAGES).joinpath(*rest)
        if ".." in rest or not path.is_file():
            self._answer(404, b"no such file", "text/plain")
            return
        offset = int(query.get("offset", ["0"])[0])
        length = int(query.get("length", [str(path.stat().st_size - offset)])[0])
        with path.open("rb") as file:
            file.seek(offset)
            self._answer(200, file.read(length), TYPES.get(path.suffix, "application/octet-stream"))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        top, *rest = self.path.strip("/").split("/")
        if top == "answers" and ".." not in rest:
            path = self.server.out.joinpath(*rest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        elif top in {"done", "failed"}:
            self.server.outcome = top, body.decode()
        self._answer(200, b"", "text/plain")
        self.server.heard.set()

    def _answer(self, code, body, kind):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet: a request per frame."""


def find_browser():
    """Path of a Chromium; EDGE_DKM_CHROMIUM names another one."""
    named = os.environ.get("EDGE_DKM_CHROMIUM")
    found = [path for path in map(shutil.which, [named] if named else BROWSERS) if path]
    if not found:
        sys.exit(f"no Chromium found ({named or BROWSERS}); apt install chromium, or name it: EDGE_DKM_CHROMIUM=/path")
    return found[0]


def wait_for_outcome(server, browser):
    """The page's last word; ends where the browser dies or says nothing for long."""
    while server.outcome is None:
        heard = server.heard.wait(SILENCE_S)
        server.heard.clear()
        if browser.poll() is not None and server.outcome is None:
            sys.exit(f"the browser ended with exit code {browser.returncode} before the page was done")
        if not heard:
            sys.exit(f"the page said nothing for {SILENCE_S} s")
    return server.outcome


def watch(server, browser):
    """Wakes the waiting thread when the browser ends."""
    browser.wait()
    server.heard.set()


def main(material, out, packages):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.material, server.out, server.packages = Path(material), Path(out), Path(packages)
    server.heard, server.outcome = threading.Event(), None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find_browser(), *FLAGS, *sandbox, "--user-data-dir=" + profile]
        address = f"http://127.0.0.1:{server.server_address[1]}/page/page.html"
        with Path(profile, "stderr").open("wb") as noise:
            browser = subprocess.Popen([*command, address], stdout=noise, stderr=noise)
        threading.Thread(target=watch, args=(server, browser), daemon=True).start()
        try:
            word, text = wait_for_outcome(server, browser)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    if word == "failed":
        sys.exit("the page failed: " + text)
    about = json.loads(text)
    write_runtime(out, about.pop("runtime"), about.pop("version"), **about)


if __name__ == "__main__":
    main(*sys.argv[1:])
