"""Every settings file that cannot be used is refused at the start: code, place, key and reason on one line, exit code 2, no secret."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import ConfigError
from edge_dkm.cli import main
from edge_dkm.settings import STATION_TOPICS, LineSettings, load_line

SECRET = "hunter2"
GOOD = """\
version: 1
station: st4
uns: {enterprise: acme, line: l4}
model: part.onnx
cameras:
  top:
    source: rtsp://${CAM_USER}:${CAM_PASS}@10.0.0.7/ch1
    roi: [320, 180, 640, 640]
    policy: latest
    trigger: {kind: part_present, region: [600, 180, 60, 640]}
    deadline_ms: 500
verdicts: {default: pass, novel: review, clusters: {scratch: reject}}
mqtt:
  host: broker.example
  port: 8883
  username: st4
  password: "${MQTT_PASS}"
delivery: {mode: journal, max_rows: 1000, max_mb: 512, max_age_h: 168}
infer_timeout_s: 5
state: /nonexistent/state
"""
MESSAGE = re.compile(r"^edge-dkm: (CFG-[A-Z]+) (.*)$")
LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAM_USER", "CAM_PASS", "MQTT_PASS"):
        monkeypatch.setenv(name, SECRET)

    def refuse(*_: object) -> None:
        raise AssertionError("settings are judged without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Code and text of the one line with which `run` and `check` refuse a file of this content."""

    def judge(content: str | bytes, *words: str, path: Path | None = None) -> tuple[str, str]:
        path = path or tmp_path / "line.yaml"
        if not path.exists():
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        said = []
        for command in ("run", "check"):
            assert main([command, str(path), *words]) == 2
            captured = capsys.readouterr()
            assert captured.out == "" and SECRET not in captured.err and "Traceback" not in captured.err
            said.append(captured.err)
        assert said[0] == said[1] and said[0].count("\n") == 1
        match = MESSAGE.match(said[0].rstrip("\n"))
        assert match is not None, said[0]
        return match[1], match[2].replace(str(path), "line.yaml")

    return judge


