"The documentation: its code runs as written, its links lead somewhere, and the site's sources hold every notebook and every public name"
import ast, fnmatch, importlib, inspect, json, os, re, subprocess, sys, tomllib
from functools import cache

import nbformat, pytest
from fastcore.docments import docments
from packaging.requirements import Requirement

from conftest import ROOT

sys.path.insert(0, str(ROOT/'docs'))
from links import broken
from reference import Module, entries, plain, reference
from sources import at_the_top, exports, lay_out, linked_files, notebook_page, with_outputs

HOW_TO = sorted((ROOT/'docs').glob('how_to_*.md'))
NOTEBOOKS = {p: nbformat.read(p, 4) for p in sorted((ROOT/'nbs').glob('*.ipynb'))}
MODULES = [name for nb in NOTEBOOKS.values() if (name := exports(nb))]


@cache
def entries_of(name): return entries(Module(ROOT/f'sage_paper/{name}.py'))


def code_blocks(path): return re.findall(r'^```python\n(.*?)^```$', path.read_text(), re.M | re.S)


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    "All pages' code, each page in a process of its own, begun at once"
    def begin(path):
        env = os.environ | dict(TMPDIR=str(tmp_path_factory.mktemp(path.stem)), SAGE_CACHE_DIR=str(tmp_path_factory.mktemp('cache')), OMP_NUM_THREADS='1')
        return subprocess.Popen([sys.executable, '-c', '\n'.join(code_blocks(path))], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    processes = {path: begin(path) for path in HOW_TO}
    yield processes
    for p in processes.values(): p.kill()


@pytest.mark.parametrize('path', HOW_TO, ids=lambda p: p.stem)
def test_a_page_says_how_in_40_lines_that_run(path, running):
    blocks = code_blocks(path)
    assert sum(len(b.splitlines()) for b in blocks) <= 40 and isinstance(ast.parse(blocks[-1]).body[-1], ast.Assert)
    error = running[path].communicate(timeout=120)[1]
    assert running[path].returncode == 0, error


def test_there_is_a_page_for_each_kind_of_part(): assert [p.stem.removeprefix('how_to_') for p in HOW_TO] == ['data_set', 'model', 'selector', 'strategy']


def prose(text): return re.sub(r'^(`{3,}).*?^\1$', '', text, flags=re.M | re.S)


def texts(path):
    "The Markdown of a page or a notebook"
    return path.read_text() if path.suffix == '.md' else '\n\n'.join(c.source for c in NOTEBOOKS[path].cells if c.cell_type == 'markdown')


def anchors(path): return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in re.findall(r'^#+ (.+)$', prose(texts(path)), re.M)}


def dead_links(path):
    "Links inside the repository that lead to no file, or to no heading of one"
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(texts(path))):
        name, _, anchor = link.partition('#')
        target = (path.parent/name).resolve() if name else path
        if re.match(r'\w+:', link): continue
        if not target.exists() or anchor and anchor not in anchors(target): yield link


@pytest.mark.parametrize('path', [ROOT/'README.md', *sorted((ROOT/'docs').glob('*.md')), *NOTEBOOKS], ids=lambda p: p.stem)
def test_every_link_leads_somewhere(path): assert list(dead_links(path)) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path/'page.md'
    page.write_text('# One: two\n[a](page.md#one-two) [b](#one-two) [c](page.md#three) [d](other.md) [e](https://example.org)\n```\n[f](code.md)\n```\n')
    assert list(dead_links(page)) == ['page.md#three', 'other.md']


@pytest.fixture(scope='module')
def laid_out(tmp_path_factory):
    "What Sphinx reads"
    folder = tmp_path_factory.mktemp('src')
    lay_out(ROOT, folder)
    return folder


def test_every_page_is_listed_once(laid_out):
    patterns = [line for block in re.findall(r'^```\{toctree\}\n(.*?)^```$', (laid_out/'index.md').read_text(), re.M | re.S) for line in block.splitlines() if line and line[0] != ':']
    names = [re.sub(r'.*<(.+)>', r'\1', p) for p in patterns]
    pages = {p.relative_to(laid_out).with_suffix('').as_posix() for p in laid_out.rglob('*') if p.suffix in ('.md', '.ipynb')} - {'index'}
    found = {page: [n for n in names if fnmatch.fnmatchcase(page, n)] for page in pages if page == 'reference/index' or not page.startswith('reference/')}
    library = {page: n for page, n in found.items() if re.match(r'nbs/\d', page)}
    assert {page: n for page, n in found.items() if not n} == {} == {page: n for page, n in library.items() if len(n) > 1}
    assert len(library) == len(MODULES) and {f'reference/{m}' for m in MODULES} < pages


