"What the project promises, measured: `make bench` prints a table and fails where a limit is missed"
import json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

from sage_paper.calls import Sample, ToolCall, format_calls
from sage_paper.config import load_settings
from sage_paper.efficiency_report import efficiency_frame, intervals, ratios, step_summary
from sage_paper.efficiency_runs import efficiency_spec, run_efficiency
from sage_paper.queries import sageworld_set
from sage_paper.samples import write_samples
from sage_paper.world import execute, make_tools, make_world

ROOT = Path(__file__).parents[1]


def seconds(*cmd, repeat=1, **env):
    "Least wall time of `repeat` runs of a command"
    def one():
        start = time.perf_counter()
        subprocess.run(cmd, check=True, cwd=ROOT, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start
    return min(one() for _ in range(repeat))


def smoke():
    "Seconds of the default notebook with no model in the cache and no record, and the memory its processes peak at, GiB"
    for f in (ROOT/'runs/streaming/smoke').glob('*.json'): f.unlink()
    with tempfile.TemporaryDirectory() as tmp:
        took = seconds('papermill', 'nbs/exp_streaming.ipynb', f'{tmp}/out.ipynb', SAGE_CACHE_DIR=tmp)
    return took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/2**20


def generation():
    "Seconds of one core for 1,200 tools and 20,000 queries, a tenth of them test queries kept apart from the others; and the plans"
    start = time.process_time()
    make_tools()
    sets = [sageworld_set(n - n//10, n//10, challenge) for challenge, n in dict(selection=8000, timing=6000, planning=6000).items()]
    return time.process_time() - start, [s.calls for d in sets for split in d.splits.values() for s in split]


def execution(plans):
    "Calls a second on one core, each plan in a world of its own"
    world, start = make_world(), time.process_time()
    for calls in plans: execute(world, calls)
    return sum(map(len, plans))/(time.process_time() - start)


def scoring(n=100_000):
    "Seconds of one core and GiB of `sage-paper score` on a file of n predictions, half of them right"
    samples = [Sample(f's/{i}', f'Query number {i}, as long as such a query usually is.', tuple(ToolCall(f'tool_{i % 97}', dict(n=i, text='some words', on=True)) for _ in range(1 + i % 3)),
                      challenge='planning' if i % 3 else 'selection') for i in range(n)]
    with tempfile.TemporaryDirectory() as tmp:
        write_samples(f'{tmp}/gold.jsonl', samples)
        with open(f'{tmp}/answers.jsonl', 'w') as f: f.writelines(json.dumps(dict(id=s.id, output=format_calls(samples[k - k % 2].calls))) + '\n' for k, s in enumerate(samples))
        code = f'import os, resource; os.sched_setaffinity(0, [0]) if hasattr(os, "sched_setaffinity") else None\nfrom sage_paper.cli import main\nmain("score --data {tmp}/gold.jsonl --predictions {tmp}/answers.jsonl".split())\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)'
        start = time.perf_counter()
        out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        return time.perf_counter() - start, float(out.splitlines()[-1])


def efficiency():
    "The rivals of `exp_efficiency` on this machine, once each; with the default model's training step, small where there is no GPU; the limits that were missed"
    import torch
    small = {} if torch.cuda.is_available() else dict(step_batch_size=4, step_number=3, step_rounds=2)
    s = load_settings('efficiency', 'paper', parts='step buffer pool stream', stream_sizes='1000 10000 100000', **small)
    records = [dict(spec=(spec := efficiency_spec(s, part, 0)), result=run_efficiency(spec)) for part in s.parts]
    frame = efficiency_frame(records)
    units = dict(step='ms', buffer='µs', pool='s', stream='µs')
    for part in s.parts:
        for (variant, n), r in intervals(frame, part).iterrows(): print(f'{part + ", " + variant:40} {n:9,} {r["mean"]:10.2f} {units[part]}')
    print(step_summary(records, frame).round(3).to_string())
    times, stream = {v: x for (p, v, n), x in frame.groupby(['part', 'variant', 'n']).value.mean().items() if p in ('pool', 'buffer') and n == frame[frame.part == p].n.max()}, frame[frame.part == 'stream'].value
    ssis = ratios(frame, 'step', 'streaming')['streaming_ssis'][0]
    checks = {'buffer, update 64 and draw 64 of a million, µs': (times['buffer'], 150), 'k-center against the fastest rival': (times['k_center']/min(times.get(k, 1e9) for k in ('numpy', 'numpy_product', 'fpsample')), 1),
              'dearest sample of a stream against the cheapest': (stream.max()/stream.min(), 1.2)}
    if torch.cuda.is_available(): checks |= {'step with SSIS against one without': (ssis, 1.1)}
    for what, (value, limit) in checks.items(): print(f'{what:50} {value:10.2f} {"":8} (at most {limit})')
    return [what for what, (value, limit) in checks.items() if value > limit]


def main():
    os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    generated, plans = generation()
    scored, scoring_memory = scoring()
    took, memory = smoke()
    bare = seconds(sys.executable, '-c', 'pass', repeat=5)
    most = [('papermill nbs/exp_streaming.ipynb, from scratch', took, 360, 's'), ('its peak memory', memory, 6, 'GiB'),
            ('make paper, after set-up', seconds('make', 'paper'), 180, 's'),
            ('import sage_paper', seconds(sys.executable, '-c', 'import sage_paper', repeat=5) - bare, 0.5, 's'),
            ('sage-paper --list', seconds('sage-paper', '--list', repeat=5), 1, 's'),
            ('1,200 tools and 20,000 queries of SageWorld', generated, 10, 's'),
            ('sage-paper score, 100,000 predictions', scored, 60, 's'), ('its peak memory', scoring_memory, 1, 'GiB'),
            ('make test', seconds('make', 'test'), 720, 's')]
    calls = execution(plans)
    for what, value, limit, unit in most: print(f'{what:50} {value:10.2f} {unit:8} (at most {limit})')
    print(f'{"calls that SageWorld executes":50} {calls:10,.0f} {"a second":8} (at least 20,000)')
    missed = efficiency()
    sys.exit(any(value >= limit for _, value, limit, _ in most) or calls < 20_000 or bool(missed))


if __name__ == '__main__': main()
