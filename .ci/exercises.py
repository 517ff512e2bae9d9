"""Write the students' notebooks from those with solutions: python .ci/exercises.py [folder to write to].

nbs/_exercises/NN_exercises.ipynb -> nbs/exercises/NN_exercises.ipynb: solutions become stubs, the cells tagged `wrong`
(typical mistakes that the tests plant) and all outputs are left out. A badge opens them on Colab, where the lessons' own
set-up cell comes first."""
import sys
from pathlib import Path

import nbformat
from nbconvert.exporters import NotebookExporter
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor
from nbgrader.preprocessors import ClearSolutions

root = Path(__file__).resolve().parents[1]
out = Path(sys.argv[1]) if len(sys.argv) > 1 else root/"nbs/exercises"

STUB = 'raise NotImplementedError("your lines here")'
COLAB = "https://colab.research.google.com"


def for_colab(notebook, name):
    "Add the badge, and the set-up cell that every lesson has."
    lesson = nbformat.read(root/"nbs/02_forward.ipynb", as_version=4)
    setup = next(cell for cell in lesson.cells if "COLAB_RELEASE_TAG" in cell.source)
    title = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    title.source += f"\n\n[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/eo-ddpm/eo_ddpm/blob/main/nbs/exercises/{name})"
    notebook.cells.insert(next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), setup)
    return notebook


exporter = NotebookExporter()
exporter.register_preprocessor(TagRemovePreprocessor(remove_cell_tags={"wrong"}), enabled=True)
exporter.register_preprocessor(ClearSolutions(code_stub={"python": STUB}, enforce_metadata=False), enabled=True)
exporter.register_preprocessor(ClearOutputPreprocessor(), enabled=True)

out.mkdir(parents=True, exist_ok=True)
for path in sorted((root/"nbs/_exercises").glob("*.ipynb")):
    text, _ = exporter.from_notebook_node(for_colab(nbformat.read(path, as_version=4), path.name))
    (out/path.name).write_text(text, encoding="utf-8", newline="\n")
