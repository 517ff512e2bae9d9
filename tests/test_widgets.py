"""The handles of the lessons, without a browser: what they show, and that they can be turned off."""
import io

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from eo_ddpm.plot import explore, make_grid, play
from lessons import LESSONS

ipywidgets = pytest.importorskip("ipywidgets")


def draw(level):
    plt.figure(figsize=(1, 1))
    plt.plot([0, level])


def test_a_menu_and_a_slider_redraw_the_picture():
    "A control that is not observed, or a picture that is drawn once."
    box = explore(draw, level=ipywidgets.IntSlider(1, 0, 5))
    slider, picture = box.children
    before, slider.value = picture.value, 3
    assert picture.value != before and not plt.get_fignums()  # and no figure stays open
    menu, picture = explore(draw, level=[1, 2]).children
    before, menu.value = picture.value, 2
    assert picture.value != before and menu.description == "level"


def test_a_film_has_all_its_pages_in_order():
    "Pages in another order than their labels, smoothed pixels, a slider that ends one page early."
    pages = [torch.full((2, 3, 4, 4), level) for level in (-1., 0., 1.)]
    (buttons, film) = play(pages, ["black", "grey", "white"], ncols=2, zoom=3).children
    assert [leaf.children[0].value for leaf in film.children] == ["black", "grey", "white"]
    for page, leaf in zip(pages, film.children):
        shown = plt.imread(io.BytesIO(leaf.children[1].value))[..., :3]
        expected = torch.as_tensor(make_grid(page, 2)).repeat_interleave(3, 0).repeat_interleave(3, 1)
        torch.testing.assert_close(torch.as_tensor(shown), expected.float(), atol=.003, rtol=0)
    button, slider = buttons.children
    assert button.max == slider.max == 2 and film.selected_index == 0
    with pytest.raises(ValueError, match="3 pages but 1 labels"): play(pages, ["one"])


def test_widgets_can_be_turned_off(monkeypatch):
    "A switch that still draws, or that turns off on any value."
    monkeypatch.setenv("EO_DDPM_WIDGETS", "0")
    def never(level): raise AssertionError("drawn")
    assert explore(never, level=[1]) is None and play([torch.zeros(1, 3, 4, 4)], ["one"]) is None
    monkeypatch.setenv("EO_DDPM_WIDGETS", "1")
    assert explore(draw, level=[1]) is not None


def test_lessons_have_handles():
    "A lesson that lost its widget, and with it its tests in the browser."
    assert {param.id[:2] for param in LESSONS} >= {"00", "01", "02", "03", "04", "05", "06", "08", "09"}


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_lessons_run_without_widgets(lesson, monkeypatch):
    "A later cell that needs the box, a widget that is made by another way."
    monkeypatch.setenv("EO_DDPM_WIDGETS", "0")
    notebook = nbformat.read(lesson, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=dict(metadata=dict(path=str(lesson.parent)))).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert "image/png" in shown and not any("widget" in kind for kind in shown)
