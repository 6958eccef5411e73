from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from configs import ConfigError, Settings, Sources, find, load_settings, load_text, shipped_names


class Dec(Settings):
    name: Literal["dec"] = "dec"
    n_clusters: int = Field(10, ge=2)
    lr: float = 0.1


class Control(Settings):
    name: Literal["ae_kmeans"] = "ae_kmeans"
    n_clusters: int = Field(10, ge=2)


class Camera(Settings):
    source: str
    roi: tuple[int, int, int, int] | None = None
    policy: Literal["latest", "every"] = "latest"


class Root(Settings):
    version: Literal[1] = 1
    method: Annotated[Dec | Control, Field(discriminator="name")] = Dec()
    cameras: dict[Annotated[str, Field(pattern="^[a-z]+$")], Camera] = {}
    password: str = ""
    port: int = 1883


def load(text: str, *overrides: str, **environ: str) -> Root:
    return load_text(Root, text, "line.yaml", Sources(overrides, "EDGE", environ))


def problems(text: str, *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, **environ)
    return caught.value.problems


def test_defaults_fill_what_the_file_leaves_out() -> None:
    assert load("port: 1") == Root(port=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "method:\n  name: dec\n  n_clusters: 1",
            ["CFG-VALUE line.yaml:3 method.n_clusters is 1, expected greater than or equal to 2"],
        ),
        (
            "method: {name: dec, n_cluster: 3}",
            ["CFG-KEY line.yaml:1 method.n_cluster is not a known setting, did you mean 'n_clusters'?"],
        ),
        ("\nprot: 5", ["CFG-KEY line.yaml:2 prot is not a known setting, did you mean 'port'?"]),
        ("port: '12'", ["CFG-TYPE line.yaml:1 port is '12', expected a valid integer"]),
        ("port: yes", ["CFG-TYPE line.yaml:1 port is yes, expected a valid integer"]),
        ("port: .inf", ["CFG-VALUE line.yaml:1 port is .inf, expected a valid integer"]),
        (
            "method: {name: deck}",
            ["CFG-VALUE line.yaml:1 method has name deck, expected one of dec, ae_kmeans, did you mean 'dec'?"],
        ),
        (
            "cameras: {top: {roi: [1, 2, 3, 4]}}",
            ["CFG-MISSING line.yaml:1 cameras.top.source is missing, expected a value"],
        ),
        (
            "cameras:\n  top: {source: x, policy: lates}",
            ["CFG-VALUE line.yaml:2 cameras.top.policy is lates, expected 'latest' or 'every', did you mean 'latest'?"],
        ),
        (
            "cameras:\n  T1: {source: x}",
            [
                "CFG-VALUE line.yaml:2 cameras.T1 is not a usable name, expected text that should match pattern '^[a-z]+$'"
            ],
        ),
        ("port: 1\nport: 2", ["CFG-DUPLICATE line.yaml:2 port is given twice (first at line.yaml:1); keep one"]),
        ("- 1", ["CFG-TYPE line.yaml:1 is [1], expected settings as `key: value` lines"]),
        ("", ["CFG-FILE line.yaml is empty, expected settings as `key: value` lines"]),
        ("a: &x 1\nb: *x", ["CFG-SYNTAX line.yaml:1 uses an anchor or alias; write the value out"]),
        (
            "port: !!python/object:os.system x",
            ["CFG-SYNTAX line.yaml:1 has the tag tag:yaml.org,2002:python/object:os.system, expected a plain value"],
        ),
    ],
)
def test_each_mistake_is_one_line_with_place_key_value_and_expectation(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_all_mistakes_are_reported_at_once() -> None:
    assert len(problems("port: x\npasword: a\nmethod: {name: dec, lr: b}")) == 3


def test_a_tab_is_named_as_the_cause() -> None:
    assert "use spaces, not tabs" in problems("method:\n\tname: dec")[0]


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("5", 5.0), (".5", 0.5), ("0x10", 16.0)])
def test_numbers_follow_yaml_1_2(text: str, value: float) -> None:
    assert load(f"method: {{name: dec, lr: {text}}}").method.lr == value  # type: ignore[union-attr]


@pytest.mark.parametrize("word", ["on", "yes", "no", "12:30"])
def test_words_that_yaml_1_1_turned_into_values_stay_text(word: str) -> None:
    assert load(f"password: {word}").password == word


def test_command_line_beats_environment_beats_file() -> None:
    text = "port: 1"
    assert load(text).port == 1
    assert load(text, EDGE__PORT="2").port == 2
    assert load(text, "port=3", EDGE__PORT="2").port == 3


def test_an_override_reaches_into_sections_and_lists() -> None:
    settings = load(
        "cameras: {top: {source: a}}", "cameras.top.roi=[1, 2, 3, 4]", "method.name=dec", "method.n_clusters=4"
    )
    assert settings.cameras["top"].roi == (1, 2, 3, 4)
    assert settings.method.n_clusters == 4


def test_a_wrong_override_names_the_option_or_the_variable() -> None:
    assert problems("port: 1", "passwrd=1") == [
        "CFG-KEY --set passwrd is not a known setting, did you mean 'password'?"
    ]
    assert problems("port: 1", EDGE__PRT="1") == [
        "CFG-KEY environment EDGE__PRT prt is not a known setting, did you mean 'port'?"
    ]
    assert problems("port: 1", "sectn.key=1")[0].startswith("CFG-KEY --set sectn is not a known setting")
    assert problems("port: 1", "port") == ["CFG-SYNTAX --set port: expected key.subkey=value"]


def test_a_number_given_as_override_may_serve_as_text() -> None:
    assert load("port: 1", "password=12345").password == "12345"


def test_environment_variables_are_substituted_and_read_as_the_field_needs_them() -> None:
    settings = load("port: ${PORT}\npassword: ${PASS}", PORT="99", PASS="123")
    assert (settings.port, settings.password) == (99, "123")


def test_a_secret_is_never_shown_in_a_message() -> None:
    lines = problems("port: ${SECRET}", SECRET="hunter2")
    assert lines == ["CFG-TYPE line.yaml:1 port is ${SECRET}, expected a valid integer"]


def test_a_missing_variable_is_named() -> None:
    assert problems("password: ${NOT_THERE}") == [
        "CFG-ENV line.yaml:1 needs the environment variable NOT_THERE, which is not set"
    ]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("port: 1").port = 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 1_000_001])
def test_a_file_that_is_no_settings_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="UTF-8|at most"):
        load_settings(Root, path, "line")


def test_a_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match=r"no such settings file.*shipped: .*x_sdd_ae_kmeans"):
        find("x_sdd_ae_kmean", "train")


def test_a_shipped_name_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = find("x_sdd_ae_kmeans", "train")
    assert find("x_sdd_ae_kmeans.yaml", "train") == find("configs/train/x_sdd_ae_kmeans.yaml", "train") == expected


def test_a_users_file_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "x_sdd_ae_kmeans.yaml"
    own.write_text("version: 1")
    assert find("x_sdd_ae_kmeans", "train").resolve() == own


def test_every_shipped_file_is_valid() -> None:
    from devices.profile import load_profile
    from trainer.settings import TrainSettings

    for name in shipped_names("train"):
        load_settings(TrainSettings, name, "train")
    for name in shipped_names("device"):
        load_profile(name)
    assert {"cpu", "openvino", "tensorrt", "raspberry_pi"} <= set(shipped_names("device"))
