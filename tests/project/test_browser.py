"""As a reader meets it: JupyterLab from `make lab`, notebooks run to the end in a real browser, a widget moved."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds a notebook may take: over ten times what it takes on two idle cores
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="needs selenium: pip install 'ddlib[test]'"
)
exceptions = pytest.importorskip("selenium.common.exceptions")
pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'ddlib[lab]'")
pytestmark = pytest.mark.slow

VIEWS = ("images", "evolution", "labels", "accuracy", "embedding")  # and neighbours, shown first
PROMPTS = (
    "return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)"
)
ERRORS = """return [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')].map(
    e => e.innerText)"""
IMAGES = "return [...document.querySelectorAll('.jp-OutputArea img')].filter(e => e.naturalWidth > 50).length"
PIXELS = """const image = document.querySelectorAll('img.widget-image')[arguments[0]];
const canvas = document.createElement('canvas');
if (!image || !image.naturalWidth) return null;
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
canvas.getContext('2d').drawImage(image, 0, 0);
return canvas.toDataURL()"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a notebook in a JupyterLab that was started as the Makefile does, on a copy of notebooks/."""
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    dm = (
        folder / "notebooks" / "dm.ipynb"
    )  # whose records explore.ipynb has made, but for other networks
    text = dm.read_text()
    assert "cross = True" in text
    dm.write_text(text.replace("cross = True", "cross = False"))
    settings = (
        folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text(
        json.dumps({"windowingMode": "none"})
    )  # cells out of sight stay in the page, to be looked at
    recipe = re.search(
        r"^lab:.*\n\t\$\(VENV\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1].split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
        "DDLIB_FIGURES",
        "DDLIB_DATA",
        "DDLIB_CACHE",
    )
    own = {
        name: str(folder / name.lower()) for name in names
    }  # the reader's settings and figures stay as they are, and there is no data set on the machine
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                *recipe,
                "--no-browser",
                "--allow-root",
                f"--port={port}",
                "--ip=127.0.0.1",
                f"--IdentityProvider.token={token}",
            ],
            cwd=folder,
            env=os.environ | own,
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (
                    folder / "log"
                ).read_text()[-2000:]
                time.sleep(0.5)
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb?reset&token={token}"
    finally:
        server.terminate()  # which ends its kernels too
        server.wait(60)


def until(browser, condition, limit: float = 60):
    """What `condition` gives once it is true."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, (
            f"nothing after {limit} s; prompts: {browser.execute_script(PROMPTS)}"
        )
        time.sleep(0.3)
    return found


def run_all(browser, address: str) -> None:
    """Open a notebook, choose Run > Run All Cells from the menu and wait until the last cell has its number."""
    browser.get(address)
    menu = "//div[contains(@class, 'lm-MenuBar-itemLabel') and text()='Run']"
    # Before the kernel is there, the menu asks for one.
    ready = "//*[contains(@class, 'jp-Notebook-ExecutionIndicator') and @data-status='idle']"
    until(browser, lambda: browser.find_elements("xpath", ready), 120)
    item = "li[data-command='runmenu:run-all']"
    # Of "Select Kernel", which the menu asks where the kernel is slow to come.
    kernel = ".jp-Dialog button.jp-mod-accept"

    def click(selector: str) -> None:
        with suppress(exceptions.WebDriverException):  # not there yet, or gone already
            browser.find_element("css selector", selector).click()

    def started() -> bool:
        """Choose the item and see whether a cell waits for its turn: on a busy machine a click may be lost."""
        until(browser, lambda: browser.find_elements("xpath", menu))[0].click()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            click(item)
            click(kernel)
            if any(text != "[ ]:" for text in browser.execute_script(PROMPTS)):
                return True
            time.sleep(0.3)
        return False

    until(browser, started, 180)

    def finished() -> bool:
        return browser.execute_script(ERRORS) or all(
            re.fullmatch(r"\[\d+\]:", text) for text in browser.execute_script(PROMPTS)
        )

    until(browser, finished, LIMIT)
    assert browser.execute_script(ERRORS) == []
    prompts = browser.execute_script(PROMPTS)
    assert prompts == [f"[{k + 1}]:" for k in range(len(prompts))]


def test_explore_runs_to_the_end_and_a_moved_widget_changes_its_picture(browser, lab):
    run_all(browser, lab("explore"))
    assert browser.execute_script(IMAGES) >= 6
    kept, made = 0, 1  # the panel of the kept sets, and that of the digits

    def pixels(panel: int) -> str:
        return browser.execute_script(PIXELS, panel)

    def changed(panel: int, act) -> str:
        """The panel's picture after an action, once it is another."""
        before = pixels(panel)
        act()
        return until(browser, lambda: (now := pixels(panel)) != before and now)

    def show(panel: int, view: str):
        button = f"//button[contains(@class, 'widget-toggle-button') and text()='{view}']"
        return browser.find_elements("xpath", button)[panel].click

    # FRePo's set, which needs no CIFAR-10 here: every view draws, and none complains.
    seen = {until(browser, lambda: pixels(kept))}
    for view in VIEWS:
        seen.add(changed(kept, show(kept, view)))
        note = browser.find_elements("css selector", ".widget-html-content")[kept].text
        assert note.startswith("Run(frepo-folder_cifar10"), note
    assert len(seen) == 1 + len(VIEWS)
    slider = browser.find_elements("css selector", ".widget-hslider .noUi-handle")[made]
    first = until(browser, lambda: pixels(made))
    assert changed(made, lambda: slider.send_keys(webdriver.Keys.ARROW_LEFT)) != first
    assert changed(made, lambda: slider.send_keys(webdriver.Keys.ARROW_RIGHT)) == first
    assert changed(made, show(made, "embedding")) != first


@pytest.mark.parametrize(("name", "pictures"), [("start_here", 2), ("dm", 4)])
def test_a_notebook_runs_to_the_end(browser, lab, name, pictures):
    run_all(browser, lab(name))
    assert browser.execute_script(IMAGES) >= pictures
