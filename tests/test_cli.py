"The command line: what it prints, what it writes, and what it says when a file is wrong"
import json, subprocess, sys

import pytest

from conftest import ROOT
from sage_paper.calls import PARSE_ERRORS, Sample, Tool, ToolCall, format_calls, tool_document
from sage_paper.cli import DEFINED, WORDS, main
from sage_paper.model import no_progress, render, tiny_lm
from sage_paper.samples import write_samples, write_tools
from sage_paper.scores import challenge_scores

TOOLS = {k: Tool(k, f'Does {k}.', dict(type='object', properties=dict(n=dict(type='integer')), required=['n'])) for k in ('boil', 'fry', 'bake', 'grill')}
GOLD = [Sample('one', 'Boil two.', (ToolCall('boil', dict(n=2)),)), Sample('two', 'Fry three.', (ToolCall('fry', dict(n=3)),)),
        Sample('plan', 'Bake one, then grill it.', (ToolCall('bake', dict(n=1)), ToolCall('grill', dict(n=1))), challenge='planning'),
        Sample('none', 'Thanks.', (), challenge='timing')]
RIGHT = {s.id: format_calls(s.calls) for s in GOLD}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with data, tools and right answers"
    monkeypatch.chdir(tmp_path)
    write_samples('gold.jsonl', GOLD)
    write_tools('tools.jsonl', TOOLS)
    answers('right.jsonl', RIGHT)
    return tmp_path


def answers(path, outputs):
    with open(path, 'w') as f: f.writelines(json.dumps(dict(id=i, output=o)) + '\n' for i, o in outputs.items())


def scored(capsys, *argv):
    "Exit code and metrics of a command that prints JSON"
    code = main([*argv, '--format', 'json'])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_right_answers_score_1(here, capsys):
    code, scores, err = scored(capsys, 'score', '--data', 'gold.jsonl', '--predictions', 'right.jsonl')
    assert code == 0 and err == '' and list(scores) == ['timing', 'planning', 'selection']
    assert scores['selection']['exact'] == scores['planning']['exact'] == scores['timing']['accuracy'] == 1 and scores['selection']['n'] == 2


@pytest.mark.parametrize('challenge,n', [('timing', 4), ('planning', 3), ('selection', 2)])
def test_a_named_challenge_is_measured_wherever_it_is_defined(here, capsys, challenge, n):
    answers('mixed.jsonl', RIGHT | dict(two='No idea.', none='[{"name":"boil","arguments":{}}]'))
    _, scores, _ = scored(capsys, 'score', '--data', 'gold.jsonl', '--predictions', 'mixed.jsonl', '--challenge', challenge)
    fit = [s for s in GOLD if challenge == 'timing' or s.calls and (challenge == 'planning' or len(s.calls) == 1)]
    outputs = RIGHT | dict(two='No idea.', none='[{"name":"boil","arguments":{}}]')
    assert scores == {challenge: challenge_scores(fit, [outputs[s.id] for s in fit], challenge)} and scores[challenge]['n'] == n


def test_the_table_and_the_json_say_the_same(here, capsys):
    main(['score', '--data', 'gold.jsonl', '--predictions', 'right.jsonl'])
    *table, last = capsys.readouterr().out.splitlines()
    scores = json.loads(last)
    shown = {tuple(l.split()[:2]) for l in table if l.startswith(' ')}
    assert {('exact', '1.0000'), ('n', '2')} <= shown and len(table) >= sum(len(m) for m in scores.values())


def test_every_line_of_the_table_says_what_it_counts(here, capsys):
    "Whatever is measured, and whatever went wrong"
    bad = dict(one='No idea.', two='[{"name": "boil"', plan='[{"name": "bake", "name": "fry"}]', none='{"a": 1}')
    answers('bad.jsonl', bad)
    for challenge in ([], ['--challenge', 'timing'], ['--challenge', 'planning']):
        assert main(['score', '--data', 'gold.jsonl', '--predictions', 'bad.jsonl', '--format', 'table', *challenge]) == 0
        lines = [l.split(maxsplit=2) for l in capsys.readouterr().out.splitlines() if l.startswith(' ')]
        assert all(len(l) == 3 for l in lines) and {'no-json', 'cut-off', 'duplicate-key'} <= {l[0] for l in lines}
    kinds = {k for c in ('timing', 'planning', 'selection') for k in challenge_scores([s for s in GOLD if DEFINED[c](len(s.calls))][:1], ['[]'], c)} - {'errors'}
    assert {*WORDS} == kinds | {*PARSE_ERRORS} and all(WORDS.values())


def test_a_missing_answer_counts_as_none_and_is_said(here, capsys):
    answers('some.jsonl', {k: RIGHT[k] for k in ('one', 'plan', 'none')})
    code, scores, err = scored(capsys, 'score', '--data', 'gold.jsonl', '--predictions', 'some.jsonl')
    assert code == 0 and scores['selection']['exact'] == 0.5 and '1 of 4 samples have no prediction' in err


WRONG = {'unknown id': (dict(one='[]', three='[]'), ['three', '1 of 2 predictions']), 'not a string': (dict(one=3), ['line 1', 'output', 'a string'])}


@pytest.mark.parametrize('outputs,said', WRONG.values(), ids=WRONG)
def test_wrong_predictions_are_named_and_end_with_2(here, capsys, outputs, said):
    answers('wrong.jsonl', outputs)
    code, scores, err = scored(capsys, 'score', '--data', 'gold.jsonl', '--predictions', 'wrong.jsonl')
    assert code == 2 and scores is None and all(w in err for w in said) and err.startswith('sage-paper: ')


