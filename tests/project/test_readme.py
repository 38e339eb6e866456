"""README.md's figures are those of the committed records, its commands exist, and it can be read in a minute."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ddlib as dd
from ddlib.methods.coreset import KINDS
from ddlib.report import docs
from tests import forks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("path", docs.pages(), ids=lambda path: path.name)
def test_what_comes_from_the_records_is_what_they_say(path):
    # The kept profiles alone: smoke's records are made on each machine anew, and are not committed.
    text = path.read_text()
    assert docs.fill(text, ROOT / "results") == text, f"{path.name}: run python -m ddlib docs"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_page_of_figures_has_tables_from_the_records(page):
    assert docs.BLOCK.search((ROOT / page).read_text())


@pytest.mark.parametrize("name", sorted(dd.METHODS))
def test_the_docstring_of_a_method_says_what_it_attains(name):
    cls = dd.METHODS[name]
    of_class = [other for other in dd.METHODS if dd.METHODS[other] is cls]  # all coresets are one
    assert of_class == [said for _, said in docs.ATTAINS.findall(cls.__doc__)]


LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
GUIDES = [ROOT / f"docs/{name}.md" for name in ("data", "layout", "results", "speed", "glossary")]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *GUIDES,
    *(ROOT / "docs/guides").glob("*.md"),
]


def sentences(text: str) -> list[str]:
    """The sentences of a page's paragraphs and lists: no code, tables, pictures, headings or link targets."""
    text = re.sub(
        r"```.*?```|<!--.*?-->|!?\[!?\[?[^\]]*\]\([^)]*\)\]\([^)]*\)", "", text, flags=re.DOTALL
    )
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = LINK.sub("]", text)
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)
    prose = [block for block in blocks if block.strip() and block.strip()[0] not in "#|"]
    parts = [re.split(r"(?<=[.:!?])\s+", " ".join(block.split())) for block in prose]
    return [part for block in parts for part in block if re.search(r"\w", part)]


def test_the_readme_is_short_and_its_sentences_are_too():
    assert len(README.split()) < 900
    lengths = [len(sentence.split()) for sentence in sentences(README)]
    assert len(lengths) > 20 and sum(lengths) / len(lengths) < 18
    assert max(lengths) <= 40, max(sentences(README), key=lambda s: len(s.split()))


def test_a_sentence_ends_at_its_stop_and_code_is_none():
    text = "# Title\n\nOne two. Three [four](five.md)!\n\n```bash\nsix seven\n```\n\n| a | b |\n\n- eight"
    assert sentences(text) == ["One two.", "Three [four]!", "- eight"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_picture_resolves(page):
    targets = {target for target, _ in LINK.findall(page.read_text())}
    here = {target for target in targets if not target.startswith("https://")}
    missing = [target for target in here if not (page.parent / target).exists()]
    assert not missing
    # Offline, an address is checked by its form: the papers are all on arXiv.
    papers = {target for target in targets - here if "arxiv" in target}
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", paper) for paper in papers)


def test_the_readme_shows_pictures_that_load_quickly():
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
    pictures = [(words, ROOT / target) for words, target in shown if not target.endswith(".svg")]
    assert len(pictures) >= 2
    for words, path in pictures:
        assert len(words.split()) >= 5, "a picture is described for those who do not see it"
        assert path.stat().st_size < 300_000


def test_the_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, licence = (
        (ROOT / f"docs/images/{name}.svg").read_text() for name in ("python", "licence")
    )
    assert project["requires-python"].removeprefix(">=") in python
    assert project["license"] in licence and project["license"] in (ROOT / "LICENSE").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert (
        f"version: {project['version']}" in citation
        and f"license: {project['license']}" in citation
    )


def test_a_reader_finds_every_notebook_and_method_from_the_front_page():
    linked = {Path(target).name for target, _ in LINK.findall(README)}
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} <= linked


@pytest.mark.parametrize("name", sorted(set(dd.METHODS) - set(KINDS)))
def test_the_glossary_says_what_a_methods_name_stands_for(name):
    word = (ROOT / f"docs/methods/{name}.md").read_text().partition(":")[0].removeprefix("# ")
    (line,) = re.findall(
        rf"^\| {re.escape(word)} \| (.+) \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE
    )
    paper = dd.METHODS.registration(name).paper.removeprefix("arXiv ")
    assert f"(https://arxiv.org/abs/{paper})" in line


