"ToolStream: the pages the paper used, split without leaks, the same everywhere; and the order of arrival"
import csv, math, os, pickle, re, subprocess, sys

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from conftest import ROOT
from sage_paper.assets import fetch
from sage_paper.calls import Sample, ToolCall
from sage_paper.samples import Task, arrivals, digest, first_seen, jaccard_pairs, near_duplicates, word_incidence, words
from sage_paper.toolstream import TLDR_DIGEST, phase_tools

SAME = 0.8   # Jaccard similarity of character 5-grams from which two queries count as one


@pytest.fixture(scope='module', params=[(1, 'report'), (1, 'tuning'), (2, 'report')], ids=['phase 1', 'tuning', 'phase 2'])
def task(request, load_toolstream):
    "Every split that a run may use"
    return load_toolstream(*request.param)


def test_the_pages_are_those_of_the_paper(pages):
    assert digest(pages) == TLDR_DIGEST
    assert len(pages) == 6643 and digest(pages[1:]) != TLDR_DIGEST


def test_the_default_task_has_its_size(toolstream):
    assert (len(toolstream.tools), len(toolstream.train), len(toolstream.test)) == (1000, 3891, 1423)


def test_every_tool_is_taught_and_asked(task):
    def per_tool(samples): return {t: sum(s.tool_ids == (t,) for s in samples) for t in task.tools}
    assert len(set(task.tools)) == len(task.tools)
    assert {s.tool_ids[0] for s in task.train + task.test} == set(task.tools)
    assert all(3 <= n <= 5 for n in per_tool(task.train).values())
    assert all(1 <= n <= 2 for n in per_tool(task.test).values())


def test_ids_are_unique_and_free_of_the_query(task):
    samples = task.train + task.test
    assert len({s.id for s in samples}) == len(samples)
    assert all(s.query.lower() not in s.id.lower() and len(s.id.split()) == 1 for s in samples)


def similar(a, b):
    "Pairs of texts from `a` and `b` whose character 5-grams are at least SAME alike"
    grams = CountVectorizer(analyzer='char', ngram_range=(5, 5), binary=True, dtype=np.int32).fit_transform([' '.join(re.findall(r'\w+', t.lower())) for t in a + b])
    common = (grams[:len(a)] @ grams[len(a):].T).tocoo()
    size = np.asarray(grams.sum(1)).ravel()
    alike = common.data/(size[common.row] + size[common.col + len(a)] - common.data) >= SAME
    return [(a[i], b[j]) for i, j in zip(common.row[alike], common.col[alike])]


def test_similar_texts_are_seen():
    assert similar(['List all files in a directory tree, sorted by name'], ['list all files in a  directory tree, sorted by names', 'Remove a file']) != []
    assert similar(['Show the version of Java'], ['Set the version of Java', 'Show its version']) == []


def test_no_held_out_query_is_trained_on(task, load_toolstream):
    train, test = [s.query for s in task.train], [s.query for s in task.test]
    assert not set(map(str.lower, train)) & set(map(str.lower, test))
    assert len(jaccard_pairs(word_incidence([' '.join(words(q)) for q in train + test]), 0.8)) == 0
    if task is load_toolstream(1, 'tuning'): assert len(similar(test, train)) < len(test)/100   # fixed before, never reported
    else: assert near_duplicates(train, test) == similar(test, train) == []


def added(samples):
    "The days on which the samples' pages were added, from the table of dates itself"
    with open(fetch('tldr-pages/added.tsv'), newline='') as f: day = {r['page']: r['added'] for r in csv.DictReader(f, delimiter='\t')}
    return [day['pages/' + s.id.removeprefix('toolstream/').rsplit('/', 1)[0] + '.md'] for s in samples]


@pytest.mark.skipif('SAGE_DATA_DIR' not in os.environ, reason='needs the table of dates of the data set tldr-pages, in SAGE_DATA_DIR')
def test_tools_are_dated(pages, task, request):
    days = added(task.train + task.test)
    if 'phase 2' in request.node.name: assert min(days) >= '2025-01-01'
    else: assert max(days) < '2024-10-01'
    assert sorted(days[:len(task.train)]) == days[:len(task.train)]   # introduced in the order of their dates


def test_tuning_and_report_share_no_tool(fair):
    report, tuning = (set(phase_tools(fair, 1, 1000, split)) for split in ('report', 'tuning'))
    assert len(report) == len(tuning) == 1000 and not report & tuning


def test_identical_across_processes_and_hash_seeds(pages, toolstream, tmp_path):
    (tmp_path/'pages').write_bytes(pickle.dumps(pages))
    code = '''import pickle, sys, sage_paper.samples as s, sage_paper.toolstream as d
d.tldr_pages = lambda: pickle.load(open(sys.argv[1], 'rb'))
t = d.toolstream(); print(s.digest(t.train + t.test), s.arrivals(t, 0.1, 3)[:9])'''
    def run(seed): return subprocess.Popen([sys.executable, '-c', code, tmp_path/'pages'], cwd=ROOT, env=os.environ | dict(PYTHONHASHSEED=seed), stdout=subprocess.PIPE, text=True)
    outs = {p.communicate(timeout=180)[0] for p in [run('0'), run('4242')]}
    assert outs == {f'{digest(toolstream.train + toolstream.test)} {arrivals(toolstream, 0.1, 3)[:9]}\n'}


def task_of(sizes):
    "A task with `sizes[k]` training queries for tool k, in mixed order"
    samples = [Sample(f's/{k}/{i}', f'{k} {i}', (ToolCall(f't{k}'),), tool_ids=(f't{k}',)) for k, n in enumerate(sizes) for i in range(n)]
    return Task(tuple(f't{k}' for k in range(len(sizes))), tuple(samples[::2] + samples[1::2]), (), '')


def check_arrivals(task, spread, seed):
    "Every query arrives once; tools appear as they are introduced; each has all arrived within the spread"
    n, order = len(task.tools), arrivals(task, spread, seed)
    assert sorted(order) == list(range(len(task.train))) and order == arrivals(task, spread, seed)
    first, last = first_seen(task, order), {task.train[i].tool_ids[0]: pos for pos, i in enumerate(order)}
    assert list(first) == list(task.tools)
    for k, t in enumerate(task.tools):
        after = math.floor(k + spread*n + 1e-6) + 1   # the next tool to be introduced
        if after < n: assert last[t] < first[task.tools[after]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_arrivals_keep_to_the_spread(sizes, spread, seed): check_arrivals(task_of(sizes), spread, seed)


def test_arrivals_of_many_keep_to_the_spread(): check_arrivals(task_of([9]*200), 0.1, 0)


def test_arrivals_depend_on_seed_and_spread():
    task = task_of([5]*200)
    def reach(spread): return max(np.ptp([pos for pos, i in enumerate(arrivals(task, spread, 0)) if task.train[i].tool_ids == (t,)]) for t in task.tools[::20])
    assert arrivals(task, 0.1, 0) != arrivals(task, 0.1, 1)
    assert 50 < reach(0.1) < 200 and reach(1.) > 500
