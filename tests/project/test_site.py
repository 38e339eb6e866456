"""The site: every link leads somewhere, nothing comes from elsewhere, and a browser finds its way, on a phone too."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from ddlib.core import DDError
from ddlib.report import site

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'ddlib[docs]'")
pytest.importorskip("latex2mathml", reason="needs latex2mathml: pip install 'ddlib[docs]'")

ROOT = Path(__file__).parents[2]
PAGES = ["index", "methods/dm", "notebooks/dm", "claims", "gallery", "sets/index", "guides/faq"]


def prose() -> dict[str, str]:
    """Every page and Markdown cell that may hold a formula."""
    found = {path.name: path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        found[path.name] = "\n\n".join(texts)
    return found


def test_every_formula_becomes_mathml():
    formulas = []
    for text in prose().values():
        site.with_tokens(text, formulas)
    assert len(formulas) > 20
    for formula in formulas:
        assert formula.startswith("<math") and "\\" not in formula, formula


def test_formulas_leave_code_alone_and_survive_markdown():
    formulas = []
    text = site.with_tokens("$a_i$ costs `$5$`\n\n$$\\tfrac1{2}$$", formulas)
    assert text == "DDFORMULA0X costs `$5$`\n\nDDFORMULA1X" and len(formulas) == 2
    assert 'display="block"' in formulas[1] and "<mfrac>" in formulas[1]
    assert site.with_formulas("<p>DDFORMULA0X</p>", formulas) == f"<p>{formulas[0]}</p>"


def test_links_between_files_become_links_between_pages():
    text = (
        "[dm](dm.ipynb), [page](../docs/methods/dm.md#run), [code](../ddlib/core.py), `[a](dm.ipynb)`, "
        "[web](https://arxiv.org), ![x](../figures/small/dm/history.png), [made](../claims.md)"
    )
    assert site.relinked(text, "notebooks/tesla.md", {"claims.md"}) == (
        "[dm](dm.md), [page](../methods/dm.md#run), code, `[a](dm.ipynb)`, "
        "[web](https://arxiv.org), ![x](../figures/small/dm/history.png), [made](../claims.md)"
    )
    assert site.relinked("see `notebooks/dm.ipynb`", "methods/dm.md") == (
        "see [`notebooks/dm.ipynb`](../notebooks/dm.md)"
    )
    badge = "[![MIT](docs/images/licence.svg)](LICENSE) [![dm](docs/images/python.svg)](docs/methods/dm.md)"
    assert site.relinked(badge, "index.md") == (
        "![MIT](images/licence.svg) [![dm](images/python.svg)](methods/dm.md)"
    )
    assert site.relinked('<a href="docs/methods/dm.md">x</a>', "index.md") == (
        '<a href="methods/dm.html">x</a>'
    )


def test_a_notebook_becomes_a_page(tmp_path):
    def output(**data):
        return {"output_type": "display_data", "data": data}

    outputs = [
        output(
            **{"text/html": '<script src="https://cdn.example/x.js"></script><b>$1</b>\n\n<i>2</i>'}
        ),
        output(**{"image/png": "cG5n", "text/plain": "a figure"}),
        output(**{"text/plain": "a bar", "application/vnd.jupyter.widget-view+json": {}}),
        {"output_type": "stream", "name": "stdout", "text": ["one\n"]},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# One"]},
        {"cell_type": "code", "source": ["1 < 2"], "outputs": outputs},
    ]
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    text, pictures = site.notebook(tmp_path / "one.ipynb")
    assert text.startswith("# One\n\n```python\n1 < 2\n```") and pictures == {
        "one_files/0.png": b"png"
    }
    assert '<div class="output">\n<b>&#36;1</b>\n<i>2</i>\n</div>' in text and "script" not in text
    assert "a bar" not in text and "```text\none\n```" in text  # progress is over


def test_the_landing_page_shows_figures_that_lead_on_under_the_titles_of_their_pages():
    made = {"index.md": "# ddlib\n\nx\n\n## Shown\n\ny\n\n## Commands\n\nz\n\n## More\n"}
    made |= {page: f"# About {page}\n\ntext" for page in site.THUMBNAILS.values()}
    assert "figures/" not in site._landing(made)  # none is stored
    text = site._landing(made | dict.fromkeys(site.THUMBNAILS, b"png"))
    for figure, page in site.THUMBNAILS.items():
        assert f"[![]({figure}){{ loading=lazy }}<br>About {page}]({page})" in text
        assert (ROOT / figure).is_file()
    assert text.index("## Shown") < text.index("## A look around") < text.index("## Commands")
    assert text.endswith("\n\nz\n\n## More\n")


def test_the_notebooks_stand_in_the_order_in_which_the_first_one_leads_to_them():
    path = site.guided_path()
    assert path[:3] == ["start_here", "dm", "frepo"]
    assert set(path) == {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")}
    made = {f"notebooks/{name}.md": "" for name in sorted(path)}
    (listed,) = (entry["Notebooks"] for entry in site.nav(made) if "Notebooks" in entry)
    assert listed == [f"notebooks/{name}.md" for name in path]


METHODS = sorted(path.stem for path in (ROOT / "docs/methods").glob("*.md"))
METHODS.remove("README")


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_and_its_notebooks_lead_to_one_another(name):
    text = (ROOT / "docs/methods" / f"{name}.md").read_text()
    text = site.relinked(text, f"methods/{name}.md")
    linked = re.findall(r"\[`notebooks/\w+\.ipynb`\]\(\.\./notebooks/(\w+)\.md\)", text)
    assert linked
    for notebook in linked:
        assert name in site._methods_by_notebook()[notebook]


@pytest.mark.parametrize(
    ("stem", "above", "notebook"),
    [
        ("memory_vs_unroll/steps", "One gradient against N", "memory_vs_unroll"),
        ("memory_vs_unroll/batch", "Memory at full width", "memory_vs_unroll"),
        ("memory_vs_unroll/classes", "Memory at full width", "memory_vs_unroll"),
        ("scaling/ipc", "One update against one size", "scaling"),
        ("dm/images_ipc10", "The images as they change", "dm"),
        ("dm/images_cifar10", "On photographs", "dm"),
        ("membership_inference/steps", "", "membership_inference"),
    ],
)
def test_a_figure_has_the_caption_of_the_cell_that_saves_it(stem, above, notebook):
    caption = site._caption(stem, site._captions())
    assert caption.startswith(above)
    assert caption.endswith(f"notebook [{notebook}](notebooks/{notebook}.md)")


def test_a_figure_that_no_cell_saves_has_its_name():
    assert site._caption("dm/memory_vs", site._captions()) == "memory vs"
    told = {'dd.plots.save(figure, f"a_{x}", p)': "any", 'dd.plots.save(figure, "a_b", p)': "one"}
    assert (site._caption("a_b", told), site._caption("a_c", told)) == ("one", "any")


def test_an_executed_notebook_that_is_older_than_its_text_is_named(tmp_path, monkeypatch):
    def cell(text, *tags):
        return {"cell_type": "code", "source": [text], "metadata": {"tags": list(tags)}}

    def write(folder, *cells):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "one.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))

    monkeypatch.setattr(site, "SOURCE", tmp_path)
    write(tmp_path / "notebooks", cell("a"))
    write(tmp_path / "results/notebooks/small", cell("b = 1", "injected-parameters"), cell("a"))
    assert site.stale(tmp_path / "results") == []
    write(tmp_path / "notebooks", cell("another"))
    (command,) = site.stale(tmp_path / "results")
    assert command == "ddlib reproduce --profile small --again --only one"
    (tmp_path / "results/notebooks/small").rename(tmp_path / "results/notebooks/kept")
    (command,) = site.stale(tmp_path / "results")
    assert command == "ddlib reproduce --only one, and copy it from smoke/ to kept/"


def test_a_build_without_results_or_into_a_strange_folder_is_one_sentence(tmp_path):
    with pytest.raises(DDError, match="no executed notebook in .*: run make reproduce"):
        site.build(tmp_path / "site", tmp_path / "results")
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DDError, match="holds something else than a site"):
        site.build(tmp_path, ROOT / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, read_once) -> Path:
    return site.build(tmp_path_factory.mktemp("pages") / "site", ROOT / "results").parent


@pytest.mark.slow
def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(built):
    pages = {path: path.read_text() for path in built.rglob("*.html")}
    names = {path.relative_to(built).as_posix() for path in pages}
    assert {f"{name}.html" for name in PAGES} <= names
    notebooks = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(notebooks) >= 16 and notebooks <= names
    broken = []
    for path, text in pages.items():
        assert 'name="viewport"' in text, path
        for target in re.findall(
            r'(?:<script[^>]*src|<link[^>]*href|<img[^>]*src)="([^"]+)"', text
        ):
            assert not re.match(r"(https?:)?//", target), f"{path} loads {target[:60]}"
        for target in re.findall(r'(?:href|src)="([^"#]+)', text):
            local = not re.match(r"[a-z]+:", target)
            if local and not (path.parent / target).exists() and path.name != "404.html":
                broken.append((path.name, target))
    assert broken == []
    sets = [text for path, text in pages.items() if path.parent.name == "sets"]
    titles = {re.search("<title>(.*)</title>", text)[1] for text in sets}
    assert len(titles) == len(sets) > 20  # the menu shows them
    method, notebook = (  # without the menus, which link everything
        (built / folder / "dm.html").read_text().partition("<article")[2].partition("</article")[0]
        for folder in ("methods", "notebooks")
    )
    assert 'href="../notebooks/dm.html"' in method and 'href="../methods/dm.html"' in notebook
    assert "DDFORMULA" not in "".join(pages.values()) and "<math" in method
    style = "".join(path.read_text() for path in built.rglob("*.css"))
    assert not re.search(r"url\((?:https?:)?//|@import", style)


# --- in a browser, from files, without a server

WIDE, PHONE = (1300, 900), (390, 844)
TITLES = (
    """return [...document.querySelectorAll('.md-search-result__item')].map(e => e.textContent)"""
)


def sized(browser, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", metrics | {"mobile": size == PHONE}
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_no_page_scrolls_sideways_or_complains(built, browser, size, tmp_path):
    sized(browser, size)
    for name in PAGES:
        browser.get(f"file://{built}/{name}.html")
        assert browser.get_log("browser") == [], name
        photograph(browser, size, name.replace("/", "_"), tmp_path)


def photograph(browser, size: tuple[int, int], name: str, folder: Path) -> None:
    """A screenshot in DDLIB_SCREENSHOTS, or in the test's own folder; the page is no wider than the window."""
    end = time.monotonic() + 5  # what slides in, slides over the edge
    while True:
        width, room = browser.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        if width <= room or time.monotonic() > end:
            break
        time.sleep(0.1)
    assert width <= room, f"{name} is {width} px wide at {room}"
    shot = Path(os.environ.get("DDLIB_SCREENSHOTS") or folder) / f"{name}_{size[0]}.png"
    assert browser.save_screenshot(str(shot)) and shot.stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_claims_are_filtered_by_paper_and_words(built, browser, size, tmp_path):
    sized(browser, size)
    browser.get(f"file://{built}/claims.html")
    rows = "return [...document.querySelectorAll('#claims tbody tr')].filter(r => !r.hidden)"
    every = browser.execute_script(f"{rows}.length")
    browser.execute_script(
        "const s = document.querySelector('.filter select[name=paper]'); s.value = 'FRePo';"
        "s.dispatchEvent(new Event('input'))"
    )
    papers = browser.execute_script(f"{rows}.map(r => r.dataset.paper)")
    assert 0 < len(papers) < every and set(papers) == {"FRePo"}
    photograph(browser, size, "claims_frepo", tmp_path)
    if size == WIDE:  # the verdicts stand in the window, without a move to the right
        edge = (
            "document.querySelector('#claims tbody tr:not([hidden])').getBoundingClientRect().right"
        )
        assert browser.execute_script(f"return {edge}") <= WIDE[0]
    box = browser.find_element("css selector", ".filter input")
    box.send_keys("cifar100")
    fewer = browser.execute_script(f"{rows}.map(r => r.textContent)")
    assert 0 < len(fewer) < len(papers) and all("CIFAR-100" in text for text in fewer)
    box.clear()
    browser.execute_script(
        "const s = document.querySelector('.filter select[name=verdict]'); s.selectedIndex = 1;"
        "s.dispatchEvent(new Event('input'))"
    )
    verdicts = browser.execute_script(f"{rows}.map(r => r.dataset.verdict)")
    assert 0 < len(verdicts) < len(papers) and "not attempted" not in verdicts


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_search_finds_a_word_without_a_server(built, browser, size, tmp_path):
    sized(browser, size)
    browser.get(f"file://{built}/index.html")
    if size == PHONE:
        browser.find_element("css selector", "label.md-header__button[for=__search]").click()
    box = browser.find_element("css selector", ".md-search__input")
    if size == WIDE:
        box.click()
    box.send_keys("adjoint")
    end = time.monotonic() + 60
    while not (found := browser.execute_script(TITLES)):
        assert time.monotonic() < end, "search found nothing"
        time.sleep(0.2)
    assert any("adjoint" in text.lower() for text in found)
    photograph(browser, size, "search_adjoint", tmp_path)
