"""The web site: every lesson and every public name is on it, and every link leads somewhere."""
import ast
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from filelock import FileLock

for tool in ("myst_nb", "sphinx_book_theme", "sphinx_copybutton"):
    pytest.importorskip(tool, reason="pip install -c constraints.txt -r .ci/site/requirements.txt")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").glob("**/*.ipynb")) if not {".ipynb_checkpoints", "_exercises"} & set(p.parts)]
MODULES = [p for p in sorted((ROOT/"eo_ddpm").glob("*.py")) if not p.name.startswith("_")]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT/"settings.ini", encoding="utf-8")
GITHUB = "https://github.com/{user}/{repo}/blob/{branch}/".format(**settings["DEFAULT"])


class Page(HTMLParser):
    "What a page shows and where it leads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.unnamed, self.text, self.skip = set(), [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join("".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        self.links += [attrs[name] for name in ("href", "src") if attrs.get(name)]
        if tag == "img" and (attrs.get("alt") or ".png").endswith(".png"): self.unnamed.append(attrs.get("src"))
        if tag in ("script", "style"): self.skip = tag

    def handle_endtag(self, tag):
        if tag == self.skip: self.skip = None

    def handle_data(self, data):
        if not self.skip: self.text.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of a freshly built site; the processes of a parallel test run share it."
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)/"site"
    with FileLock(f"{out}.lock"):
        if not (out/"index.html").is_file():
            done = subprocess.run([sys.executable, ROOT/".ci/site/build.py", out], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.glob("**/*.html") if "_static" not in path.parts}


def test_every_notebook_is_in_the_menu(pages):
    "Catches a new lesson that nobody put on the site."
    for path in NOTEBOOKS:
        name = path.relative_to(ROOT).with_suffix(".html").as_posix()
        if path.name == "index.ipynb": continue  # the front page
        assert name in pages, f"no page for {path}"
        assert name in pages["index.html"].links, f"{name} is not in the menu"


def test_every_public_name_is_in_the_reference(pages):
    "Catches a module or a function that the reference forgot; nbdev's own index knows them all."
    index = ast.literal_eval((ROOT/"eo_ddpm/_modidx.py").read_text(encoding="utf-8").split("d = ", 1)[1])["syms"]
    assert len(index) == len(MODULES)
    for module, names in index.items():
        page = pages[f"api/{module.removeprefix('eo_ddpm.')}.html"]
        missing = [name for name in names if "._" not in name and name not in page.ids]
        assert not missing, missing


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_comments_of_arguments_are_shown(path, pages):
    "Catches comments that get lost on the way from the code, or come out as Markdown."
    text = path.read_text(encoding="utf-8")
    comments = re.findall(r"^ {4}\**\w+:.*,\s+# (.+)$", text, re.M) + re.findall(r"^\)->.*:\s+# (.+)$", text, re.M)
    missing = [c for c in comments if " ".join(c.replace("`", "").split()) not in pages[f"api/{path.stem}.html"].words]
    assert not missing, missing


def test_no_directives(pages):
    "Catches lines for nbdev that a reader should not see."
    for name, page in pages.items(): assert not re.search(r"#\| ?[a-z]", page.words), name


def test_links(pages, site):
    "Catches a renamed notebook, section or file that something still links to, here or on GitHub."
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if target.startswith(GITHUB):
                path = ROOT/target.removeprefix(GITHUB)
                line = re.fullmatch(r"L(\d+)", anchor)
                there = path.exists() and not (line and int(line[1]) > path.read_text(encoding="utf-8").count("\n"))
                if not there: broken.append((name, link))
            if re.match(r"\w+:|//", target): continue
            path = (site/name).parent/target.split("?")[0] if target else site/name
            path = path.resolve().relative_to(site.resolve()).as_posix()
            lost = anchor and path in pages and anchor not in pages[path].ids
            if lost or not (site/path).is_file(): broken.append((name, link))
    assert not broken, broken


def test_source_links_point_at_definitions(pages):
    "Catches line numbers that are off."
    for path in MODULES:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = re.findall(rf"{path.name}#L(\d+)", " ".join(pages[f"api/{path.stem}.html"].links))
        assert found and all(re.match(r"(async )?def |class |\w+ *=|\w+(, *\w+)+ *=", lines[int(n)-1]) for n in found)


def test_figures_have_words(pages):
    "Catches figures that a screen reader has nothing to say about."
    for name, page in pages.items(): assert not page.unnamed, (name, page.unnamed)


def test_alternative_text_of_a_figure(tmp_path):
    "Catches `#| fig-alt:` shown instead of used."
    import nbformat
    sys.path.insert(0, str(ROOT/".ci/site"))
    try: from build import code_cell
    finally: sys.path.pop(0)
    given = nbformat.v4.new_code_cell('#| fig-alt: "A patch: fields, a creek"\nplot(x0, title="Noise")')
    (cell,) = code_cell(given, "Section")
    assert cell.source == 'plot(x0, title="Noise")' and cell.metadata["mystnb"]["image"]["alt"] == "A patch: fields, a creek"
    (cell,) = code_cell(nbformat.v4.new_code_cell('plot(x0, title="Noise")'), "Section")
    assert cell.metadata["mystnb"]["image"]["alt"] == "Figure: Noise"
    assert code_cell(nbformat.v4.new_code_cell("#| hide\nx = 1"), "Section") == []


def test_search(site):
    "Catches a site that cannot be searched: words of lessons and names of the reference are in its index."
    index = (site/"searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index.removeprefix("Search.setIndex(").rstrip().removesuffix(";").removesuffix(")"))
    found = index["terms"]["sentinel"]
    assert {index["docnames"][i] for i in ([found] if isinstance(found, int) else found)} > {"index", "nbs/01_data"}
    assert any(name == "add_noise" for *_, name in index["objects"]["eo_ddpm.forward"])
