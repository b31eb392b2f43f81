"""Explorers in a real browser: the slider moves the picture, and nothing is asked from the network."""
import re
import shutil
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from minidiff.teach import lab

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(240),
              pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]
EXPLORE = """from PIL import Image
from minidiff.teach import explore
explore(lambda red: Image.new("RGB", (64, 64), (red, 0, 0)), alt="a square of some red", red=range(0, 256, 51))"""
REAL = lab.notebooks_dir() / "01_forward_noising.ipynb"
READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"  # returns nothing: a promise hangs


def up_to_the_explorer(path):
    """A notebook, its outputs cleared, down to the first cell that calls explore."""
    nb = nbformat.read(path, as_version=4)
    last = next(i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and "\nexplore(" in cell.source)
    code = [cell.source for cell in nb.cells[:last + 1] if cell.cell_type == "code"]
    return new_notebook(cells=[new_code_cell(source) for source in code])


NOTEBOOKS = [pytest.param(lambda: new_notebook(cells=[new_code_cell(EXPLORE)]), id="a tiny one"),
             pytest.param(lambda: up_to_the_explorer(REAL), id="01",
                          marks=pytest.mark.skipif(not REAL.is_file(), reason="notebook 01 is not there"))]


@pytest.fixture
def server(tmp_path):
    """Starts JupyterLab on a notebook as `lab` does; returns its address."""
    started = []

    def start(nb) -> str:
        nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nb, tmp_path / lab.FIRST)
        config = tmp_path / "config"
        config.mkdir()
        command = [*lab.command(tmp_path, browser=False), "--allow-root", "--expose-app-in-browser",
                   "--IdentityProvider.token=t"]
        started.append(subprocess.Popen(command, env=lab.environment(config), stderr=subprocess.PIPE, text=True))
        lines = (re.search(r"(http://127\.0\.0\.1:\d+)/", line) for line in started[-1].stderr)
        address = next(found[1] for found in lines if found)
        return f"{address}/lab/tree/{lab.FIRST}?token=t"

    yield start
    for process in started:
        process.terminate()
        process.stderr.read()
        process.wait(20)


@pytest.fixture
def page():
    """A page that notes what it asks for and what it complains about."""
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        yield page
        browser.close()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_slider_moves_the_picture_and_nothing_leaves_the_machine(notebook, server, page):
    for _ in range(50):  # the address is printed a moment before it answers
        try:
            page.goto(server(notebook()) if not page.asked else page.asked[0])
            break
        except sync_api.Error:
            page.complaints.clear()
            page.wait_for_timeout(200)
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate(RUN_ALL)
    picture = page.wait_for_selector(".jp-OutputArea img.widget-image", timeout=120_000)
    before = picture.get_attribute("src")
    handle = page.wait_for_selector(".jp-OutputArea .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    handle.press("ArrowRight")
    page.wait_for_function("([img, src]) => img.src !== src", arg=[picture, before], timeout=60_000)
    local = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|(data|blob|about):")
    assert [url for url in page.asked if not local.match(url)] == []
    assert page.complaints == []
