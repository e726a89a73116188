"The matrix of accuracies: every number against its definition, written out cell by cell"
import numpy as np, pytest
from hypothesis import assume, given, strategies as st
from hypothesis.extra.numpy import arrays

from sage_paper.forgetting import (LEVELS, answer_levels, average_accuracy, backward_transfer, forgetting, forward_transfer, intransigence,
                                   knowledge_transfer, lost_by_level, matrix_numbers)

accuracy = st.floats(0, 1)
matrices = st.integers(2, 6).flatmap(lambda t: arrays(float, (t + 1, t), elements=accuracy))
close = lambda x: pytest.approx(x, abs=1e-12)


@given(matrices)
def test_each_number_is_what_its_paper_says(r):
    tasks = r.shape[1]
    at = lambda moment, task: r[moment, task - 1]   # moment 0: before any task; tasks counted from 1, as in the papers
    assert average_accuracy(r) == close(sum(at(tasks, j) for j in range(1, tasks + 1))/tasks)
    assert backward_transfer(r) == close(sum(at(tasks, j) - at(j, j) for j in range(1, tasks))/(tasks - 1))
    assert forgetting(r) == close(sum(max(at(i, j) for i in range(tasks)) - at(tasks, j) for j in range(1, tasks))/(tasks - 1))
    assert forward_transfer(r) == close(sum(at(j - 1, j) - at(0, j) for j in range(2, tasks + 1))/(tasks - 1))


@given(matrices, st.data())
def test_bounds_are_compared_with_what_was_just_learnt(r, data):
    tasks = r.shape[1]
    bound = data.draw(arrays(float, tasks, elements=accuracy))
    assert intransigence(r, bound) == close(sum(bound[j - 1] - r[j, j - 1] for j in range(1, tasks + 1))/tasks)
    assert knowledge_transfer(r, bound) == close(sum(r[j, j - 1] - bound[j - 1] for j in range(2, tasks + 1))/(tasks - 1))
    assert set(matrix_numbers(r)) | {'intransigence', 'knowledge_transfer'} == set(matrix_numbers(r, bound, bound))


@given(matrices)
def test_forgetting_is_never_less_than_what_backward_transfer_lost(r): assert forgetting(r) >= -backward_transfer(r) - 1e-12


@given(matrices)
def test_a_model_that_stands_still_forgets_nothing(r):
    still = np.tile(r[0], (len(r), 1))
    assert forgetting(still) == backward_transfer(still) == forward_transfer(still) == 0


def test_dividing_by_all_tasks_would_show():
    r = [[0, 0], [1, 0], [0, 1]]   # the second of two tasks erases the first: everything that could be lost is lost
    assert (forgetting(r), backward_transfer(r)) == (1, -1)


@pytest.mark.parametrize('r,what', [([0.1, 0.2], 'one row more'), ([[0.1, 0.2], [0.3, 0.4]], 'one row more'), ([[0.1], [np.nan]], 'from 0 to 1'), ([[0.], [45.]], 'from 0 to 1')])
def test_what_is_no_matrix_is_named(r, what):
    with pytest.raises(ValueError, match=what): average_accuracy(r)


def test_one_task_has_neither_earlier_nor_later_ones():
    for f in (backward_transfer, forgetting, forward_transfer):
        with pytest.raises(ValueError, match='no (later|earlier) ones'): f([[0.], [1.]])
    with pytest.raises(ValueError, match='two or more'): knowledge_transfer([[0.], [1.]], [1.])


levels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)

@given(levels, st.sampled_from(LEVELS[1:]))
def test_what_is_lost_falls_into_its_parts(pairs, known):
    before, after = np.array(pairs).T
    k, was = LEVELS.index(known), before >= LEVELS.index(known)
    assume(was.any())
    lost = lost_by_level(before, after, known)
    assert list(lost) == list(LEVELS[:k]) and sum(lost.values()) == close(np.mean(after[was] < k))
    for name, part in lost.items(): assert part == close(sum(a == LEVELS.index(name) for b, a in pairs if b >= k)/was.sum())


def test_where_nothing_was_known_nothing_can_be_said(): assert all(np.isnan(x) for x in lost_by_level([0, 1], [3, 3]).values())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_levels_and_their_masks_say_the_same(level):
    level = np.array(level)
    assert answer_levels(level > 0, level > 1, level > 2).tolist() == level.tolist()


def test_masks_that_contradict_each_other_are_named():
    for masks in (([0], [1], [0]), ([1], [0], [1])):
        with pytest.raises(ValueError, match='needs a right format'): answer_levels(*masks)
    with pytest.raises(ValueError, match='the same queries'): lost_by_level([1], [1, 2])
