"""Build the course as a web site: python .ci/site/build.py [FOLDER], `_docs` if not given. Needs requirements.txt beside it.

The pages keep the places of their sources (nbs/02_forward.ipynb becomes nbs/02_forward.html), so links between them need
no change; the README is the front page, its course tables are the order of the lessons. Nothing is executed or imported:
figures are the stored ones, the reference is read from the text of the package."""
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from posixpath import normpath

import nbformat
import reference

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT/"settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
PACKAGE, GITHUB = cfg["lib_name"], f"https://github.com/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}"
MORE = {f"{PACKAGE}/pretrained/README.md": "The network in the box", "benchmarks/README.md": "Benchmarks"}


# Which pages there are, in which order

def course():
    "The notebooks of the README's tables: lessons, then workshops, as [[stem, ...], [stem, ...]]."
    tables, last = [], -2
    for number, line in enumerate((ROOT/"README.md").read_text(encoding="utf-8").splitlines()):
        if row := re.match(r"\| \[\w+\]\(nbs/(\w+)\.ipynb\)", line):
            if number > last+1: tables.append([])
            tables[-1].append(row[1])
            last = number
    there = {p.stem for p in (ROOT/"nbs").glob("*.ipynb")} - {"index"}
    if there != (listed := {stem for table in tables for stem in table}):
        raise ValueError(f"course tables of nbs/index.ipynb: {sorted(there-listed)} not listed, "
                         f"{sorted(listed-there)} not there")
    return tables


def pages():
    "Caption -> sources, the way through the site."
    lessons, *workshops = course()
    found = lambda pattern: [p.relative_to(ROOT).as_posix() for p in sorted((ROOT/"nbs").glob(pattern))]
    return {"Lessons": [f"nbs/{stem}.ipynb" for stem in lessons],
            "Workshops": [f"nbs/{stem}.ipynb" for table in workshops for stem in table],
            "Exercises": found("exercises/*.ipynb"),
            "For teachers": sorted(found("teacher/*.md"), key=lambda name: not name.endswith("guide.md")),
            "Reference": ["api/index.md", *MORE]}


def title(name):
    "What the navigation calls a page: the number of a notebook and its headline."
    if name in MORE: return MORE[name]
    if name == "api/index.md": return "API"
    path = ROOT/name
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n\n".join(
        c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    headline = re.search(r"^# (.+)$", text, re.M)
    if not headline: raise ValueError(f"{name}: expected a headline, # ...")
    number = re.match(r"\d\d", path.name)
    return f"{number[0]} {headline[1]}" if number and not re.search(rf"\b{number[0]}\b", headline[1]) else headline[1]


# Text and notebooks

def link(text, name, known, out):
    "Point links of page `name` at the front page, or at GitHub if the site does not have the file; take pictures along."
    folder, up = Path(name).parent.as_posix(), "../"*name.count("/")

    def place(match):
        target = normpath(f"{folder}/{match[2]}")
        if target in ("nbs/index.ipynb", "README.md"): return f"{match[1]}({up}index.md"
        if target in known or not (ROOT/target).exists(): return match[0]  # Sphinx names a link that leads nowhere
        if match[1].startswith("!"):
            (out/target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/target, out/target)
            return match[0]
        return f"{match[1]}({GITHUB}/{target}"
    return re.sub(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)\s#]+)", place, text)


def says(cell, directives, heading):
    "The alternative text of a figure: `#| fig-alt:`, else the title that the code gives it, else the section."
    if given := re.search(r"fig-alt: *(.+)", directives): return given[1].strip("\"' ")
    titles = re.findall(r'(?:title=|set_title\(|suptitle\()"([^"]+)"', cell.source)
    return f"Figure: {titles[-1] if titles else heading}"


