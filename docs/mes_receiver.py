"""Reference receiver for one station: every result once, in a database of your own. Copy it, and replace `store` by your system.

    python docs/mes_receiver.py HOST PORT BASE [--ack] [--db results.db]

Needs paho-mqtt >= 2.2 and Python's sqlite3. Three rules make it lose nothing:
1. commit first, then acknowledge: to the broker (PUBACK), and with --ack to the station (dkm.ack/1, delivery mode e2e);
2. the same result_id again is the same result;
3. cseq rises by one per camera and epoch: a hole that no dkm.gap/1 covers is asked for again (cmd/replay).
"""

import argparse
import json
import os
import sqlite3
import sys
import time
import uuid

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE_S = 5.0  # a hole may close by itself: a station in mode e2e sends again what we have not acknowledged
ASK_EVERY_S, ASK_AT_ONCE = 30.0, 1000
BATCH = 500
# stream: all up to `cseq` is here or declared, its row had `seq`; the newest that we have heard of are `last_cseq`, `last_seq`.
SCHEMA = """
CREATE TABLE IF NOT EXISTS result(result_id TEXT PRIMARY KEY, epoch TEXT, camera TEXT, cseq INT, seq INT, body TEXT);
CREATE INDEX IF NOT EXISTS result_order ON result(epoch, camera, cseq);
CREATE TABLE IF NOT EXISTS gap(epoch TEXT, camera TEXT, first INT, last INT, reason TEXT, UNIQUE(epoch, camera, first, last));
CREATE TABLE IF NOT EXISTS stream(epoch TEXT, camera TEXT, cseq INT, seq INT, last_cseq INT, last_seq INT,
                                  PRIMARY KEY(epoch, camera));
"""
KEYS = {  # what we understand, and the keys that it must have
    "dkm.result/1": {"result_id": str, "epoch": str, "camera": str, "cseq": int, "seq": int},
    "dkm.gap/1": {"epoch": str, "camera": str, "from": int, "to": int, "seq": int, "reason": str},
    "dkm.health/1": {"epoch": str, "last": dict, "outbox": dict},
    "dkm.reply/1": {"ok": bool},
}


def open_database(path):
    """A commit survives a power cut."""
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
    return db


def store(db, rows):
    """Commits results and gap records in one transaction; returns how many results were new."""
    new = 0
    db.execute("BEGIN IMMEDIATE")
    for row in rows:
        stream = (row["epoch"], row["camera"])
        if row["schema"] == "dkm.result/1":
            values = (row["result_id"], *stream, row["cseq"], row["seq"], json.dumps(row))
            new += db.execute("INSERT OR IGNORE INTO result VALUES (?, ?, ?, ?, ?, ?)", values).rowcount
            heard_of(db, stream, row["cseq"], row["seq"])
        else:
            values = (*stream, row["from"], row["to"], row["reason"])
            db.execute("INSERT OR IGNORE INTO gap VALUES (?, ?, ?, ?, ?)", values)
            heard_of(db, stream, row["to"], row["seq"])
        advance(db, stream)
    db.execute("COMMIT")
    return new


def heard_of(db, stream, cseq, seq):
    """Notes that the station has given these numbers."""
    db.execute("INSERT OR IGNORE INTO stream VALUES (?, ?, 0, 0, 0, 0)", stream)
    newest = (
        "UPDATE stream SET last_cseq = MAX(last_cseq, ?), last_seq = MAX(last_seq, ?) WHERE epoch = ? AND camera = ?"
    )
    db.execute(newest, (cseq, seq, *stream))


def advance(db, stream):
    """Moves the stream's `cseq` over all that is here or declared."""
    cseq, seq = before = db.execute("SELECT cseq, seq FROM stream WHERE epoch = ? AND camera = ?", stream).fetchone()
    here = "SELECT cseq, seq FROM result WHERE epoch = ? AND camera = ? AND cseq = ?"
    declared = "SELECT MAX(last) FROM gap WHERE epoch = ? AND camera = ? AND first <= ? AND last >= ?"
    while True:
        found = db.execute(here, (*stream, cseq + 1)).fetchone()
        if found is None:
            last = db.execute(declared, (*stream, cseq + 1, cseq + 1)).fetchone()[0]
            if last is None:
                break
            found = (last, seq)
        cseq, seq = found
    if (cseq, seq) != before:
        db.execute("UPDATE stream SET cseq = ?, seq = ? WHERE epoch = ? AND camera = ?", (cseq, seq, *stream))


def holes(db):
    """The first run that is missing in each stream that misses something: {(epoch, camera): (from, to)}."""
    open_streams = db.execute("SELECT epoch, camera, cseq, last_cseq FROM stream WHERE cseq < last_cseq").fetchall()
    behind = "SELECT MIN(cseq) FROM result WHERE epoch = ? AND camera = ? AND cseq > ?"
    found = {}
    for epoch, camera, cseq, last in open_streams:
        there = db.execute(behind, (epoch, camera, cseq)).fetchone()[0]
        found[(epoch, camera)] = (cseq + 1, last if there is None else there - 1)
    return found


def upto(db, epoch, held):
    """The last seq that came in the order sent, but not beyond a fresh hole in a camera of `held`: the station sends it again.

    A hole in seq alone means nothing: the numbers of what the station's limits dropped are not given again.
    """
    streams = db.execute("SELECT camera, seq, last_seq FROM stream WHERE epoch = ?", (epoch,)).fetchall()
    return min([max(last for _, _, last in streams), *(seq for camera, seq, _ in streams if camera in held)])


