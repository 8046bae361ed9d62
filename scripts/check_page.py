"""Open pages in a real browser and check what a reader would meet.

    python scripts/check_page.py PAGE.html... [--pictures DIR] [--browser PATH]

Every page is opened in headless Chromium, over its DevTools protocol: in light, in dark, and at the width of a phone.
Found are: messages on the console and exceptions, requests that leave the page, text below the contrast of WCAG 2 AA,
pages wider than their window, drawings and controls without a name, ids given twice, controls that the Tab key does
not reach or that show no focus, tables that Enter does not sort, and downloads that are empty. `--pictures` keeps a
screenshot of the whole page in each of the three. The browser may reach nothing: it runs behind a proxy that is not
there.

Prints one JSON object: {"status": "passed" | "failed" | "skipped", ...}. Exit 0: nothing found, or no browser on this
machine, with the reason. Exit 1: something found. Exit 2: no such page.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = {
    "light": (1280, 900, "light"),
    "dark": (1280, 900, "dark"),
    "phone": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
"""Name -> window width, height and colour scheme."""


def find_browser(asked: str | None = None) -> str | None:
    """Path of a Chromium; None without one."""
    return next((path for name in ([asked] if asked else BROWSERS) if (path := shutil.which(name))), None)


class Browser:
    """Chromium, spoken to over two pipes: one JSON message a NUL byte."""

    def __init__(self, path: str, profile: Path) -> None:
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()

        def wire() -> None:  # the browser reads file 3 and writes file 4
            high_in, high_out = os.dup(to_browser), os.dup(from_browser)
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        command = [
            path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9",
            "--proxy-bypass-list=<-loopback>", "--disable-background-networking", "--disable-component-update",
            "--no-first-run", "--font-render-hinting=none", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come in between are kept. RuntimeError when it fails."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "session") and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._in.read(1 << 16)
            if not piece:
                raise RuntimeError("the browser ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """One key, down and up, as a person would."""
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key,
                      windowsVirtualKeyCode=code, **more)  # fmt: skip

    def open(self, page: Path) -> None:
        """Load a page and wait until it stands still."""
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + 60
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            if time.monotonic() > until:
                raise RuntimeError(f"{page} did not load in a minute")
            time.sleep(0.02)
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def close(self) -> None:
        """End the browser and everything it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._in.close()
        self._out.close()


@contextmanager
def browser(path: str) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    with tempfile.TemporaryDirectory(prefix="check-page-", ignore_cleanup_errors=True) as profile:
        opened = Browser(path, Path(profile))
        try:
            for domain in ("Page", "Runtime", "Network", "Log"):
                opened.call(f"{domain}.enable")
            opened.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=profile, eventsEnabled=True)
            opened.downloads = Path(profile)  # type: ignore[attr-defined]
            yield opened
        finally:
            opened.close()