def code_cell(cell, heading):
    "A code cell as the site shows it, behind a target for links if it is exported; nothing for a hidden one."
    directives = re.match(r"(#\|.*\n?)*", cell.source)[0]
    cell.source = cell.source[len(directives):].strip("\n")
    if re.search(r"#\| *hide\b", directives) or not cell.source: return []
    if re.search(r"#\| *echo: *false", directives): cell.metadata["tags"] = ["remove-input"]
    cell.metadata["mystnb"] = {"image": {"alt": says(cell, directives, heading)}}
    for output in cell.outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            output.data = {"text/markdown": "*In the notebook this is a widget to play with.*"}
    target = nbformat.v4.new_markdown_cell(f"(cell-{cell.id})=")
    return [target, cell] if re.search(r"#\| *export\b", directives) else [cell]


def notebook(name, out, known):
    "Write notebook `name` to `out` without what only nbdev reads."
    nb = nbformat.read(ROOT/name, 4)
    module = next((m[1] for c in nb.cells if (m := re.match(r"#\| default_exp (\w+)", c.source))), None)
    api = f" · [API](../api/{module}.md)" if module else ""
    bar = nbformat.v4.new_markdown_cell(f"{{.page-links}}\n[Notebook on GitHub]({GITHUB}/{name}){api}")
    cells, heading, started = [], name, False
    # a lesson in halves has several headlines: below the first, all move down by one
    halves = sum(c.cell_type == "markdown" and c.source.startswith("# ") for c in nb.cells) > 1
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = link(cell.source, name, known, out)
            if started and halves: cell.source = re.sub(r"^#+ ", r"#\g<0>", cell.source, flags=re.M)
            if headings := re.findall(r"^#+ (.+)$", cell.source, re.M): heading = headings[-1]
            cells += [cell] if started else [cell, bar]
            started = True
        if cell.cell_type == "code": cells += code_cell(cell, heading)
    nb.cells = cells
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    nb.metadata["language_info"] = {"name": "python"}  # for coloured code
    nbformat.write(nb, out/name)


# All of it

def write(text, name, out, known):
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    (out/name).write_text(link(text, name, known, out), encoding="utf-8")


def toctree(names, *options):
    entries = [f"{title(name)} <{name.rsplit('.', 1)[0]}>" for name in names]
    return "\n".join(["", "```{toctree}", ":hidden:", *options, "", *entries, "```", ""])


def api(sources, out, known):
    "The pages of the modules, in the order of the notebooks that make them, and the list of them."
    modules, rows = [], []
    for name in sources:
        module = re.search(r'"#\| default_exp (\w+)', (ROOT/name).read_text(encoding="utf-8"))
        if not module: continue
        made_in = f"[{title(name)}](../{name})"
        text, about = reference.page(ROOT/PACKAGE/f"{module[1]}.py", PACKAGE, made_in, GITHUB)
        write(text, f"api/{module[1]}.md", out, known)
        modules.append(f"{module[1]} <{module[1]}>")
        rows.append(f"| [{PACKAGE}.{module[1]}]({module[1]}.md) | {about} | {made_in} |")
    overview = ["# API", "", "| module | | made in |", "|---|---|---|", *rows, ""]
    write("\n".join([*overview, "```{toctree}", ":hidden:", "", *modules, "```", ""]), "api/index.md", out, known)


def prepare(out):
    "Write the sources of the site into folder `out`."
    parts = pages()
    known = {name for names in parts.values() for name in names}
    api(parts["Lessons"] + parts["Workshops"], out, known)
    for name in known - {"api/index.md"}:
        if name.endswith(".ipynb"): notebook(name, out, known)
        else: write((ROOT/name).read_text(encoding="utf-8"), name, out, known)
    menu = "".join(toctree(names, f":caption: {caption}") for caption, names in parts.items() if names)
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    readme = re.sub(rf"\| `({PACKAGE}\.(\w+))` \|", r"| [`\1`](api/\2.md) |", readme)
    write(readme + menu, "index.md", out, known)


def main(out):
    if out.exists() and any(out.iterdir()) and not (out/"searchindex.js").exists():
        sys.exit(f"{out}: holds something that is not a site; expected an empty or a new folder")
    with tempfile.TemporaryDirectory() as folder:
        prepare(source := Path(folder, "source"))
        subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-c", HERE,
                        "-d", Path(folder, "cache"), source, Path(folder, "html")], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(folder, "html"), out)
    print(out/"index.html")


if __name__ == "__main__": main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"_docs").resolve())
