"""The project as pages to look at, from what is stored: executed notebooks, claims, methods, figures. Nothing is run.

`build` writes static HTML that needs no network and no script: formulas become pictures (matplotlib's mathtext), code
is coloured by a style sheet beside the pages.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
import re
import shutil
from pathlib import Path

import pandas as pd

from ..core import DDError
from ..files import SOURCE, results_folder
from . import claims
from .docs import fill

MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|\$(\S[^$\n]*?)\$", re.DOTALL)
MARKER = ".ddlib-site"  # a folder with this file may be written anew
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 75em; margin: 0 auto; padding: 0 1em 3em; color: #222; }
nav { border-bottom: 1px solid #ccc; padding: .8em 0; } nav a { margin-right: 1.2em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; } div.scroll { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: left; vertical-align: top; }
pre, code { font: 13px/1.45 monospace; background: #f6f6f6; } pre { padding: .6em; overflow-x: auto; }
img { max-width: 100%; } div.tex { text-align: center; margin: 1em; }
.prompt, .anchor-link { display: none; } .output_area { overflow-x: auto; }
caption { text-align: left; padding: .4em 0; }
figure { display: inline-block; margin: 1em 1em 0 0; max-width: 46%; vertical-align: top; }
figcaption { font-size: 13px; }
.kind { border-left: 6px solid; padding-left: .6em; }
"""


@functools.cache
def _formula(tex: str, display: bool) -> str:
    """A formula as an inline picture; as its source where mathtext does not know it (an aligned block, say)."""
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties

    plain = re.sub(r"\\[bB]igg?[lrm]?\s*(?=[^a-zA-Z])", "", " ".join(tex.split()))
    plain = re.sub(r"\\[td]?frac\s*(\d)", r"\\frac{\1}", plain).replace("\\tfrac", "\\frac")
    plain = re.sub(r"\\(math\w+)\s+(\w)", r"\\\1{\2}", plain)
    picture = io.BytesIO()
    try:
        depth = mathtext.math_to_image(
            f"${plain}$",
            picture,
            prop=FontProperties(size=15 if display else 12),
            dpi=72,
            format="svg",
        )
        data = base64.b64encode(picture.getvalue()).decode()
        found = (
            f'<img style="vertical-align: -{depth:.1f}pt" alt="{html.escape(tex, quote=True)}" '
            f'src="data:image/svg+xml;base64,{data}">'
        )
    except ValueError:
        found = f"<code>{html.escape(tex)}</code>"
    return f'\n<div class="tex">{found}</div>\n' if display else found


def _math(text: str) -> str:
    return MATH.sub(lambda m: m[1] or _formula(m[2] or m[3], bool(m[2])), text)


class _Site:
    """The pages and where each comes from, so that links between sources become links between pages."""

    def __init__(self, out: Path):
        self.out, self.sources = out, {}
        self.nav = [
            ("index.html", "ddlib"),
            ("claims.html", "claims"),
            ("methods/index.html", "methods"),
            ("notebooks/index.html", "notebooks"),
            ("gallery.html", "figures"),
        ]

    def link(self, name: str, source: Path, match: re.Match) -> str:
        """A link to a source of another page as one to the page, a web address as it is, anything else as text."""
        target, _, anchor = match[1].partition("#")
        if re.match(r"https?:", target) or not target:
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if path not in self.sources:
            return match[2]
        return f'<a href="{_relative(self.sources[path], name)}{"#" + anchor if anchor else ""}">{match[2]}</a>'

    def write(self, name: str, title: str, body: str, source: Path | None = None) -> None:
        body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL | re.IGNORECASE)
        if source:
            body = re.sub(
                r'<a href="([^"]*)"[^>]*>(.*?)</a>',
                functools.partial(self.link, name, source),
                body,
                flags=re.DOTALL,
            )
        bar = "".join(f'<a href="{_relative(page, name)}">{text}</a>' for page, text in self.nav)
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
        style = f'<link rel="stylesheet" href="{_relative("style.css", name)}">'
        path.write_text(
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}{style}</head><body><nav>{bar}</nav>\n{body}\n'
            "</body></html>\n"
        )


def _relative(page: str, start: str) -> str:
    return os.path.relpath(page, os.path.dirname(start) or ".")


