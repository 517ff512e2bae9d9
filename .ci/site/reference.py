"""The reference: a page for each module, read from its text. Comments of the arguments (docments) become a table."""
import ast
import re
import tokenize
from inspect import cleandoc


def escape(text):
    "Plain words as Markdown; what stands in `backticks` stays."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_$<\[|])", r"\\\1", part) for part in parts)


def words(node):
    "The docstring as Markdown; a paragraph that click is told to leave alone (backspace) is shown as it is."
    parts = cleandoc(ast.get_docstring(node, clean=False) or "").split("\n\n")
    return "\n\n".join(f"```text{part[1:]}\n```" if part.startswith("\b") else escape(part) for part in parts)


def first_sentence(node): return re.split(r"(?<=[.?!])\s", words(node), maxsplit=1)[0]


def arguments(node):
    "(name, type, line) of each argument of a function, or of each field of a dataclass."
    if isinstance(node, ast.ClassDef):
        return [(n.target.id, ast.unparse(n.annotation), n.lineno) for n in node.body if isinstance(n, ast.AnnAssign)]
    a = node.args
    args = [arg for arg in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if arg]
    return [(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", arg.lineno)
            for arg in args if arg.arg not in ("self", "cls")]


def docments(node, comments):
    "(name, type, comment) of each argument and of what comes back. A comment alone on its line goes on with the one above."
    args, returns = arguments(node), getattr(node, "returns", None)
    end = max([line for *_, line in args], default=0)+1 if isinstance(node, ast.ClassDef) else node.body[0].lineno
    said, owners = {}, []
    for line in range(node.lineno, end):
        here = [name for name, _, at in args if at == line]
        if line == node.lineno: here = here[-1:]  # def f(a, b):  # what b is
        if returns and returns.end_lineno == line: here = ["returns"]
        owners = here or owners
        if line in comments: said |= {name: f"{said.get(name, '')} {comments[line]}".strip() for name in owners}
    rows = [(name, kind, said.get(name, "")) for name, kind, _ in args]
    return rows + [("returns", ast.unparse(returns), said["returns"])] if "returns" in said else rows


def options(node):
    "(name, nothing, help) of each option of a command of click."
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("click.option", "click.argument"): continue
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        default = f" (default {given['default']})" if "default" in given else ""
        yield ", ".join(flag.value for flag in call.args), "", given.get("help", "") + default


def table(rows):
    tick = lambda text: f"`{text}`".replace("|", r"\|") if text else ""
    if not any(meaning for *_, meaning in rows): return []
    return ["{.docments}", "| argument | type | meaning |", "|---|---|---|",
            *(f"| {tick(name)} | {tick(kind)} | {escape(meaning)} |" for name, kind, meaning in rows), ""]


def function(node, comments, links, kind="function"):
    "Signature, docstring and table of a function or method."
    decorators = [ast.unparse(d) for d in node.decorator_list]
    command = any(d.startswith(("main.command", "click.group")) for d in decorators)
    inside = re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))
    arrow = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in decorators: kind, inside = "property", None
    head = node.name if command or inside is None else f"{node.name}({inside}){arrow}"
    rows = list(options(node)) or docments(node, comments)
    return [f"::::{{py:{kind}}} {head}", "", links, "", words(node), "", *table(rows), "::::", ""]


def a_class(node, comments, links):
    "The same for a class, with its public methods."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((n for n in methods if n.name == "__init__"), None)
    inside = re.sub(r"^self(, )?", "", ast.unparse(init.args)) if init else ", ".join(
        ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign))
    head = f"{node.name}({inside})" if inside else node.name
    rows = docments(init or node, comments)
    inner = [line for n in methods if not n.name.startswith("_") for line in function(n, comments, "", "method")]
    return [f":::::{{py:class}} {head}", "", links, "", words(node), "", *table(rows), *inner, ":::::", ""]


def value(name, node, comments, links):
    "A constant: what it is set to, shortened, and the comment behind it."
    text = ast.unparse(node.value)
    shown = text if len(text) < 200 else text[:190] + " ..."
    said = escape(comments.get(node.end_lineno, ""))
    return [f"::::{{py:data}} {name}", "", links, "", f"```python\n{shown}\n```", "", said, "", "::::", ""]


def page(path, package, made_in, github):
    "The page of the module at `path` as MyST Markdown, and the first sentence of its docstring."
    tree, name = ast.parse(path.read_text(encoding="utf-8")), f"{package}.{path.stem}"
    with open(path, "rb") as f:
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT}
    cells = {line: m[1] for line, text in comments.items() if (m := re.fullmatch(r"%% .*\.ipynb #(\w+)", text))}  # by nbdev
    assigned = {ast.unparse(n.targets[0]): n for n in tree.body if isinstance(n, ast.Assign)}
    public = ast.literal_eval(assigned["__all__"].value)

    def links(node):
        cell = cells[max(line for line in cells if line < node.lineno)]
        return f"{{.page-links}}\n[Lesson](#cell-{cell}) · [Source]({github}/{package}/{path.name}#L{node.lineno})"

    out = [f"# {name}", "", words(tree), "", f"{{.page-links}}\nMade in {made_in}", "", f"```{{py:module}} {name}\n```", ""]
    for node in tree.body:
        if getattr(node, "name", None) not in public: continue
        out += (a_class if isinstance(node, ast.ClassDef) else function)(node, comments, links(node))
    if values := [n for n in public if n in assigned]: out += ["## Values", ""]
    for n in values: out += value(n, assigned[n], comments, links(assigned[n]))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level]
    taken = [f"{{py:obj}}`{a.name} <{package}.{n.module}.{a.name}>`" for n in imports for a in n.names if a.name in public]
    if taken: out += [f"Also here: {', '.join(taken)}."]
    return "\n".join(out), first_sentence(tree)
