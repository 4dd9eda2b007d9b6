"""The built site: complete, offline, every internal link alive, every image described."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checks  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import pages_exist  # noqa: E402

SITE = ROOT / "_build" / "html"


@pytest.fixture(scope="module")
def pages():
    assert SITE.exists(), "the site is not built; run `make book` first"
    return {p.resolve(): checks.Page(p.read_text("utf8")) for p in SITE.rglob("*.html")
            if not {"_static", "mathjax"} & set(p.relative_to(SITE).parts)}


def test_every_page_of_the_contents_is_built():
    assert pages_exist.missing(ROOT) == []


def test_a_page_that_is_not_built_is_noticed(tmp_path):
    (tmp_path / "_toc.yml").write_text("root: intro\nparts: [{chapters: [{file: gone}]}]\n")
    assert pages_exist.missing(tmp_path) == ["_build/html/intro.html", "_build/html/gone.html"]


def test_nothing_is_loaded_from_elsewhere(pages):
    assert {str(p): found for p, page in pages.items() if (found := checks.external_loads(page))} == {}


def test_no_stylesheet_loads_from_elsewhere(pages):
    sheets = list(SITE.rglob("*.css"))
    assert sheets and {str(p): found for p in sheets if (found := checks.addresses(p.read_text("utf8")))} == {}


def test_mathjax_is_on_the_site(pages):
    chapter = pages[(SITE / "chapters" / "01_architecture.html").resolve()]
    (source,) = [src for src in chapter.loaded if "mathjax" in src]
    assert (SITE / "chapters" / source.partition("?")[0]).resolve().stat().st_size > 1_000_000


def test_every_image_says_what_it_shows(pages):
    bad = {str(p): found for p, page in pages.items() if (found := checks.bare_images(page))}
    assert bad == {}


def test_every_internal_link_leads_somewhere(pages):
    assert {str(p): found for p in pages if (found := checks.broken_links(p, pages))} == {}


def test_planted_faults_are_found(tmp_path):
    page = checks.Page('<script src="https://cdn.example/x.js"></script><img src="a.svg" alt="a.svg">'
                       '<a href="#nowhere">x</a><a href="gone.html">y</a><p id="here"></p><a href="#here">z</a>')
    where = (tmp_path / "p.html").resolve()
    where.write_text("")
    assert checks.external_loads(page) == ["https://cdn.example/x.js"]
    assert checks.bare_images(page) == ["a.svg"]
    assert checks.broken_links(where, {where: page}) == ["#nowhere", "gone.html"]


@pytest.mark.parametrize("markup", [
    '<img srcset="https://x.example/a.png 2x">', '<object data="//x.example/y"></object>', '<video poster="https://x.example/p"></video>',
    '<p style="background: url(https://x.example/b)">', '<style>@import "https://x.example/f.css"</style>',
    '<script>import("https://x.example/m.js")</script>', '<link rel="preconnect" href="https://x.example">'])
def test_every_way_out_is_known(markup):
    assert checks.external_loads(checks.Page(markup))


def test_a_link_out_is_not_a_load():
    assert checks.external_loads(checks.Page('<a href="https://x.example">x</a><link rel="canonical" href="https://x.example">')) == []
