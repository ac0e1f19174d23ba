"""Memory that is free: files that are only cached are not in its way."""

import pytest

from ddpm.files import machine


@pytest.mark.parametrize(
    ("group", "kinds", "names"),
    [
        ("memory/a/b", "4:memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
        ("a/b", "0:", ("memory.max", "memory.current", "")),
    ],
)
def test_the_memory_of_a_control_group(tmp_path, monkeypatch, group, kinds, names):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    limit, use, prefix = names
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"1:cpu:/\n{kinds}:/a/b\n")
    lines = ["MemTotal: 9 kB", "MemAvailable: 7 kB", "SwapTotal: 1 kB", "SwapFree: 1 kB"]
    (tmp_path / "meminfo").write_text("\n".join(lines))
    assert machine.machine_memory() == (10 * 1024, 8 * 1024)

    inner = tmp_path / "groups" / group
    inner.mkdir(parents=True)
    for folder, most in ((inner, "5000"), (inner.parent, "6000" if prefix else "max")):
        (folder / limit).write_text(f"{most}\n")
        (folder / use).write_text("4500\n")
        (folder / "memory.stat").write_text(f"anon 500\n{prefix}inactive_file 4000\n")
    assert machine.machine_memory() == (5000, 4500)
    (tmp_path / "meminfo").write_text("nothing")
    assert machine.machine_memory() is None
