"A tracker beside the records: what it is told, when, and what happens where it is not there or does not answer"
import sys
from types import SimpleNamespace

import pandas as pd, pytest

from conftest import ROOT
from sage_paper.cli import main
from sage_paper.config import SettingsError
from sage_paper.records import RecordError, read_record, run_or_load, sweep
from sage_paper.tracking import TrackingError, by_step, flat_settings, points, said_of, track

COMMITTED = [sorted(folder.glob('*.json'))[0] for folder in sorted((ROOT/'runs').glob('*/paper'))]


def flat(nested): return pd.json_normalize(nested).iloc[0].to_dict()   # dotted names, by pandas


class FakeMLflow(SimpleNamespace):
    "Notes what the real one would be told"
    def __init__(self): super().__init__(runs=[])
    def set_experiment(self, name): self.experiment = name
    def start_run(self, run_name):
        self.runs.append(run := SimpleNamespace(experiment=self.experiment, name=run_name, params={}, metrics={}, over=False))
        class Within:
            def __enter__(self): return run
            def __exit__(self, *_): run.over = True
        return Within()
    def log_params(self, params):
        assert len(params) <= 100 and all(len(str(v)) <= 6000 for v in params.values())   # what MLflow takes
        self.runs[-1].params |= params
    def log_metrics(self, metrics, step):
        assert len(metrics) <= 1000
        for k, v in metrics.items(): self.runs[-1].metrics.setdefault(k, {})[step] = v


class FakeTrackio(SimpleNamespace):
    def __init__(self): super().__init__(runs=[])
    def init(self, project, name, config, embed, auto_log_gpu, auto_log_cpu):
        assert not (embed or auto_log_gpu or auto_log_cpu)
        run = SimpleNamespace(experiment=project, name=name, params=config, metrics={}, over=False)
        def log(metrics, step):
            for k, v in metrics.items(): run.metrics.setdefault(k, {})[step] = v
        def finish(): run.over = True
        run.log, run.finish = log, finish
        self.runs.append(run)
        return run


@pytest.fixture(params=['mlflow', 'trackio'])
def tracker(request, monkeypatch):
    "A tracker that notes what it is told"
    fake = dict(mlflow=FakeMLflow, trackio=FakeTrackio)[request.param]()
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.setenv('SAGE_TRACKER', request.param)
    return fake


def curve(spec):
    if spec['x'] > 9: raise MemoryError('no room')
    return dict(loss=[1/(spec['x'] + k) for k in range(3)], n=spec['x'])


def test_a_run_is_told_of_once_when_its_record_is_there(tracker, tmp_path):
    for _ in range(2): record = run_or_load(curve, 'demo', 1, dict(x=2, data=dict(sageworld='b3f2')), tmp_path)
    run, = tracker.runs
    assert run.over and run.experiment == 'demo' and run.name == record['key'] and run.params['x'] == 2 and run.params['data.sageworld'] == 'b3f2' and run.params['environment.device']
    assert run.metrics['loss'] == {0: 1/2, 1: 1/3, 2: 1/4} and run.metrics['n'] == {0: 2} and run.metrics['seconds'][0] > 0


def test_a_sweep_tells_of_what_it_has_made_and_of_no_failure(tracker, tmp_path):
    run_or_load(curve, 'demo', 1, dict(x=1), tmp_path)
    with pytest.raises(RecordError, match='1 of 3 runs failed'): sweep(curve, 'demo', 1, [dict(x=x) for x in (1, 2, 10)], tmp_path)
    assert [r.params['x'] for r in tracker.runs] == [1, 2]


@pytest.mark.parametrize('path', COMMITTED, ids=lambda p: p.parent.parent.name)
def test_every_kind_of_record_fits_a_tracker(path, tracker):
    record = read_record(path)
    track(record)
    run, = tracker.runs
    assert run.over and sum(map(len, run.metrics.values())) == sum(map(len, by_step(record).values())) > 1
    assert len(run.metrics) < 1000 and max(map(len, run.metrics.values())) < 250   # curves, and nothing query by query


def test_settings_are_flat_as_they_are_shown():
    for path in COMMITTED:
        record = read_record(path)
        assert flat_settings(record['spec']) == flat(record['spec']) and {*flat(record['spec'])} < {*said_of(record)}


def test_numbers_have_one_place_each():
    for path in COMMITTED:
        found = [(name, step) for name, step, _ in points(read_record(path)['result'])]
        assert len(found) == len({*found}), path


def test_no_tracker_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv('SAGE_TRACKER', raising=False)
    for name in ('mlflow', 'trackio'): monkeypatch.setitem(sys.modules, name, None)
    assert run_or_load(curve, 'demo', 1, dict(x=2), tmp_path)['result']['n'] == 2


@pytest.mark.parametrize('name,said', [('mlflow', r"pip install -e '\.\[mlflow\]'"), ('trackio', r"pip install -e '\.\[trackio\]'"), ('wandb', 'known are trackio, mlflow')])
def test_a_tracker_that_is_not_there_is_named_before_anything_is_run(name, said, monkeypatch, tmp_path):
    monkeypatch.setenv('SAGE_TRACKER', name)
    monkeypatch.setitem(sys.modules, name, None)
    for begin in (lambda: run_or_load(curve, 'demo', 1, dict(x=2), tmp_path), lambda: sweep(curve, 'demo', 1, [dict(x=2)], tmp_path)):
        with pytest.raises(SettingsError, match=said): begin()
    assert [*tmp_path.glob('*.json')] == []


def test_a_tracker_out_of_reach_loses_no_run(monkeypatch, tmp_path):
    fake = FakeMLflow()
    fake.start_run = lambda run_name: (_ for _ in ()).throw(ConnectionError('nobody is there'))
    monkeypatch.setitem(sys.modules, 'mlflow', fake)
    monkeypatch.setenv('SAGE_TRACKER', 'mlflow')
    with pytest.raises(TrackingError, match='its record is written'): run_or_load(curve, 'demo', 1, dict(x=2), tmp_path)
    with pytest.raises(RecordError, match='TrackingError: mlflow did not take the run'): sweep(curve, 'demo', 1, [dict(x=3)], tmp_path)
    assert [r['result']['n'] for r in sweep(curve, 'demo', 1, [dict(x=2), dict(x=3)], tmp_path)] == [2, 3] and [*tmp_path.glob('*.failed.json')] == []


def test_records_are_sent_later(tracker, monkeypatch, tmp_path, capsys):
    (tmp_path/'nbs').mkdir(); (tmp_path/'settings.ini').touch()
    monkeypatch.setenv('SAGE_ROOT', str(tmp_path))
    with monkeypatch.context() as m:
        m.delenv('SAGE_TRACKER')
        for x in (1, 2): run_or_load(curve, 'streaming', 1, dict(x=x), tmp_path/'runs/streaming/smoke')
        assert main(['runs', 'track']) == 2 and 'name one in SAGE_TRACKER' in capsys.readouterr().err
    assert main(['runs', 'track', 'streaming_comparison']) == 0 and sorted(r.params['x'] for r in tracker.runs) == [1, 2] and '2 records sent' in capsys.readouterr().out
    assert main(['runs', 'track', '--profile', 'paper']) == 0 and len(tracker.runs) == 2
