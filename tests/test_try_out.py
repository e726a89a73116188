"The forms of try_out: what they show is what a run does, and what they are asked wrongly they explain; and the notebook that JupyterLab opens on"
import json, re, shutil, subprocess, sys

import nbformat, numpy as np, pytest, torch

from conftest import ROOT
from sage_paper.calls import Tool, ToolCall, tool_document
from sage_paper.model import encode, load_lm, no_progress, tiny_lm
from sage_paper.samples import SampleError, arrivals
from sage_paper.streaming_runs import _train, load_task
from sage_paper.explore import VEGA_LITE
from sage_paper.try_out import EXAMPLE, PARTS, TINY, Asker, NoModel, Scorer, ask, find_model, load_model, misfits, score_chart, score_frame, stream_settings, told, tools_of, top_scored

# ---- What SSIS scores high


def settings(**changes): return stream_settings(6, 3, **dict(batch_size=4, buffer_size=4) | changes)


@pytest.fixture(scope='module')
def frame(): return score_frame(tiny_lm(), settings())


def test_watching_changes_nothing():
    "The same weights in the end, to the last bit, as a run of the experiment has"
    s, watched, run = settings(), tiny_lm(), tiny_lm()
    score_frame(watched, s, seed=1)
    task = load_task(s.stream, s.n_tools, s.train_per_tool, s.test_per_tool)
    spec = dict(method='streaming_coreset', seed=1, lr=s.lr_streaming_coreset)
    _train(run, s, spec, encode(task.train, run.tokenizer), arrivals(task, s.spread, 1), [])
    before, after = tiny_lm().model.state_dict(), run.model.state_dict()
    assert all(torch.equal(x, after[k]) for k, x in watched.model.state_dict().items()) and not all(torch.equal(x, after[k]) for k, x in before.items())


def test_every_query_is_scored_once_in_order_of_arrival(frame):
    s = settings()
    task = load_task(s.stream, s.n_tools, s.train_per_tool, s.test_per_tool)
    assert list(frame['query']) == [task.train[i].query for i in arrivals(task, s.spread, 0)] and list(frame.arrived) == [*range(18)]
    terms = frame[[*PARTS]].to_numpy()
    assert (terms > 0).all() and (terms <= 1).all() and np.allclose(terms @ (0.4, 0.3, 0.3), frame.importance)
    assert np.allclose(frame[[f'from {k}' for k in PARTS]].sum(axis=1), frame.importance)


@pytest.mark.parametrize('alone', range(3))
def test_a_term_alone_is_the_importance(alone):
    frame = score_frame(tiny_lm(), settings(weights=tuple(float(k == alone) for k in range(3))))
    name = [*PARTS][alone]
    assert np.allclose(frame.importance, frame[name]) and frame[name].nunique() > 3 and (frame[[f'from {k}' for k in PARTS if k != name]] == 0).all(axis=None)


def test_what_enters_is_what_a_buffer_takes():
    assert score_frame(tiny_lm(), settings(fraction=1., buffer_size=100)).entered.all()
    some = score_frame(tiny_lm(), settings(fraction=0.3, buffer_size=100)).entered
    assert 0.1 < some.mean() < 0.6


def test_the_chart_holds_every_query_and_names_its_version(frame):
    spec = score_chart(frame).to_dict()
    data, = spec['datasets'].values()
    assert [d['query'] for d in data] == list(frame['query']) and spec['params'][0]['value'] == [dict(arrived=int(frame.importance.idxmax()))]
    assert {d['entered'] for d in data} <= {'entered the buffer', 'did not'}


def test_the_table_is_the_top(frame):
    top = top_scored(frame, 5)
    assert list(top.importance) == sorted(frame.importance.round(2), reverse=True)[:5] and {*top['entered the buffer']} <= {'yes', 'no'}


def test_the_scorer_trains_and_shows():
    form = Scorer(TINY)
    form.tools.value, form.each.value = 6, 2
    form.button.click()
    drawn, table = (o['data'] for o in form.shown.outputs)
    assert drawn[VEGA_LITE]['$schema'].endswith('vega-lite/v5.json') and 'importance' in table['text/html'] and len(form.frame) == 12 and form.bar.value == 1


def test_the_scorer_can_be_used_again_after_a_mistake():
    form = Scorer('nowhere')
    form.button.click()
    assert 'There is no folder nowhere' in form.said.value and form.shown.outputs == () and not form.button.disabled
    form.model.value, form.tools.value, form.each.value = TINY, 4, 1
    form.button.click()
    assert len(form.shown.outputs) == 2


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    def broken(*args, **kwargs): raise ValueError('a bug')
    monkeypatch.setattr('sage_paper.try_out.score_frame', broken)
    form = Scorer(TINY)
    with pytest.raises(ValueError, match='a bug'): form.press()
    assert not form.button.disabled


# ---- A model by name

@pytest.fixture(scope='module')
def agent(tmp_path_factory):
    "A folder that `load_lm` takes"
    folder, lm = tmp_path_factory.mktemp('agent'), tiny_lm()
    with no_progress(): lm.model.save_pretrained(folder); lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(agent, tmp_path): return shutil.copytree(agent, tmp_path/'broken')