def test_laying_out_again_changes_nothing_and_leaves_nothing_behind(laid_out):
    def state(): return {p: p.stat().st_mtime_ns for p in laid_out.rglob('*') if p.is_file()}
    before = state()
    (laid_out/'nbs/99_gone.ipynb').write_text('{}')
    lay_out(ROOT, laid_out)
    assert state() == before


def test_the_claims_come_from_the_readme(laid_out):
    start, end = re.findall(r'^:(?:start-after|end-before): "(.+)"$', (laid_out/'index.md').read_text(), re.M)
    part = (laid_out/'README.md').read_text().partition(f'{start}\n')[2].partition(f'{end}\n')[0]
    rows = [line for line in part.splitlines() if line.startswith('| ')]
    experiments = {p.stem for p in (ROOT/'nbs').glob('exp_*.ipynb')}
    published = experiments & {line['notebook'] for line in json.loads((ROOT/'tables/manifest.json').read_text()).values()}   # a claim without numbers has no row
    assert len(rows) == 1 + len(published) and '{include} README.md' in (laid_out/'index.md').read_text()
    assert {*re.findall(r'\(nbs/(exp_\w+)\.ipynb\)', part)} == published


def test_every_public_name_is_in_the_reference(laid_out):
    "As nbdev's own index has them; constants, which that does not have, as `__all__` has them"
    syms = importlib.import_module('sage_paper._modidx').d['syms']
    for name in MODULES:
        shown, module = {e.name for e in entries_of(name)}, importlib.import_module(f'sage_paper.{name}') if name in ('calls', 'selectors') else None
        known = {s.removeprefix(f'sage_paper.{name}.') for s in syms[f'sage_paper.{name}']}
        public = {s for s in known if not re.search(r'(^|\.)_', s)}
        assert public <= shown, name
        if module: assert {*module.__all__} <= shown


def test_every_entry_leads_to_the_cell_that_defines_it(laid_out):
    def after_target(cells): return {a.source: b.source for a, b in zip(cells, cells[1:])}
    after = {p.stem: after_target(nbformat.read(p, 4).cells) for p in (laid_out/'nbs').glob('[0-9]*.ipynb')}
    for name in MODULES:
        for e in entries_of(name): assert re.search(rf'\b{e.name.rpartition(".")[2]}\b', after[e.notebook].get(f'(cell-{e.cell})=', '')), f'{name}.{e.name}'


@pytest.mark.parametrize('name', ['calls', 'samples', 'selectors', 'ssis', 'replay', 'trainers'])
def test_comments_are_those_that_fastcore_finds(name):
    module, n = importlib.import_module(f'sage_paper.{name}'), 0
    for e in entries_of(name):
        owner, _, attr = e.name.rpartition('.')
        if e.kind not in ('function', 'method') or owner and not hasattr(module, owner): continue
        expected = docments(inspect.getattr_static(getattr(module, owner), attr) if owner else getattr(module, attr), full=True, args_kwargs=True)
        ours = {('return' if r.name == 'returns' else r.name.lstrip('*')): r.comment for r in e.rows}
        for k, v in expected.items():
            if k in ours and k not in ('self', 'cls'): assert ours[k] == (v.docment or ''), f'{e.name}: {k}'
            n += bool(v.docment)
    assert n > 5


