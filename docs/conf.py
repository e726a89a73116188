"Sphinx's configuration. `make docs` builds the site into docs/build/html"
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
from formulas import add_mathml
from sources import lay_out

project = html_title = 'SAGE-Agent'
author = 'The SAGE-Agent authors'
extensions = ['myst_nb', 'sphinxcontrib.bibtex']

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
nb_execution_mode = 'off'          # the notebooks' own outputs are those of a clean run, and a test keeps them so
nb_merge_streams = True

bibtex_reference_style = 'author_year'

add_module_names = False
toc_object_entries_show_parents = 'hide'
html_theme = 'furo'
html_static_path, html_css_files = ['static'], ['site.css']
html_copy_source = html_show_copyright = False
smartquotes = False
html_math_renderer = 'mathml'


def setup(app):
    lay_out(ROOT, Path(app.srcdir))
    app.config.bibtex_bibfiles = [str(app.srcdir/'references.bib')]
    add_mathml(app)
