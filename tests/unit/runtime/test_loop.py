"""The loop on plain lists: it needs neither torch nor numpy."""

from dataclasses import dataclass, field

import pytest

from offramp.runtime.deadline import Deadline
from offramp.runtime.loop import run_steps, time_steps


class Lists:
    """An engine of lists."""

    nobody = ()

    def rows(self, output):
        return list(range(len(output)))

    def stayers(self, leave):
        return [place for place, leaves in enumerate(leave) if not leaves]

    def take(self, rows, places):
        return [rows[place] for place in places]

    def own(self, values):
        return list(values)

    def put(self, into, rows, values):
        for row, value in zip(rows, values, strict=True):
            into[row] = value
        return into

    def last(self, reached):
        last = [None] * len(reached[0][1])
        for number, rows in reached:
            for row in rows:
                last[row] = number
        return last


@dataclass
class Countdown:
    """Takes 1 from each number; who is at 0 leaves."""

    exit_index: int
    is_final: bool = False
    seen: list = field(default_factory=list)

    def run(self, carried):
        self.seen.append(carried)
        left = [number - 1 for number in carried]
        says = [f"{number} at {self.exit_index}" for number in left]
        return says, [-number for number in left], [number == 0 for number in left], left

    def take(self, carried, rows):
        return [carried[row] for row in rows]


def steps():
    return [Countdown(0), Countdown(2), Countdown(3, is_final=True)]


def test_who_is_sure_leaves_and_the_others_go_on():
    path = steps()
    result = run_steps(path, [1, 3, 2, 1, 3], Lists())
    assert [step.seen for step in path] == [[[1, 3, 2, 1, 3]], [[2, 1, 2]], [[1, 1]]]
    assert result.exit_index == [0, 3, 2, 0, 3]
    assert result.output == ["0 at 0", "0 at 3", "0 at 2", "0 at 0", "0 at 3"]
    assert result.confidence == [0] * 5
    assert len(result.rows) == 0


def test_all_leave_at_the_final_exit_whatever_it_says():
    result = run_steps(steps(), [9, 1], Lists())
    assert result.exit_index == [3, 0]
    assert result.confidence == [-6, 0]
    assert len(result.rows) == 0


def test_nothing_is_taken_where_nobody_leaves_nor_run_where_nobody_stays():
    path = steps()
    assert run_steps(path, [2, 2], Lists()).exit_index == [2, 2]
    assert [len(step.seen) for step in path] == [1, 1, 0]
    assert path[0].seen[0] == [2, 2]


def test_a_part_hands_on_those_that_none_of_its_steps_let_go():
    result = run_steps(steps()[:2], [4, 1, 3], Lists())
    assert result.rows == [0, 2]
    assert result.carried == [2, 1]
    assert result.exit_index == [2, 0, 2]
    assert result.output == ["2 at 2", "0 at 0", "1 at 2"]


@pytest.mark.parametrize(("first", "exit_index"), [(0, 2), (1, 0)])
def test_the_deadline_knows_the_steps_by_their_numbers(first, exit_index):
    deadline = Deadline(1e6, (1.0, 1.0, 1e9, 1.0))
    result = run_steps(steps(), [3, 3], Lists(), first=first, deadline=deadline)
    assert result.exit_index == [exit_index] * 2
    assert result.rows == [0, 1]


def test_every_step_is_timed_once_a_round_on_all_samples():
    path = steps()
    assert len(time_steps(path, [3, 1], Lists())) == 3
    assert all(len(step.seen) == len(path[0].seen) > 1 for step in path)
    assert path[2].seen[0] == [1, -1]
