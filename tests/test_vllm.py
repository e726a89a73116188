"""A real vLLM server with the default model: what it answers, what it counts, and what is left when it is killed.

Two are started: one, and when it has been killed in the middle of a batch, one that takes its place, asks for a key and takes in adapters.
"""
import json, logging, os, signal, threading, time
from types import SimpleNamespace

import numpy as np, pytest, torch

from sage_paper.assets import AssetError
from sage_paper.inference import IncompleteBatch, InProcess, NoServer, Server, UnifiedInferenceClient, Unsupported, served
from sage_paper.model import conversation, load_lm, render
from sage_paper.queries import sageworld_set
from sage_paper.serving import VLLM, ServeError, vllm_binary

try: vllm_binary()
except ServeError as e:
    if os.environ.get('SAGE_VLLM'): raise   # whoever names one wants it tested
    pytest.skip(str(e), allow_module_level=True)

pytestmark = pytest.mark.alone   # its server takes all cores


@pytest.fixture(scope='module', autouse=True)
def in_fp32():
    "Both sides, also on processors that multiply in bf16, where rounding decides every fourth answer"
    with pytest.MonkeyPatch.context() as m:
        m.setattr('sage_paper.serving.computes_bf16', lambda device: False)
        yield


@pytest.fixture(scope='module')
def lm():
    try: return load_lm('smollm2-135m-instruct', 'fp32')
    except AssetError as e:
        if 'download' not in str(e): raise
        pytest.skip(f'the model cannot be had: {str(e).splitlines()[0]}')


@pytest.fixture(scope='module')
def server(lm):
    with VLLM() as s: yield s


@pytest.fixture(scope='module')
def client(server):
    with UnifiedInferenceClient(server.backend()) as c: yield c


KEY = 'sk-not-to-be-seen'   # of the second server; the first one does not ask for it
PLAIN = [[dict(role='user', content=f'Count from {k} to {k + 3}.')] for k in range(256)]


def test_it_is_found(server, monkeypatch):
    monkeypatch.setenv('SAGE_VLLM_URL', server.url)
    with UnifiedInferenceClient.create_auto() as c:
        assert repr(c) == 'UnifiedInferenceClient(smollm2-135m-instruct, vLLM)' and served(server.url) == ['smollm2-135m-instruct']


def test_a_chat_is_answered_with_tokens_and_counts(client, lm):
    before = client.stats()
    (answer,) = client.chat(PLAIN[0], max_new_tokens=8)
    assert lm.tokenizer.decode(answer.ids, skip_special_tokens=True) == answer.text and len(answer.ids) == 8
    assert lm.tokenizer.apply_chat_template(PLAIN[0], add_generation_prompt=True)['input_ids'] == list(answer.prompt_ids)
    after = client.stats()
    assert after['completion_tokens'] - before['completion_tokens'] == 8 and after['prompt_tokens'] - before['prompt_tokens'] == len(answer.prompt_ids)


def test_a_batch_of_256_comes_back_whole_and_in_order(client):
    before = client.backend.metrics()
    answers = client.chats(PLAIN, max_new_tokens=4)
    assert len(answers) == 256 and len({a.prompt_ids for a, in answers}) == 256
    alone = [client.chat(PLAIN[k], max_new_tokens=4) for k in (0, 100, 255)]
    assert [answers[k][0].prompt_ids for k in (0, 100, 255)] == [a[0].prompt_ids for a in alone]
    after = client.backend.metrics()
    assert after['request_success_total'] - before['request_success_total'] == 259 and after['num_requests_running'] == 0


def test_what_is_drawn_depends_on_the_seed_alone(client):
    def draw(seed): return client.chats(PLAIN[:4], n=3, temperature=1., max_new_tokens=8, seed=seed)
    first = draw(1)
    assert [len(x) for x in first] == [3]*4 and len({a.text for x in first for a in x}) > 6
    assert draw(1) == first != draw(2)


def test_log_probabilities_are_those_of_the_model_in_this_process(client, lm):
    samples = sageworld_set(0, 6, 'planning', 60).splits['test']
    with UnifiedInferenceClient(InProcess(lm)) as near: here, there = near.logprobs(samples), client.logprobs(samples)
    assert [len(x) for x in here] == [len(x) for x in there]
    assert max(np.abs(x - y).mean() for x, y in zip(here, there)) < (0.1 if lm.bf16 else 1e-3)