def test_an_entry_says_what_is_taken_and_given(tmp_path):
    (tmp_path/'tea.py').write_text('''"""About tea."""
__all__ = ['MOST', 'Cup', 'TeaError', 'pour']
# %% ../nbs/90_tea.ipynb #0a1b
MOST = 3   # cups
# %% ../nbs/90_tea.ipynb #2c3d
@dataclass
class Cup:
    "A cup"
    size: int = 2       # in (0, 9], *not* more
    of: 'Cup' = None
class TeaError(ValueError): "No tea"
# %% ../nbs/90_tea.ipynb #4e5f
@patch
def fill(self:Cup, n=1, # times
    *more, # see `Cup`
)->Cup: # itself
    "Fill it"
def pour(a, b:list[int]=()): return a   # not said of one
''')
    found = {e.name: e for e in entries(Module(tmp_path/'tea.py'))}
    assert {n: (e.kind, e.cell) for n, e in found.items()} == {'MOST': ('data', '0a1b'), 'Cup': ('class', '2c3d'), 'TeaError': ('exception', '2c3d'), 'Cup.fill': ('method', '4e5f'), 'pour': ('function', '4e5f')}
    assert found['Cup.fill'].signature == '(n=1, *more)' and found['pour'].signature == '(a, b=())'
    assert [(r.name, r.type, r.default, r.comment) for r in found['Cup.fill'].rows] == [('n', '', '1', 'times'), ('*more', '', '', 'see `Cup`'), ('returns', 'Cup', '', 'itself')]
    text = reference(tmp_path, ['tea'])['tea']
    assert r'| `size` | `int` | `2` | in (0, 9\], \*not\* more |' in text and '{py:obj}`Cup <sage_paper.tea.Cup>`' in text
    assert plain('a|b `c|d` $e$ _f_', {}) == r'a\|b `c\|d` \$e\$ \_f\_'


def test_a_notebook_becomes_a_page(tmp_path):
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell('# Tea (`known2020tea`, `other2020tea`, [how](../docs/how.md))'), v4.new_code_cell('#| default_exp tea'), v4.new_code_cell('#| hide\nimport x'), v4.new_code_cell('#| export\ndef f(): 1', id='abc'), v4.new_code_cell('f()')]
    nb = v4.new_notebook(cells=cells)
    page = nbformat.reads(notebook_page(nb, {'known2020tea'}), 4)
    assert [c.source for c in page.cells] == ['# Tea ({cite:alp}`known2020tea`, `other2020tea`, [how](../how.md))', 'In the reference: [tea](../reference/tea.md).', '(cell-abc)=', 'def f(): 1', 'f()']
    done = v4.new_notebook(cells=[*cells[:1], v4.new_code_cell('x = 1', metadata=dict(tags=['injected-parameters'])), *cells[1:]])
    nbformat.write(done, tmp_path/'run.ipynb')
    assert len(with_outputs(nb, tmp_path/'run.ipynb').cells) == 6 and with_outputs(nb, tmp_path/'none.ipynb') is nb
    nb.cells[-1].source = 'f() + 1'   # the run is older than the notebook
    assert with_outputs(nb, tmp_path/'run.ipynb') is nb


def test_a_page_is_moved_to_the_top(tmp_path):
    assert at_the_top('[a](../nbs/a.ipynb) [b](c.md) [d](docs/d.md) ```{include} ../README.md') == '[a](nbs/a.ipynb) [b](c.md) [d](d.md) ```{include} README.md'
    (tmp_path/'a.ini').write_text('')
    assert linked_files('[a](../a.ini) [b](../b.ini) [c](../c.md) [d](https://example.org/a.ini)', tmp_path/'docs', tmp_path) == {'a.ini'}


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path/'a.html').write_text('<p id="x"><a href="b.html#y">1</a><a href="b.html#z">2</a><a href="c.html">3</a><a href="#x">4</a><a href="https://example.org">5</a><script src="https://example.org/s.js">')
    (tmp_path/'b.html').write_text('<p id="y">')
    assert broken(tmp_path) == ['a.html: loads https://example.org/s.js from elsewhere', 'a.html: b.html#z: no such place on that page', 'a.html: c.html leads nowhere']


def formulas(text): return re.findall(r'\$\$(.+?)\$\$|(?<![\\\w$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])', re.sub(r'`[^`]*`', '', text), re.S)


def test_every_formula_can_be_shown():
    for name in ('sphinx', 'latex2mathml'): pytest.importorskip(name, reason='needs the extra `docs`')
    from formulas import mathml
    found = [(block or inline, bool(block)) for path in NOTEBOOKS for block, inline in formulas(prose(texts(path)))]
    shown = [mathml(tex, block) for tex, block in found]
    assert len(shown) > 100 and all(s.startswith('<math') for s in shown)
    assert '<mfrac><mn>1</mn><mn>2</mn></mfrac>' in mathml(r'\frac12').replace('<mrow>', '').replace('</mrow>', '')
    with pytest.raises(ValueError, match=r'unknown commands \\nosuch'): mathml(r'x + \nosuch')


def test_the_site_is_built_of_pinned_versions():
    pins = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line and line[0] != '#')
    extra = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies']['docs']
    for r in map(Requirement, extra): assert r.specifier.contains(pins[r.name]), r