EVALUATE = ['evaluate', '--data', 'gold.jsonl', '--model']


@pytest.mark.parametrize('argv,said', [(['score', '--data', 'none.jsonl', '--predictions', 'right.jsonl'], 'none.jsonl'),
                                       (['score', '--data', 'gold.jsonl', '--predictions', 'gold.jsonl'], 'unknown; expected one of id, output'),
                                       (['score', '--data', 'empty.jsonl', '--predictions', 'right.jsonl'], 'empty.jsonl: expected samples, a line each, found an empty file'),
                                       (['score', '--data', 'gold.jsonl', '--predictions', 'empty.jsonl'], 'empty.jsonl: expected predictions, a line each, found an empty file'),
                                       (['score', '--data', 'wide.jsonl', '--predictions', 'right.jsonl'], 'wide.jsonl: expected UTF-8, found UTF-16'),
                                       ([*EVALUATE, 'bm25', '--tools', 'empty.jsonl'], 'empty.jsonl: expected tools, a line each, found an empty file'),
                                       ([*EVALUATE, 'bm25', '--tools', 'few.jsonl'], "gold.jsonl: sample 'two' has the tool 'fry', which few.jsonl lacks; 2 tools are missing in all"),
                                       ([*EVALUATE, 'bm25'], 'bm25 needs the tools to choose from: name their file with --tools'),
                                       ([*EVALUATE, 'nonsense'], "no model 'nonsense'. There are smollm2-135m-instruct, gemma3-270m, bm25, folders, and hub ids"),
                                       ([*EVALUATE, 'smollm2-135m'], "did you mean 'smollm2-135m-instruct'?"),
                                       ([*EVALUATE, './gone'], "no model './gone'"),
                                       ([*EVALUATE, 'smollm2-135m-instruct', '--candidates', '2'], '--candidates needs the tools to choose from: name their file with --tools')])
def test_what_a_user_can_put_right_is_said_in_a_line(here, capsys, argv, said):
    (here/'empty.jsonl').touch()
    (here/'wide.jsonl').write_text((here/'gold.jsonl').read_text(), 'utf-16')
    write_tools('few.jsonl', {k: TOOLS[k] for k in ('boil', 'bake')})
    code, scores, err = scored(capsys, *argv)
    assert code == 2 and scores is None and said in err and 'Traceback' not in err and (err.count('\n') == 1 or 'unknown' in said)


def test_a_model_that_cannot_be_one_is_refused_before_anything_is_loaded(here):
    code = f'import sys; from sage_paper.cli import main; c = main({[*EVALUATE, "nonsense"]}); print(c, "torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=here, check=True).stdout == '2 False\n'


def test_bm25_answers_with_the_tool_it_finds_first(here, capsys):
    code, scores, _ = scored(capsys, *EVALUATE, 'bm25', '--tools', 'tools.jsonl', '--predictions', 'out.jsonl')
    with open('out.jsonl') as f: written = {o['id']: json.loads(o['output']) for o in map(json.loads, f)}
    assert code == 0 and written['one'] == [dict(name='boil', arguments={})] and written['two'] == [dict(name='fry', arguments={})]
    assert scores['selection'] == dict(n=2, format=1, readable=1, name=1, exact=0, argument_f1=0, errors={}) and scores['timing']['false_call'] == 1


def test_an_unknown_option_shows_the_usage(here):
    out = subprocess.run([sys.executable, '-c', 'import sys; from sage_paper.cli import main; sys.exit(main())', 'score', '--date', 'gold.jsonl'], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 2 and 'usage: sage-paper' in out.stderr


@pytest.fixture
def tiny(here):
    "A random model's folder"
    lm = tiny_lm()
    with no_progress(): lm.model.save_pretrained('tiny'); lm.tokenizer.save_pretrained('tiny')
    return lm


def test_evaluating_writes_what_scoring_reads(tiny, capsys):
    argv = ['--data', 'gold.jsonl', '--challenge', 'selection']
    code, evaluated, _ = scored(capsys, 'evaluate', *argv, '--model', 'tiny', '--max-new-tokens', '6', '--predictions', 'out.jsonl')
    with open('out.jsonl') as f: written = [json.loads(l) for l in f]
    assert code == 0 and [w['id'] for w in written] == ['one', 'two'] and all(w['output'] for w in written)
    write_samples('two.jsonl', GOLD[:2])
    assert scored(capsys, 'score', '--data', 'two.jsonl', '--predictions', 'out.jsonl')[1] == evaluated


def test_candidates_reach_the_prompt(tiny, capsys, monkeypatch):
    prompts = []
    def generate(lm, samples, max_new_tokens, batch_size, tools):
        prompts.extend(render(s, lm.tokenizer, tools)[0] for s in samples)
        return [RIGHT[s.id] for s in samples]
    monkeypatch.setattr('sage_paper.evaluation.generate', generate)
    code, scores, _ = scored(capsys, 'evaluate', '--data', 'gold.jsonl', '--model', 'tiny', '--tools', 'tools.jsonl', '--candidates', '2')
    assert code == 0 and scores['planning']['exact'] == 1 and len(prompts) == 4
    assert all(sum(tool_document(t) in p for t in TOOLS.values()) == 2 for p in prompts) and tool_document(TOOLS['boil']) in prompts[0]