def test_a_folder_is_loaded(agent):
    own, there = tiny_lm().model.state_dict(), load_model(str(agent)).model.state_dict()
    assert all(torch.equal(x, there[k]) for k, x in own.items())


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
@pytest.mark.parametrize('how', ['gone', 'empty', 'cut off', 'garbage'])
def test_a_damaged_folder_is_explained(broken, name, how):
    path = broken/name
    data = path.read_bytes()
    if how == 'gone': path.unlink()
    else: path.write_bytes({'empty': b'', 'cut off': data[:len(data)//2], 'garbage': b'[1, 2' + data}[how])
    with pytest.raises(NoModel, match='sage-paper export my-agent') as e: load_model(str(broken))
    assert re.search('cannot be loaded as a language model|a folder without a model', str(e.value)) and '\n' not in str(e.value)


def test_weights_of_another_size_are_explained(broken):
    config = json.loads((broken/'config.json').read_text())
    (broken/'config.json').write_text(json.dumps(config | dict(hidden_size=64)))
    with pytest.raises(NoModel, match='cannot be loaded as a language model'): load_model(str(broken))


@pytest.mark.parametrize('name, says', [('', 'No folder is named'), ('  ', 'No folder is named'), ('my-agent', 'There is no folder my-agent'), ('README.md', 'README.md is a file'), ('tests', 'a folder without a model')])
def test_what_is_no_model_is_explained(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT/'nbs')   # where a notebook looks; the project is looked through, too
    with pytest.raises(NoModel, match=says) as e: find_model(name)
    assert 'sage-paper export my-agent' in str(e.value)


def test_a_model_that_cannot_be_fetched_is_explained(monkeypatch, tmp_path):
    from sage_paper.assets import AssetMissing, registry
    def missing(name): raise AssetMissing(registry()['smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf'], 'not found', 'put it there')
    monkeypatch.setattr('sage_paper.try_out.load_lm', missing)
    with pytest.raises(NoModel, match='(?s)smollm2-135m-instruct is not on this machine and cannot be had.*put it there'): load_model('smollm2-135m-instruct')


# ---- What an agent answers

def test_tools_are_read_as_from_a_file():
    tools = tools_of(EXAMPLE)
    assert [*tools] == ['kettle_schedule', 'lamp_switch'] and tool_document(tools['lamp_switch']) == 'lamp_switch(on: boolean): Switch a lamp on or off.'
    assert tools_of(' \n') == {} and [*tools_of(EXAMPLE + '\n\n')] == [*tools]


@pytest.mark.parametrize('text, says', [
    ('{"name": "a"}\n{"name": }', r'^line 2: expected JSON, found an error at column 10'), ('{"name": "a"}\n\n{"name": "b"}', '^line 2: expected an object, found an empty line'),
    ('[{"name": "a"}]', '^line 1: '), ('{"nane": "a"}', '^line 1: name: expected, but missing'), ('{"name": "a"}\n{"name": "b", "parameters": {"type": "list"}}', '^line 2: parameters'),
    ('{"name": "a"}\n{"name": "b", "parameters": {"type": "object", "properties": {"x": {"type": "integer", "minimum": "1"}}}}', "^line 2: parameters: '1' is not of type 'number'")])
def test_broken_tools_are_named_by_line(text, says):
    with pytest.raises(SampleError, match=says): tools_of(text)


TOOLS = tools_of('{"name": "set", "parameters": {"type": "object", "properties": {"to": {"type": "integer", "minimum": 1}, "by": {"type": "object", "properties": {"who": {"type": "string"}}, "required": ["who"]}}, "required": ["to"], "additionalProperties": false}}\n{"name": "ring"}')


@pytest.mark.parametrize('calls, wrong', [
    ([], []), ([ToolCall('set', dict(to=1))], []), ([ToolCall('set', dict(to='$1'))], []), ([ToolCall('ring', dict(any=1))], []),
    ([ToolCall('set')], ['call 1, set: to: is missing']), ([ToolCall('set', dict(to=0))], ['call 1, set: to: expected integer from 1, found 0']),
    ([ToolCall('ring'), ToolCall('set', dict(to=1, at=2))], ['call 2, set: at: the tool has no such parameter; it has to, by']),
    ([ToolCall('set', dict(to=1, by={}))], ['call 1, set: by.who: is missing']), ([ToolCall('sing')], ['call 1, sing: there is no such tool; there are set, ring'])])
def test_a_call_is_held_against_its_tool(calls, wrong): assert misfits(calls, TOOLS) == wrong


def test_of_two_tools_of_one_name_the_fitting_one_counts():
    two = {'a': Tool('a', '', dict(type='object', properties=dict(x=dict(type='integer')), required=['x'])), 'a#2': Tool('a', '', dict(type='object', properties=dict(y=dict(type='string')), required=['y']))}
    assert misfits([ToolCall('a', dict(x=1)), ToolCall('a', dict(y='z'))], two) == [] and len(misfits([ToolCall('a')], two)) == 1


def test_the_prompt_has_the_tools(monkeypatch):
    "And of many the nearest ones"
    asked = []
    monkeypatch.setattr('sage_paper.try_out.generate', lambda lm, samples, n, tools: asked.append((samples[0], tools)) or ['[]'])
    many = {f'tool_{k}': Tool(f'tool_{k}', f'Does {w} things.') for k, w in enumerate('red green blue warm cold loud soft fast slow thin wide kettle'.split())}
    for tools in ({}, tools_of(EXAMPLE), many): ask(None, 'Put a kettle on.', tools)
    assert [len(s.candidates) for s, _ in asked] == [0, 2, 10] and asked[0][1] is None and 'tool_11' in asked[2][0].candidates


@pytest.mark.parametrize('answer, says', [
    ('[{"name":"ring","arguments":{}}]', ['1. ring()', 'All of it fits']), ('[{"name":"set","arguments":{}}]', ['1. set()', 'call 1, set: to: is missing']), ('[]', ['No call']), ('Sure', ['cannot be read as calls', 'Sure']), ('', ['cannot be read', '(nothing)'])])
def test_an_answer_in_words(answer, says):
    lines = [text for text, _ in told(answer, TOOLS)]
    assert len(lines) == len(says) and all(s in line for s, line in zip(says, lines))


def test_the_asker_asks_and_explains(agent, monkeypatch):
    monkeypatch.setattr('sage_paper.try_out.generate', lambda lm, samples, n, tools: ['[{"name":"lamp_switch","arguments":{"on":"<b>"}}]'])
    loaded = []
    monkeypatch.setattr('sage_paper.try_out.load_model', lambda name: loaded.append(name) or load_lm(name))
    form = Asker(str(agent))
    for _ in range(2): form.button.click()
    assert len(loaded) == 1 and 'lamp_switch(on=&quot;&lt;b&gt;&quot;)' in form.said.value and 'expected boolean' in form.said.value and '<b>' not in form.said.value
    for change, says in ((dict(tools=EXAMPLE[:-2]), 'line 2: '), (dict(tools=EXAMPLE, query=''), 'The query is empty'), (dict(query='Hello', folder='gone'), 'There is no folder gone')):
        for k, v in change.items(): getattr(form, k).value = v
        form.button.click()
        assert says in form.said.value and not form.button.disabled


def test_an_agent_that_was_exported_anew_is_loaded_anew(agent, monkeypatch):
    monkeypatch.setattr('sage_paper.try_out.ask', lambda *args: '[]')
    loaded, form = [], Asker(str(agent))
    monkeypatch.setattr('sage_paper.try_out.load_model', loaded.append)
    form.button.click()
    (agent/'README.md').write_text('written later')
    form.button.click()
    assert len(loaded) == 2


# ---- The notebook that JupyterLab opens on

INDEX = ROOT/'nbs/index.ipynb'


def links(path): return re.findall(r'\]\(([^)\s]+)\)', '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'))


def test_every_notebook_is_linked_from_the_index():
    found = {link for link in links(INDEX) if re.fullmatch(r'\w+\.ipynb', link)}
    assert {p.name for p in (ROOT/'nbs').glob('*.ipynb')} - {INDEX.name} <= found and INDEX.name not in found


def test_the_index_has_the_readmes_numbers():
    readme = (ROOT/'README.md').read_text()
    outcome, = (c.source for c in nbformat.read(INDEX, 4).cells if 'What came out is mixed.' in c.source)
    numbers = re.findall(r'\d+\.\d+', outcome)
    assert len(numbers) == 12 and [n for n in numbers if n not in readme] == []


def test_the_index_runs_from_the_records_alone(tmp_path):
    "Within two minutes, with neither data nor a model, and to the committed text"
    nb = nbformat.read(INDEX, 4)
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code')
    env = dict(PYTHONPATH=str(ROOT), MPLBACKEND='agg', SAGE_ROOT=str(ROOT), SAGE_CACHE_DIR=str(tmp_path/'cache'), HOME=str(tmp_path), PATH='')
    code = f'import sys\n{code}\nassert "torch" not in sys.modules and len(records) == 40'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    printed = ''.join(o.text for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'stream')
    assert out.stdout == printed and not (tmp_path/'cache').exists()


def test_jupyterlab_opens_on_the_index():
    lab = re.search(r'^lab:.*\n\t(.*)$', (ROOT/'Makefile').read_text(), re.M)[1]
    url = re.search(r'--LabApp\.default_url=/lab/tree/(\S+)', lab)[1]
    assert ROOT/url == INDEX
    opened = json.loads((ROOT/'.devcontainer/devcontainer.json').read_text())['customizations']['codespaces']['openFiles']
    assert opened == ['nbs/index.ipynb']


def test_the_index_is_neither_library_nor_experiment():
    assert not any(c.source.startswith('#| default_exp') for c in nbformat.read(INDEX, 4).cells) and not INDEX.name.startswith('exp_')
    assert not (ROOT/'sage_paper/index.py').exists()