def build(
    profile: str = "small", out: str | Path | None = None, results: str | Path | None = None
) -> Path:
    """Write the site of a profile and return its first page; raises `DDError` where there is nothing to show."""
    try:
        import nbformat
        from nbconvert import HTMLExporter
        from nbconvert.filters.markdown_mistune import markdown2html_mistune as to_html
        from pygments.formatters import HtmlFormatter
    except ImportError:
        raise DDError("site needs nbconvert: pip install 'ddlib[lab]', or make site") from None
    folder = results_folder(results) / "notebooks" / profile
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        raise DDError(
            f"there is no executed notebook in {folder}: run make reproduce PROFILE={profile} first"
        )
    figures = Path(os.environ.get("DDLIB_FIGURES") or SOURCE / "figures") / profile
    pictures = sorted(figures.glob("*.png"))
    if not (SOURCE / "README.md").is_file():
        raise DDError(f"site needs the source checkout of ddlib: {SOURCE} has no README.md")
    docs = [SOURCE / "README.md", *sorted((SOURCE / "docs" / "methods").glob("*.md"))]
    site = _Site(Path(out or SOURCE / "site"))
    if site.out.exists() and not (site.out / MARKER).is_file() and any(site.out.iterdir()):
        raise DDError(
            f"{site.out} holds something else than a site: choose another folder with --out"
        )
    shutil.rmtree(site.out, ignore_errors=True)
    # At once: a site that is killed half way is still known as one by the next call.
    site.out.mkdir(parents=True, exist_ok=True)
    (site.out / MARKER).touch()
    for path in docs[1:]:
        site.sources[path] = f"methods/{'index' if path.stem == 'README' else path.stem}.html"
    site.sources |= {SOURCE / "README.md": "index.html"}
    site.sources |= {
        SOURCE / "notebooks" / path.name: f"notebooks/{path.stem}.html" for path in notebooks
    }

    for path in docs:
        text = fill(path.read_text(), results)
        site.write(
            site.sources[path], text.partition("\n")[0].strip("# "), to_html(_math(text)), path
        )
    exporter = HTMLExporter(template_name="basic")  # the one without scripts
    for path in notebooks:
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            cell.source = _math(cell.source) if cell.cell_type == "markdown" else cell.source
            for output in cell.get("outputs", []):  # a widget is live or nothing
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        source = SOURCE / "notebooks" / path.name
        site.write(
            site.sources[source],
            path.stem,
            f"<p>{profile} profile, as executed</p>{exporter.from_notebook_node(notebook)[0]}",
            source,
        )
    listed = "".join(f'<li><a href="{path.stem}.html">{path.stem}</a></li>' for path in notebooks)
    site.write(
        "notebooks/index.html",
        "Notebooks",
        f"<h1>Notebooks, {profile} profile</h1><ul>{listed}</ul>",
    )
    site.write("claims.html", "Claims", _claims(results))
    shown = "".join(
        f'<figure><a href="figures/{p.name}"><img src="figures/{p.name}" alt="{p.stem}" loading="lazy"></a>'
        f"<figcaption>{p.stem.replace('_', ' ')}</figcaption></figure>"
        for p in pictures
    )
    site.write(
        "gallery.html",
        "Figures",
        f"<h1>Figures, {profile} profile</h1>{shown or '<p>None is stored.</p>'}",
    )
    (site.out / "figures").mkdir(exist_ok=True)
    for path in pictures:
        shutil.copy(path, site.out / "figures")
    (site.out / MARKER).touch()
    (site.out / "style.css").write_text(STYLE + HtmlFormatter().get_style_defs(".highlight"))
    return site.out / "index.html"


def _claims(results: str | Path | None) -> str:
    judged = claims.judge(claims.load(), results)
    parts = [
        "<h1>Every claim, and what became of it</h1>",
        claims.counts(judged).to_html(index=False, border=0),
        f"<p>{claims.from_memory()}</p>",
    ]
    for paper, facts in claims.papers().items():
        parts.append(
            f"<h2>{html.escape(facts['title'])}</h2><p>{facts['venue']}, "
            f'<a href="https://arxiv.org/abs/{paper}">arXiv {paper}</a>; version read: {facts["version"]}; '
            f'<a href="methods/{facts["page"]}.html">how it is built here</a></p>'
        )
        for where, rows in judged[judged.paper == paper].groupby("where", sort=False):
            (group,) = claims.groups(rows).to_dict("records")
            why = (
                f"; not attempted: {group['why not attempted']}"
                if group["why not attempted"]
                else ""
            )
            table = claims.shown(rows).drop(columns="where").map(_cell)
            table["verdict"] = [
                f'<span class="kind" style="border-color: {claims.VERDICTS[kind]}">{text}</span>'
                for kind, text in zip(rows.kind, table.verdict, strict=True)
            ]
            with pd.option_context("display.max_colwidth", None):  # else long cells are cut
                cells = table.to_html(index=False, border=0, escape=False)
            parts.append(
                f"<h3>{html.escape(where)}</h3><p>labels: {group['labels']}; ± of the paper: "
                f'{html.escape(group["± of the paper"] + why)}</p><div class="scroll">{cells}</div>'
            )
    return "\n".join(parts)


def _cell(text: object) -> str:
    return html.escape(str(text)).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
