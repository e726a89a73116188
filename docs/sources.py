"What the site is built from: the pages of docs/, the notebooks, and the reference, laid out in one folder that Sphinx reads"
import json, re
from pathlib import Path

import nbformat

from reference import reference

CITATION = re.compile(r'`([a-z]+(?:19|20)\d\d[a-z0-9]+)`')
LINK = re.compile(r'\]\(([^)\s]+)\)')


def lay_out(
    root:Path,   # the project's
    folder:Path, # where to; what is there and has not changed is left as it is, so that Sphinx need not read it again
):
    "Write all that Sphinx reads"
    bibliography = (root/'paper/references.bib').read_text(encoding='utf-8')
    texts = {p: p.read_text(encoding='utf-8') for p in (root/'README.md', *sorted((root/'docs').glob('*.md')))}
    notebooks = {p: nbformat.read(p, 4) for p in sorted((root/'nbs').glob('*.ipynb'))}
    cited = {*re.findall(r'^@\w+\{([^,]+),', bibliography, re.M)}
    pages = {p.name: at_the_top(t) for p, t in texts.items()}
    pages['references.bib'] = bibliography.replace(r'{\i}', 'i')   # the dotless i below an accent, which Sphinx's reader of BibTeX takes for a letter of its own
    pages |= {f'nbs/{p.name}': notebook_page(with_outputs(nb, root/'paper/build/nbs'/p.name), cited) for p, nb in notebooks.items()}
    pages |= {f'reference/{name}.md': text for name, text in reference(root/'sage_paper', [*filter(None, map(exports, notebooks.values()))]).items()}
    texts |= {p: '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown') for p, nb in notebooks.items()}
    files = {f for p, text in texts.items() for f in linked_files(text, p.parent, root)}
    for p in [p for p in folder.rglob('*') if p.is_file() and p.relative_to(folder).as_posix() not in {*pages, *files}]: p.unlink()
    for name, text in pages.items(): write(folder/name, text.encode())
    for name in files: write(folder/name, (root/name).read_bytes())


def write(path:Path, data:bytes):
    "Write a file, unless it holds just that"
    if path.is_file() and path.read_bytes() == data: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def at_the_top(text:str)->str:
    "A page of docs/, or one that links to such, with the links that it has where the site has the pages of docs/: one folder higher up"
    return re.sub(r'(\]\(|\{include\} )(?:\.\./|docs/)', r'\1', text)


def linked_files(
    text:str,    # Markdown
    folder:Path, # that it stands in
    root:Path,
)->set: # of paths below `root`, as text
    "The files that a text links to and that are no pages themselves"
    found = [(folder/link.partition('#')[0]).resolve() for link in LINK.findall(text) if not re.match(r'\w+:|#', link)]
    return {f.relative_to(root.resolve()).as_posix() for f in found if f.is_file() and f.suffix not in ('.md', '.ipynb')}


def exports(nb)->str:
    "The module that a notebook is exported to, '' if it is none"
    return next((m[1] for c in nb.cells if (m := re.match(r'#\|\s*default_exp:?\s+(\w+)', c.source))), '')


def with_outputs(
    nb,
    run:Path, # where `make figures` has left the notebook with its outputs, if it has
):
    "A notebook, of an experiment the one with outputs, as long as that one's code is the same"
    if not run.is_file(): return nb
    done = nbformat.read(run, 4)
    own = [c.source for c in done.cells if 'injected-parameters' not in c.metadata.get('tags', [])]
    return done if own == [c.source for c in nb.cells] else nb


def notebook_page(nb, cited:set)->str: # JSON
    "A notebook as a page: without nbdev's directives, with a target at each exported cell, with citations and a link to the reference"
    cells = [x for c in nb.cells for x in (code_cells(c) if c.cell_type == 'code' else [markdown_cell(c.id, cite(c.source.replace('](../docs/', '](../'), cited))])]
    metadata = nb.metadata | dict(language_info=dict(name='python', pygments_lexer='ipython3'))
    return json.dumps(nb | dict(cells=cells, metadata=metadata))


def markdown_cell(name, source): return dict(cell_type='markdown', id=name, metadata={}, source=source)


def code_cells(c)->list:
    "What a code cell becomes: nothing if it is hidden, a link to the reference if it names the module, else itself, after a target if it is exported"
    if m := re.match(r'#\|\s*default_exp:?\s+(\w+)', c.source): return [markdown_cell(c.id, f'In the reference: [{m[1]}](../reference/{m[1]}.md).')]
    if re.match(r'#\|\s*hide\b', c.source): return []
    for o in c.outputs:   # nbdev's documentation of a function begins with a rule, which may not stand in an output
        if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = o.data['text/markdown'].removeprefix('---\n')
    before = [markdown_cell(f'at-{c.id}', f'(cell-{c.id})=')] if re.match(r'#\|\s*exporti?\b', c.source) else []
    return [*before, c | dict(source=re.sub(r'^#\|.*\n?', '', c.source, flags=re.M))]


def cite(text:str, cited:set)->str:
    "Markdown with the keys of the bibliography as citations"
    return CITATION.sub(lambda m: f'{{cite:alp}}`{m[1]}`' if m[1] in cited else m[0], text)
