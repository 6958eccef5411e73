from __future__ import annotations

from trainer.cluster_names import class_names


def test_a_class_with_one_cluster_hands_its_name_down() -> None:
    assert class_names([1, 0], ["dent", "scratch"]) == ["scratch", "dent"]


def test_several_clusters_of_a_class_are_numbered() -> None:
    assert class_names([0, 1, 0, -1, -1], ["dent", "scratch"]) == [
        "dent-1",
        "scratch",
        "dent-2",
        "unsure-1",
        "unsure-2",
    ]


def test_names_stay_different_where_a_class_is_called_like_a_number_of_another() -> None:
    names = class_names([0, 0, 1], ["dent", "dent-1"])
    assert len(set(names)) == 3 and names[2] == "dent-1"


def test_long_names_leave_room_for_a_number() -> None:
    names = class_names([0, 0], ["x" * 80])
    assert len(set(names)) == 2 and all(len(name) <= 60 for name in names)
