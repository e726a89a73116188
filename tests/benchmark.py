"What the project promises to stay below, measured: `make bench` prints a table and fails where a limit is passed"
import os, resource, subprocess, sys, tempfile, time
from pathlib import Path

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


def main():
    os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    took, memory = smoke()
    bare = seconds(sys.executable, '-c', 'pass', repeat=5)
    figures = [('papermill nbs/exp_streaming.ipynb, from scratch', took, 360, 's'), ('its peak memory', memory, 6, 'GiB'),
               ('make paper, after set-up', seconds('make', 'paper'), 180, 's'),
               ('import sage_paper', seconds(sys.executable, '-c', 'import sage_paper', repeat=5) - bare, 0.5, 's'),
               ('make test', seconds('make', 'test'), 720, 's')]
    for what, value, limit, unit in figures: print(f'{what:50} {value:8.2f} {unit:4} (limit {limit})')
    sys.exit(any(value >= limit for _, value, limit, _ in figures))


if __name__ == '__main__': main()
