from __future__ import annotations

from configs import ConfigError
from configs.secrets import is_secret_key, mask


def test_every_problem_has_a_code_in_front_and_keeps_its_own() -> None:
    error = ConfigError(["CFG-KEY a:1 x is not a known setting", "a:2 y is 1"])
    assert error.problems == ["CFG-KEY a:1 x is not a known setting", "CFG-VALUE a:2 y is 1"]
    assert str(error) == "\n".join(error.problems) and error.exit_code == 2


def test_a_problem_is_one_line_of_bearable_length_whatever_it_quotes() -> None:
    (line,) = ConfigError(["a\nb\x1b[31m\ud800" + "x" * 5000]).problems
    assert line.startswith("CFG-VALUE a\\nb\\x1b[31m\\ud800") and len(line) == 1000 and line.isprintable()


def test_more_than_twenty_problems_are_counted() -> None:
    problems = ConfigError([f"p{n}" for n in range(25)]).problems
    assert len(problems) == 20 and problems[-1] == "CFG-VALUE and 6 more; put these right first"


def test_user_and_password_of_an_address_are_hidden() -> None:
    assert mask("rtsp://me:p@ss/w@10.0.0.7/ch1 and a@b") == "rtsp://***@10.0.0.7/ch1 and a@b"
    assert mask("http://10.0.0.7/ch1") == "http://10.0.0.7/ch1"


def test_misspelt_keys_of_secrets_are_known_as_such() -> None:
    for key in ("password", "pasword", "passwrod", "apssword", "Passwd", "pwd", "api_token", "client_secret"):
        assert is_secret_key(key)
    for key in ("host", "port", "station", "source", "trigger", "max_rows", "clusters", "region"):
        assert not is_secret_key(key)
