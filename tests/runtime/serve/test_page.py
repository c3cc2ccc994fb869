"""The page in a real browser, on a real server with the zoo's model."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ZOO = ROOT / "models" / "zoo" / "far-emoji"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "serve"]
WAIT = 120_000

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """far-emoji, drawn with one diffusion step at each level unless the page asks for more."""
    from far_export.export import export_bundle

    made = tmp_path_factory.mktemp("page") / "far-emoji"
    export_bundle(ZOO / "far.safetensors", ZOO / "vae.safetensors", made, defaults={"steps": "1"}, editing=False)
    return made


@pytest.fixture(scope="module")
def server(serve: Any, bundle: Path) -> Iterator[str]:
    with serve(bundle) as address:
        yield address


@contextlib.contextmanager
def own_server(bundle: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves a bundle, and its address; it is killed at the end, if it was not before."""
    command = [*COMMAND, str(bundle), "--port", str(port), "--engine", "onnxruntime", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"serving far-emoji at (http://\S+) ", process.stdout.readline())
            assert found
            yield process, found[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    """The page, loaded; no script may have failed and nothing may have come from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server)
    opened = context.new_page()
    failed: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.set_default_timeout(WAIT)
    opened.goto(f"{server}/")
    opened.locator("#about:not(:empty)").wait_for()
    yield opened
    assert failed == []
    assert all(url.startswith((server, "data:", "blob:")) for url in asked)
    context.close()


def test_a_picture_sharpens_level_by_level_and_its_command_can_be_copied(page: Any) -> None:
    page.fill("#label", "sunflower")
    page.fill("#seed", "3")
    page.fill("#guidance", "1.5")
    page.click("#draw")
    page.locator(".legend").wait_for()
    names = page.locator(".strip figcaption").all_inner_texts()
    assert names == [f"level {i}" for i in range(8)]
    assert page.locator(".strip canvas.spectrum").count() == 8
    assert "sunflower, seed 3" in page.locator("article h3").inner_text()
    assert {"transformer", "denoise", "decode"} <= set(page.locator(".legend").inner_text().split())
    page.click(".command button")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith("far generate BUNDLE --label 41 --seed 3 ")
    assert "--guidance 1.5" in copied
    assert page.locator("#history li").count() == 1


def test_the_spectrum_grows_towards_high_frequency(page: Any) -> None:
    page.fill("#label", "rainbow")
    page.fill("#seed", "1")
    page.click("#draw")
    page.locator(".legend").wait_for()
    high = page.evaluate(
        """async () => {
            const { radialSpectrum } = await import("./page/spectrum.js");
            return [...document.querySelectorAll("canvas.level")].map((canvas) => {
                const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                return radialSpectrum(image).slice(16).reduce((sum, each) => sum + each, 0);
            });
        }"""
    )
    assert len(high) == 8
    assert high[-1] > 3 * high[0]


def test_the_spectrum_is_that_of_the_picture(page: Any) -> None:
    """Power at a known frequency; Parseval's sum."""
    found = page.evaluate(
        """async () => {
            const { radialSpectrum } = await import("./page/spectrum.js");
            const image = new ImageData(70, 64);
            for (let y = 0; y < 64; y++) for (let x = 0; x < 70; x++) {
                const value = 128 + Math.round(100 * Math.cos(2 * Math.PI * 5 * x / 64));
                image.data.set([value, value, value, 255], 4 * (y * 70 + x));
            }
            return [...radialSpectrum(image)];
        }"""
    )
    assert len(found) == 32
    assert max(range(32), key=found.__getitem__) == 5
    assert found[5] > 1000 * max(value for i, value in enumerate(found) if i != 5)


def test_two_presets_are_compared_with_the_same_seed_by_keyboard_alone(page: Any) -> None:
    page.locator("#label").focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("ghost")
    page.fill("#seed", "5")
    page.locator("#compare").focus()
    page.keyboard.press("Space")
    page.select_option("#other-preset", "fast")
    page.keyboard.press("Control+Enter")
    page.locator(".legend").nth(1).wait_for()
    assert page.locator("article h3").all_inner_texts() == ["ghost, seed 5"] * 2
    assert "fast" in page.locator("article").nth(1).inner_text()
    commands = page.locator(".command code").all_inner_texts()
    assert "dpmpp-2m" in commands[1]
    assert "dpmpp-2m" not in commands[0]


def test_history_brings_settings_back_and_survives_a_reload(page: Any, server: str) -> None:
    page.fill("#label", "robot")
    page.fill("#seed", "77")
    page.click("#draw")
    page.locator(".legend").wait_for()
    page.reload()
    page.locator("#about:not(:empty)").wait_for()
    page.click("#history button")
    assert (page.input_value("#label"), page.input_value("#seed")) == ("robot", "77")
    page.click("#forget")
    assert page.locator("#history li").count() == 0


def test_an_error_says_what_to_do(page: Any) -> None:
    page.fill("#label", "nothing of the kind")
    page.click("#draw")
    page.locator("#error:not(:empty)").wait_for()
    assert "no class of that name" in page.locator("#error").inner_text()
    assert page.locator("#draw").is_enabled()


def test_it_draws_where_the_browser_has_no_room_for_the_history(page: Any) -> None:
    page.evaluate(
        """() => {
            let text = "x".repeat(1 << 20), key = 0;
            while (text.length) {
                try { localStorage.setItem(`filler ${key++}`, text); } catch { text = text.slice(text.length / 2 + 1); }
            }
        }"""
    )
    page.fill("#label", "ghost")
    page.fill("#seed", "4")
    page.click("#draw")
    page.locator(".legend").wait_for()
    assert page.locator("article h3").inner_text() == "ghost, seed 4"
    assert page.locator("#error").inner_text() == ""
    assert page.locator("#history li").count() == 0
    page.evaluate("() => localStorage.clear()")
    page.click("#draw")
    page.locator("#history li").wait_for()  # there is room again


def test_a_server_that_is_killed_in_the_middle_of_a_picture_is_told_and_another_draws(
    browser: Any, bundle: Path
) -> None:
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    with own_server(bundle, 0) as (process, address):
        page.goto(f"{address}/")
        page.locator("#about:not(:empty)").wait_for()
        page.fill("#label", "robot")
        page.fill("#seed", "6")
        page.select_option("#preset", "official")
        page.click("#draw")
        page.locator(".strip figcaption").first.wait_for()
        process.kill()
        page.locator("#error:not(:empty)").wait_for()
        assert "is the server still there?" in page.locator("#error").inner_text()
        assert "is the server still there?" in page.locator("article").inner_text()
        assert page.locator("#draw").is_enabled()
        assert page.locator("#history li").count() == 0
        page.click("#draw")  # nobody is there
        page.locator("#error:not(:empty)").wait_for()
    with own_server(bundle, int(address.rpartition(":")[2])):
        page.select_option("#preset", "")
        page.click("#draw")
        page.locator(".legend").wait_for()
        assert page.locator("#error").inner_text() == ""
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    wide = page.evaluate("() => document.documentElement.scrollWidth")
    assert wide <= 360
    paper, ink = page.evaluate(
        """() => ["backgroundColor", "color"].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g)
            .slice(0, 3).reduce((sum, each) => sum + Number(each), 0))"""
    )
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 400
