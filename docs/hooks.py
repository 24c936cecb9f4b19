"""What mkdocs calls while it builds the site: a page per registered optimizer, the pictures, a check of every link."""

from __future__ import annotations

import io
import re
import sys
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import matplotlib.style
from matplotlib.figure import Figure
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import fusedopt
from fusedopt import paths

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import generated  # noqa: E402  (mkdocs loads hooks by path, so that their folder is no place to import from)

STYLES = {"light": "default", "dark": "dark_background"}


def on_config(config):
    """Add the optimizers' pages to the navigation."""
    for section in config.nav:
        if "Optimizers" in section:
            section["Optimizers"] += [{name: f"optimizers/{name}.md"} for name in sorted(fusedopt.registry)]
    return config


def on_files(files, config):
    """Add the pages and pictures that are made from the code."""
    pages = {f"optimizers/{name}.md": generated.page(name) for name in fusedopt.registry}
    pages["optimizers/index.md"] = generated.overview()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    plot = (DOCS.parent / "bench" / "plots" / "convergence.svg").read_text()
    files.append(File.generated(config, "pictures/convergence.svg", content=plot))
    pictures = {name: [rule] for name, rule in generated.own_paths().items()} | paths.FAMILIES
    for name, rules in pictures.items():
        for scheme in STYLES:
            content = picture(name, rules, scheme)
            files.append(File.generated(config, f"pictures/{name}-{scheme}.svg", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put sections of the README where a page asks for them: what stands twice does not stay equal."""
    return re.sub(r"<!-- README: (.*) -->", lambda match: generated.readme(match[1]), markdown)


def picture(name, rules, scheme):
    """The paths of some rules as SVG, for a light or a dark page."""
    with matplotlib.style.context(STYLES[scheme]):
        figure = Figure(figsize=(9, 3.1), layout="constrained")
        paths.draw_family(figure, name, rules)
        # Equal text gives equal files, whenever it is drawn.
        matplotlib.rcParams["svg.hashsalt"] = name
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def on_post_build(config):
    """Every link leads to a page and a place of the site, or stands in external-links.txt."""
    site = Path(config.site_dir)
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    known = (DOCS / "external-links.txt").read_text().split()
    external, broken = set(), []
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme in ("http", "https"):
                external.add(urldefrag(link).url)
            elif problem := resolve(path, link, pages):
                broken.append(f"{path.relative_to(site)}: {link}: {problem}")
    for link in sorted(external):
        if not any(fnmatch(link, pattern) for pattern in known):
            broken.append(f"{link} is not in docs/external-links.txt")
    if broken:
        raise PluginError("\n".join(["links:", *broken]))


def resolve(path, link, pages):
    """What is wrong with a link inside the site, or None."""
    address, fragment = urldefrag(link)
    if urlsplit(link).scheme or address.startswith("/"):
        # The error page is served for any address, and so names its files from the root.
        return None if path.name == "404.html" else "neither inside the site nor on the web"
    target = (path.parent / unquote(address)).resolve() if address else path
    if not target.exists():
        return "no such file"
    if fragment and target in pages and unquote(fragment) not in pages[target].places:
        return "no such place"
    return None


class Links(HTMLParser):
    """The links of a page, and the places that links can lead to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places = [], {"__top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
