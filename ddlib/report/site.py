"""The pages that come from records, for MkDocs: notebooks, claims, figures, kept sets, reference. Nothing is run.

`docs/` holds the pages that people write, `mkdocs.yml` says how all of them look, and `docs/hooks.py` hands these
functions to MkDocs with the Material theme: kept tools for navigation, search, phones and dark mode. Formulas become
MathML, which browsers draw themselves, so a page needs neither a network nor a script from elsewhere.
"""

from __future__ import annotations

import base64
import functools
import html
import inspect
import itertools
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ..core import DDError, path_of
from ..files import SOURCE, CannotWrite, figures_folder, results_folder
from . import claims, explore, plots, tables
from .docs import fill
from .slim import is_progress, read

MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|\$(\S[^$\n]*?)\$", re.DOTALL)
# Code, which stays; a Markdown link or picture; a link or picture as a tag.
LINK = re.compile(
    r"```.*?```"
    r"|(?P<image>!?)\[(?P<shown>!\[[^\[\]]*\]\([^)\s]+\)|[^\[\]]*)\]\((?P<target>[^)\s]+)\)"
    r"|`[^`\n]*`"
    r'|\b(?P<name>src|href)="(?P<address>[^"]+)"',
    re.DOTALL,
)
# What latex2mathml does not know -> the same in words that it knows.
SPELLINGS = {r"\tfrac": r"\frac", r"\arg": r"\mathrm{arg}", r"\|": "‖"}
MARKER = ".ddlib-site"  # a folder with this file may be written anew
FRONT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# The name under which a notebook's cell saves a figure.
SAVED = re.compile(r'plots\.save\(\s*\w+,\s*f?"([^"]+)"')
# Of a notebook that was executed in several profiles. `kept` has the embedded digits' of those that no other has.
BEST = ("paper", "small", "smoke", "kept")
# Figures of the landing page -> the page that each leads to.
THUMBNAILS = {
    "figures/small/frepo/images_ipc1.png": "notebooks/frepo.md",
    "figures/small/accuracy_vs_ipc/ours.png": "notebooks/accuracy_vs_ipc.md",
    "figures/small/memory_vs_unroll/steps.png": "notebooks/memory_vs_unroll.md",
    "figures/small/claims/verdicts.png": "claims.md",
}
Pages = dict[str, str | bytes]  # path below the site -> Markdown, or a file's bytes


def build(out: str | Path | None = None, results: str | Path | None = None) -> Path:
    """Write the site and return its first page; a `DDError` where nothing is stored or `out` holds other files."""
    if not (SOURCE / "mkdocs.yml").is_file():
        raise DDError(f"site needs the source checkout of ddlib: {SOURCE} has no mkdocs.yml")
    try:
        from mkdocs.commands.build import build as write
        from mkdocs.config import load_config
    except ImportError:
        raise DDError("site needs MkDocs: pip install 'ddlib[docs]', or make site") from None
    out = path_of("the folder of the site", out or SOURCE / "site")
    executed(results)
    _mark(out)
    config = load_config(str(SOURCE / "mkdocs.yml"), site_dir=str(out.resolve()))
    config.extra["results"] = str(results_folder(results))
    config.plugins.on_startup(command="build", dirty=False)
    write(config)
    return out / "index.html"


def _mark(out: Path) -> None:
    """Make the site's folder and mark it: a site that is killed half way is known as one by the next call."""
    try:
        strange = out.exists() and not (out / MARKER).is_file() and any(out.iterdir())
        if not strange:
            out.mkdir(parents=True, exist_ok=True)
            (out / MARKER).touch()
    except OSError as error:
        raise CannotWrite(
            f"cannot write a site into {out}: {error.strerror}; choose another folder with --out"
        ) from None
    if strange:
        raise DDError(f"{out} holds something else than a site: choose another folder with --out")


