"A trained agent as a folder: what others load is what was trained, and its card says what is in the record"
import dataclasses, json, os, re, stat

import pytest, torch, yaml
from huggingface_hub import ModelCard

from conftest import ROOT
from sage_paper.assets import registry
from sage_paper.calls import Sample, ToolCall
from sage_paper.cli import main
from sage_paper.config import SettingsError, load_settings
from sage_paper.datasets import DATASETS
from sage_paper.full_training_runs import run_full_training
from sage_paper.model import load_lm, no_progress, render, tiny_lm
from sage_paper.publishing import ExportError, base_of, export_agent, limits, measures_of, model_card, source_of
from sage_paper.records import read_record, record_key
from sage_paper.trained_agent import train_and_export

RECORDS = sorted((ROOT/'runs/full_training/paper').glob('*.json'))
QUERY = Sample('a', 'Put the oak barrel into the cellar.', (ToolCall('wine_move_oak_barrel', dict(id='oak_barrel-3', place='cellar')),))


@pytest.fixture(scope='module')
def record(): return read_record(RECORDS[0])


@pytest.fixture(scope='module')
def exported(record, tmp_path_factory):
    "A random model, and its folder with a card of a real run"
    lm, folder = tiny_lm(seed=3), tmp_path_factory.mktemp('out')/'an-agent'
    return lm, export_agent(lm, folder, model_card(record, 'an-agent'), record)


def test_others_get_the_same_logits_and_the_same_tokens(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    lm, folder = exported
    with no_progress(): model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert render(QUERY, tokenizer) == render(QUERY, lm.tokenizer)
    ids = tokenizer(render(QUERY, tokenizer)[0], add_special_tokens=False)['input_ids']
    assert ids == lm.tokenizer(render(QUERY, lm.tokenizer)[0], add_special_tokens=False)['input_ids'] and len(ids) > 50
    with torch.no_grad(): assert torch.equal(model(torch.tensor([ids])).logits, lm.model(torch.tensor([ids])).logits)
    assert model.dtype == torch.float32 and tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id


def test_the_library_loads_it_as_any_other_model(exported):
    lm, folder = exported
    again = load_lm(str(folder), 'fp32', 'cpu')
    assert all(torch.equal(a, b) for a, b in zip(lm.model.state_dict().values(), again.model.state_dict().values(), strict=True))


def test_the_folder_has_what_vllm_and_the_hub_look_for(exported, record):
    _, folder = exported
    assert {'config.json', 'model.safetensors', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'README.md', 'record.json'} <= {p.name for p in folder.iterdir()}
    template = (folder/'chat_template.jinja').read_text() if (folder/'chat_template.jinja').exists() else json.loads((folder/'tokenizer_config.json').read_text())['chat_template']
    assert '<|im_start|>' in template and json.loads((folder/'config.json').read_text())['architectures'] == ['LlamaForCausalLM']
    assert json.loads((folder/'record.json').read_text()) == record and stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o644}


def test_the_code_in_the_card_runs(exported, monkeypatch, capsys):
    lm, folder = exported
    monkeypatch.chdir(folder.parent)
    python, shell = re.findall(r'```(?:python|sh)\n(.+?)```', (folder/'README.md').read_text(), re.S)
    with no_progress(): exec(python.replace('max_new_tokens=128', 'max_new_tokens=4'), ran := {})
    ids = ran['prompt']['input_ids']
    written = lm.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1]:]
    assert capsys.readouterr().out == lm.tokenizer.decode(written, skip_special_tokens=True) + '\n' and 0 < len(written) <= 4
    assert lm.tokenizer.decode(ids[0]) == render(Sample('', ran['chat'][1]['content'], ()), lm.tokenizer)[0] and shell.startswith('vllm serve an-agent ')
    asked = json.loads(re.search(r"-d '(.+)'", shell)[1])
    assert asked['model'] == 'an-agent' and asked['temperature'] == 0 and [m['role'] for m in asked['messages']] == ['system', 'user'] and asked['messages'][0]['content'] in python


# ---- The card

