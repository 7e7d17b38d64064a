"""A headless browser looks at a page: what is in it, what it asked for, whether it fits, what its console says."""

import base64
import json
import os
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
    "--allow-file-access-from-files",
)  # fmt: skip
SECONDS = 120
LOOK = """<!DOCTYPE html><meta charset="utf-8"><iframe id="page" style="width:{width}px;height:900px;border:0"></iframe>
<script>
function look() {{
  const frame = document.getElementById("page"), inside = frame.contentWindow, page = inside.document;
  const clipped = [];
  page.querySelectorAll("svg").forEach(svg => svg.querySelectorAll("text").forEach(text => {{
    const box = text.getBBox(), view = svg.viewBox.baseVal;
    if (box.x < -1 || box.y < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1)
      clipped.push(text.textContent);
  }}));
  const found = {{
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth, clipped,
    titles: [...page.querySelectorAll("figure h3")].map(each => each.textContent),
    empty: [...page.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().height < 40).length,
    drawings: page.querySelectorAll("figure svg").length,
    sections: [...page.querySelectorAll("section")].map(s => s.id),
    asked: inside.performance.getEntriesByType("resource").map(each => each.name),
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(each => each.getBoundingClientRect().height)),
  }};
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  document.body.append(out);
}}
const frame = document.getElementById("page");
frame.onload = look;
frame.src = {address};
</script>"""


def need_browser():
    """Skip where no browser is; fail where one must be."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("HPCMOE_REQUIRE_LAB") == "1" else pytest.skip)(
            "no chromium: apt install chromium"
        )


def open_in_browser(address, folder, *options):
    """Open an address -> (the document after its scripts, the console's lines)."""
    command = [
        CHROMIUM,
        *QUIET,
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=4000",
        *options,
        address,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def look_at(page, width, folder):
    """Look at a page file in a frame of some width -> (what is found, the console's lines)."""
    wrapper = folder / f"look-{width}.html"
    wrapper.write_text(LOOK.format(width=width, address=json.dumps(page.resolve().as_uri())))
    document, console = open_in_browser(wrapper.as_uri(), folder, "--dump-dom")
    found = re.search(r'<pre id="found">([^<]+)</pre>', document)
    assert found, (document[:2000], console)
    return json.loads(base64.b64decode(found[1])), console


def photograph(page, width, height, picture, folder):
    """Write a picture of a page."""
    open_in_browser(page.resolve().as_uri(), folder, f"--window-size={width},{height}", f"--screenshot={picture}")
