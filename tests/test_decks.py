"""Slides and pages in a real browser, from files, without a network: nothing is cut, small or out of reach."""
import importlib.util
import shutil
from pathlib import Path

import pytest

from minidiff.teach import lab, web

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300),
              pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
READY = "document.documentElement.dataset.ready"
TEXT = "img, p, li, th, td, pre, h1, h2, h3, .MathJax_Display .MathJax"
TOO_FAR = """text => [...Reveal.getCurrentSlide().querySelectorAll(text)]
    .filter(each => !each.closest('aside, .code, .MJX_Assistive_MathML')).flatMap(each => {
        const box = each.getBoundingClientRect(), wrong = [];
        if (!box.width || !box.height) return [];
        const cut = box.left < -1 || box.top < -1 || box.right > innerWidth + 1 || box.bottom > innerHeight + 1;
        const points = 0.75 * parseFloat(getComputedStyle(each).fontSize) * Reveal.getScale();
        if (cut) wrong.push('cut');
        if (each.textContent.trim() && points < 20) wrong.push(`${points} points`);
        return wrong.map(what => [what, each.tagName, each.textContent.slice(0, 60)]); })"""
TO_SLIDE = """([k, fragment]) => {
    const at = Reveal.getIndices(Reveal.getSlides()[k]); Reveal.slide(at.h, at.v, fragment); }"""
OF_THE_IDEA = "Reveal.getSlides().findIndex(each => each.querySelector('.idea'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    list(web.slides(folder / "slides"))
    list(web.pages(folder / "pages"))
    return folder


@pytest.fixture
def browser():
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def opened(browser, file: Path, wide: int, high: int):
    """A page from a file, and what it asks for."""
    page = browser.new_page(viewport={"width": wide, "height": high})
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(file.as_uri())
    return page


@pytest.mark.parametrize("name", [path.stem for path in sorted(lab.notebooks_dir().glob("*.ipynb"))])
def test_every_slide_is_shown_whole_and_its_text_is_large(built, browser, name):
    for wide, high in ((1280, 720), (1920, 1080)):
        page = opened(browser, built / "slides" / f"{name}.html", wide, high)
        page.wait_for_function(READY)
        assert page.locator("[data-full]").count() == 0
        slides = page.evaluate("Reveal.getTotalSlides()")
        assert slides > 10
        for k in range(slides):
            page.evaluate(TO_SLIDE, [k, 99])
            assert page.evaluate(TOO_FAR, TEXT) == [], f"slide {k + 1} of {slides} at {wide}×{high}"
        assert all(url.startswith(("file:", "data:", "about:")) for url in page.asked) and page.errors == []
        page.close()


def test_the_projectors_slide_keeps_its_answer_until_the_last_key(built, browser):
    page = opened(browser, built / "slides" / "04_ddpm_and_ddim.html", 1280, 720)
    page.wait_for_function(READY)
    page.evaluate(TO_SLIDE, [page.evaluate(OF_THE_IDEA), -1])
    rows, idea = page.locator("section.present figure img"), page.locator("section.present .idea")
    seen = "each => getComputedStyle(each).visibility === 'visible' && each.matches('.visible')"
    assert rows.count() == 3 and not idea.evaluate(seen)
    shown = []
    while not idea.evaluate(seen):
        page.keyboard.press("ArrowRight")
        shown.append(sum(row.evaluate(seen) for row in rows.all()))
    assert {1, 2, 3} <= {*shown} and shown == sorted(shown)
    assert "commit to an answer" in page.evaluate("Reveal.getSlideNotes()")
    assert "commit to an answer" not in page.locator("section.present .page").inner_text()


def test_a_key_shows_the_code_and_hides_it(built, browser):
    page = opened(browser, built / "slides" / "04_ddpm_and_ddim.html", 1280, 720)
    page.wait_for_function(READY)
    page.evaluate(TO_SLIDE, [page.evaluate(OF_THE_IDEA), -1])
    assert not page.get_by_text("rows.append").first.is_visible()
    page.keyboard.press("c")
    assert page.locator("dialog").is_visible() and "rows.append" in page.locator("dialog").inner_text()
    page.keyboard.press("c")
    assert not page.locator("dialog").is_visible()
    page.keyboard.press("c")
    page.keyboard.press("ArrowRight")                                    # a presenter has no other key
    assert not page.locator("dialog").is_visible()


def test_the_right_arrow_alone_leads_to_every_slide_and_answers_come_after_their_questions(built, browser):
    page = opened(browser, built / "slides" / "04_ddpm_and_ddim.html", 1280, 720)
    page.wait_for_function(READY)
    here = "JSON.stringify([Reveal.getIndices().h, Reveal.getIndices().v])"
    seen, answers = [page.evaluate(here)], 0
    hidden = "() => document.querySelectorAll('section.present .fragment:not(.visible)').length"
    while not page.evaluate("Reveal.isLastSlide() && !Reveal.availableFragments().next"):
        before = page.evaluate(hidden)
        page.keyboard.press("ArrowRight")
        answers += page.evaluate(hidden) < before
        now = page.evaluate(here)
        seen += [now] * (now != seen[-1])
    assert len(seen) == len({*seen}) == page.evaluate("Reveal.getTotalSlides()") and answers >= 3
    for question in page.locator(".page > p.keep").all():
        assert question.evaluate("each => each.nextElementSibling.matches('.fragment')")


@pytest.mark.parametrize("wide", [390, 1280])
def test_a_page_is_as_wide_as_the_screen_and_its_mathematics_set(built, browser, wide):
    for name in (path.stem for path in sorted(lab.notebooks_dir().glob("*.ipynb"))):
        page = opened(browser, built / "pages" / f"{name}.html", wide, 800)
        page.wait_for_function("MathJax.Hub.queue.pending === 0 && document.querySelectorAll('.MathJax').length > 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= wide
        assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        assert all(url.startswith(("file:", "data:", "about:")) for url in page.asked) and page.errors == []
        page.close()


@pytest.mark.skipif(importlib.util.find_spec("axe_playwright_python") is None,
                    reason="axe is not installed: pip install axe-playwright-python")
def test_axe_finds_nothing_serious_on_a_page(built, browser):
    from axe_playwright_python.sync_playwright import Axe

    for name in ("00_start_here", "04_ddpm_and_ddim", "07_attention"):
        page = opened(browser, built / "pages" / f"{name}.html", 390, 800)
        page.wait_for_function("MathJax.Hub.queue.pending === 0 && document.querySelectorAll('.MathJax').length > 0")
        found = Axe().run(page).response["violations"]
        assert [(each["id"], len(each["nodes"])) for each in found if each["impact"] in ("serious", "critical")] == []
        page.close()