def executed(results: str | Path | None = None) -> dict[str, tuple[str, Path]]:
    """Notebook's name -> the best folder of `BEST` that has it executed, and the file; none at all is a `DDError`."""
    folder = results_folder(results) / "notebooks"
    found = {
        path.stem: (profile, path)
        for profile in reversed(BEST)
        for path in sorted((folder / profile).glob("*.ipynb"))
    }
    if not found:
        raise DDError(
            f"there is no executed notebook in {folder}: run make reproduce PROFILE=smoke first"
        )
    return found


def stale(results: str | Path | None = None) -> list[str]:
    """For every executed notebook whose text has changed since, the command that executes it again."""
    return [
        f"ddlib reproduce --only {name}, and copy it from smoke/ to kept/"
        if folder == "kept"
        else f"ddlib reproduce --profile {folder} --again --only {name}"
        for name, (folder, path) in executed(results).items()
        if _changed_since(path)
    ]


def _changed_since(path: Path) -> bool:
    """Whether the notebook that was executed has other cells today."""

    def sources(cells: list[dict]) -> list[str]:
        own = (cell for cell in cells if "injected-parameters" not in _tags(cell))
        return ["".join(cell["source"]) for cell in own]

    today = SOURCE / "notebooks" / path.name
    return today.is_file() and sources(read(path)["cells"]) != sources(read(today)["cells"])


def _tags(cell: dict) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def pages(results: str | Path | None = None) -> Pages:
    """Every page that is not written by hand, by its path."""
    made = {page: (SOURCE / file).read_text() for file, page in FRONT.items()}
    made |= _notebooks(results)
    made["claims.md"] = _claims(results)
    made |= _gallery()
    made |= _sets(results)
    made["reference/api.md"] = _api()
    made["reference/command_line.md"] = _command_line()
    made["index.md"] = _landing(made)
    return made


def _landing(made: Pages) -> str:
    """README with four figures behind its first section, each a link to its page under that page's title."""
    shown = [
        f"[![]({figure}){{ loading=lazy }}<br>{made[page].partition(chr(10))[0].strip('# ')}]({page})"
        for figure, page in THUMBNAILS.items()
        if figure in made
    ]
    strip = "\n".join(shown)
    lead, first, rest = made["index.md"].split("\n## ", 2)
    return (
        f"{lead}\n## {first}\n## A look around\n\n"
        f'<div class="thumbnails" markdown>\n\n{strip}\n\n</div>\n\n'
        "All figures: [gallery](gallery.md). All distilled images, with a card each: [kept sets](sets/index.md). "
        f"[Every claim](claims.md).\n\n## {rest}"
    )


def nav(made: Pages) -> list:
    """The site's order: where to begin, methods, notebooks, results, reference."""
    docs = SOURCE / "docs"
    written = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]

    def of(folder: str, order: Sequence[str] = ()) -> list[str]:
        order = ["index", "README", *order]
        names = sorted(path for path in {*written, *made} if path.endswith(".md"))
        inside = [path for path in names if path.rpartition("/")[0] == folder]
        return sorted(inside, key=lambda path: _place(Path(path).stem, order))

    front = _linked((SOURCE / "README.md").read_text().lower(), "md")
    methods = _linked((docs / "methods" / "README.md").read_text(), "md")
    results = ["results.md", "claims.md", "gallery.md"]
    rest = [path for path in of("", front) if path not in ("index.md", *results)]
    return [
        {"Home": "index.md"},
        {"Guides": [*of("guides", front), *rest]},
        {"Methods": of("methods", methods)},
        {"Notebooks": of("notebooks", guided_path())},
        {"Results": [*results, {"Kept sets": of("sets")}]},
        {"Reference": of("reference")},
    ]


