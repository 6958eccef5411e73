from __future__ import annotations

from pathlib import Path

from trainer.available_memory import available_bytes

MIB = 1 << 20


def machine(root: Path, files: dict[str, str]) -> Path:
    """A made-up root of which only these files exist."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  8000 kB\nMemAvailable:    4096 kB\n"}


def test_without_groups_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, MEMINFO)) == 4 * MIB


def test_a_system_that_says_nothing_gives_none(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_a_group_of_version_2_bounds_it_and_its_cache_counts_as_free(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/job/inner\n",
            "sys/fs/cgroup/job/inner/memory.max": "max\n",
            "sys/fs/cgroup/job/inner/memory.current": f"{MIB}\n",
            "sys/fs/cgroup/job/memory.max": f"{3 * MIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{2 * MIB}\n",
            "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {MIB // 2}\n",
        },
    )
    assert available_bytes(root) == MIB + MIB // 2


def test_in_a_container_the_root_of_what_is_seen_counts(tmp_path: Path) -> None:
    """The path is the host's, and is not there."""
    root = machine(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/../../docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{2 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * MIB}\n",
        },
    )
    assert available_bytes(root) == 0


def test_a_group_of_version_1_bounds_it(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{MIB}\n",
        },
    )
    assert available_bytes(root) == MIB


def test_this_machine_says_a_number_between_a_megabyte_and_all_it_has() -> None:
    found = available_bytes()
    if Path("/proc/meminfo").exists():
        assert found is not None and MIB < found < 1 << 50
