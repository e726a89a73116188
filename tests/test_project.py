"The project as a whole: pinned, light to import, cited, in house style, and free of texts and places that are not its own"
import ast, json, re, subprocess, sys, time, tomllib

import nbformat, pytest, yaml
from packaging.requirements import Requirement

from conftest import ROOT

PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
REQUIREMENTS = [*PROJECT['dependencies'], *(r for extra in ('dev', 'lab') for r in PROJECT['optional-dependencies'][extra])]
LIBRARY = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LIGHT = ['sage_paper', *(f'sage_paper.{m}' for m in 'config calls assets samples toolstream bfcl datasets world queries data_cards scores ast_match retrieval statistics tracking records report streaming_runs streaming_report challenge_runs challenge_report experiments inventory estimates running cli explore widgets'.split())]
MACHINE = [f'/{folder}/' for folder in ('work', 'opt', 'root')]
INDEX = ['python' + 'hosted.org', *(f'--{option}' for option in ('index' + '-url', 'extra-index' + '-url', 'find' + '-links'))]


def name(requirement): return re.sub('[-_.]+', '-', Requirement(requirement).name).lower()


def parsed(requirements): return {name(r): str(Requirement(r).specifier) for r in requirements}


def test_conda_lists_the_same_requirements():
    listed = yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']
    flat = [r for d in listed for r in (d['pip'] if isinstance(d, dict) else [d]) if r != 'pip']
    assert len(flat) == len({name(r) for r in flat})
    assert parsed(flat) == parsed([*REQUIREMENTS, 'python' + PROJECT['requires-python']])


def pins(): return [line.strip() for line in (ROOT/'constraints.txt').read_text().splitlines() if line.strip() and not line.startswith('#')]


def test_every_version_is_pinned():
    versions = {name(p): p.partition('==')[2] for p in pins()}
    assert len(versions) == len(pins()) and all(re.fullmatch(r'[\w.-]+==[\w.]+', p) for p in pins())
    for r in REQUIREMENTS: assert Requirement(r).specifier.contains(versions[name(r)], prereleases=True), r
    assert 'torch==2.13.0' in pins()   # no local version: both its CPU and its CUDA build fit


def markdown(path): return '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')


def cited_in_notebooks(): return {k for p in NOTEBOOKS for k in re.findall(r'`([a-z]+(?:19|20)\d\d[a-z0-9]+)`', markdown(p))}


def cited_in_paper():
    found = [m for p in (ROOT/'paper').rglob('*.tex') for m in re.findall(r'\\[cC]ite\w*\*?(?:\[[^]]*\])*\{([^}]+)\}', p.read_text())]
    return {k.strip() for m in found for k in m.split(',')}


@pytest.mark.parametrize('cited', [cited_in_notebooks, cited_in_paper])
def test_every_citation_is_in_the_bibliography(cited):
    entries = re.findall(r'^@\w+\{([^,]+),', (ROOT/'paper/references.bib').read_text(), re.M)
    assert len(entries) == len(set(entries)) and cited()
    assert sorted(cited() - set(entries)) == []


def seconds(code):
    "Least wall time of a fresh interpreter that runs `code`, of five"
    def one():
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
        return time.perf_counter() - start
    return min(one() for _ in range(5))


@pytest.mark.alone
def test_import_is_quick(): assert seconds('import sage_paper') - seconds('pass') < 0.5


def test_import_leaves_torch_alone():
    code = f"import importlib, sys\nfor m in {LIGHT}:\n    importlib.import_module(m)\n    print(m, *({{'torch', 'transformers', 'matplotlib.pyplot', 'altair'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() == LIGHT


@pytest.fixture(params=LIBRARY, ids=lambda p: p.stem)
def notebook(request): return nbformat.read(request.param, 4)


def exported(nb): return [c.source for c in nb.cells if c.cell_type == 'code' and re.match(r'#\|\s*exporti?\b', c.source)]


def test_a_notebook_begins_with_title_and_subtitle(notebook):
    title, _, rest = notebook.cells[0].source.partition('\n')
    subtitle = rest.strip() or notebook.cells[1].source
    assert notebook.cells[0].cell_type == 'markdown' and re.fullmatch('# .+', title) and re.match('> .+', subtitle)


def test_a_notebook_is_short(notebook):
    assert len(notebook.cells) <= 70 and exported(notebook)
    assert [s for s in exported(notebook) if len(s.splitlines()) > 50] == []


def module(path):
    "The module a notebook exports to"
    return re.search(r'^#\|\s*default_exp:?\s+(\w+)', '\n'.join(c.source for c in nbformat.read(path, 4).cells), re.M)[1]


def imported(nb):
    "Modules of the library that any of a notebook's cells imports"
    cells = ['\n'.join(l for l in c.source.splitlines() if not l.lstrip().startswith(('%', '!'))) for c in nb.cells if c.cell_type == 'code']
    nodes = [n for s in cells for n in ast.walk(ast.parse(s))]
    froms = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    plain = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {m.removeprefix('sage_paper.') for m in froms | plain if m.startswith('sage_paper.')}


def test_notebooks_import_lower_numbers_only():
    order = [module(p) for p in LIBRARY]
    assert len(order) == len(set(order)) and [p.stem.split('_', 1)[1] for p in LIBRARY] == order
    late = {p.stem: sorted(imported(nbformat.read(p, 4)) - {*order[:k], order[k]}) for k, p in enumerate(LIBRARY)}
    assert {stem: mods for stem, mods in late.items() if mods} == {}


def outputs(path):
    "All text that a notebook's outputs hold, pictures left out"
    def texts(o):
        yield from (''.join(v) if isinstance(v, list) else str(v) for k, v in o.get('data', {}).items() if not k.startswith('image/'))
        yield from (''.join(o.get(k, '')) for k in ('text', 'evalue', 'traceback'))
    return '\n'.join(t for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', []) for t in texts(o))


TIMES = [r'\b\d\d:\d\d:\d\d\b', r'\d ?(ms|µs)\b', r'\d(it/s|s/it)\b', 'Wall time', 'CPU times']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_show_no_place_and_no_time(path):
    text = outputs(path)
    assert [p for p in (*MACHINE, '/home/', '/Users/', '/tmp/', sys.prefix) if p in text] == []
    assert [p for p in TIMES if re.search(p, text)] == []


def test_outputs_hold_no_query_of_toolstream(pages):
    queries = {q for p in pages for q, _ in p.examples if len(q) >= 20}
    for path in NOTEBOOKS:
        text = outputs(path)
        assert [q for q in queries if q in text] == [], path.name


def tracked():
    "The files git tracks"
    out = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip('not a git checkout')
    return [ROOT/f for f in out.stdout.split('\0') if f and (ROOT/f).is_file()]


def test_no_file_names_a_machine():
    found = {str(p.relative_to(ROOT)): [w for w in (*MACHINE, *INDEX) if w.encode() in data] for p in tracked() if (data := p.read_bytes())}
    assert {f: words for f, words in found.items() if words} == {}


def test_what_the_readmes_walks_write_stays_out_of_git():
    shell = ''.join(re.findall(r'```sh\n(.*?)```', (ROOT/'README.md').read_text(), re.S))
    written = {*re.findall(r' > (\S+)', shell), *re.findall(r'\bout\w*\.ipynb', (ROOT/'README.md').read_text()), 'out2.ipynb', 'build/smoke-custom/figures/streaming.pdf'}
    assert {'mine.yaml', 'build/gold.jsonl', 'out.ipynb'} <= written
    ignored = subprocess.run(['git', 'check-ignore', '--no-index', *sorted(written)], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {*ignored} == written
