"""Draw the page of serve.py: starts the server, drives the page in Chromium, and takes pictures.

    python train_trm_lm.py --config configs/addition.yaml  # after `python experiments/maths.py --data_only`
    python experiments/draw_page.py                       # writes docs/page.png and docs/page.gif
    python experiments/draw_page.py checkpoints/python --prompt "def main(" --tint certainty --depths []

Needs Playwright (requirements-dev.txt) and Chromium (apt-get install chromium). The picture shows what a model that
adds writes at two depths, and what it thought about one token; the animation shows a Sudoku that is solved step by
step.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # finds src when run as a script

from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402

FRAME_MS, LAST_MS = 900, 3500  # of the animation


@dataclass
class PageConfig:
    """What to draw.

    Args:
        checkpoint: checkpoint or run folder of a language model; the flag name may be left out
        puzzle: checkpoint or run folder of a puzzle model with 9 x 9 Sudokus
        prompt: beginning of the text
        depths: two depths, whose texts are shown side by side; [] = one text
        token: which of the written tokens to look at, from 0; with depths, in the second text
        length: tokens to write
        temperature: of the text
        seed: of the text
        tint: what the tints stand for: certainty, steps, settled
        picture: file of the picture
        animation: file of the animation
    """

    checkpoint: str = "runs/addition"
    puzzle: str = "checkpoints/sudoku"
    prompt: str = "Input: 000005217729+000586940063 \n Output:"
    depths: list[int] = field(default_factory=lambda: [1, 4])
    token: int = 11
    length: int = 64
    temperature: float = 0.0
    seed: int = 1
    tint: str = "settled"
    picture: str = str(ROOT / "docs" / "page.png")
    animation: str = str(ROOT / "docs" / "page.gif")

    def __post_init__(self):
        if len(self.depths) not in (0, 2):
            raise ValueError(f"depths has {len(self.depths)} values: give two, or none")


def find_chromium() -> str | None:
    """Returns the path of Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def serving(*flags):
    """Starts serve.py on a free port, and yields the address of its page. Raises UserError if it does not start."""
    command = [sys.executable, str(ROOT / "serve.py"), *flags, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if address := re.search(r"http://\S+", line):
                yield address[0]
                return
        raise UserError(f"serve.py did not start: {''.join(said).strip()}")
    finally:
        server.terminate()
        server.communicate()


@contextmanager
def chromium():
    """Yields a running Chromium, or raises UserError if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("Playwright is missing: pip install -r requirements-dev.txt") from None
    path = find_chromium()
    if path is None:
        raise UserError("Chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def draw_text(browser, address: str, config: PageConfig):
    """Lets the model write, selects a token, and writes the picture."""
    page = browser.new_page(viewport={"width": 1240, "height": 730}, device_scale_factor=1.5)
    settings = {name: getattr(config, name) for name in ("length", "seed", "temperature", "tint")}
    page.goto(f"{address}/#" + "&".join(f"{name}={value}" for name, value in settings.items()))
    page.get_by_role("textbox", name="The text").fill(config.prompt)
    page.keyboard.press("Control+Enter")
    page.locator(".token.written").first.wait_for(timeout=60_000)
    page.locator("#write").wait_for(timeout=120_000)
    if config.depths:
        page.locator("#compare").click()
        page.get_by_label("left").fill(str(config.depths[0]))
        page.get_by_label("right").fill(str(config.depths[1]))
        page.get_by_role("button", name="Write both").click()
        page.locator("#figures strong").wait_for(timeout=120_000)
    page.locator(".branch").last.locator(".token.written").nth(config.token).click()
    page.mouse.move(0, 0)
    page.screenshot(path=config.picture)
    page.close()


def draw_board(browser, address: str, config: PageConfig):
    """Solves an example, and writes the steps until nothing changes as an animation."""
    from PIL import Image

    page = browser.new_page(viewport={"width": 960, "height": 760})
    page.emulate_media(reduced_motion="reduce")  # shows the last step at once
    page.goto(f"{address}/#board=")
    page.get_by_role("button", name="Example").click()
    page.get_by_role("button", name="Solve").click()
    slider = page.locator("#step")
    page.locator("#step:enabled").wait_for()
    slider.press("Home")
    slider.blur()
    shots, quiet = [], 0
    clip = {"x": 10, "y": page.locator(".board").bounding_box()["y"] - 12, "width": 940, "height": 600}
    while quiet < 2 and len(shots) <= int(slider.get_attribute("max")):
        shots.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
        page.get_by_role("button", name="Next ›").click()
        page.mouse.move(0, 0)
        quiet = 0 if len(shots) < 2 or page.locator(".cell.changed").count() else quiet + 1
    # one palette for all frames, so that a frame only needs to store what changed
    palette = shots[len(shots) // 2].quantize(128)
    frames = [shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots]
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(config.animation, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    page.close()


def main(argv=None):
    (config,) = parse_flags(__doc__, PageConfig, argv=argv, positional="checkpoint")
    with serving(config.checkpoint, "--puzzle", config.puzzle) as address, chromium() as browser:
        draw_text(browser, address, config)
        draw_board(browser, address, config)
    print(f"wrote {config.picture} and {config.animation}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
