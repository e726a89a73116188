"`sage-paper serve` with a stand-in for vLLM: how it ends, what it then leaves behind, and what it says when it cannot start"
import os, signal, socket, subprocess, sys, threading, time

import pytest

from conftest import ROOT
from sage_paper.cli import main
from sage_paper.inference import NoServer, served
from sage_paper.serving import free_port

# A server with a process of its own beside it, as vLLM has; it may be told not to answer yet, to ignore that it is to end, and to end by itself.
STAND_IN = f'''#!{sys.executable}
import json, os, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
port, name = (sys.argv[sys.argv.index(x) + 1] for x in ('--port', '--served-model-name'))
if 'STUBBORN' in os.environ: signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(['sleep', '600'])
with open(os.environ['PIDS'] + '~', 'w') as f: f.write(f'{{os.getpid()}} {{child.pid}}')
os.rename(os.environ['PIDS'] + '~', os.environ['PIDS'])
class Up(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == '/v1/models' and 'BRIEF' in os.environ: threading.Timer(0.2, lambda: os._exit(7)).start()
        self.send_response(503 if 'SLOW' in os.environ else 200); self.end_headers()
        self.wfile.write(json.dumps(dict(data=[dict(id=name, owned_by='vllm')])).encode())
print('out of memory', flush=True)
HTTPServer(('127.0.0.1', int(port)), Up).serve_forever()
'''


@pytest.fixture
def argv(tmp_path, monkeypatch, tiny_folder):
    "A command that serves a random model with the stand-in"
    (tmp_path/'vllm').write_text(STAND_IN)
    (tmp_path/'vllm').chmod(0o755)
    for k, v in dict(SAGE_VLLM=tmp_path/'vllm', PIDS=tmp_path/'pids').items(): monkeypatch.setenv(k, str(v))
    return ['serve', '--model', tiny_folder, '--port', str(free_port())]


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout[:1] not in ('', 'Z')


def nobody_is_left(path):
    "Whether what a stand-in started is gone"
    pids = [*map(int, path.read_text().split())]
    until = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < until: time.sleep(0.02)
    return not any(map(alive, pids))


def once(ready, do):
    "Do something in the background as soon as it is time"
    def wait():
        until = time.monotonic() + 30
        while not ready() and time.monotonic() < until: time.sleep(0.02)
        do()
    threading.Thread(target=wait, daemon=True).start()


def test_ctrl_c_ends_it_with_0_and_all_that_it_started(argv, tmp_path):
    code = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from sage_paper.cli import main; sys.exit(main())'
    p = subprocess.Popen([sys.executable, '-c', code, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = p.stdout.readline()
    assert f'answers at http://127.0.0.1:{argv[-1]}/v1' in said and served(f'http://127.0.0.1:{argv[-1]}/v1')
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=90)
    assert p.returncode == 0 and out == '' and len(err.splitlines()) == 1 and nobody_is_left(tmp_path/'pids')
    with pytest.raises(NoServer): served(f'http://127.0.0.1:{argv[-1]}/v1')


@pytest.mark.parametrize('how', ['SLOW', ''], ids=['before it answers', 'later'])
@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGHUP], ids=['kill', 'closed terminal'])
def test_so_do_others_who_end_it(argv, tmp_path, monkeypatch, capsys, sign, how):
    if how: monkeypatch.setenv(how, '')
    before, said = signal.signal(sign, signal.SIG_DFL), []   # which whoever runs the tests in the background may ignore
    def answers(): said.append(capsys.readouterr().out); return 'answers at' in ''.join(said)
    once((tmp_path/'pids').exists if how else answers, lambda: os.kill(os.getpid(), sign))
    try: assert main(argv) == 0 and nobody_is_left(tmp_path/'pids') and signal.getsignal(sign) == signal.SIG_DFL
    finally: signal.signal(sign, before)


def test_who_asks_twice_does_not_wait(argv, tmp_path, monkeypatch):
    monkeypatch.setenv('STUBBORN', '')
    monkeypatch.setenv('SLOW', '')
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    once((tmp_path/'pids').exists, twice)
    start = time.monotonic()
    assert main(argv) == 0 and time.monotonic() - start < 10 and nobody_is_left(tmp_path/'pids')


def test_when_it_ends_by_itself_the_end_of_its_log_is_shown_and_the_exit_code_is_1(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BRIEF', '')
    assert main(argv) == 1 and nobody_is_left(tmp_path/'pids')
    err = capsys.readouterr().err
    assert 'vLLM ended by itself, with 7' in err and 'out of memory' in err


def test_what_keeps_it_from_starting_is_said_in_a_line(argv, tmp_path, monkeypatch, capsys):
    with socket.create_server(('127.0.0.1', int(argv[-1]))): assert main(argv) == 2
    assert f'something listens at port {argv[-1]} already: end it, or choose another port\n' in capsys.readouterr().err
    monkeypatch.setenv('SAGE_VLLM', str(tmp_path/'nowhere'))
    assert main(argv) == 2 and capsys.readouterr().err == f'sage-paper: no vLLM at {tmp_path}/nowhere: install it with `make vllm`, or name the command in SAGE_VLLM\n'
    with pytest.raises(SystemExit) as e: main([*argv[:-1], '70000'])
    assert e.value.code == 2 and "argument --port: invalid port value: '70000'" in capsys.readouterr().err
    assert not (tmp_path/'pids').exists()
