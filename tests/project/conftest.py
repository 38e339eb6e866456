"""A headless Chromium, for tests that look at pages as a reader does, and the records behind all pages, read once."""

import shutil
from functools import cache

import pandas as pd
import pytest

from ddlib.report import claims, docs, tables


@pytest.fixture(scope="module")
def read_once():
    """Every page asks for the same records, for the figures beside them and for the verdicts on all claims."""
    known, judge = {}, claims.judge

    def judged(rows: pd.DataFrame, results=None) -> pd.DataFrame:
        if rows is not claims.load():
            return judge(rows, results)
        if results not in known:
            known[results] = judge(rows, results)
        return known[results].copy()

    with pytest.MonkeyPatch.context() as patch:
        owners = {"stored": tables, "printed_figure": tables, "_runs": docs, "load": claims}
        for name, owner in owners.items():
            patch.setattr(owner, name, cache(getattr(owner, name)))
        patch.setattr(claims, "judge", judged)
        yield


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    service = shutil.which("chromedriver")
    if not (program and service):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield driver
    driver.quit()
