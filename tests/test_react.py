"ReAct: what is trained on is what an agent will read and write; it sees what calls give, never the gold calls, and may err"
import dataclasses
from functools import cache, partial

import pytest, torch

from sage_paper.calls import Sample, Tool, ToolCall, format_calls
from sage_paper.model import Encoded, forward, tiny_lm
from sage_paper.queries import sageworld_set
from sage_paper.react import Observation, carried_out, concrete, observe, opening, react, react_examples, read_step, respond, step_text, thought, trajectory
from sage_paper.search import Planned
from sage_paper.world import CallError, execute, is_reference, make_world, reaches_end_state

WORLD = make_world()
DATA = {c: sageworld_set(0, 60, c, 300) for c in ('planning', 'selection', 'timing')}
SAMPLES = [s for d in DATA.values() for s in d.splits['test']]
TOOLS = DATA['planning'].tools
TOKENIZER = tiny_lm().tokenizer


def texts(e): return TOKENIZER.decode(e.ids[:e.n_prompt]), TOKENIZER.decode(e.ids[e.n_prompt:])


class Reciter:
    "A policy that takes the right steps, whatever it sees, and keeps what it was asked"
    def __init__(self, samples, world):
        self.steps = {s.query: [t for t, _ in trajectory(s, TOOLS, world)] for s in samples}
        self.chats = []

    def __call__(self, chats):
        self.chats += chats
        return [(self.steps[c[1]['content']][len(c)//2 - 1], 7) for c in chats]


@pytest.mark.parametrize('challenge', DATA)
def test_concrete_plans_have_the_outcome_of_the_gold_plans(challenge):
    for s in DATA[challenge].splits['test']:
        calls = [c for c, _ in carried_out(s.calls, WORLD)]
        assert not any(is_reference(v) for c in calls for v in c.arguments.values()) and reaches_end_state(WORLD, s.calls, calls)


def test_an_observation_says_what_is_promised_and_nothing_else():
    kinds = set()
    for t in make_world().tools.values():
        if t.action not in ('find', 'next', 'oldest', 'whose', 'locate', 'when'): continue
        entity = WORLD.entities[f'{t.collection}-2']
        given = dict(find=dict(person=entity.fields['keeper'])).get(t.action, {} if t.action in ('next', 'oldest') else dict(id=entity.id))
        seen = observe(execute(WORLD, [ToolCall(t.name, given)]))
        promised = [w for w in ('date', 'place', 'keeper') if w in t.description.partition('by it, ')[2]]
        kinds.add((t.action, *promised))
        assert list(seen.fields) == promised
        if promised: assert all(WORLD.entities[seen.output].fields[w] in seen.text for w in promised)
    assert len(kinds) == 7


@pytest.mark.parametrize('world', [WORLD, None], ids=['run', 'not run'])
def test_training_prompts_are_what_an_agent_reads(world):
    reciter = Reciter(SAMPLES, world)
    found = react(reciter, SAMPLES, world=world, max_steps=10)
    examples = list(map(texts, react_examples(SAMPLES, TOOLS, world, TOKENIZER)))
    asked = [TOKENIZER.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in reciter.chats]
    assert sorted(p for p, _ in examples) == sorted(asked)
    assert sorted(a for _, a in examples) == sorted(t + '<|im_end|>' for steps in reciter.steps.values() for t in steps)
    for s, p in zip(SAMPLES, found):
        assert p.ended and len(p.calls) == len(s.calls) == p.proposals - 1 and p.tokens == 7*p.proposals and p.executed == len(s.calls)*(world is not None)
        if world: assert reaches_end_state(WORLD, s.calls, p.calls)
        else: assert p.calls == tuple(s.calls)


def test_the_loss_sees_steps_alone():
    for prompt, answer in map(texts, react_examples(SAMPLES[:20], TOOLS, WORLD, TOKENIZER)):
        assert answer.startswith('Thought: ') and answer.endswith('<|im_end|>') and 'Observation' not in answer
        assert prompt.endswith('<|im_start|>assistant\n') and read_step(answer.removesuffix('<|im_end|>'))[1] == ''


def test_a_query_that_needs_no_tool_is_finished_at_once():
    none = [s for s in DATA['timing'].splits['test'] if not s.calls][:5]
    assert none and [texts(e)[1] for e in react_examples(none, TOOLS, WORLD, TOKENIZER)] == ['Thought: No tool is needed.\nfinish<|im_end|>']*5
    assert react(Reciter(none, WORLD), none, world=WORLD) == [Planned((), True, 7, 0, 1)]*5


def test_candidates_are_documented():
    s = dataclasses.replace(DATA['selection'].splits['test'][0], candidates=tuple(sorted(TOOLS)[:3]))
    tools = TOOLS | DATA['selection'].tools
    (prompt, _), _ = map(texts, react_examples([s], tools, WORLD, TOKENIZER))
    assert all(f'\n{k}(' in prompt for k in s.candidates) and opening(s, tools)[0]['content'] in prompt
    with pytest.raises(ValueError, match='no tool is known'): react(lambda chats: [], [s])


def test_gold_calls_that_do_not_run_are_an_error():
    with pytest.raises(CallError): react_examples([Sample('x', 'x', (ToolCall('nothing'),))], {}, WORLD, TOKENIZER)


def test_a_name_that_two_keys_share_is_told_apart_by_the_sample():
    tools = {'a/tar': Tool('tar', 'Packs.'), 'b/tar': Tool('tar', 'Unpacks.')}
    for key in tools:
        s = Sample('s', 'q', (ToolCall('tar'),), tool_ids=(key,))
        assert thought('tar', tools[key]) in trajectory(s, tools, None)[0][0]


# errors

def steps(*said):
    "A policy that takes these steps and writes down what it reads"
    read = []
    def policy(chats):
        read.extend(c[-1]['content'] for c in chats)
        return [(said[len(c)//2 - 1], 3) for c in chats]
    return policy, read


PLAN = next(s for s in DATA['planning'].splits['test'] if len(s.calls) == 2 and '$1' in s.calls[1].arguments.values())
FIRST, SECOND = (c for c, _ in carried_out(PLAN.calls, WORLD))
END = step_text('That is all.')


@pytest.mark.parametrize('slip, says', [(step_text('x', ToolCall('no_such_tool')), "error: name is 'no_such_tool', expected one of the 1200 tools"),
                                        ('Thought: hm', 'error: expected one call, or finish'), ('x\n{"name":', 'error: expected one call, or finish'),
                                        (step_text('x', dataclasses.replace(FIRST, arguments={**FIRST.arguments, 'odd': 1})), 'error: odd is 1, expected one of ')])
@pytest.mark.parametrize('at', [0, 1])
def test_an_error_is_read_changes_nothing_and_is_not_the_end(slip, says, at):
    right = [step_text('a', FIRST), step_text('b', SECOND), END]
    policy, read = steps(*right[:at], slip, *right[at:])
    p, = react(policy, [PLAN], world=WORLD)
    assert read[at + 1].startswith('Observation: ' + says) and 'call 1' not in read[at + 1] and len(read[at + 1]) < 300
    assert p == Planned((FIRST, SECOND), True, 12, 2 + (slip[-1] == '}'), 4)


def test_references_are_understood_and_made_concrete():
    policy, _ = steps(step_text('a', PLAN.calls[0]), 'unreadable', step_text('b', PLAN.calls[1]), END)
    assert react(policy, [PLAN], world=WORLD)[0].calls == (FIRST, SECOND)


def test_steps_are_limited():
    policy, _ = steps(*[step_text('a', FIRST)]*9)
    assert react(policy, [PLAN], max_steps=4)[0] == Planned((FIRST,)*4, False, 12, 0, 4)
    assert react(policy, [PLAN], max_steps=0)[0] == Planned((), False)
    assert react(policy, []) == []


def test_only_what_was_observed_is_filled_in():
    seen = [Observation('a-1', dict(place='attic')), Observation(0)]
    assert concrete(ToolCall('t', dict(a='$1', b='$1.place', c='$1.date', d='$2', e='$3', f='$0', g='cost $1')), seen).arguments == dict(a='a-1', b='attic', c='$1.date', d=0, e='$3', f='$0', g='cost $1')


# a tiny model

@cache
def taught():
    lm = tiny_lm()
    short = sorted((s for s in DATA['planning'].splits['test'] if len(s.calls) == 2), key=lambda s: len(format_calls(s.calls)))[:2]
    asked = [dataclasses.replace(s, query=f'Task {x}') for s, x in zip(short, 'ab')]
    batch, opt = lm.collate(react_examples(asked, TOOLS, WORLD, lm.tokenizer)), torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    for _ in range(250):
        forward(lm, batch).nll.mean().backward()
        opt.step(); opt.zero_grad()
    return lm, asked


def test_a_taught_agent_acts_alike_alone_and_beside_others_and_without_gold_calls():
    lm, asked = taught()
    policy = partial(respond, lm, max_new_tokens=200)
    together = react(policy, asked, world=WORLD)
    for s, p in zip(asked, together):
        assert p.ended and reaches_end_state(WORLD, s.calls, p.calls)
        assert react(policy, [dataclasses.replace(s, calls=())], world=WORLD) == [p]


def test_a_response_is_greedy_and_goes_on_behind_lists():
    lm, (a, b) = taught()
    chats = [opening(a), opening(b), opening(a)]
    (x, n), (y, _), z = respond(lm, chats, max_new_tokens=200)
    assert z == (x, n) and x != y and [x, y] == [trajectory(s, TOOLS, WORLD)[0][0] for s in (a, b)]
    e = react_examples([a], TOOLS, WORLD, lm.tokenizer)[0]
    assert isinstance(e, Encoded) and n == e.n_answer and respond(lm, chats[:1], max_new_tokens=5)[0][1] == 5