CHECKS = r"""
(() => {
  const found = [];
  const say = (what, element) => found.push(`${what}: ${where(element)}`);
  const where = (e) => {
    const text = (e.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40);
    return `<${e.tagName.toLowerCase()} ${e.getAttribute("class") || ""}> ${text}`;
  };
  // Colours as numbers, composited: the canvas knows every notation.
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = "#000"; pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0 && !(at instanceof SVGElement && at.tagName !== "svg")) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const light = ([r, g, b]) => {
    const f = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  let least = 21, texts = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || e.closest("script, style, title, .unseen, .skip, [aria-hidden=true]:not(.mark)")) continue;
    if (!e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const large = size >= 24 || (bold && size >= 18.66);
    const under = behind(svg ? e.ownerSVGElement.parentElement : e);
    const ratio = contrast(over(rgba(svg ? style.fill : style.color), under), under);
    texts += 1; least = Math.min(least, ratio);
    if (ratio < (large ? 3 : 4.5)) say(`contrast ${ratio.toFixed(2)}`, e);
  }
  for (const mark of document.querySelectorAll("svg.chart circle, svg.chart .line, svg.chart .front, svg.bars rect")) {
    const style = getComputedStyle(mark), under = behind(mark.ownerSVGElement.parentElement);
    const paints = [style.fill, style.stroke].filter((paint) => paint !== "none");
    const ratio = Math.max(...paints.map((paint) => contrast(over(rgba(paint), under), under)));
    if (ratio < 3) say(`a mark with contrast ${ratio.toFixed(2)}`, mark);
  }
  const wide = document.documentElement.scrollWidth;
  if (wide > WIDTH) found.push(`the page is ${wide} px wide in a window of ${WIDTH}`);
  for (const svg of document.querySelectorAll("svg"))
    if (!(svg.getAttribute("aria-label") || svg.querySelector("title"))) say("a drawing without a name", svg);
  for (const e of document.querySelectorAll("a[href], button, [tabindex='0']"))
    if (!(e.getAttribute("aria-label") || e.textContent.trim())) say("a control without a name", e);
  for (const scroller of document.querySelectorAll("*")) {
    const style = getComputedStyle(scroller);
    const scrolls = /auto|scroll/.test(style.overflowX) && scroller.scrollWidth > scroller.clientWidth + 1;
    if (scrolls && scroller.tabIndex < 0) say("scrolls but the keyboard cannot reach it", scroller);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((i) => i === id).length > 1) found.push(`the id ${id} is given twice`);
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((h) => Number(h.tagName[1]));
  levels.forEach((level, i) => {
    if (i && level > levels[i - 1] + 1) found.push(`a heading of level ${level} follows one of ${levels[i - 1]}`);
  });
  if (!document.documentElement.lang || !document.title) found.push("the page has no language or no title");
  for (const th of document.querySelectorAll("table th"))
    if (!th.scope) say("a heading of a table without scope", th);
  return { found, least: Number(least.toFixed(2)), texts };
})()
"""
"""What can be seen without touching anything; WIDTH stands for the window's."""

FOCUSED = r"""
(() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  e.dataset.reached = "1";
  const style = getComputedStyle(e);
  const shown = (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== "none";
  const text = (e.getAttribute("aria-label") || e.textContent).trim().slice(0, 40);
  return { shown, what: `<${e.tagName.toLowerCase()}> ${text}` };
})()
"""

UNREACHED = r"""
[...document.querySelectorAll("a[href], button, summary, [tabindex='0']")]
  .filter((e) => e.checkVisibility() && !e.dataset.reached)
  .map((e) => `<${e.tagName.toLowerCase()}> ${(e.getAttribute("aria-label") || e.textContent).trim().slice(0, 40)}`)
"""

HEADS = "document.querySelectorAll('table.sortable thead button').length"


def check(opened: Browser, page: Path, pictures: Path | None) -> dict[str, Any]:
    """Everything found wrong with one page, by view."""
    findings: list[str] = []
    facts: dict[str, Any] = {}
    for view, (width, height, scheme) in VIEWS.items():
        opened.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                    deviceScaleFactor=2 if width < 500 else 1, mobile=width < 500)  # fmt: skip
        opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        opened.open(page)
        if pictures:
            _picture(opened, pictures / f"{page.parent.parent.name}-{page.stem}-{view}.png", width)
        opened.run("for (const d of document.querySelectorAll('details')) d.open = true")
        seen = opened.run(CHECKS.replace("WIDTH", str(width)))
        facts[view] = {"least_contrast": seen["least"], "texts": seen["texts"]}
        findings += [f"{view}: {text}" for text in seen["found"]]
        if view == "light":
            findings += [f"keyboard: {text}" for text in _keyboard(opened)]
        findings += [f"{view}: {text}" for text in _noise(opened, page)]
        if view == "light":
            findings += [f"downloads: {text}" for text in _downloads(opened, page, facts)]
    return {"page": str(page), "findings": findings, "facts": facts}


