"""One thread per learner on the host, and the table in which a compiled program's calls find theirs."""

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Vector = np.ndarray[Any, np.dtype[Any]]
Evaluation = tuple[float, Vector]

# What waits this long for an evaluation belongs to a program that was aborted: its thread ends.
SECONDS_UNTIL_ABANDONED = 3600.0

_session_numbers = itertools.count(1)


class HostLoss:
    """The loss as a learner on the host sees it: flat vectors in, numbers out.

    Points are rounded to the dtype of `params` before they are evaluated; the last one is remembered, so asking for
    the value and then for the gradient at the same point costs one evaluation.
    """

    def __init__(self, ask: Callable[[Vector], Evaluation]) -> None:
        self._ask = ask

    def __call__(self, point: Vector) -> float:
        """The loss at `point`."""
        return self._ask(point)[0]

    def value_and_grad(self, point: Vector) -> Evaluation:
        """The loss and its gradient, both float64, at `point`; the gradient is the caller's to overwrite."""
        value, gradient = self._ask(point)
        return value, gradient.astype(np.float64)


class PaddedLoss:
    """The loss of points with more entries, all of them constant, as a loss of points without those."""

    def __init__(self, loss: HostLoss, rest: Vector) -> None:
        self._loss = loss
        self._rest = rest

    def __call__(self, point: Vector) -> float:
        """The loss."""
        return self._loss(np.concatenate([point, self._rest]))

    def value_and_grad(self, point: Vector) -> tuple[float, Vector]:
        """The loss and its gradient."""
        value, gradient = self._loss.value_and_grad(np.concatenate([point, self._rest]))
        return value, gradient[: point.size]


# (loss, start, tol, max_steps) -> solution
Learner = Callable[[HostLoss, Vector, float, int], Vector]


class Told(NamedTuple):
    """What the program tells the host: arrays with the batch's axes in front."""

    session: Any
    finished: Any
    tol: Any
    max_steps: Any
    point: Any
    value: Any
    gradient: Any


class Reply(NamedTuple):
    """What the host wants next: the loss at `point`, or to end there."""

    session: Any
    finished: Any
    point: Any


class Office:
    """Where the calls of one compiled program come in: it finds, or opens, the session that each lane belongs to.

    A session leaves the table when its learner has ended. Nobody asks for it again: a loop that is mapped goes on
    calling for lanes that have finished, but those come marked as finished and their replies are discarded.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._sessions: dict[int, _Session] = {}

    def exchange(self, told: Told) -> Reply:
        """Tell every lane, then collect from every lane, so that their learners run at the same time."""
        lanes = [Told(*lane) for lane in zip(*told, strict=True)]
        sessions: list[_Session | None] = []
        try:
            for lane in lanes:
                sessions.append(None if lane.finished else self._tell(lane))
            replies = [
                Reply(lane.session, True, lane.point) if session is None else self._collect(session)
                for lane, session in zip(lanes, sessions, strict=True)
            ]
        except BaseException:
            # The program ends here, and with it every other lane.
            for session in sessions:
                if session is not None:
                    self._sessions.pop(session.number, None)
                    session.abort()
            raise
        return Reply(*map(np.stack, zip(*replies, strict=True)))

    def _tell(self, lane: Told) -> "_Session":
        if lane.session == 0:
            number = 1 + next(_session_numbers) % (2**31 - 2)
            session = self._sessions[number] = _Session(number, self._learner, lane)
            session.start()
            return session
        session = self._sessions[int(lane.session)]
        session.replies.put((float(lane.value), lane.gradient))
        return session

    def _collect(self, session: "_Session") -> Reply:
        report = session.reports.get()
        if isinstance(report, BaseException):
            raise report
        if report.finished:
            del self._sessions[session.number]
            session.join()
        return report


class _Session(threading.Thread):
    """One learner at work. It hands over reports and waits for replies; a daemon, so it never holds up an exit."""

    def __init__(self, number: int, learner: Learner, opening: Told) -> None:
        super().__init__(name=f"contrastive_meta learner {number}", daemon=True)
        self.number = number
        self.reports: queue.SimpleQueue[Reply | BaseException] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[Evaluation | None] = queue.SimpleQueue()
        self._learner = learner
        self._opening = opening
        # The program evaluated the start before it called, so the learner's first question needs no round trip.
        self._known_point = np.array(opening.point)
        self._known: Evaluation = float(opening.value), np.array(opening.gradient)
        self._one_at_a_time = threading.Lock()
        self._over = False

    def run(self) -> None:
        """Learn, and report the solution or what was raised."""
        opening = self._opening
        start = self._known_point.astype(np.float64)
        try:
            point = self._learner(HostLoss(self._ask), start, float(opening.tol), int(opening.max_steps))
            report = Reply(self.number, True, _rounded(point, opening.point.dtype))
        except BaseException as error:
            self.reports.put(error)
        else:
            self.reports.put(report)
        finally:
            self._over = True

    def abort(self) -> None:
        """End the learner at its next question, or at the one it is waiting on."""
        self._over = True
        self.replies.put(None)

    def _ask(self, point: Vector) -> Evaluation:
        with self._one_at_a_time:
            if self._over:
                raise _LearningIsOver
            # A copy, because learners step in place; in the dtype in which it will be evaluated.
            point = _rounded(point, self._known_point.dtype)
            if not np.array_equal(point, self._known_point):
                self.reports.put(Reply(self.number, False, point))
                self._known_point, self._known = point, self._wait()
            return self._known

    def _wait(self) -> Evaluation:
        try:
            reply = self.replies.get(timeout=SECONDS_UNTIL_ABANDONED)
        except queue.Empty:
            self._over = True
            raise TimeoutError(
                f"A learner on the host waited {SECONDS_UNTIL_ABANDONED:.0f} s for the loss and gave up."
            ) from None
        if reply is None:
            raise _LearningIsOver
        return reply


def _rounded(point: Vector, dtype: Any) -> Vector:
    with np.errstate(over="ignore"):  # what float64 can hold may be infinite in float32: the loss will say so
        return np.array(point, dtype)


class _LearningIsOver(BaseException):
    """Raised inside a learner whose program is gone, or that has ended. Not an `Exception`: learners catch those."""

    def __init__(self) -> None:
        super().__init__("A loss can be asked only while its learner runs and the program that started it waits.")