def test_answers_follow_a_schema(client):
    schema = dict(type='object', properties=dict(tool=dict(enum=['kettle', 'lamp']), on=dict(type='boolean')), required=['tool', 'on'], additionalProperties=False)
    said = [json.loads(client.chat([dict(role='user', content=q)], schema=schema, max_new_tokens=48)[0].text) for q in ('Tea, please.', 'It is dark.')]
    assert all(set(x) == {'tool', 'on'} and x['tool'] in ('kettle', 'lamp') and isinstance(x['on'], bool) for x in said)


def test_too_long_a_question_is_the_askers_fault(client):
    asked = [PLAIN[0], [dict(role='user', content='word '*3000)], PLAIN[1]]
    with pytest.raises(IncompleteBatch, match='1 of 3 have no answer; number 1: BadRequestError') as e: client.chats(asked, max_new_tokens=4)
    assert [r is None for r in e.value.results] == [False, True, False]


@pytest.fixture(scope='module')
def asked(): return list(sageworld_set(0, 100, 'selection', 100).splits['test'])


@pytest.fixture(scope='module')
def near(lm, asked):
    "What the model in this process answers"
    with UnifiedInferenceClient(InProcess(lm, 25)) as c: return [x for x, in c.generate(asked, max_new_tokens=12)]


def agree(lm, here, there, ids):
    "Whether at least 95% of the answers are the same, and the others part where two tokens are nearly as likely; `ids` are those from elsewhere"
    part = [(x, y) for x, a, y in zip(here, there, ids, strict=True) if x.text != a]
    assert len(part) <= len(here)/20
    for x, y in part:
        k = next(k for k, (a, b) in enumerate(zip(x.ids, y)) if a != b)
        context = torch.tensor([[*x.prompt_ids, *x.ids[:k]]], device=lm.device)
        with torch.no_grad(), lm.autocast(): logp = lm.model(context).logits[0, -1].float().log_softmax(-1)
        assert abs(logp[x.ids[k]] - logp[y[k]]) < (0.2 if lm.bf16 else 0.01)


def test_greedy_answers_are_those_of_the_model_in_this_process_or_part_where_two_tokens_are_nearly_as_likely(client, lm, asked, near):
    there = [x for x, in client.generate(asked, max_new_tokens=12)]
    assert [x.prompt_ids for x in there] == [x.prompt_ids for x in near] and all(len(x.ids) for x in there)
    agree(lm, near, [x.text for x in there], [x.ids for x in there])


@pytest.fixture(scope='module')
def killed(server, lm):
    "What two clients have of a batch in whose middle the server was killed: one that gives up soon, and one that does not; and the server that took its place"
    def ask(attempts, n, new, out):
        with UnifiedInferenceClient(Server(server.url, 'smollm2-135m-instruct', KEY), concurrency=8, attempts=attempts, deadline=1200) as c:
            clients.append(c)
            try: out.answers = c.chats(PLAIN[:n], max_new_tokens=new)
            except IncompleteBatch as e: out.error = e
            out.stats = c.stats()
    clients, hasty, patient = [], SimpleNamespace(), SimpleNamespace()
    threads = [threading.Thread(target=ask, args=x, daemon=True) for x in ((3, 256, 16, hasty), (150, 32, 16, patient))]
    for t in threads: t.start()
    while len(clients) < 2 or min(c.stats()['requests'] for c in clients) < 10:
        assert all(t.is_alive() for t in threads)
        time.sleep(0.02)
    os.killpg(server.process.pid, signal.SIGKILL)
    threads[0].join()
    server.stop()
    with VLLM(port=server.port, adapters=True, key=KEY) as s:
        threads[1].join()
        yield SimpleNamespace(hasty=hasty, patient=patient, server=s)


def test_a_batch_whose_server_is_killed_ends_and_keeps_what_was_answered(killed):
    e = killed.hasty.error
    done = [k for k, r in enumerate(e.results) if r]
    assert 'APIConnectionError' in str(e) and len(e.results) == 256 and 10 <= len(done) < 256 and not {*done} & {*e.errors}
    with UnifiedInferenceClient(killed.server.backend(), concurrency=8) as c:   # the rest can be had of another one
        rest = c.chats([PLAIN[k] for k in range(256) if k not in done][:4], max_new_tokens=16)
        again = c.chats([PLAIN[k] for k in done[:2]], max_new_tokens=16)
    assert len(rest) == 4 and all(len(r[0].ids) for r in rest) and [r[0].prompt_ids for r in again] == [e.results[k][0].prompt_ids for k in done[:2]]


def test_one_whose_server_comes_back_in_time_is_answered_whole(killed):
    if error := getattr(killed.patient, 'error', None): raise error
    answers, stats = killed.patient.answers, killed.patient.stats
    assert len(answers) == 32 and all(len(a.ids) for a, in answers) and len({a.prompt_ids for a, in answers}) == 32
    assert stats['retried'] > 0 and stats['failed'] == 0 and stats['requests'] == 32