def _picture(opened: Browser, path: Path, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tall = min(12_000, int(opened.run("document.documentElement.scrollHeight")))
    clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
    shot = opened.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    path.write_bytes(base64.b64decode(shot["data"]))


def _noise(opened: Browser, page: Path) -> Iterator[str]:
    """Console messages, exceptions, and requests other than for the page itself."""
    own = page.resolve().as_uri()
    for event in opened.events:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            yield f"console.{said['type']}: {said['args'][:1]}"
        elif method == "Runtime.exceptionThrown":
            yield f"exception: {said['exceptionDetails'].get('text')}"
        elif method == "Log.entryAdded":
            yield f"{said['entry']['level']}: {said['entry']['text']}"
        elif method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if url.partition("#")[0] != own and not url.startswith(("data:", "blob:")):
                yield f"a request to {url}"


def _keyboard(opened: Browser) -> Iterator[str]:
    """Tab through the whole page, then sort every table with Enter."""
    opened.run("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(3000):
        opened.press("Tab")
        at = opened.run(FOCUSED)
        if at is None:
            break
        if not at["shown"]:
            yield f"no visible focus on {at['what']}"
    for what in opened.run(UNREACHED):
        yield f"Tab does not reach {what}"
    for number in range(int(opened.run(HEADS))):
        button = f"document.querySelectorAll('table.sortable thead button')[{number}]"
        opened.run(f"{button}.focus()")
        for key, wanted in (("Enter", "ascending"), (" ", "descending")):
            opened.press(key)
            got = opened.run(f"{button}.closest('th').getAttribute('aria-sort')")
            if got != wanted:
                yield f"`{key}` sorts column {number} {got}, expected {wanted}"


def _downloads(opened: Browser, page: Path, facts: dict[str, Any]) -> Iterator[str]:
    """Press every export button with the keyboard and look at the file it gives."""
    folder: Path = opened.downloads  # type: ignore[attr-defined]
    names = []
    for number in range(int(opened.run("document.querySelectorAll('.export button').length"))):
        if number % 8 == 0:  # a browser stops a page that gives too many files
            opened.open(page)
        button = f"document.querySelectorAll('.export button')[{number}]"
        label = opened.run(f"{button}.getAttribute('aria-label')")
        before = {p.name for p in folder.iterdir()}
        opened.run(f"{button}.focus()")
        opened.press("Enter")
        file = _new_file(folder, before)
        text = file.read_text(encoding="utf-8") if file else ""
        if file is None or not text.strip():
            yield f"{label} gives nothing"
        elif file.suffix == ".svg" and not (text.startswith("<svg") and "xmlns" in text and "var(" not in text):
            yield f"{label} is not a drawing that stands alone"
        elif file.suffix == ".csv" and len({line.count(",") for line in text.split("\n\n")[0].splitlines()}) < 1:
            yield f"{label} is no table"
        if file:
            names.append(file.name)
            file.unlink()
    if len(names) != len(set(names)):
        yield f"two downloads have one name: {sorted(names)}"
    facts["downloads"] = names


def _new_file(folder: Path, before: set[str]) -> Path | None:
    for _ in range(200):
        new = [p for p in folder.iterdir() if p.suffix in (".svg", ".csv") and p.name not in before]
        if new and new[0].stat().st_size:
            return new[0]
        time.sleep(0.02)
    return None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path, help="keep screenshots here")
    parser.add_argument("--browser", help="a Chromium; found on the PATH by default")
    options = parser.parse_args(arguments)
    if missing := [page for page in options.pages if not page.is_file()]:
        print(f"error: there is no page `{missing[0]}`", file=sys.stderr)
        return 2
    path = find_browser(options.browser)
    if path is None:
        print(json.dumps({"status": "skipped", "reason": "no Chromium on this machine"}))
        return 0
    with browser(path) as opened:
        pages = [check(opened, page, options.pictures) for page in options.pages]
    failed = any(page["findings"] for page in pages)
    print(json.dumps({"status": "failed" if failed else "passed", "pages": pages}, indent=1, ensure_ascii=False))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