def test_the_guide_to_a_method_of_ones_own_works(tmp_path):
    text = (ROOT / "docs/guides/add_a_method.md").read_text()
    script = tmp_path / "mine.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    done = forks.run([runpy.run_path, str(script)], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_subcommand_named_exists():
    for command in sorted(set(re.findall(r"python -m ddlib (\w+)", README))):
        done = subprocess.run(
            [sys.executable, "-m", "ddlib", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, command


def test_the_speed_figures_are_those_of_the_bench_rows():
    bench = ROOT / "results" / "bench"
    parts = ("dm", "gradient", "kmeans", "trajectory")  # what has rows of seconds
    rows = [row for part in parts for row in json.loads((bench / f"{part}_cpu.json").read_text())]
    speed = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    steps = [row for row in rows if row["what"] == "DM iteration" and row["classes"] == 10]
    assert [row["ipc"] for row in steps] == [1, 10, 50]
    for key in ("seconds", "times faster", "times faster, heap kept"):
        assert " / ".join(f"{row[key]:.1f}" for row in steps) in speed, key
    choice, epyc = (
        {row["what"].split(": ")[-1]: row for row in json.loads((bench / name).read_text())[1:]}
        for name in ("dream_cpu.json", "dream_epyc_cpu.json")
    )
    plain, before, compiled = (choice[way] for way in ("plain", "channels last", "compiled"))
    assert f"{compiled['seconds']:.1f} compiled, {plain['seconds']:.1f} plain" in speed
    assert f"{compiled['times faster']:.2f} times faster (median over turns)" in speed
    assert f"channels_last, {before['times faster']:.2f} times" in speed
    assert compiled["same images"] == epyc["compiled"]["same images"] == 1
    assert f"gains less, {epyc['compiled']['times faster']:.2f} times" in speed
    low = epyc["compiled, bf16"]
    assert f"{low['times faster']:.2f} times, and {low['same images']:.0%}" in speed
    (score,) = (row for row in rows if row["what"].startswith("evaluation"))
    assert f"{score['times faster, heap kept']:.2f} times a DataLoader loop" in speed
    assert f"({score['times faster']:.2f} as the C" in speed
    gains = []
    for ipc in (1, 10):
        sets = json.loads((bench / "precision_cpu.json").read_text())["sets"].items()
        times = [row["cpu seconds"] for name, row in sets if f"dm-folder_cifar10-ipc{ipc}-" in name]
        gains.append(sum(t["float32"] for t in times) / sum(t["bf16"] for t in times))
    assert "IPC 1 / 10 takes {:.1f} / {:.1f} times less".format(*gains) in speed
    outer = {row["what"]: row for row in rows if row["what"].startswith("outer step")}
    exact = outer["outer step, adjoint"]
    assert f"{exact['over tesla']:.2f} times TESLA's and {exact['over unroll']:.2f} times" in speed
    held = f"{exact['graph MiB']:.0f} MiB (and {exact['stored MiB']:.0f} MiB of weight vectors)"
    whole = outer["outer step, unroll"]["graph MiB"]
    assert f"{held} against {whole:.0f} MiB" in speed
    found = [row for what, row in outer.items() if "compiled" in what]
    assert len(found) == 9
    for row in found:
        assert f"| {row['over tesla']:.2f} / {row['over unroll']:.2f} |" in speed, row["what"]
    with_gib = [row for row in found if "1 GiB" in row["what"]]
    most = max(row["over tesla"] for row in with_gib)
    assert f"with 1 GiB takes {most:.2f} of its time or less" in speed
    (long,) = (row for row in with_gib if row["steps"] == 50)
    assert f"50 steps and 1 GiB it takes {long['over unroll']:.2f} of its time" in speed


def test_the_figures_of_lock_step_and_of_ray_are_those_of_the_records():
    bench = ROOT / "results" / "bench"
    dm, ray = (json.loads((bench / f"{part}_cpu.json").read_text()) for part in ("dm", "cluster"))
    speed = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    (row,) = (row for row in dm if "lock step" in row["what"])
    alone = [row[f"seconds, IPC {ipc} alone"] for ipc in (1, 10, 50)]
    assert f"{row['seconds']:.1f} s for one iteration of all three" in speed
    assert "they take {:.1f}, {:.1f} and {:.1f} s alone".format(*alone) in speed
    assert row["seconds"] < 1.3 * alone[-1]
    page = " ".join((ROOT / "docs" / "guides" / "many_machines.md").read_text().split())
    runs, experts = ray[1:]
    assert (
        f"took {runs['seconds on Ray']:.0f} s where `ddlib queue` took {runs['seconds']:.0f} s"
        in page
    )
    assert f"{runs['times faster']:.2f} times faster, {100 * runs['overhead']:.0f} % more" in page
    assert f"took {experts['seconds on Ray']:.0f} s against {experts['seconds']:.0f} s" in page
    assert f"s: {experts['times faster']:.2f} times. Every run" in page


def test_the_figures_of_a_large_set_are_those_of_its_record():
    (row,) = json.loads((ROOT / "results" / "bench" / "large_cpu.json").read_text())
    page = (ROOT / "docs" / "data.md").read_text().replace("\n", " ")
    rate = row["images decoded per second"]
    for words in (
        f"{row['images']:,} JPEG files",
        f"{row['GB']:.1f} GB decoded, at {rate:,.0f} images per second",
        f"{row['images per second']:,.0f} images per second, in {row['anonymous MiB']:.0f} MiB of",
        f"{row['mapped MiB']:.0f} MiB of mapped pages",
        f"would take {1_281_167 / rate / 60:.0f} minutes",
    ):
        assert words in page, words
    assert row["limit MiB"] < 1.5e9 / 2**20 and row["cores"] == 1
    assert 0.3 < row["share decoded before it"] < 0.4


def test_the_whole_training_set_has_a_row_where_it_was_kept(results):
    block = "<!-- whole:begin (python -m ddlib docs) -->\n<!-- whole:end -->"
    assert "No record yet." in docs.fill(block, results)
    for profile in ("smoke", "paper"):
        spec = dd.resolve("random", "digits", 1, profile, eval_epochs=1, backbone="convnet:width=8")
        (row,) = dd.trajectories.full(spec, device="cpu").to_dict("records")
    rows = docs.fill(block, results).splitlines()[3:-1]
    assert rows == [
        f"| digits | dsa | 2 | float32 | 2 | none | {row['accuracy']:.1f} ± {row['std']:.1f} |"
    ]