def test_every_measure_of_the_card_is_one_of_the_record(exported, record):
    _, folder = exported
    found = {(e.task_name, e.dataset_type, e.metric_type): e.metric_value for e in ModelCard.load(folder/'README.md').data.eval_results}
    wanted = {(*k.split('/'), m): round(v, 4) for k, p in record['result']['parts'].items() for m, v in p['scores'].items() if m not in ('n', 'errors') and v is not None}
    assert found == wanted and len(found) > 30


def test_the_text_shows_the_same_measures(record):
    text = str(model_card(record, 'x'))
    for challenge, name, n, measure, value in measures_of(record['result']['parts']): assert f'| {challenge} | {name} | {n} | {measure.replace("_", " ")} | {value:.3f} |' in text


def test_base_model_data_and_licences_are_named(record):
    card = model_card(record, 'x')
    assert card.data.base_model == 'HuggingFaceTB/SmolLM2-135M-Instruct' and card.data.license == 'apache-2.0' == registry()['smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf'].licence.lower()
    for name in record['spec']['data']:
        what, licence, where = source_of(name)
        assert re.search(rf'^\| {name} \| {re.escape(what)} \| .+ \| {licence} \| {re.escape(where)} \|$', str(card), re.M)
    assert 'CC-BY-4.0 | https://github.com/tldr-pages/tldr, commit 08e345f42639' in str(card)


@pytest.mark.parametrize('name', DATASETS)
def test_every_data_set_has_a_licence_and_a_source(name):
    what, licence, where = source_of(name)
    rows = [a for a in registry().values() if a.licence == licence]
    assert what and rows and re.fullmatch(r'https://github\.com/\S+, commit [0-9a-f]{12}|the package \S+==\S+', where)


def test_the_head_is_yaml_and_nothing_of_it_is_lost(record):
    text = str(model_card(record, 'x'))
    head = yaml.safe_load(text.split('---')[1])
    assert head['pipeline_tag'] == 'text-generation' and head['library_name'] == 'transformers' and head['model-index'][0]['name'] == 'x'
    assert {r['dataset']['type'] for r in head['model-index'][0]['results']} == {k.split('/')[1] for k in record['result']['parts']}


def test_limits_follow_from_the_record(record):
    small = record | dict(result=record['result'] | dict(parts={'timing/sageworld': dict(scores=dict(n=2, accuracy=.5))}), spec=record['spec'] | dict(data=dict(sageworld='')))
    assert any('2 held-out queries' in x for x in limits(small)) and not any('held-out queries' in x for x in limits(record))
    assert any('command lines' in x for x in limits(record)) and not any('command lines' in x for x in limits(small))


def test_a_model_of_nobody_knows_what_licence_is_not_given_one(record, tmp_path):
    own = record | dict(spec=record['spec'] | dict(model=str(tmp_path)))
    card = model_card(own, 'x')
    assert card.data.license == 'other' and card.data.base_model is None and base_of('a/b@c') == ('a/b', '') and str(tmp_path) not in str(card)


# ---- All or nothing

@pytest.mark.parametrize('there', ['folder', 'file'])
def test_what_is_there_is_not_written_over(there, record, tmp_path):
    place = tmp_path/'agent'
    if there == 'file': place.write_text('mine')
    else: place.mkdir(); (place/'mine').write_text('mine')
    with pytest.raises(ExportError, match='no empty folder'): export_agent(tiny_lm(), place, model_card(record, 'x'))
    assert (place if there == 'file' else place/'mine').read_text() == 'mine' and [*tmp_path.iterdir()] == [place]


@pytest.mark.parametrize('step', ['model', 'tokenizer', 'generation', 'rename'])
def test_a_failure_leaves_nothing(step, record, tmp_path, monkeypatch):
    from transformers import GenerationConfig
    lm = tiny_lm()
    def full(*_, **__): raise OSError('no room')
    at = dict(model=(lm.model, 'save_pretrained'), tokenizer=(lm.tokenizer, 'save_pretrained'), generation=(GenerationConfig, 'save_pretrained'), rename=(os, 'rename'))[step]
    monkeypatch.setattr(*at, full)
    with pytest.raises(OSError, match='no room'): export_agent(lm, tmp_path/'new'/'agent', model_card(record, 'x'))
    assert [*(tmp_path/'new').iterdir()] == []


