"The inference client: order, attempts, deadlines, what is kept when something breaks, and what is never said"
import asyncio, json, logging, signal, socket, subprocess, sys, threading, time
from array import array
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import sage_paper.client, sage_paper.inference
from conftest import ROOT
from sage_paper.client import LocalClient
from sage_paper.inference import IncompleteBatch, InProcess, Interrupted, NoServer, Server, Tally, UnifiedInferenceClient, find_backend
from sage_paper.model import encode, forward, tiny_lm
from sage_paper.queries import sageworld_set

SECRET = 'sk-not-to-be-seen'


@contextmanager
def served(reply, owner='vllm'):
    "A server that hands each question, with its number, to `reply`; its address, and what it has seen"
    seen, lock, now = dict(asked=[], most=0, keys=set()), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass

        def say(self, status, body, **headers):
            data = json.dumps(body).encode()
            self.send_response(status)
            for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(data)), **headers}.items(): self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)

        def answer(self, text):
            self.say(200, dict(id='', object='chat.completion', created=0, model='m', usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2),
                               choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))]))

        def fail(self, status, **headers): self.say(status, dict(error=dict(message=f'no: {status}')), **headers)

        def hang_up(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self): self.say(200, dict(data=[dict(id='m', owned_by=owner)]))

        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['messages'][-1]['content']
            with lock:
                seen['asked'].append(said); seen['keys'].add(self.headers['Authorization'])
                now[0] += 1; seen['most'] = max(seen['most'], now[0])
                k = seen['asked'].count(said)
            try: reply(self, said, k)
            finally:
                with lock: now[0] -= 1

    class Quiet(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128
        def handle_error(self, *_): pass   # those who ask may go away

    server = Quiet(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/v1', seen
    finally:
        server.shutdown()
        server.server_close()


def client_of(url, **kwargs): return UnifiedInferenceClient(Server(url, 'm', SECRET, vllm=False), **kwargs)
def questions(*words): return [[dict(role='user', content=str(w))] for w in words]
def texts(results): return [r and r[0].text for r in results]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch): monkeypatch.setattr('tenacity.wait.wait_random_exponential.__call__', lambda self, state: 0.001)


def test_answers_stand_where_their_questions_stood_and_not_too_many_are_asked_at_a_time():
    def reply(h, said, k):
        time.sleep(0.002*(int(said) % 7))
        h.answer(said)
    with served(reply) as (url, seen), client_of(url, concurrency=9) as client:
        assert texts(client.chats(questions(*range(100)))) == [str(k) for k in range(100)]
        assert 1 < seen['most'] <= 9 and client.stats()['requests'] == client.stats()['completion_tokens'] == 100


def test_counts_can_be_read_while_a_batch_goes_on():
    tally, lost = Tally(latencies=array('f', range(10_000))), []
    def work():
        for k in range(5_000):
            try: tally.latencies.append(k)
            except BufferError as e: lost.append(e)
            time.sleep(0)   # so that the other thread gets its turn between any two
    thread = threading.Thread(target=work)
    thread.start()
    reads = 0
    while thread.is_alive() or not reads: reads += tally.stats()['latency_p50'] > 0
    thread.join()
    assert reads and not lost and len(tally.latencies) == 15_000


@pytest.mark.parametrize('status', [429, 500, 502, 503, 'hung up'])
def test_what_passes_is_tried_again(status):
    def reply(h, said, k): h.answer(said) if k == 3 else h.hang_up() if status == 'hung up' else h.fail(status)
    with served(reply) as (url, seen), client_of(url) as client:
        assert texts(client.chats(questions('a', 'b'))) == ['a', 'b'] and len(seen['asked']) == 6
        assert {k: client.stats()[k] for k in ('requests', 'retried', 'failed')} == dict(requests=2, retried=4, failed=0)


@pytest.mark.parametrize('status', [400, 401, 403, 404, 409, 422])
def test_a_mistake_of_the_one_who_asks_is_not(status):
    with served(lambda h, said, k: h.fail(status)) as (url, seen), client_of(url) as client:
        with pytest.raises(IncompleteBatch, match=f'no: {status}'): client.chats(questions('a'))
        assert seen['asked'] == ['a'] and client.stats()['failed'] == 1


def test_attempts_end():
    with served(lambda h, said, k: h.fail(503)) as (url, seen), client_of(url, attempts=4) as client:
        with pytest.raises(IncompleteBatch, match='InternalServerError'): client.chats(questions('a'))
        assert len(seen['asked']) == 4


def test_a_pause_that_a_server_names_is_kept():
    at = []
    def reply(h, said, k):
        at.append(time.monotonic())
        h.answer(said) if k == 2 else h.fail(429, **{'Retry-After': '0.5'})
    with served(reply) as (url, _), client_of(url) as client: client.chats(questions('a'))
    assert at[1] - at[0] >= 0.5


def test_a_question_at_fault_does_not_stop_the_others():
    with served(lambda h, said, k: h.fail(400) if said == '3' else h.answer(said)) as (url, _), client_of(url, concurrency=2) as client:
        with pytest.raises(IncompleteBatch, match='1 of 20 have no answer; number 3') as e: client.chats(questions(*range(20)))
        assert texts(e.value.results) == [None if k == 3 else str(k) for k in range(20)]


@pytest.mark.alone
def test_one_that_takes_too_long_does_not_either():
    def reply(h, said, k):
        if said == '3': time.sleep(3)
        h.answer(said)
    with served(reply) as (url, _), client_of(url, concurrency=4, deadline=0.5) as client:
        start = time.monotonic()
        with pytest.raises(IncompleteBatch, match='1 of 20 .*number 3: TimeoutError') as e: client.chats(questions(*range(20)))
        assert time.monotonic() - start < 2 and sum(r is None for r in e.value.results) == 1


def test_a_server_that_is_gone_ends_the_batch_and_what_was_answered_is_kept():
    def reply(h, said, k): h.answer(said) if int(said) < 30 else h.hang_up()
    with served(reply) as (url, seen), client_of(url, concurrency=4, attempts=3) as client:
        with pytest.raises(IncompleteBatch, match='APIConnectionError') as e: client.chats(questions(*range(10_000)))
        assert texts(e.value.results)[:30] == [str(k) for k in range(30)] and len(seen['asked']) < 60


@pytest.fixture
def interruptible():
    "What is started in the background may have been told to ignore the keyboard"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_stops_it_keeps_what_there_is(interruptible):
    def reply(h, said, k):
        if int(said) == 40: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        h.answer(said)
    with served(reply) as (url, seen), client_of(url, concurrency=4) as client:
        with pytest.raises(Interrupted) as e: client.chats(questions(*range(10_000)))
        assert isinstance(e.value, KeyboardInterrupt) and texts(e.value.results)[:30] == [str(k) for k in range(30)] and len(seen['asked']) < 1000
        assert texts(client.chats(questions('1'))) == ['1']   # and can go on asking


def test_it_can_be_awaited_many_times_at_once():
    async def ask(client): return await asyncio.gather(*(client.achats(questions(k, k + 1)) for k in range(5)))
    with served(lambda h, said, k: h.answer(said)) as (url, _), client_of(url) as client:
        assert [texts(x) for x in asyncio.run(ask(client))] == [[str(k), str(k + 1)] for k in range(5)]


def test_the_key_goes_to_the_server_and_nowhere_else(caplog, capsys, monkeypatch):
    for k, v in dict(OPENAI_API_KEY=SECRET, SAGE_API_MODEL='m').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(sage_paper.inference, 'USUAL', 'http://127.0.0.1:9/v1')
    with served(lambda h, said, k: h.answer(said) if said == 'a' else h.fail(400)) as (url, seen), caplog.at_level(logging.DEBUG):
        monkeypatch.setenv('OPENAI_BASE_URL', url)
        with UnifiedInferenceClient.create_auto() as client:
            client.chats(questions('a'))
            with pytest.raises(IncompleteBatch) as e: client.chats(questions('b'))
            said = [repr(client), repr(client.backend), str(vars(client)), str(e.value), repr(e.value.errors), str(client.stats())]
    out = capsys.readouterr()
    assert seen['keys'] == {f'Bearer {SECRET}'} and 'answers come from m (API)' in caplog.text
    assert not [x for x in (*said, out.out, out.err, *(r.getMessage() for r in caplog.records if r.name.startswith('sage_paper'))) if SECRET in x]


def test_whoever_is_there_is_taken_in_order(monkeypatch):
    monkeypatch.setattr(sage_paper.inference, 'load_lm', lambda *a: 'the model')
    monkeypatch.setattr(sage_paper.inference, 'USUAL', 'http://127.0.0.1:9/v1')
    key = dict(OPENAI_API_KEY=SECRET, SAGE_API_MODEL='m')
    with served(lambda *a: None) as (url, _), served(lambda *a: None, owner='somebody') as (other, _):
        for env, kind in [(key | dict(SAGE_VLLM_URL=url), 'vLLM'), (key, 'API'), ({}, 'in this process'), (dict(OPENAI_API_KEY=SECRET), 'in this process')]:
            assert find_backend('x', 'auto', env)[0].kind == kind
        with pytest.raises(NoServer, match='is not vLLM'): find_backend('x', 'auto', dict(SAGE_VLLM_URL=other))
        with pytest.raises(NoServer, match='no vLLM server answers'): find_backend('x', 'auto', key | dict(SAGE_VLLM_URL='http://127.0.0.1:9/v1'))


def test_in_this_process_it_answers_as_the_learners_client_does_and_piece_by_piece():
    lm, asked = tiny_lm(), list(sageworld_set(0, 7, 'selection', 60).splits['test'])
    with UnifiedInferenceClient(InProcess(lm)) as whole, UnifiedInferenceClient(InProcess(lm, 2)) as pieces:
        assert whole.generate(asked, max_new_tokens=20) == LocalClient(lm).generate(asked, max_new_tokens=20)
        assert whole.generate(asked, 3, 1., 20, seed=4) == pieces.generate(asked, 3, 1., 20, seed=4)
        found, by_hand = pieces.logprobs(asked), forward(lm, lm.collate(encode(asked, lm.tokenizer))).nll.tolist()
        assert [-x.mean() for x in found] == pytest.approx(by_hand, rel=1e-4)


def test_a_deadline_is_for_servers(monkeypatch):
    def slow(lm, prompts, *a, **k):
        time.sleep(0.3)
        return [('late', [1])]*len(prompts)
    monkeypatch.setattr(sage_paper.client, 'write', slow)
    with UnifiedInferenceClient(InProcess(tiny_lm(), 1), deadline=0.1) as client: assert texts(client.chats(questions('a', 'b'))) == ['late', 'late']


def test_an_error_in_this_process_is_not_hidden(monkeypatch):
    def broken(*a, **k): raise MemoryError('full')
    monkeypatch.setattr(sage_paper.client, 'write', broken)
    with UnifiedInferenceClient(InProcess(tiny_lm(), 1)) as client, pytest.raises(IncompleteBatch, match='5 of 5 .*MemoryError: full'): client.chats(questions(*range(5)))


MANY = '''
import asyncio, resource, sys
from sage_paper.inference import Completion, Reply, UnifiedInferenceClient
class Echo:
    width, remote, model, kind = 1, True, 'echo', 'nowhere'
    async def close(self): pass
    async def chat(self, chats, s, first): return [Reply((Completion(chats[0][-1]['content'], (), ()),), 1, 1)]
client = UnifiedInferenceClient(Echo())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
asked = [[dict(role='system', content='You are asked'), dict(role='user', content=f'this, number {k}')] for k in range(100_000)]
out = client.chats(asked)
assert [r[0].text for r in out[::9999]] == [c[-1]['content'] for c in asked[::9999]] and len(out) == 100_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*(1 if sys.platform == 'darwin' else 1024))
'''


def test_a_hundred_thousand_questions_take_less_than_a_gibibyte():
    grown = int(subprocess.run([sys.executable, '-c', MANY], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert grown < 2**28   # a quarter of it
