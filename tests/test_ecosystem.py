"What stands beside the library for others: data cards, hooks, containers, Binder; all of it names what is there"
import json, os, re, shutil, subprocess

import pytest, yaml

from conftest import ROOT
from sage_paper.config import load_settings
from sage_paper.data_cards import CARDS, CONTEXT, SHOWN, check_card, croissant, described, main, write_data
from sage_paper.datasets import DATASETS
from sage_paper.samples import load_samples, sample_to_json
from sage_paper.toolstream import TLDR_COMMIT

# ---- Data cards


@pytest.fixture(scope='module', params=CARDS)
def card(request): return json.loads((ROOT/'cards'/f'{request.param}.json').read_text())


def test_a_card_has_what_croissant_asks_for(card):
    check_card(card)
    assert card['@context'] == CONTEXT and 'http://mlcommons.org/croissant/1.0' in card['conformsTo'] and card['@type'] == 'sc:Dataset'
    fields = [f for r in card['recordSet'] for f in r['field']]
    assert len(fields) > 40 and all(f['dataType'] == 'sc:Text' and f['@id'].split('/')[0] + '.jsonl' == f['source']['fileObject']['@id'] for f in fields)
    assert all(re.fullmatch('[0-9a-f]{64}', d['sha256']) and re.fullmatch(r'\d+ B', d['contentSize']) for d in card['distribution'])


def test_every_term_of_a_card_has_a_meaning():
    "No key that neither the context nor schema.org defines, since Croissant's are all in the context"
    known = {*CONTEXT, *'name description license url citeAs version inLanguage keywords creator distribution contentUrl contentSize encodingFormat sha256'.split()}
    def keys(o): return {k for x in o for k in keys(x)} if isinstance(o, list) else {*o} | {k for v in o.values() for k in keys(v)} if isinstance(o, dict) else set()
    for name in CARDS:
        found = keys({k: v for k, v in json.loads((ROOT/'cards'/f'{name}.json').read_text()).items() if k != '@context'})
        assert {k for k in found if not k.startswith(('@', 'rai:'))} <= known and any(k.startswith('rai:') for k in found)


def test_the_cards_are_regenerated_to_the_same_bytes(pages, fair, tmp_path, monkeypatch):
    monkeypatch.setattr('sage_paper.datasets.tldr_pages', lambda: pages)
    monkeypatch.setattr('sage_paper.datasets.fair_samples', lambda _: fair)
    main(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in (ROOT/'cards').iterdir()} and len([*tmp_path.iterdir()]) == len(CARDS)


def test_what_is_described_is_what_the_experiment_asks():
    s = load_settings('challenges', 'paper', ROOT/'settings.ini')
    assert SHOWN == dict(n_train=s.train_per_set, n_test=s.test_per_set, n_tools=s.n_tools, seed=0)


def test_toolstreams_card_names_its_source_and_none_of_its_sentences(pages):
    text = (ROOT/'cards/toolstream.json').read_text()
    assert TLDR_COMMIT in text and DATASETS['toolstream'].licence in text
    assert [q for p in pages for q, _ in p.examples if len(q) >= 20 and q in text] == []


def test_counts_and_digests_are_of_the_files(tmp_path):
    data = described('sageworld')
    paths = write_data(data, tmp_path)
    card = json.loads((ROOT/'cards/sageworld.json').read_text())
    assert card == croissant('sageworld', data, tmp_path) and [p.name for p in paths] == [d['@id'] for d in card['distribution']]
    for split, samples in data.splits.items():
        about, = (r['description'] for r in card['recordSet'] if r['@id'] == split)
        assert f'{len(samples):,} queries' in about and [sample_to_json(s) for s in load_samples(tmp_path/f'{split}.jsonl')] == [*map(sample_to_json, samples)]


# ---- Hooks, containers, Binder

def makefile_line(target):
    "The commands of a target of the Makefile"
    return re.search(rf'^{re.escape(target)}:.*\n((?:\t.*\n)+)', (ROOT/'Makefile').read_text(), re.M)[1]


PIP = "-c constraints.txt -e '.[dev,lab]'"


def test_hooks_are_this_checkouts_own_and_their_tests_exist():
    config = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text())
    assert [r['repo'] for r in config['repos']] == ['local']
    hooks = config['repos'][0]['hooks']
    assert [h['id'] for h in hooks] == ['nbdev-clean', 'nbdev-export', 'house-rules'] and all(h['language'] == 'system' and h['entry'].startswith('.venv/bin/') for h in hooks)
    assert all((ROOT/path).is_file() for h in hooks for path in re.findall(r'tests/\w+\.py', h['entry'])) and 'pre-commit install' in makefile_line('hooks')
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert all(any(re.search(h['files'], f) for f in files) for h in hooks if 'files' in h)


def test_the_image_is_set_up_as_the_makefile_does():
    text = (ROOT/'Dockerfile').read_text()
    stages = re.split(r'^FROM ', text, flags=re.M)[1:]
    assert [s.split()[2] for s in map(str.strip, stages)] == ['system', 'project'] and stages[0].startswith('python:3.11-slim')
    assert PIP in makefile_line('$(READY)') and 'pip install' not in text
    before, after = stages[1].split('RUN make setup')
    copied = [f for line in re.findall(r'^COPY (?:--\S+ )*(.+)$', before, re.M) for f in line.split()[:-1]]
    assert {'Makefile', 'pyproject.toml', 'constraints.txt', 'README.md', 'sage_paper'} == {*copied} and all((ROOT/f).exists() for f in copied)
    assert re.search(r'^CMD \["make", "lab"\]$', after, re.M) and re.findall(r'^USER (\w+)$', text, re.M) == ['sage'] and makefile_line('lab')


