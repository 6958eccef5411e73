"""Which rows go out next on one connection, and what their acknowledgements mean: window, holds, backlog, replays, end-to-end acks.

A refused row keeps its topic back until it is tried again, row by row first; other topics go on. With end-to-end acknowledgement
everything waits instead: the consumer's `upto` is cumulative, so nothing may overtake.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from edge_dkm.errors import BrokerError, StorageError
from edge_dkm.mqtt.link import PACKET_MARGIN_BYTES, Link, TooLargeError, publish, refusal, refusal_code
from edge_dkm.mqtt.pacing import Pace, Silence
from edge_dkm.outbox import Outbox, Row

ACK_TIMEOUT_S = 5.0
MARK_ROWS, MARK_AFTER_S, MARK_LATEST_S = 64, 0.2, 0.4  # accepted rows are noted when so many, or so old
HOLD_S = 5.0  # before a refused topic is tried again
IDLE_S = 1.0  # longest wait between two looks at the keepalive
E2E_WINDOW = 500  # rows that the consumer has not acknowledged; below a broker's usual queue of 1,000

log = logging.getLogger(__name__)
Mode = Literal["puback", "journal", "e2e"]
_BACKLOG = "*"  # no camera has this name
_LIVE, _HISTORICAL = b'"historical":false', b'"historical":true'


@dataclass(frozen=True)
class Problem:
    """Why something is not being delivered. `code` is that of the alarm."""

    code: str
    text: str


@dataclass
class Replay:
    """A consumer's request to send cseq `first`..`last` of a camera again; `first` moves on as rows go out."""

    camera: str
    epoch: str
    first: int
    last: int
    is_refused: bool = False  # it has ended, whatever of it is still under way


@dataclass
class _Hold:
    """A camera whose topic was refused: its rows from `after_seq` on wait until `until_s`, then one tries the way for all."""

    after_seq: int
    until_s: float
    probing: bool = True


@dataclass(frozen=True)
class _Sent:
    row: Row
    replay: Replay | None = None
    is_probe: bool = False