# ---- Training one

@pytest.fixture(scope='module')
def settings(tiny_folder):
    return dataclasses.replace(load_settings('full_training', 'smoke', ROOT/'settings.ini'), model=tiny_folder, precision='fp32', train_per_set=4, batch_size=4, buffer_size=6, remembered=0.5, n_queries=2, passes=8., max_new_tokens=4)


@pytest.fixture(scope='module')
def trained(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')/'agent'
    return train_and_export(settings, folder), folder


def test_the_card_is_of_the_very_run(trained, settings):
    record, folder = trained
    assert json.loads((folder/'record.json').read_text()) == record and record['key'] == record_key('full_training', record['version'], record['spec']) and record['key'] in (folder/'README.md').read_text()
    assert {(e.task_name, e.dataset_type) for e in ModelCard.load(folder/'README.md').data.eval_results} == {tuple(k.split('/')) for k in record['result']['parts']}


def test_the_run_is_that_of_the_experiment_and_the_weights_are_its_last(trained, settings):
    record, folder = trained
    again = run_full_training(record['spec'])
    assert {k: p['scores'] for k, p in again['parts'].items()} == {k: p['scores'] for k, p in record['result']['parts'].items()}
    before, after = load_lm(settings.model, 'fp32', 'cpu').model.state_dict(), load_lm(str(folder), 'fp32', 'cpu').model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_nothing_is_trained_for_a_folder_that_cannot_be_written(settings, tmp_path, monkeypatch):
    monkeypatch.setattr('sage_paper.trained_agent.train_agent', lambda spec: pytest.fail('it was trained'))
    (tmp_path/'mine').touch()
    with pytest.raises(ExportError): train_and_export(settings, tmp_path)
    with pytest.raises(SettingsError, match='expected one of full, no_ssis'): train_and_export(settings, tmp_path/'new', 'sage')


def test_the_command_trains_with_changed_settings(settings, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SAGE_ROOT', str(ROOT))
    (tmp_path/'mine.yaml').write_text(f'model: {tiny_folder}\nprecision: fp32\npasses: 8\ntrain_per_set: 4\nbatch_size: 4\nmax_new_tokens: 4\n')
    assert main(['export', str(tmp_path/'agent'), '--variant', 'no_rl', '--seed', '5', '--config', str(tmp_path/'mine.yaml')]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path/'agent/record.json').read_text())
    assert 'profile smoke-custom, variant no_rl' in out and record['spec']['variant'] == 'no_rl' and record['spec']['seed'] == 5 and [*record['result']['stages']] == ['stream']


@pytest.mark.parametrize('argv,said', [(['export', '.'], 'no empty folder'), (['export', 'new', '--profile', 'papre'], "did you mean 'paper'"), (['export', 'new', '--config', 'none.yaml'], 'none.yaml cannot be read')])
def test_what_is_wrong_with_an_export_is_said_in_a_line(argv, said, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('SAGE_ROOT', str(ROOT))
    (tmp_path/'mine').touch()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2 and said in (err := capsys.readouterr().err) and 'Traceback' not in err


def test_data_and_card_are_written_side_by_side(monkeypatch, tmp_path, capsys):
    from sage_paper.data_cards import described
    small = dataclasses.replace(d := described('sageworld'), splits={k: s[:2] for k, s in d.splits.items()})
    monkeypatch.setattr('sage_paper.data_cards.described', lambda name: small)
    assert main(['data', 'sageworld', str(tmp_path/'world')]) == 0
    written = [tmp_path/'world'/d['contentUrl'] for d in json.loads((tmp_path/'world/croissant.json').read_text())['distribution']]
    assert [str(p) for p in (*written, tmp_path/'world/croissant.json')] == capsys.readouterr().out.split() and all(p.stat().st_size for p in written)
    assert main(['data', 'sageworld', str(tmp_path/'world')]) == 2 and 'is there already' in capsys.readouterr().err
