"""The lessons as a student meets them: JupyterLab, Chromium, the keyboard. Needs no network.

Where there is no Chromium these tests are skipped, but never on GitHub. They leave a picture of each widget, and how fast
it answered, in tests/artifacts/browser. No test fails because a machine is slow."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import nbformat
import pytest

from lessons import LESSONS, ROOT, handle_cells

pytestmark = [pytest.mark.browser, pytest.mark.slow]
OUT = ROOT/"tests/artifacts/browser"
MINUTE = 60_000  # milliseconds, as Playwright counts
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]

# the pixels of the picture that a box shows; null while there is none
PICTURE = """box => {
    const img = [...box.querySelectorAll("img.widget-image")].find(img => img.offsetParent)
    if (!img?.complete || !img.naturalWidth) return null
    const canvas = document.createElement("canvas")
    canvas.width = img.naturalWidth; canvas.height = img.naturalHeight
    canvas.getContext("2d").drawImage(img, 0, 0)
    return canvas.toDataURL()
}"""
# what moves a control: JupyterLab takes the arrows away from a closed menu
KEY = """control => {
    if (control.tagName == "BUTTON") return "Enter"
    if (control.tagName == "SELECT") return control.selectedIndex < control.length-1 ? "End" : "Home"
    return +control.ariaValueNow < +control.ariaValueMax ? "ArrowRight" : "ArrowLeft"
}"""

CENTRE = "box => box.scrollIntoView({block: 'center'})"
PLAYED = """box => {
    const slider = box.querySelector(".noUi-handle")
    return slider.ariaValueNow == slider.ariaValueMax && box.querySelector(".widget-play .fa-play")  // it pauses by itself
}"""


@pytest.fixture(scope="module")
def chromium():
    "The first Chromium that starts: one of the system, Playwright's own, Chrome where its installer puts it."
    missing = pytest.fail if os.environ.get("GITHUB_ACTIONS") else pytest.skip
    try: from playwright.sync_api import Error, sync_playwright
    except ImportError: missing('no Playwright: pip install -c constraints.txt -e ".[dev]"')
    names = ("chromium", "google-chrome", "chromium-browser")
    found = [dict(executable_path=path) for path in map(shutil.which, names) if path]
    with sync_playwright() as playwright:
        for where in (*found, {}, dict(channel="chrome")):
            try: browser = playwright.chromium.launch(args=FLAGS, timeout=2*MINUTE, **where)
            except Error: continue
            yield browser
            browser.close()
            return
        missing("no Chromium: apt-get install chromium, or python -m playwright install --with-deps chromium")


def settings(folder):
    "An environment in which nobody's own settings count, nor extensions that disturb."
    graders = ("formgrader", "validate_assignment", "assignment_list", "course_list")  # for the exercises; a class has none
    off = {f"nbgrader.server_extensions.{name}": False for name in graders}
    news = "@jupyterlab/apputils-extension:announcements"
    config = {"jupyter_server_config.json": dict(ServerApp=dict(jpserver_extensions=off)),
              "labconfig/page_config.json": dict(disabledExtensions={"@jupyter/nbgrader": True, news: True})}
    for name, values in config.items():
        path = folder/"config"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    places = {f"JUPYTER_{name.upper()}_DIR": str(folder/name) for name in ("config", "data", "runtime")}
    places |= {f"JUPYTERLAB_{name.upper()}_DIR": str(folder/name) for name in ("settings", "workspaces")}
    return {**os.environ, **places, "IPYTHONDIR": str(folder/"ipython"), "EO_DDPM_WIDGETS": "1"}


def wait_for_server(server, port, log):
    "Until it listens; fails with its log if it ends, or takes three minutes."
    until = time.monotonic()+180
    while True:
        try: return socket.create_connection(("127.0.0.1", port), 5).close()
        except OSError: time.sleep(.1)
        if server.poll() is not None or time.monotonic() > until: pytest.fail(log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the lessons; its folder and its address."
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder/'nbs'}"]
    with open(folder/"log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=settings(folder), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_server(server, port, folder/"log")
        yield folder/"nbs", f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def visit(chromium, address, name):
    "A page with this notebook and a kernel that waits. Afterwards the kernel is shut down."
    page = chromium.new_page(viewport=dict(width=1200, height=1000))
    page.set_default_timeout(2*MINUTE)
    try:
        page.goto(f"{address}lab/tree/{name}.ipynb?reset")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'")
        yield page
        page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    except Exception:
        page.screenshot(path=OUT/f"{name}_failed.png")
        raise
    finally: page.close()


def run_all(page, path):
    "What Run All does, to the end; then save. Returns what lies on the disk and the seconds it took."
    began = time.perf_counter()
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells').finally(() => window.finished = true)")
    page.wait_for_function("window.finished", timeout=20*MINUTE)
    seconds = time.perf_counter()-began
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    return nbformat.read(path, as_version=4), seconds


def complaints(notebook):
    "Errors, warnings and cells that never ran."
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code": continue
        if cell.source.strip() and cell.execution_count is None: yield f"cell {i} did not run"
        for output in cell.outputs:
            if output.output_type == "error": yield f"cell {i}: {output.ename}: {output.evalue}"
            if output.get("name") == "stderr" and output.text.strip():  # a progress bar that is done leaves blanks
                yield f"cell {i} warns: {output.text[:300]}"


def section_above(notebook, i):
    "The cells between the last heading and cell i."
    start = i
    while notebook.cells[start].cell_type != "markdown" or not notebook.cells[start].source.startswith("#"): start -= 1
    return notebook.cells[start:i]


def move(page, box, control):
    "Press one key; wait until the picture is another one. Returns what was pressed and how long that took."
    control.focus()
    before, key = box.evaluate(PICTURE), control.evaluate(KEY)
    name = control.evaluate("control => control.closest('.widget-inline-hbox').innerText.split('\\n')[0]")
    began = time.perf_counter()
    page.keyboard.press(key)
    another = f"([box, before]) => ![null, before].includes(({PICTURE})(box))"
    try: page.wait_for_function(another, arg=[box.element_handle(), before])
    except Exception as e: raise AssertionError(f"{key} on {name or 'the film'}: the picture stays the same") from e
    return dict(control=name, key=key, seconds=round(time.perf_counter()-began, 3))


@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson_runs_and_its_widgets_answer(chromium, lab, lesson):
    """A cell that fails or warns in JupyterLab, a widget that shows as text or without a figure above it, a control that is
    not wired, a picture that never changes, a film that does not play to its end."""
    folder, address = lab
    OUT.mkdir(parents=True, exist_ok=True)
    with visit(chromium, address, lesson.stem) as page:
        notebook, seconds = run_all(page, folder/lesson.name)
        problems = [*complaints(notebook)]
        assert not problems
        found = dict(seconds=round(seconds, 1), moves=[])
        for i in handle_cells(notebook):
            outputs = [output for cell in section_above(notebook, i) for output in cell.get("outputs", [])]
            assert any("image/png" in output.get("data", {}) for output in outputs), f"no figure above cell {i}"
            box = page.locator(f".jp-Cell[data-windowed-list-index='{i}'] .jp-OutputArea-output > .widget-vbox")
            box.evaluate(CENTRE)
            page.wait_for_function(PICTURE, arg=box.element_handle())
            controls = box.locator(".widget-play button:first-child, .noUi-handle").all()
            controls += box.locator("select").all()  # last: some choices leave a slider without a say
            assert controls, f"no control in cell {i}"
            for control in controls:
                found["moves"].append(move(page, box, control))
                if found["moves"][-1]["key"] == "Enter":  # a film: without the kernel, and without us, it comes to its end
                    page.wait_for_function(PLAYED, arg=box.element_handle())
            box.evaluate(CENTRE)  # figures that came late have moved it
            page.screenshot(path=OUT/f"{lesson.stem}_{i}.png")
    (OUT/f"{lesson.stem}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