def test_the_image_gets_the_tex_that_the_paper_is_set_with():
    packages = re.search(r'^packages="(.+)"$', (ROOT/'paper/build.sh').read_text(), re.M)[1].split()
    tex = re.search(r'if \[ -n "\$TEX" \]; then (.+?); fi', (ROOT/'Dockerfile').read_text())[1]
    assert tex.split()[-len(packages):] == packages


@pytest.fixture
def tools(tmp_path):
    "A function that gives a PATH with a few commands, and a user's number"
    def path(uid, *names):
        (tmp_path/'bin').mkdir(exist_ok=True)
        for name in names: (tmp_path/'bin'/name).symlink_to(shutil.which(name))
        (tmp_path/'bin/id').write_text(f'#!/bin/sh\necho {uid}\n')
        (tmp_path/'bin/id').chmod(0o755)
        return f'{tmp_path}/bin'
    return path


@pytest.mark.parametrize('uid', [1000, 0], ids=['nobody to install it', 'root whose apt fails'])
def test_without_tex_the_paper_ends_with_3_and_says_that_there_is_no_pdf(tmp_path, tools, uid):
    shutil.copy(ROOT/'paper/build.sh', tmp_path)
    path = tools(uid, 'dirname', 'mkdir')
    (tmp_path/'bin/apt-get').write_text('#!/bin/sh\nexit 100\n')
    (tmp_path/'bin/apt-get').chmod(0o755)
    out = subprocess.run(['/bin/sh', tmp_path/'build.sh'], env=dict(PATH=path), capture_output=True, text=True)
    assert out.returncode == 3 and 'the PDF is NOT' in out.stderr.splitlines()[-1] and 'main.pdf' not in out.stdout
    checks = makefile_line('check').splitlines()
    assert checks[0] == '\tpaper/build.sh || [ $$? = 3 ]' and 'cmp paper/build/main.pdf paper/main.pdf' in checks[-1]   # which takes the PDF only if there is one


def test_with_tex_the_paper_ends_as_tex_does(tmp_path, tools):
    shutil.copy(ROOT/'paper/build.sh', tmp_path)
    path = tools(1000, 'dirname', 'mkdir', 'cat', 'grep')
    for code, expected in ((0, 0), (12, 1)):
        (tmp_path/'bin/latexmk').write_text(f'#!/bin/sh\n: > build/main.log\nexit {code}\n')
        (tmp_path/'bin/latexmk').chmod(0o755)
        assert subprocess.run(['/bin/sh', tmp_path/'build.sh'], env=dict(PATH=path), capture_output=True, text=True).returncode == expected


@pytest.mark.parametrize('uid,allowed', [(0, True), (1000, False)])
def test_jupyterlab_runs_as_root_only_for_root(tools, uid, allowed):
    out = subprocess.run(['make', '-n', 'lab'], env=os.environ | dict(PATH=f'{tools(uid)}{os.pathsep}{os.environ["PATH"]}'), capture_output=True, text=True, cwd=ROOT, check=True).stdout
    line = next(l for l in out.splitlines() if 'jupyter lab' in l)
    assert ('--allow-root' in line) is allowed and '--LabApp.default_url' in line


def test_setting_up_ends_with_what_to_do_next():
    assert makefile_line('setup').splitlines()[-1].startswith("\t@echo 'set up in .venv")
    assert [w for w in re.findall(r'make (\w+)', makefile_line('setup')) if w not in ('paper', 'lab')] == []


def test_what_is_made_here_stays_out_of_the_image():
    ignored = (ROOT/'.dockerignore').read_text().split()
    assert {'.venv', '.venv-vllm', 'build', 'paper/build'} <= {*ignored} and not {'nbs', 'runs', 'sage_paper', 'constraints.txt'} & {*ignored}


def test_the_devcontainer_is_built_from_the_dockerfile():
    c = json.loads((ROOT/'.devcontainer/devcontainer.json').read_text())
    file = ROOT/'.devcontainer'/c['build']['dockerfile']
    assert file.resolve() == ROOT/'Dockerfile' and f' AS {c["build"]["target"]}\n' in file.read_text() and f'USER {c["remoteUser"]}\n' in file.read_text()
    assert c['postCreateCommand'].split()[1] in re.search(r'^\.PHONY: (.+)$', (ROOT/'Makefile').read_text(), re.M)[1].split()


def test_binder_takes_the_same_versions():
    lines = (ROOT/'.binder/requirements.txt').read_text().splitlines()
    assert (ROOT/'.binder'/lines[0].removeprefix('-c ')).resolve() == ROOT/'constraints.txt' and lines[1:] == ['-e .[dev,lab]'] and PIP.endswith("-e '.[dev,lab]'")
    assert (ROOT/'.binder/runtime.txt').read_text() == 'python-3.11\n'


def test_binder_opens_a_notebook_that_is_there():
    opened, = re.findall(r'mybinder\.org/\S+urlpath=lab/tree/(\S+?)`', (ROOT/'README.md').read_text())
    assert (ROOT/opened).exists()


def test_the_readme_names_what_is_there():
    text = (ROOT/'README.md').read_text()
    links = [l for l in re.findall(r'\]\(([^)#\s]+)\)', text) if '://' not in l]
    assert len(links) > 50 and [l for l in links if not (ROOT/l).exists()] == []
    targets = re.search(r'^\.PHONY: (.+)$', (ROOT/'Makefile').read_text(), re.M)[1].split()
    assert [t for t in re.findall(r'`make ([a-z]+)`', text) + re.findall(r'^make ([a-z]+)', text, re.M) if t not in targets] == []
