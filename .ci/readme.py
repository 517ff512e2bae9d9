"""Write README.md and its picture from nbs/index.ipynb: python .ci/readme.py [folder to write to]."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

root = Path(__file__).resolve().parents[1]
out = Path(sys.argv[1]) if len(sys.argv) > 1 else root

notebook = nbformat.read(root/"nbs/index.ipynb", as_version=4)
notebook.metadata["language_info"] = {"name": "python"}  # for coloured code
for cell in notebook.cells:
    if cell.cell_type != "code": continue
    cell.outputs = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    for output in cell.outputs: output.data.pop("text/plain", None)
    if cell.source.startswith("#| hide"): cell.metadata["tags"] = ["hide"]
    if cell.source.startswith("#| echo: false"): cell.metadata["tags"] = ["no_input"]

exporter = MarkdownExporter()
exporter.register_preprocessor(TagRemovePreprocessor(remove_cell_tags={"hide"}, remove_input_tags={"no_input"}), enabled=True)
text, resources = exporter.from_notebook_node(notebook, {"unique_key": "index", "output_files_dir": "nbs/images"})
text = re.sub(r"\]\((\d\d_|exercises/|teacher/)", r"](nbs/\1", text)  # links from the root instead of from nbs/
text = text.replace("](../", "](")
text = re.sub(r"\n{3,}", "\n\n", text).strip()
text = re.sub(r"!\[png\]", "![A real patch turns into noise; the trained network turns noise into a patch]", text)

(out/"README.md").write_text(f"<!-- Written by .ci/readme.py: edit nbs/index.ipynb instead. -->\n\n{text}\n", encoding="utf-8", newline="\n")
for name, data in resources["outputs"].items():
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    (out/name).write_bytes(data)
