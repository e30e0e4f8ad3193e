"""Atomic writes: a file is complete or absent, whatever fails in between."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from engine.files import (
    atomic_path,
    exclusive_lock,
    inside,
    read_json,
    remove_stale_temporaries,
    require_free_bytes,
    require_replaceable_json,
    sha256_ends,
    write_json,
    write_text,
)

PROJECT = Path(__file__).resolve().parents[2]


def test_a_file_appears_complete_without_temporaries(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_in_the_middle_keeps_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A file-size limit causes EFBIG, a full disk ENOSPC; both are reported as no room."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from engine.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_text(Path(sys.argv[1]), 'x' * 100_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "big.txt")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("no room left on the disk; free some space or choose another folder")
    )
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_folder_that_takes_no_files_is_one_line() -> None:
    refused = "^/proc/x.json: cannot be written: No such file or directory; choose another place or name$"
    with pytest.raises(UserError, match=refused):
        write_text(Path("/proc/x.json"), "text")


def test_an_error_of_another_file_is_not_blamed_on_the_written_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "read.txt").read_text()


def test_free_space_is_checked_before_the_work(tmp_path: Path) -> None:
    require_free_bytes(tmp_path / "not" / "yet" / "there", 1, "a byte")
    with pytest.raises(UserError, match=r"the features needs about .* MB and only"):
        require_free_bytes(tmp_path, 1 << 60, "the features")


def test_old_temporaries_are_removed_and_recent_ones_kept(tmp_path: Path) -> None:
    old, young = tmp_path / ".a.h5.1-x.tmp", tmp_path / ".b.h5.2-y.tmp"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert remove_stale_temporaries(tmp_path) == 1
    assert os.listdir(tmp_path) == [young.name]


def test_temporaries_of_dead_writers_are_removed_and_of_live_ones_kept(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from engine.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "dead.h5")], check=False)
    with atomic_path(tmp_path / "alive.h5") as temporary:
        temporary.write_text("half")
        assert len(os.listdir(tmp_path)) == 2
        assert remove_stale_temporaries(tmp_path) == 1
        assert os.listdir(tmp_path) == [temporary.name]


def killed_writer(path: Path) -> subprocess.Popen[bytes]:
    """A process that was killed while it wrote `path`, and that has not been waited for."""
    program = (
        "import os, signal, sys; from pathlib import Path; from engine.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=PROJECT)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def test_a_zombie_process_counts_as_dead(tmp_path: Path) -> None:
    """In containers without an init process, zombies remain forever, and accept signals like running processes."""
    process = killed_writer(tmp_path / "dead.h5")
    assert remove_stale_temporaries(tmp_path) == 1
    process.wait()


def test_writing_a_file_removes_its_stale_temporaries(tmp_path: Path) -> None:
    """The writer may have died after the folder was cleaned: a worker of a pool, or of a run that has just been
    killed.
    """
    for name in ("a.h5", "b.h5"):
        killed_writer(tmp_path / name).wait()
    with atomic_path(tmp_path / "a.h5") as other:
        other.write_text("a living writer's")
        write_text(tmp_path / "a.h5", "whole")
        (left,) = (path.name for path in tmp_path.iterdir() if path not in (tmp_path / "a.h5", other))
    assert left.startswith(".b.h5.")


CONTENDER = """
import sys, time
from pathlib import Path
from configs.errors import UserError
from engine.files import exclusive_lock
folder, rounds, refused = Path(sys.argv[1]), int(sys.argv[2]), 0
for _ in range(rounds):
    try:
        with exclusive_lock(folder, "ablation"):
            (folder / "inside").mkdir()  # fails where another is inside
            (folder / "inside").rmdir()
    except UserError:
        refused += 1
print(rounds - refused)
"""


def test_only_one_of_several_processes_gets_the_lock(tmp_path: Path) -> None:
    (tmp_path / "in-work").write_text("00000000-999999")  # the file that a crashed process of the first release left
    command = [sys.executable, "-c", CONTENDER, str(tmp_path), "150"]
    started = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    entered = [int(process.communicate(timeout=280)[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum(entered) > 0
    assert not (tmp_path / "in-work").exists()


def test_the_holder_is_named_and_its_lock_is_free_once_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from engine.files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), 'ablation'):\n    print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    named = rf"this ablation \(process {holder.pid} on .+\); wait for it, or choose another --name"
    with pytest.raises(UserError, match=named), exclusive_lock(tmp_path, "ablation"):
        pass
    holder.kill()
    holder.communicate(timeout=280)
    with exclusive_lock(tmp_path, "ablation"):
        assert f"process {os.getpid()} on" in (tmp_path / "in-work").read_text()
    assert not (tmp_path / "in-work").exists()


def test_a_file_system_without_locks_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.warns(UserWarning, match="this file system has no locks"), exclusive_lock(tmp_path, "ablation"):
        assert (tmp_path / "in-work").exists()


def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=r"\.lock: cannot be locked \(Is a directory\); delete it"),
        exclusive_lock(tmp_path, "ablation"),
    ):
        pass


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "é"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", float("nan"))
    (tmp_path / "c.json").write_text("{")
    for name in ("c.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)
    assert not (tmp_path / "b.json").exists()


def test_the_hash_of_the_ends_covers_size_first_and_last_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    content = bytearray(3 << 20)
    seen = set()
    for position in (None, 0, len(content) - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        seen.add(sha256_ends(path))
    path.write_bytes(bytes((3 << 20) + 1))
    seen.add(sha256_ends(path))
    assert len(seen) == 4


def test_paths_of_an_index_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    assert inside(tmp_path / "root", "videos/a.mp4") == tmp_path / "root" / "videos/a.mp4"
    for path in ("../outside", "/etc/passwd", "link/a.mp4", "a\x00b"):
        with pytest.raises(UserError):
            inside(tmp_path / "root", path)


def test_errors_caused_by_file_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(UserError, match="name is too long"):
        write_text(tmp_path / ("x" * 300), "x")
    write_text(tmp_path / ("ü" * 120), "x")  # 240 bytes: the temporary name beside it must fit as well
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_json_with_huge_numbers_or_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("9" * 5000)
    with pytest.raises(UserError, match="not a JSON file"):
        read_json(path)
    with pytest.raises(UserError, match="does not contain results"):
        require_replaceable_json(path)
    path.write_text("{}")
    require_replaceable_json(path)
    require_replaceable_json(tmp_path / "new.json")
