"""Sphinx's settings for the site that build.py makes."""
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here.parents[1]/"settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

project, author, copyright, release = cfg["lib_name"], cfg["author"], cfg["copyright"], cfg["version"]
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]
smartquotes = False  # code and prose keep their quotes

nb_execution_mode = "off"  # the stored outputs are shown
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.mime_priority"]
python_maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"
add_module_names = False
# numbers and words of figures, tables and outputs are for reading; only code gets a copy button
copybutton_selector = "div:not(.output) > div.highlight pre"

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = html_logo = "static/logo.svg"
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_sourcelink = html_use_index = html_domain_indices = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": project, "alt_text": "home"},
    "repository_url": f"https://github.com/{cfg['user']}/{cfg['repo']}",
    "repository_branch": cfg["branch"],
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "footer_content_items": ["copyright.html"],
}