@pytest.fixture(scope='module')
def cloud(killed):
    "The same model as somebody else's API, of which a key and an address are known"
    env = dict(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=killed.server.url, SAGE_API_MODEL='smollm2-135m-instruct')
    with pytest.MonkeyPatch.context() as m:
        m.setattr('sage_paper.inference.USUAL', 'http://127.0.0.1:9/v1')
        m.delenv('SAGE_VLLM_URL', raising=False)
        for k, v in env.items(): m.setenv(k, v)
        with UnifiedInferenceClient.create_auto() as c: yield c


def test_an_api_answers_as_the_model_in_this_process_does(cloud, lm, asked, near):
    assert repr(cloud) == 'UnifiedInferenceClient(smollm2-135m-instruct, API)'
    there = [x.text for x, in cloud.generate(asked, max_new_tokens=12)]
    agree(lm, near, there, lm.tokenizer(there, add_special_tokens=False)['input_ids'])
    assert cloud.stats()['prompt_tokens'] == sum(len(x.prompt_ids) for x in near) and cloud.stats()['failed'] == 0


def test_a_chat_is_the_completion_of_the_prompt_that_this_process_makes_of_it(cloud, lm, asked):
    prompts = [render(s, lm.tokenizer)[0] for s in asked[:4]]
    async def complete(): return await cloud.backend.api.completions.create(model=cloud.backend.model, prompt=prompts, max_tokens=12, temperature=0., extra_body=dict(add_special_tokens=False))
    raw = cloud.submit(complete()).result()
    chats = cloud.chats([conversation(s) for s in asked[:4]], max_new_tokens=12)
    assert sum(c.text == a.text for c, (a,) in zip(raw.choices, chats, strict=True)) >= 3   # of two tokens that are nearly as likely, the company in a batch may decide


def test_an_api_that_speaks_openais_protocol_alone_gives_no_tokens_and_no_log_probabilities(cloud, asked):
    assert cloud.chat(PLAIN[0], max_new_tokens=4)[0].ids == ()
    with pytest.raises(IncompleteBatch) as e: cloud.logprobs(asked[:1])
    assert isinstance(e.value.errors[0], Unsupported)


def test_the_key_is_asked_for_and_told_to_nobody_else(cloud, killed, caplog, capfd):
    with caplog.at_level(logging.DEBUG), UnifiedInferenceClient(Server(killed.server.url, 'smollm2-135m-instruct', KEY + '-wrong', vllm=False)) as wrong:
        with pytest.raises(IncompleteBatch, match='AuthenticationError') as e: wrong.chats(PLAIN[:20], max_new_tokens=2)
        assert not any(e.value.results) and wrong.stats()['retried'] == 0
        cloud.chats(PLAIN[:2], max_new_tokens=2)
        with pytest.raises(NoServer, match='HTTP Error 401') as none: served(killed.server.url)
    said = [*map(str, (e.value, *e.value.errors.values(), none.value, cloud.stats(), wrong.stats(), vars(cloud), killed.server.command)), repr(cloud), repr(cloud.backend), *capfd.readouterr(),
            killed.server.log.read_text(), *(r.getMessage() for r in caplog.records)]
    assert [x for x in said if KEY in x] == []


def test_adapters_are_taken_in(killed, lm, tmp_path):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)   # with some others the answer stays as it was
    tuned = get_peft_model(lm.model, LoraConfig(r=8, target_modules=['q_proj', 'v_proj'], init_lora_weights=False, task_type='CAUSAL_LM'))
    tuned.save_pretrained(tmp_path)
    asked = [dict(role='user', content='Name a fruit.')]
    def greedy(net, n=6):
        ids = torch.tensor([lm.tokenizer.apply_chat_template(asked, add_generation_prompt=True)['input_ids']], device=lm.device)
        with torch.no_grad(), lm.autocast(): return net.generate(ids, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
    try:
        with_it = greedy(tuned)
        with tuned.disable_adapter(): without = greedy(tuned)
    finally: tuned.unload()
    assert with_it != without
    plain = UnifiedInferenceClient(killed.server.backend())
    async def load(): return await plain.backend.with_adapter('fruity', tmp_path)
    with plain, UnifiedInferenceClient(plain.submit(load()).result()) as adapted:
        assert list(plain.chat(asked, max_new_tokens=6)[0].ids) == without and list(adapted.chat(asked, max_new_tokens=6)[0].ids) == with_it