def guided_path() -> list[str]:
    """The notebooks in the order in which start_here.ipynb leads to them, itself the first."""
    cells = read(SOURCE / "notebooks" / "start_here.ipynb")["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return ["start_here", *_linked("".join(texts), "ipynb")]


def _linked(text: str, suffix: str) -> list[str]:
    """The files of this kind to which a text leads, by name, in its order."""
    return list(dict.fromkeys(re.findall(rf"\]\((?:[\w/]+/)?(\w+)\.{suffix}\)", text)))


def _place(name: str, order: Sequence[str]) -> int:
    """Where a name stands in an order; behind all of it where it does not."""
    return order.index(name) if name in order else len(order)


# --- text: links and formulas


def source_of(page: str) -> Path:
    """The file in the checkout that a page stands for, from which its links lead."""
    for file, front in FRONT.items():
        if page == front:
            return SOURCE / file
    if page.startswith("notebooks/"):
        return SOURCE / Path(page).with_suffix(".ipynb")
    return SOURCE / "docs" / page


def page_of(source: Path) -> str | None:
    """The page, or the picture, that shows a file of the checkout; None where none does."""
    if not source.is_relative_to(SOURCE) or not source.is_file():
        return None
    path = source.relative_to(SOURCE).as_posix()
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        return str(Path(path).with_suffix(".md"))
    if path.startswith("figures/"):
        return path if path.endswith((".png", ".gif")) else None
    return FRONT.get(path)


def relinked(text: str, page: str, known: Collection[str] = ()) -> str:
    """Links between files of the checkout as links between pages; those to files without a page as plain text.

    `known` are the paths of made pages and pictures: a link to one of them is right as it stands.
    """
    source, folder = source_of(page), os.path.dirname(page)

    def moved(target: str) -> str | None:
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return target
        if os.path.normpath(os.path.join(folder, path)) in known:
            return target
        found = page_of(Path(os.path.normpath(source.parent / path)))
        if found is None:
            return None
        return os.path.relpath(found, folder or ".") + (f"#{anchor}" if anchor else "")

    def change(match: re.Match) -> str:
        if match["target"]:
            target = moved(match["target"])
            shown = LINK.sub(change, match["shown"])  # a picture may be the link
            return shown if target is None else f"{match['image']}[{shown}]({target})"
        if match["address"]:
            target = moved(match["address"])
            return match[0] if target is None else f'{match["name"]}="{_as_html(target)}"'
        return match[0]

    if page.startswith("methods/"):
        text = re.sub(r"(?<!\[)`(notebooks/\w+\.ipynb)`", r"[`\1`](../../\1)", text)
    return LINK.sub(change, text)


def _as_html(target: str) -> str:
    """A page in a raw tag, which MkDocs leaves alone, by the name that it will have."""
    return re.sub(r"\.md(#|$)", r".html\1", target)


def with_tokens(text: str, formulas: list[str]) -> str:
    """The text with a word in place of each formula, which Markdown leaves alone; `formulas` takes their MathML."""

    def token(match: re.Match) -> str:
        if match[1]:
            return match[1]
        formulas.append(formula(match[2] or match[3], bool(match[2])))
        return f"DDFORMULA{len(formulas) - 1}X"

    return MATH.sub(token, text)


def with_formulas(page: str, formulas: list[str]) -> str:
    return re.sub(r"DDFORMULA(\d+)X", lambda match: formulas[int(match[1])], page)


@functools.cache
def formula(tex: str, display: bool) -> str:
    """A formula as MathML."""
    from latex2mathml.converter import convert

    plain = tex.strip()
    for ours, known in SPELLINGS.items():
        plain = plain.replace(ours, known)
    return convert(plain, display="block" if display else "inline")


# --- pages


def _notebooks(results: str | Path | None) -> Pages:
    """Every notebook as it was executed in its best profile, else as it stands, and a list of all."""
    done, made, rows = executed(results), {}, []
    methods, order = _methods_by_notebook(), guided_path()
    paths = sorted((SOURCE / "notebooks").glob("*.ipynb"))
    for path in sorted(paths, key=lambda path: _place(path.stem, order)):
        _, file = done.get(path.stem, ("", path))
        text, pictures = notebook(file)
        title, _, body = text.partition("\n")
        profile, told = _execution(file)
        pages_of = [f"[{name}](../methods/{name}.md)" for name in methods.get(path.stem, ())]
        about = (
            f" Today's records, and how it is built here: {', '.join(pages_of)}."
            if pages_of
            else ""
        )
        made[f"notebooks/{path.stem}.md"] = f'{title}\n\n!!! note ""\n    {told}{about}\n\n{body}'
        made |= {f"notebooks/{name}": data for name, data in pictures.items()}
        rows.append(
            f"| {len(rows) + 1} | [{path.stem}]({path.stem}.md) | {title.strip('# ')} | {profile} |"
        )
    table = "\n".join(rows)
    made["notebooks/index.md"] = (
        "# Notebooks\n\nIn the order in which [start_here](start_here.md) leads to them.\n\n"
        f"| | notebook | what it shows | profile |\n| --- | --- | --- | --- |\n{table}\n"
    )
    return made


def _execution(path: Path) -> tuple[str, str]:
    """The profile of a notebook as papermill executed it, and a sentence that says so."""
    about = read(path)["metadata"].get("papermill", {})
    if not about:
        return "not executed", f"Not executed yet: `ddlib reproduce --only {path.stem}`."
    profile = about.get("parameters", {}).get("profile", "smoke")
    told = f"As executed in the `{profile}` profile on {about['end_time'][:10]}."
    return profile, f"{told} The text has changed since." if _changed_since(path) else told


def _methods_by_notebook() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for page in sorted((SOURCE / "docs" / "methods").glob("*.md")):
        for name in dict.fromkeys(re.findall(r"notebooks/(\w+)\.ipynb", page.read_text())):
            if page.stem != "README":
                found.setdefault(name, []).append(page.stem)
        found.setdefault(page.stem, [page.stem])
    return found


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its pictures by file name."""
    cells = read(path)["cells"]
    parts, pictures = [], {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_fenced(source, "python"))
        for output in itertools.filterfalse(is_progress, cell.get("outputs", [])):
            parts.append(_output(output, path.stem, pictures))
    text = "\n\n".join(filter(None, parts))
    return text if text.startswith("#") else f"# {path.stem}\n\n{text}", pictures


# What is kept of a notebook's HTML: these elements without attributes, which can run and load nothing.
TAGS = "table|caption|thead|tbody|tfoot|tr|th|td|details|summary|pre|code|p|div|span|br|b|i|em|strong|sub|sup"
ELEMENTS = re.compile(
    r"<(script|style|iframe|object|embed)\b.*?(</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE
)
TAG = re.compile(rf"<(?:(/?)({TAGS})\b|[/!a-z])[^<>]*>", re.IGNORECASE)


def tame(html: str) -> str:
    """A table or a text of a notebook's output, without what would run or load something."""
    plain = TAG.sub(
        lambda tag: f"<{tag[1]}{tag[2].lower()}>" if tag[2] else "", ELEMENTS.sub("", html)
    )
    return re.sub(rf"<(?!/?(?:{TAGS})>)", "&lt;", plain)


def _output(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell: its picture, its table, else its text; an error is left to the notebook's own tests."""
    if output["output_type"] == "stream":
        return _fenced("".join(output.get("text", "")).rstrip(), "text")
    data = output.get("data", {})
    if "image/png" in data:
        file = f"{name}_files/{len(pictures)}.png"
        pictures[file] = base64.b64decode("".join(data["image/png"]))
        return f"![A figure of this notebook]({file})"
    if "text/html" in data:
        body = tame("".join(data["text/html"]))
        body = re.sub(r"\n\s*\n", "\n", body).replace("$", "&#36;")
        body = body.replace(" ± ", "&nbsp;±&nbsp;")
        return f'<div class="output">\n{body}\n</div>'
    text = "".join(data.get("text/plain", ""))
    return _fenced(text, "text") if text else ""


def _fenced(text: str, language: str) -> str:
    """The text as a block of code, which no backticks in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _claims(results: str | Path | None) -> str:
    """Every claim as one table, which docs/javascripts/filter.js filters by paper, verdict and words."""
    judged = claims.judge(claims.load(), results)
    judged = judged.sort_values("kind", key=lambda kinds: kinds == "not attempted", kind="stable")
    papers = claims.papers()
    shown = claims.shown(judged)
    shown["dataset"] = shown.dataset.map(plots.short)
    elsewhere = shown.network.where(shown.network.str.contains("→"), "")
    shown["what"] = (shown.what + " " + elsewhere).str.strip()
    columns = ["where", "what", "dataset", "IPC", "paper", "ours", "verdict"]
    rows = []
    for row, kind, paper in zip(
        shown[columns].itertuples(index=False), judged.kind, judged.paper, strict=True
    ):
        title = claims.short_title(paper)
        cells = "".join(f"<td>{_cell(value)}</td>" for value in row)
        facts = f'data-paper="{html.escape(title)}" data-verdict="{html.escape(kind)}"'
        rows.append(f"<tr {facts}><td>{html.escape(title)}</td>{cells}</tr>")
    head = "".join(
        f"<th>{name}</th>" for name in ["paper", *columns[:-3], "printed", *columns[-2:]]
    )
    listed = "\n".join(
        f"- **{facts['title']}**, {facts['venue']}, [arXiv {paper}](https://arxiv.org/abs/{paper}); version "
        f"read: {facts['version']}; [how it is built here](methods/{facts['page']}.md)"
        for paper, facts in papers.items()
    )
    counts = tables.as_markdown(claims.by_verdict(judged))
    table = "\n".join(rows)
    return (
        f"# Every claim, and what became of it\n\nA claim is one figure of a paper's table. "
        f"[The rule](results.md#how-a-verdict-is-given) behind the verdicts is fixed; "
        f"[claims](notebooks/claims.md) says why the rest was not attempted.\n\n{counts}\n\n{claims.from_memory()}\n\n"
        f'<div class="filter" data-table="claims"></div>\n<div class="output">\n<table id="claims" class="claims">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{table}\n</tbody></table>\n</div>\n\n"
        f"## The papers\n\n{listed}\n"
    )


def _cell(value: object) -> str:
    text = html.escape(str(value)).replace("$", "&#36;")
    return text.replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")


def _gallery() -> Pages:
    """Every kept figure with what its notebook says above it."""
    folder = figures_folder()
    told, made, parts = _captions(), {}, []
    for path in sorted(p for p in folder.glob("*/**/*") if p.suffix in (".png", ".gif")):
        profile, _, stem = path.relative_to(folder).with_suffix("").as_posix().partition("/")
        name = f"figures/{profile}/{stem}{path.suffix}"
        made[name] = path.read_bytes()
        if profile in BEST:
            words = stem.replace("/", ": ").replace("_", " ")
            parts.append(
                f"<figure markdown>\n[![{words}]({name}){{ loading=lazy }}]({name})\n"
                f"<figcaption markdown>{_caption(stem, told)}, `{profile}` profile</figcaption>\n</figure>"
            )
    shown = "\n\n".join(parts) or "No figure is stored: `ddlib reproduce` makes them."
    made["gallery.md"] = f"# Gallery\n\n{shown}\n"
    return made


def _captions() -> dict[str, str]:
    """The code of every notebook cell -> where it stands and the sentence above it."""
    told = {}
    for path in sorted((SOURCE / "notebooks").glob("*.ipynb")):
        above = ""
        for cell in read(path)["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                headings = re.findall(r"^#+ (.+)", source, re.MULTILINE)
                above = headings[-1] if headings else above
            elif above:
                told[source] = f"{above}: notebook [{path.stem}](notebooks/{path.stem}.md)"
    return told


def _caption(stem: str, told: dict[str, str]) -> str:
    """The caption of the cell that saves a figure of this name; of several with {}, that which spells out most."""
    fits = {}
    for source, caption in told.items():
        for name in SAVED.findall(source):
            spelt = re.split(r"\{[^{}]*\}", name)
            if re.fullmatch(".+".join(map(re.escape, spelt)), stem):
                fits[len("".join(spelt))] = caption
    return fits[max(fits)] if fits else stem.rpartition("/")[2].replace("_", " ")


def _sets(results: str | Path | None) -> Pages:
    """A card and a picture for each kept set on real images, and a page of all."""
    from .card import card, picture

    made, parts = {}, []
    for profile in claims.KEPT:
        for (dataset, method, ipc), run in explore.choices(tables.stored(results, profile)).items():
            name = run.path.stem
            drawn = picture(run)
            shown = f"![The images, a column a class]({name}.png)" if drawn else ""
            text = card(run, pictures=shown).split("---\n", 2)[2].lstrip()
            label = f"{method}, IPC {ipc}: {plots.place(dataset, profile)}"
            head = (
                f"---\ntitle: {json.dumps(label)}\n---\n\n"  # two profiles' cards have one heading
            )
            made[f"sets/{name}.md"] = head + text.replace("$", "&#36;")
            made |= {f"sets/{name}.png": drawn} if drawn else {}
            parts.append(f"[{label}]({name}.md), accuracy {run.accuracy:.1f} %\n\n{shown}\n")
    listed = "\n".join(parts) or "No set is kept yet."
    made["sets/index.md"] = (
        f"# Kept sets\n\nEach with a card: what, how well, at what cost.\n\n{listed}"
    )
    return made


def _api() -> str:
    """The public face, name by name, from signatures and docstrings."""
    import ddlib

    parts = ["# The public face", "`import ddlib as dd`; every name below is `dd.NAME`."]
    for name in sorted(ddlib.__all__, key=str.lower):
        value = getattr(ddlib, name)
        if inspect.ismodule(value):
            inside = [key for key, item in vars(value).items() if _own(value, key, item)]
            parts.append(f"## {name}\n\n{_docstring(value)}")
            parts += [_entry(f"{name}.{key}", getattr(value, key), 3) for key in sorted(inside)]
        else:
            parts.append(_entry(name, value, 2))
    return "\n\n".join(parts)


def _own(module, name: str, value: object) -> bool:
    return callable(value) and not name.startswith("_") and value.__module__ == module.__name__


def _entry(name: str, value: object, level: int) -> str:
    title = f"{'#' * level} {name}"
    if not callable(value):
        return f"{title}\n\n`{', '.join(map(str, value))}`"
    try:
        signature = f"{name}{inspect.signature(value)}"
    except (TypeError, ValueError):
        signature = name
    return f"{title}\n\n```python\n{signature}\n```\n\n{_docstring(value)}"


def _docstring(value: object) -> str:
    text = inspect.getdoc(value) or ""
    return _fenced(text, "text") if text else ""


def _command_line() -> str:
    """The help page of every command."""
    from ..cli import COMMANDS, parser

    parts = ["# The command line", f"```text\n{parser().format_help()}```"]
    commands = parser()._subparsers._group_actions[0].choices
    parts += [f"## ddlib {name}\n\n```text\n{commands[name].format_help()}```" for name in COMMANDS]
    return "\n\n".join(parts)


def is_wide(page: str) -> bool:
    """Whether what a page shows needs the room of the list of contents."""
    return page in ("results.md", "claims.md", "gallery.md") or page.startswith(
        ("methods/", "notebooks/")
    )


def filled(text: str, page: str, results: str | Path | None, known: Collection[str]) -> str:
    """A page as MkDocs is to read it: its records renewed, its links between pages."""
    return relinked(fill(text, results), page, known)