def swap(old: str, new: str) -> str:
    """The good file with one thing changed."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


WRONG: dict[str, tuple[str | bytes, str, str]] = {
    "misspelt key": (swap("port:", "prot:"), "CFG-KEY", "line.yaml:15 mqtt.prot is not a known setting, did you mean 'port'?"),
    "unit left out of a key": (swap("infer_timeout_s", "infer_timeout"), "CFG-KEY", "line.yaml:19 infer_timeout is not"),
    "misspelt word": (swap("latest", "lastest"), "CFG-VALUE", "line.yaml:9 cameras.top.policy is lastest, expected 'latest'"),
    "misspelt kind": (swap("part_present", "part_presnt"), "CFG-VALUE", "did you mean 'part_present'?"),
    "left out": (swap("station: st4\n", ""), "CFG-MISSING", "station is missing"),
    "text for a number": (swap("8883", "mqtts"), "CFG-TYPE", "line.yaml:15 mqtt.port is mqtts, expected a valid integer"),
    "a unit with the number": (swap("_s: 5", "_s: 10 s"), "CFG-TYPE", "is 10 s, expected a valid number, write 10 alone"),
    "a number for text": (swap("st4", "4"), "CFG-TYPE", "line.yaml:2 station is 4, expected a valid string"),
    "a list for a section": (swap("{mode: journal, max_rows: 1000, max_mb: 512, max_age_h: 168}", "[1]"), "CFG-TYPE", "delivery is [1]"),
    "nothing for a section": (swap(" {default: pass, novel: review, clusters: {scratch: reject}}", ""), "CFG-TYPE", "verdicts is nothing"),
    "the same key twice": (GOOD + "station: st5\n", "CFG-DUPLICATE", "line.yaml:21 station is given twice (first at line.yaml:2)"),
    "two cameras of a name": (swap("verdicts:", "  top: {source: 'usb:0'}\nverdicts:"), "CFG-DUPLICATE", "top is given twice"),
    "no rows": (swap("1000", "0"), "CFG-VALUE", "delivery.max_rows is 0, expected greater than or equal to 10"),
    "rows below zero": (swap("1000", "-5"), "CFG-VALUE", "delivery.max_rows is -5"),
    "not a number": (swap("512", ".nan"), "CFG-VALUE", "delivery.max_mb is .nan, expected a valid number"),
    "endless": (swap("168", ".inf"), "CFG-VALUE", "delivery.max_age_h is .inf"),
    "beyond all numbers": (swap("168", "1e999"), "CFG-VALUE", "delivery.max_age_h is 1e999"),
    "more than can be waited": (swap("168", "1e300"), "CFG-VALUE", "expected less than or equal to 876000"),
    "endless text": (swap("username: st4", "username: .inf"), "CFG-TYPE", "mqtt.username is .inf, expected text; put it in quotes"),
    "too many digits": (swap("1000", "9" * 5000), "CFG-TYPE", "delivery.max_rows is 9999"),
    "a host with a space": (swap("broker.example", "a b"), "CFG-VALUE", "mqtt.host is a b, expected a host name"),
    "a host with a NUL": (swap("broker.example", '"a\\0b"'), "CFG-ENCODING", "line.yaml:14 holds a NUL"),
    "a label too long": (swap("broker.example", "x" * 64 + ".example"), "CFG-VALUE", "expected a host name"),
    "an empty label": (swap("broker.example", "a..b"), "CFG-VALUE", "expected a host name"),
    "half a character": (swap("broker.example", '"\\uD800"'), "CFG-ENCODING", "half a character"),
    "a variable that is not set": (swap("${MQTT_PASS}", "${MQTT_PASSWORT}"), "CFG-ENV", "line.yaml:17 needs the environment variable MQTT_PASSWORT"),
    "no name of a variable": (swap("${MQTT_PASS}", "${MQTT PASS}"), "CFG-ENV", "no name of an environment variable"),
    "a tab": (swap("  port", "\tport"), "CFG-SYNTAX", "(use spaces, not tabs)"),
    "a bracket that is never closed": (swap("640]\n", "640\n"), "CFG-SYNTAX", "is not valid YAML"),
    "two documents": (GOOD + "---\nversion: 1\n", "CFG-SYNTAX", "begins a second document; one file holds one"),
    "a tag": (swap("st4", "!!python/object:os.system x"), "CFG-SYNTAX", "has the tag"),
    "a bomb of aliases": (LAUGHS + GOOD, "CFG-SYNTAX", "uses an anchor or alias"),
    "an alias to itself": ("a: &a [*a]\n", "CFG-SYNTAX", "uses an anchor or alias"),
    "nested without end": ("a: " + "[" * 3000, "CFG-SYNTAX", "is nested more than 16 deep"),
    "nested deep": ("a: " + "[" * 40 + "]" * 40, "CFG-SYNTAX", "is nested more than 16 deep"),
    "a list as a key": ("? [a]\n: 1\n", "CFG-SYNTAX", "a key that is a list or mapping"),
    "UTF-16": (GOOD.encode("utf-16"), "CFG-ENCODING", "it looks like UTF-16"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "CFG-ENCODING", "line.yaml:1 holds a NUL; is it UTF-16?"),
    "Latin-1": (swap("acme", "Müller").encode("latin-1"), "CFG-ENCODING", "line.yaml:3 is not UTF-8 text (byte 43 is 0xfc)"),
    "a NUL": (GOOD.encode().replace(b"st4", b"s\0t", 1), "CFG-ENCODING", "line.yaml:2 holds a NUL"),
    "a control character": (swap("st4", "s\x1bt4"), "CFG-ENCODING", "line.yaml:2 holds the character U+001B"),
    "empty": (b"", "CFG-FILE", "line.yaml is empty"),
    "only a comment": (b"# later\n", "CFG-FILE", "line.yaml is empty"),
    "a list": (b"- 1\n", "CFG-TYPE", "expected settings as `key: value` lines"),
    "an error page": (b"<!DOCTYPE html>\n<html></html>\n", "CFG-TYPE", "expected settings as `key: value` lines"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "CFG-ENCODING", "is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "code", "text"), WRONG.values(), ids=WRONG.keys())
def test_each_mistake_is_refused_with_its_code_on_one_line_and_check_agrees(
    content: str | bytes, code: str, text: str, verdict: Callable[..., tuple[str, str]]
) -> None:
    found, line = verdict(content)
    assert (found, text in line) == (code, True), line


def test_control_the_file_without_a_mistake_is_accepted_with_a_mark_too(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    loaded = load_line(path)
    assert loaded.station == "st4" and loaded.mqtt.password == SECRET


@pytest.mark.parametrize("name", ["the same key twice", "two cameras of a name", "a bomb of aliases", "endless text"])
def test_control_a_plain_reader_of_yaml_takes_what_is_refused_here(name: str) -> None:
    assert isinstance(yaml.safe_load(WRONG[name][0]), dict)


def test_to_keep_rows_longer_than_they_may_wait_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(swap("max_age_h: 168", "max_age_h: 1, keep_h: 100"))
    assert load_line(path).delivery.keep_h == 100


@pytest.mark.parametrize("name", [*STATION_TOPICS, "a/b", "+", "#", "$SYS", "a b", "x" * 33, "ä"])
def test_a_camera_may_not_be_called_what_would_mix_topics(name: str, verdict: Callable[..., tuple[str, str]]) -> None:
    code, line = verdict(swap("  top:", f"  '{name}':"))
    assert code == "CFG-VALUE" and line.startswith("line.yaml:6 cameras.") and "is not a usable name" in line


@pytest.mark.parametrize("name", ["a/b", "+", "#", "$SYS", "a b", "", "x" * 65])
@pytest.mark.parametrize("key", ["station: st4", "enterprise: acme"])
def test_no_level_of_a_topic_holds_its_special_characters(
    key: str, name: str, verdict: Callable[..., tuple[str, str]]
) -> None:
    code, line = verdict(swap(key, f"{key.split()[0]} '{name}'"))
    assert code == "CFG-VALUE" and key.split(":")[0] in line


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--set", "mqtt.prot=1"), "CFG-KEY", "--set mqtt.prot is not a known setting, did you mean 'port'?"),
        (("--set", "mqtt.port=x"), "CFG-TYPE", "--set mqtt.port is x"),
        (("--set", "mqtt.port"), "CFG-SYNTAX", "--set mqtt.port: expected key.subkey=value"),
        (("--set", f"mqtt.password:{SECRET}"), "CFG-SYNTAX", "--set ...: expected key.subkey=value"),
        (("--set", f"mqtt.password=[{SECRET}]"), "CFG-TYPE", "--set mqtt.password is ***, expected a valid string"),
        (("--set", f"mqtt.password=*{SECRET}"), "CFG-SYNTAX", "--set"),
        (("--set", "station.x.y=1"), "CFG-KEY", "has no sub-keys"),
        (("--set", ".".join("a" * 2000) + "=1"), "CFG-SYNTAX", "--set is nested more than 16 deep"),
        (("--set", "station=a\nb"), "CFG-VALUE", "--set station is a b"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_name(
    words: tuple[str, ...], code: str, text: str, verdict: Callable[..., tuple[str, str]]
) -> None:
    found, line = verdict(GOOD, *words)
    assert (found, text in line) == (code, True), line


@pytest.mark.parametrize(
    ("name", "value", "code", "text"),
    [
        ("EDGE_DKM__MQTT__PROT", "1", "CFG-KEY", "environment EDGE_DKM__MQTT__PROT mqtt.prot is not a known setting"),
        ("EDGE_DKM__MQTT__PORT", "x", "CFG-TYPE", "environment EDGE_DKM__MQTT__PORT mqtt.port is x"),
        ("EDGE_DKM__MQTT__PASSWORD", f"[{SECRET}]", "CFG-TYPE", "mqtt.password is ***"),
        ("EDGE_DKM__STATION", "\udcff", "CFG-ENCODING", "environment EDGE_DKM__STATION holds"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused_by_name(
    name: str,
    value: str,
    code: str,
    text: str,
    verdict: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    found, line = verdict(GOOD)
    assert (found, text in line) == (code, True), line


@pytest.mark.parametrize(
    "wrong",
    [
        swap('"${MQTT_PASS}"', f"[{SECRET}]"),
        swap('"${MQTT_PASS}"', f"*{SECRET}"),
        swap('"${MQTT_PASS}"', f"!{SECRET}"),
        swap('password: "${MQTT_PASS}"', f"pasword: {SECRET}"),
        swap("latest", "x").replace("${CAM_USER}:${CAM_PASS}", f"me:{SECRET}"),
        swap("top:\n", f"top: rtsp://me:{SECRET}@h/x\n").split("    source")[0] + "station2: 1\n",
        swap("rtsp://${CAM_USER}:${CAM_PASS}@", f"rtsp://{'u' * 30}:{SECRET}{'x' * 40}@").replace(
            "roi: [", "roi: [x, "
        ),
        swap("  top:", f"  rtsp://me:{SECRET}@h:"),
        f"station: rtsp://me:{SECRET}@h\n",
    ],
)
def test_a_secret_in_a_file_with_a_mistake_is_never_shown(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(wrong)
    with pytest.raises(ConfigError) as caught:
        load_line(path)
    assert SECRET not in str(caught.value) and all(line.startswith("CFG-") for line in caught.value.problems)


def test_a_file_that_is_no_file_is_refused(tmp_path: Path, verdict: Callable[..., tuple[str, str]]) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1_000_000_000)
    assert verdict(b"", path=tmp_path / "folder")[0] == "CFG-FILE"
    assert verdict(b"", path=tmp_path / "pipe") == (
        "CFG-FILE",
        "line.yaml is a device, pipe or socket, expected a settings file",
    )
    assert verdict(b"", path=huge)[0] == "CFG-SIZE"  # refused by its size: reading it would take a gigabyte


@pytest.mark.parametrize("name", ["", ".", "/", "no-such", "x" * 5000, "a\0b"])
def test_a_name_of_no_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("edge-dkm: CFG-FILE ") and error.count("\n") == 1


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(ConfigError, match="CFG-FILE .*cannot be read: Permission denied"):
            load_line(path)
    finally:
        os.seteuid(user)


def test_a_password_that_everybody_may_read_is_a_warning_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD.replace("${MQTT_PASS}", SECRET).replace("${CAM_USER}:${CAM_PASS}", f"me:{SECRET}"))
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert load_line(path).mqtt.password == SECRET
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" holds")[0] for line in said] == [
        f"CFG-SECRET {path}:7 cameras.top.source",
        f"CFG-SECRET {path}:17 mqtt.password",
    ] and SECRET not in " ".join(said)
    caplog.clear()
    path.chmod(0o640)
    load_line(path)
    path.write_text(GOOD)  # ${NAME} is no secret
    path.chmod(0o644)
    load_line(path)
    assert caplog.records == []


@pytest.mark.parametrize("unseen", ["\ue000", "\u200b", "\u3000", "\u00a0"], ids=ascii)
def test_a_character_that_nobody_can_see_is_shown_by_its_code(tmp_path: Path, unseen: str) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD.replace("infer_timeout_s", f"infer_{unseen}timeout_s"))
    with pytest.raises(ConfigError) as caught:
        load_line(path)
    assert any(unseen.encode("unicode_escape").decode() in line for line in caught.value.problems)
    assert all(line.isprintable() for line in caught.value.problems)


def test_many_mistakes_are_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD + "".join(f"key{n}: 1\n" for n in range(3000)))
    with pytest.raises(ConfigError) as caught:
        load_line(path)
    assert len(caught.value.problems) == 20 and "2981 more" in caught.value.problems[-1]


def test_a_relative_path_begins_at_the_working_directory_not_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(swap("/nonexistent/state", "state"))
    assert (load_line(path).state, load_line(path).model) == (Path("state"), "part.onnx")


LINES = GOOD.splitlines()
WORDS = st.sampled_from(
    ["", "~", "[]", "{}", "-1", "1e400", ".nan", "'", '"', "*a", "&a x", "!x", "${", "${X}", "10 s", "true", "\t", "? ", "- ", ": ",
     "\u2028", "\\uD800", '"\\0"', "9" * 400, "0x", "1e", "|", ">", "%", "@", "`", "...", "---", "<<: *a", "rtsp://u:hunter2@h"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The good file after one to four mistakes of a typist, an editor or a disk."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(0, len(lines) - 1))
        line = lines[n]
        at = draw(st.integers(0, max(0, len(line) - 2)))
        match draw(st.integers(0, 7)):
            case 0:
                lines[n] = line[:at] + line[at : at + 2][::-1] + line[at + 2 :]
            case 1:
                lines[n] = line[:at] + line[at + 1 :]
            case 2:
                lines[n] = line[:at] + draw(WORDS) + line[at:]
            case 3:
                lines[n] = line.split(":")[0] + ": " + draw(WORDS)
            case 4:
                lines.insert(n, line)
            case 5 if len(lines) > 1:
                del lines[n]
            case 6:
                lines[n] = "  " * draw(st.integers(0, 20)) + line.lstrip()
            case _:
                lines[n] = draw(st.text(max_size=20))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return data


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_whatever_stands_in_the_file_it_is_settings_or_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_bytes(content)
    path.chmod(0o600)
    try:
        assert isinstance(load_line(path), LineSettings)
    except ConfigError as error:
        for line in error.problems:
            assert line.startswith("CFG-") and str(path) in line, line
            assert line.isprintable() and len(line) <= 1000 and SECRET not in line, line
