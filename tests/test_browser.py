"""Explorers in a real browser: pressing an arrow key moves the picture, and nothing is asked of the network."""
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from minidiff.teach import lab

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.timeout(240),
              pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

TINY = """from PIL import Image
from minidiff.teach import explore

explore(lambda hue, red: Image.new("RGB", (64, 64), (red, 0, 255 * (hue == "violet"))),
        alt="a square of some red", hue=["red", "violet"], red=range(0, 256, 51))"""
REAL = lab.notebooks_dir() / "01_forward_noising.ipynb"
LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|(data|blob|about):")
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
SAVE_AND_STOP = """() => {
    const run = name => window.jupyterapp.commands.execute(name);
    run('docmanager:save').then(() => run('notebook:shutdown-kernel')).then(() => { window.stopped = true });
}"""
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"  # returns no promise to wait for


def down_to_the_explorer(cells: list) -> list:
    """The code cells down to the first that calls explore."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    last = next(place for place, cell in enumerate(code) if re.search("^explore\\(", cell.source, re.MULTILINE))
    return [new_code_cell(cell.source) for cell in code[:last + 1]]


@pytest.fixture
def serve(tmp_path):
    """Opens cells as the first notebook in JupyterLab, as `minidiff lab` does; returns its address."""
    servers = []

    def start(cells: list, hook: bool = True) -> str:
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks for one
        nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "mine" / lab.FIRST)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [part for part in lab.command(tmp_path / "mine", browser=False) if hook or "hook" not in part]
        command += ["--expose-app-in-browser", "--allow-root", "--IdentityProvider.token=t",
                    f"--ServerApp.port={port}"]
        own = {name: str(tmp_path / name) for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        settings = tmp_path / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "notebook-extension"
        settings.mkdir(parents=True)
        (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # draw all cells
        with open(tmp_path / "log", "w") as log:
            servers.append(subprocess.Popen(command, env=lab.environment(tmp_path / "config") | own, stderr=log))
        return f"http://127.0.0.1:{port}"

    (tmp_path / "mine").mkdir()
    (tmp_path / "config").mkdir()
    yield start
    for server in servers:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page():
    """A page that notes what it asks for and what it complains about."""
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.set_default_timeout(90_000)
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda channel: page.asked.append(channel.url))
        page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def goto(page, address: str) -> None:
    """Open a page of a server that may still be starting."""
    for _ in range(900):
        try:
            urllib.request.urlopen(f"{address}/api?token=t", timeout=20).close()
            break
        except urllib.error.URLError:
            page.wait_for_timeout(100)
    page.goto(f"{address}/lab/tree/{lab.FIRST}?token=t")


def run_all(page):
    """Run all cells; returns the explorer's picture."""
    page.wait_for_function(IDLE)
    page.evaluate(RUN_ALL)
    picture = page.wait_for_selector("img.widget-image")
    page.wait_for_function(IDLE)
    return picture


@pytest.mark.parametrize("cells", [
    pytest.param(lambda: [new_code_cell(TINY)], id="tiny"),
    pytest.param(lambda: down_to_the_explorer(nbformat.read(REAL, 4).cells), id="notebook-01",
                 marks=pytest.mark.skipif(not REAL.is_file(), reason="notebook 01 is not there"))])
def test_an_arrow_key_moves_the_picture_and_nothing_leaves_the_machine(cells, serve, page):
    goto(page, serve(cells()))
    picture = run_all(page)
    before = picture.get_attribute("src")
    page.locator(".noUi-handle").last.press("ArrowRight")
    page.wait_for_function("([picture, before]) => picture.src !== before", arg=[picture, before])
    assert page.asked and [url for url in page.asked if not LOCAL.match(url)] == []
    assert page.errors == []


@pytest.mark.parametrize("hook", [True, False], ids=["minidiff lab", "jupyter lab"])
def test_a_saved_notebook_opened_again_shows_the_film_and_how_to_move_it(hook, serve, page):
    goto(page, serve([new_code_cell(TINY)], hook))
    run_all(page)
    assert not page.locator("figure.minidiff-stored").is_visible()        # the widget stands in its place
    page.evaluate(SAVE_AND_STOP)
    page.wait_for_function("window.stopped")
    page.reload()
    film = page.wait_for_selector("figure:has(img[alt='a square of some red'])")
    assert film.is_visible() and "Run this cell" in film.inner_text()
    if not hook:                                                         # the widget was saved, and has ended
        page.wait_for_selector(".jupyter-widgets", state="attached")
    assert [each.is_visible() for each in page.locator(".jp-OutputArea-child").all()] == [True] + [False] * (not hook)
    assert "not found" not in page.locator(".jp-OutputArea").inner_text() and (page.errors == [] or not hook)


PLACE = """from PIL import Image
from minidiff.teach import explore

explore(lambda column, row: [Image.new("RGB", (90, 60), (80 * column, 80 * row, 0)), Image.new("RGB", (90, 60))],
        alt="two pictures", width=600, place=("column", "row"), column=range(3), row=range(2))"""


