"""Both report pages as a browser shows them: at 1280 and 390 px, light and dark, by headless Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest
import test_compare
import test_gym_report

from pats_jax.comparison import comparison_page, seed_statistics
from pats_jax.priming import gym_report, relative_gain

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]

# A window cannot be as narrow as a phone's, a frame can.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:4000px" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement, body = page.defaultView.getComputedStyle(page.body);
  page.querySelectorAll("details").forEach(one => one.open = true);
  const of = (tag, read) => Array.from(page.querySelectorAll(tag), read);
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth,
    content: root.scrollWidth,
    tables: of("table", one => {{
      const box = one.parentElement, style = page.defaultView.getComputedStyle(box);
      return {{
        clipped: one.scrollWidth > box.clientWidth && !["auto", "scroll"].includes(style.overflowX),
        scrolls: one.scrollWidth > box.clientWidth,
        caption: one.caption ? one.caption.firstChild.getBoundingClientRect().right : 0,
        second: one.querySelector("tbody td").getBoundingClientRect().right,
        size: parseFloat(page.defaultView.getComputedStyle(one.querySelector("td")).fontSize),
      }};
    }}),
    pictures: of("img", one => [one.naturalWidth, one.getBoundingClientRect().right, one.alt]),
    text: body.color,
    ground: body.backgroundColor,
  }});
}});
</script>"""


def shown(page, width, dark, folder):
    """What the browser says about a page in a frame of that width."""
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    flags = (
        "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --window-size=1300,4100"
    )
    own = f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(CHROMIUM), *flags.split(), *own, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert told, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(told[1]))


def luminance(color):
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def comparison(folder):
    scores = {"finetune": test_compare.FINETUNE, "pats": test_compare.PATS, "dps-dense": test_compare.PATS}
    runs = test_compare.write_grid(folder, scores, ("mrpc", "stsb"))
    command = "pats-jax compare --methods finetune pats dps-dense --tasks mrpc stsb --seeds 1 2 3 4 5 --output_dir runs"
    comparison_page.write_report(folder, seed_statistics.summarise(folder, runs), [command], [{"cores": "2"}])
    return folder / "report.html"


def gym(folder):
    summary = relative_gain.summarise(test_gym_report.records())
    gym_report.write_report(folder, summary, title="Priming: relative gains", about=["pats-jax gym " + "--x y " * 40])
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("write", [comparison, gym])
def test_a_page_is_readable(write, width, dark, tmp_path):
    found = shown(write(tmp_path).read_text(encoding="utf-8"), width, dark, tmp_path)
    assert found["width"] == width and found["content"] <= width, "the page does not scroll sideways"
    assert found["tables"] and not any(one["clipped"] for one in found["tables"])
    assert width == 390 or not any(one["scrolls"] for one in found["tables"])
    assert all(max(one["second"], one["caption"]) <= width for one in found["tables"]), (
        "the caption and the first number can be seen at once"
    )
    assert all(one["size"] >= 12 for one in found["tables"])
    for natural, right, text in found["pictures"]:
        assert natural > 300 and right <= width and len(text.split()) > 5
    text, ground = luminance(found["text"]), luminance(found["ground"])
    assert (text > ground) == dark
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 7, "WCAG's best grade of contrast"