class Flight:
    """The rows under way on one connection.

    `history_per_s` (order live_first): what was committed before the connection is backlog; it goes to `<camera>/history`, marked
    historical, at that pace and in the room that new rows leave. None: all in one order.
    """

    def __init__(
        self, outbox: Outbox, mode: Mode, history_per_s: float | None, replays: deque[Replay], codes: Counter[int]
    ) -> None:
        self._outbox, self._replays, self._codes = outbox, replays, codes
        self._sent: dict[int, _Sent] = {}  # mid -> what was published
        self._accepted: list[int] = []  # rows that the broker took, to be noted soon
        self._accepted_s = 0.0  # since when
        self._backlog_upto = outbox.last_seq if history_per_s is not None else 0
        self._pace = Pace(history_per_s or 1.0)
        self._backlog_after = 0
        self._backlog_held_until_s, self._is_backlog_proven = 0.0, False
        self._after_seq = self._backlog_upto
        self._holds: dict[str, _Hold] = {}
        self._proven: set[str] = set()  # cameras of which a row was accepted on this connection
        self._problems: dict[str, Problem] = {}  # camera -> why it is held; "" for the whole connection
        self._all_held_until_s = 0.0
        self._end_to_end = Silence() if mode == "e2e" else None
        # A window that is half refused comes out of order: the first row alone finds out whether somebody listens.
        self._probing_all = mode == "e2e"
        self.acknowledged = 0
        self.is_answered = False  # whether the broker has said anything of a row, on this connection

    @property
    def problem(self) -> Problem | None:
        """The first of what is not delivered."""
        return next(iter(self._problems.values()), None)

    @property
    def unacknowledged_by_consumer(self) -> int:
        """Rows that the broker has and the consumer has not acknowledged (mode e2e)."""
        return len(self._end_to_end.waiting) if self._end_to_end else 0

    def next_look_s(self) -> float:
        """When a held row or a silent consumer is due."""
        now_s = time.monotonic()
        due = [IDLE_S, *(max(0.0, hold.until_s - now_s) for hold in self._holds.values() if hold.until_s > now_s)]
        if self._all_held_until_s > now_s:
            due.append(self._all_held_until_s - now_s)
        if self._end_to_end is not None:
            due.append(self._end_to_end.due_s())
        if self._accepted:
            due.append(max(0.0, self._accepted_s + MARK_LATEST_S - now_s))
        if self._backlog_after < self._backlog_upto:
            paced_s, held_s = self._pace.due_s(), self._backlog_held_until_s - now_s
            if held_s > 0:
                due.append(held_s)
            elif paced_s > 0:  # else it waits for an acknowledgement, which wakes us
                due.append(paced_s)
        return min(due)

    def fill(self, link: Link) -> None:
        """Publishes what comes next, up to the window."""
        if time.monotonic() < self._all_held_until_s:
            return
        self._try_held(link)
        self._main(link)
        if self._backlog_after < self._backlog_upto:
            self._backlog(link)
        self._replay(link)

    def settle(self, link: Link) -> None:
        """Marks acknowledged rows, notes refusals.

        Raises:
            BrokerError: an acknowledgement does not come.
        """
        acks, link.acks = link.acks, []
        done = []
        for mid, code in acks:
            sent = self._sent.pop(mid, None)
            if sent is None:
                continue
            self._codes[code] += 1
            self.is_answered = True
            if code == 0:
                done.append(sent)
            else:
                self._refused(sent, code)
        self._delivered(done)
        self._mark_in_time(bool(done))
        if link.oldest_s() > ACK_TIMEOUT_S:  # of anything: what was announced takes room in the window, too
            raise BrokerError(
                f"the broker has not acknowledged for {ACK_TIMEOUT_S:g} s; connecting anew", "M-NO-PUBACK"
            )
        self._look_for_silence()

    def _mark_in_time(self, just_accepted: bool) -> None:
        """Best right behind an acknowledgement: a flush to disk that began when the next result comes would hold that up."""
        if not self._accepted:
            return
        age_s = time.monotonic() - self._accepted_s
        if len(self._accepted) >= MARK_ROWS or age_s >= (MARK_AFTER_S if just_accepted else MARK_LATEST_S):
            self._mark()

    def _mark(self) -> None:
        """Notes accepted rows, many in one transaction: each costs the disk a flush, and after a crash they merely go out once more."""
        accepted, self._accepted = self._accepted, []
        if accepted:
            self._outbox.mark_sent(accepted)
            self.acknowledged += len(accepted)

    def consumer_acknowledged(self, epoch: str, upto: int) -> None:
        """`dkm.ack/1` came; outside of mode e2e it means nothing."""
        if self._end_to_end is None:
            return
        marked = self._outbox.acknowledge(epoch, upto)
        self.acknowledged += marked
        if marked and self._end_to_end.acknowledged(upto) and self._is_silent:
            self._problems.pop("")

    def abandon(self) -> None:
        """The connection is gone: what was accepted is noted, and what of a replay was not is asked for again on the next one."""
        with contextlib.suppress(StorageError):  # reported by whoever writes next; the rows go out once more
            self._mark()
        for sent in self._sent.values():
            if sent.replay is not None and not sent.replay.is_refused and sent.row.cseq is not None:
                sent.replay.first = min(sent.replay.first, sent.row.cseq)
                if sent.replay not in self._replays:
                    self._replays.appendleft(sent.replay)

    def _is_backlog(self, row: Row) -> bool:
        return 0 < row.seq <= self._backlog_upto

    @property
    def _is_silent(self) -> bool:
        problem = self._problems.get("")
        return problem is not None and problem.code == "M-NO-ACK"

    def _room(self, link: Link) -> int:
        if self._end_to_end is None:
            return link.room
        room = min(link.room, E2E_WINDOW - len(self._end_to_end.waiting))
        return min(room, 1 - len(self._sent)) if self._probing_all else room

    def _main(self, link: Link) -> None:
        """New rows in their order; those of a held camera are passed over and stay in the outbox."""
        while (room := self._room(link)) > 0:
            newest = self._outbox.last_seq
            # What is passed over is not handed out: a limit may still drop it.
            rows = self._outbox.unsent(self._after_seq, room, without=tuple(self._holds))
            for row in rows:
                if row.camera in self._holds or self._send_in_turn(link, row) or row.camera in self._holds:
                    self._after_seq = row.seq
                else:  # all wait
                    return
            if len(rows) < room:  # no need to pass over the same rows again at every commit
                self._after_seq = max(self._after_seq, newest)
                return

    def _send_in_turn(self, link: Link, row: Row) -> bool:
        """A camera's first row on this connection goes alone; those behind it are held until it was accepted."""
        is_probe = self._end_to_end is None and row.camera not in self._proven
        is_sent = self._send(link, row, is_probe=is_probe)
        if is_sent and is_probe:
            self._holds[row.camera] = _Hold(row.seq, 0.0)
        return is_sent

    def _try_held(self, link: Link) -> None:
        for camera, hold in list(self._holds.items()):
            if time.monotonic() < hold.until_s:
                continue
            if self._send_held(link, camera, hold):
                del self._holds[camera]
                self._problems.pop(camera, None)

    def _send_held(self, link: Link, camera: str, hold: _Hold) -> bool:
        """Whether the camera has caught up with the others."""
        while True:
            under_way = sum(sent.row.camera == camera for sent in self._sent.values())
            room = min(self._room(link), 1 - under_way) if hold.probing else self._room(link)
            if room <= 0:
                return False
            rows = [row for row in self._outbox.unsent(hold.after_seq, room) if row.seq <= self._after_seq]
            if not rows:
                return not hold.probing or under_way == 0
            for row in rows:
                hold.after_seq = row.seq
                if row.camera == camera and (not self._send(link, row, is_probe=hold.probing) or hold.probing):
                    return False

    def _backlog(self, link: Link) -> None:
        """Half the window at most, so that a new row never waits for old ones."""
        room = min(self._room(link), max(1, link.window // 2) - len(self._sent), self._pace.room())
        if not self._is_backlog_proven:  # its first row alone finds out whether somebody listens
            room = min(room, 1 - sum(self._is_backlog(sent.row) for sent in self._sent.values()))
        if room <= 0 or time.monotonic() < self._backlog_held_until_s:
            return
        rows = [row for row in self._outbox.unsent(self._backlog_after, room) if row.seq <= self._backlog_upto]
        for row in rows:
            if not self._send(link, _as_history(row)):
                return
            self._pace.spend()
            self._backlog_after = row.seq
        if not rows and not any(self._is_backlog(sent.row) for sent in self._sent.values()):
            self._backlog_after = self._backlog_upto

    def _replay(self, link: Link) -> None:
        """What a consumer asked for again, in the room that is left; a run that is no longer kept is declared in the stream."""
        while self._replays and (room := min(self._room(link), max(1, link.window // 2) - len(self._sent))) > 0:
            request = self._replays[0]
            pieces = self._outbox.kept(request.camera, request.epoch, request.first, request.last, room)
            for piece in pieces:
                request.first = piece.last + 1
                if piece.body is None:
                    self._outbox.declare_missing(request.camera, request.epoch, piece.first, piece.last, "age")
                else:
                    row = Row(0, piece.topic, piece.body.replace(_LIVE, _HISTORICAL), request.camera, piece.first)
                    if not self._send(link, row, request):
                        return
            if not pieces or request.first > request.last:
                self._replays.popleft()

    def _too_large(self, row: Row, problem: Problem, replay: Replay | None) -> None:
        if replay is None:
            self._hold(row, problem)
        else:
            self._end_replay(replay, problem)

    def _send(self, link: Link, row: Row, replay: Replay | None = None, is_probe: bool = False) -> bool:
        """False where the broker takes no packet of this size: its row is held, as a refused one."""
        limit = link.max_packet_bytes
        if limit is not None and len(row.body) + len(row.topic) + PACKET_MARGIN_BYTES > limit:
            text = f"the broker takes packets of at most {limit} bytes, a result of {len(row.body)} needs {PACKET_MARGIN_BYTES} more; raise its limit"
            self._too_large(row, Problem("M-PACKET", text), replay)
            return False
        try:
            mid = publish(link, row.topic, row.body, qos=1, user=_cloud_event(row))
        except TooLargeError as error:  # very long topics
            self._too_large(row, Problem(error.code, str(error)), replay)
            return False
        if self._end_to_end is not None and replay is None:
            if not self._end_to_end.waiting:
                self._end_to_end.heard_s = time.monotonic()
            self._end_to_end.waiting.append(row.seq)
        self._sent[mid] = _Sent(row, replay, is_probe)
        return True

    def _delivered(self, done: list[_Sent]) -> None:
        if not done:
            return
        if self._end_to_end is None:
            if not self._accepted:
                self._accepted_s = time.monotonic()
            self._accepted += [sent.row.seq for sent in done if sent.replay is None]
        self._probing_all = False
        self._proven.update(sent.row.camera for sent in done if sent.replay is None and not self._is_backlog(sent.row))
        if any(self._is_backlog(sent.row) for sent in done):
            self._is_backlog_proven = True
            self._problems.pop(_BACKLOG, None)
        for camera in {sent.row.camera for sent in done if sent.is_probe}:
            self._problems.pop(camera, None)
            if camera in self._holds:
                self._holds[camera].probing = False
        if not self._is_silent:
            self._problems.pop("", None)

    def _refused(self, sent: _Sent, code: int) -> None:
        """Never taken for delivered: the row stays, and so does what is behind it on its topic."""
        problem = Problem(refusal_code(code), f"the broker does not deliver {sent.row.topic}: {refusal(code)}")
        if sent.replay is None:
            self._hold(sent.row, problem)
        else:  # whoever asked is gone, and will ask again
            self._end_replay(sent.replay, problem)

    def _end_replay(self, replay: Replay, problem: Problem) -> None:
        if replay.is_refused:  # by the row before this one
            return
        log.warning("a replay of %s ends: %s", replay.camera, problem.text)
        with contextlib.suppress(ValueError):
            self._replays.remove(replay)
        replay.is_refused = True

    def _hold(self, row: Row, problem: Problem) -> None:
        self._mark()  # what was accepted behind the row is not sent again
        until_s = time.monotonic() + HOLD_S
        if self._is_backlog(row):  # new results go on
            self._backlog_held_until_s, self._is_backlog_proven, self._backlog_after = until_s, False, 0
            self._problems[_BACKLOG] = problem
        elif self._end_to_end is None:
            before = self._holds.get(row.camera)
            after_seq = min(row.seq - 1, before.after_seq) if before else row.seq - 1
            self._holds[row.camera] = _Hold(after_seq, until_s)
            self._problems[row.camera] = problem
        else:  # all wait, and begin again with the oldest: nothing may overtake where acknowledgements are one row of numbers
            self._all_held_until_s, self._probing_all = until_s, True
            self._after_seq = 0
            self._sent.clear()
            self._end_to_end.waiting.clear()
            self._problems[""] = problem

    def _look_for_silence(self) -> None:
        silence = self._end_to_end
        if silence is None or silence.due_s() > 0:
            return
        if silence.is_lasting:
            self._problems[""] = Problem(
                "M-NO-ACK",
                f"no consumer acknowledges: {len(silence.waiting)} results were sent and are kept; is it running?",
            )
        silence.rewind()
        self._after_seq = 0


def _as_history(row: Row) -> Row:
    head, _, last = row.topic.rpartition("/")
    topic = f"{head}/history" if last == "result" else row.topic
    return Row(row.seq, topic, row.body.replace(_LIVE, _HISTORICAL), row.camera, row.cseq)


def _cloud_event(row: Row) -> list[tuple[str, str]]:
    """CloudEvents 1.0 attributes, binary mode: the envelope travels as user properties."""
    body = json.loads(row.body)
    identity = body.get("result_id") or f"{body['epoch']}-{body['seq']}"
    return [
        ("specversion", "1.0"),
        ("id", identity),
        ("type", body["schema"].replace("/", ".v")),
        ("source", row.topic.rsplit("/", 1)[0]),
        ("time", body["ts"]),
    ]