def test_a_click_on_the_picture_chooses_its_place(serve, page):
    goto(page, serve([new_code_cell(PLACE)]))
    picture = run_all(page)
    before, box = picture.get_attribute("src"), picture.bounding_box()
    page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.75 * box["height"])     # the last place of the first
    page.wait_for_function("([picture, before]) => picture.src !== before", arg=[picture, before])
    readouts = page.locator(".widget-readout")
    page.wait_for_timeout(200)
    assert readouts.all_inner_texts() == ["2", "1"]
    assert page.errors == []


STUDIO = """import minidiff as md
from minidiff.teach import studio

studio(md.StableDiffusion.from_pretrained("mini-sd"), "a red house, snow", steps=3)"""


def moved_by(page, picture, act) -> None:
    """Act, and wait until the picture has changed and the kernel idles."""
    before = picture.get_attribute("src")
    act()
    page.wait_for_function("([picture, before]) => picture.src !== before", arg=[picture, before])
    page.wait_for_function(IDLE)
    page.wait_for_timeout(500)                                           # the last frame arrives after the kernel idles


def test_the_studio_draws_what_is_typed_and_its_slider_goes_back(serve, page):
    goto(page, serve([new_code_cell(STUDIO)]))
    picture = run_all(page)

    box = page.locator(".widget-text input").first
    box.fill("a blue boat, sea, night")
    box.press("Enter")
    moved_by(page, picture, page.get_by_role("button", name="draw").click)
    slider = page.locator(".noUi-handle").last
    moved_by(page, picture, lambda: slider.press("ArrowLeft"))
    moved_by(page, picture, page.get_by_role("button", name="play").click)
    assert page.asked and [url for url in page.asked if not LOCAL.match(url)] == []
    assert page.errors == []


NAMED = """() => { const at = document.activeElement;
    const label = at.labels?.[0] || at.closest('.widget-inline-hbox')?.querySelector('label');
    return at.getAttribute('aria-label') || at.title || at.innerText || label?.textContent || ''; }"""


def test_the_studio_by_keys_alone(serve, page):
    """Each stop of the Tab key has a name; a prompt is typed, steps are walked, the machine says what it does."""
    goto(page, serve([new_code_cell(STUDIO)]))
    picture = run_all(page)

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            stops.append(page.evaluate(NAMED).strip())
            if stops[-1].startswith(name):
                return
        raise AssertionError(f"{name} is not among {stops}")

    stops: list[str] = []
    page.locator(".widget-dropdown select").first.focus()
    tab_to("prompt")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("a blue boat, sea, night")
    moved_by(page, picture, lambda: page.keyboard.press("Enter"))
    tab_to("guidance")
    moved_by(page, picture, lambda: page.keyboard.press("ArrowLeft"))
    for name, key in (("draw", "Enter"), ("play", "Space")):
        tab_to(name)
        moved_by(page, picture, lambda key=key: page.keyboard.press(key))
    page.keyboard.press("Space")                                         # and it stops
    page.wait_for_timeout(1500)
    tab_to("step")
    moved_by(page, picture, lambda: page.keyboard.press("ArrowLeft"))
    tab_to("the U-Net")
    assert page.get_by_text("estimates the noise in the state").is_visible()
    assert all(stops) and page.errors == []


DONE = """() => { const found = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
          const prompts = found.map(prompt => prompt.textContent);
          return prompts.length > 0 && prompts.every(text => /\\[\\d+\\]/.test(text)); }"""
EXPLORERS = [path.name for path in sorted(lab.notebooks_dir().glob("*.ipynb")) if re.search(
    r'"explore\(', path.read_text(encoding="utf-8"))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EXPLORERS)
def test_every_explorer_moves_after_the_whole_notebook_was_run(name, serve, page):
    """A later cell may have given the names that an explorer uses to something else."""
    cells = [new_code_cell(cell.source) for cell in nbformat.read(lab.notebooks_dir() / name, 4).cells
             if cell.cell_type == "code"]
    page.set_default_timeout(400_000)
    goto(page, serve(cells))
    page.wait_for_function(IDLE)
    page.evaluate(RUN_ALL)
    page.wait_for_function(DONE)
    boxes = page.locator(".jp-OutputArea-output > .widget-vbox:has(img.widget-image)")
    made = sum(len(re.findall(r"^(?:explore|studio)\(", cell.source, re.MULTILINE)) for cell in cells)
    assert boxes.count() == made
    page.set_default_timeout(60_000)
    for box in boxes.all():
        picture, handles = box.locator("img.widget-image").first.element_handle(), box.locator(".noUi-handle")
        before = picture.get_attribute("src")
        if handles.count():
            handles.last.press("ArrowLeft")
            handles.last.press("ArrowRight")
            handles.last.press("ArrowRight")
        else:
            box.locator("select").last.select_option(index=1)
        page.wait_for_function("([picture, before]) => picture.src !== before", arg=[picture, before])
        assert box.get_by_role("alert").count() == 0
