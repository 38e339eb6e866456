"""What MkDocs calls while it builds: the pages that come from records, links between files, formulas as MathML."""

from mkdocs.structure.files import File

from ddlib.report import site

MADE = {}


def on_config(config):
    MADE.clear()
    MADE.update(site.pages(config.extra.get("results")))
    config.nav = site.nav(MADE)
    return config


def on_files(files, config):
    for path, content in MADE.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    known = {file.src_uri for file in files}
    text = site.filled(markdown, page.file.src_uri, config.extra.get("results"), known)
    page.meta["formulas"] = []
    if site.is_wide(page.file.src_uri):
        page.meta["hide"] = ["toc"]
    return site.with_tokens(text, page.meta["formulas"])


def on_page_content(html, page, config, files):
    return site.with_formulas(html, page.meta["formulas"])