def read(message):
    """The message with the keys of its schema, or None: what we do not know is not for us."""
    try:
        body = json.loads(message.payload)
        if all(isinstance(body[key], kind) for key, kind in KEYS[body["schema"]].items()):
            return body
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    print(f"not understood: {message.topic} {message.payload[:80]!r}", file=sys.stderr)
    return None


class Receiver:
    """Callbacks only collect; the work is done in `turn`, where an error ends the connection and not, unseen, a thread."""

    def __init__(self, options):
        self.options, self.db = options, open_database(options.db)
        self.inbox, self.new = [], 0
        self.patience = {}  # (epoch, camera) with a hole -> [first seen, last asked, asked up to]

    def run(self):
        """Receives for ever, or until --count."""
        pause_s = 0.2
        while True:
            try:
                self.connection()
                pause_s = 0.2
            except OSError as error:
                print(f"no connection to the broker: {error}", file=sys.stderr)
                pause_s = min(2 * pause_s, 30)
            if self.is_done():
                return
            time.sleep(pause_s)

    def is_done(self):
        """Whether --count is reached."""
        return self.options.count is not None and self.new >= self.options.count

    def connection(self):
        """One connection, until it is lost. The broker queues for us while we are away."""
        client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=self.options.client_id,
            protocol=mqtt.MQTTv5,
            manual_ack=True,  # else the library acknowledges before we have committed
            reconnect_on_failure=False,
        )
        if self.options.user:
            client.username_pw_set(self.options.user, os.environ.get("MQTT_PASSWORD"))
        if self.options.ca:
            client.tls_set(self.options.ca, self.options.cert, self.options.key)
        self.inbox = []
        client.on_connect = self.on_connect
        client.on_message = lambda client, data, message: self.inbox.append(message)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 7 * 24 * 3600
        client.connect(self.options.host, self.options.port, 15, clean_start=False, properties=session)
        try:
            while client.loop(0.2) == mqtt.MQTT_ERR_SUCCESS and not self.is_done():
                waiting = 0
                while waiting < len(self.inbox) < BATCH:  # what is there already shares one commit
                    waiting = len(self.inbox)
                    client.loop(0)
                self.turn(client)
        finally:
            client.disconnect()

    def on_connect(self, client, data, flags, reason, properties):
        """Subscribes at every connection: a broker that was restarted may have forgotten us."""
        print(f"broker: {reason}", file=sys.stderr)
        if not reason.is_failure:
            topics = ("+/result", "+/history", "health", "reply")
            client.subscribe([(f"{self.options.base}/{topic}", 1) for topic in topics])

    def turn(self, client):
        """Commits what has come, then acknowledges it, then asks for what is missing."""
        messages, self.inbox = self.inbox, []
        bodies = [body for body in map(read, messages) if body is not None]
        rows = [body for body in bodies if body["schema"] in ("dkm.result/1", "dkm.gap/1")]
        if rows:
            self.new += store(self.db, rows)
        for message in messages:
            client.ack(message.mid, message.qos)
        for body in bodies:
            self.notice(body)
        now_s, missing = time.monotonic(), holes(self.db)
        self.patience = {stream: self.patience.get(stream, [now_s, 0.0, 0]) for stream in missing}
        fresh = {stream for stream, (since_s, _, _) in self.patience.items() if now_s - since_s < PATIENCE_S}
        if self.options.ack:  # also for what we had already: our last acknowledgement may have been lost
            for epoch in {row["epoch"] for row in rows}:
                held = {camera for of, camera in fresh if of == epoch}
                body = {"schema": "dkm.ack/1", "epoch": epoch, "upto": upto(self.db, epoch, held)}
                client.publish(f"{self.options.base}/ack", json.dumps(body), qos=1)
        for stream in missing.keys() - fresh:
            self.ask(client, stream, *missing[stream])

    def notice(self, body):
        """Health of a station whose outbox is empty says how far each camera is: so a hole at the very end shows, too."""
        if body["schema"] == "dkm.health/1" and body["outbox"].get("rows") == 0:
            for camera, cseq in body["last"].items():
                heard_of(self.db, (body["epoch"], camera), cseq, 0)
        elif body["schema"] == "dkm.reply/1" and not body["ok"]:
            print(f"command refused: {body.get('code')} {body.get('detail')}", file=sys.stderr)

    def ask(self, client, stream, first, last):
        """A replay of what is missing, piece by piece; the station answers with results or with a gap record."""
        waiting = self.patience[stream]
        if first <= waiting[2] and time.monotonic() - waiting[1] < ASK_EVERY_S:
            return
        waiting[1:] = time.monotonic(), min(last, first + ASK_AT_ONCE - 1)
        args = {"epoch": stream[0], "camera": stream[1], "from": first, "to": waiting[2]}
        body = {"schema": "dkm.cmd/1", "id": uuid.uuid4().hex, "args": args}  # a new id: the same one is not done again
        client.publish(f"{self.options.base}/cmd/replay", json.dumps(body), qos=1)


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("base", help="the station's topic, such as acme/plant1/dkm/v1/st4")
    parser.add_argument("--db", default="results.db")
    parser.add_argument("--ack", action="store_true", help="for a station with delivery.mode: e2e")
    parser.add_argument("--count", type=int, help="end after so many new results")
    parser.add_argument("--client-id", default="mes-receiver", help="keep it: the broker queues for this name")
    parser.add_argument("--user", help="the password is taken from the environment, MQTT_PASSWORD")
    parser.add_argument("--ca", help="PEM file; with --cert and --key where the broker asks for a certificate")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    Receiver(parse()).run()
