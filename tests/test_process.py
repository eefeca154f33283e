"""`dali-vit` as a process: it ends without taking its modules apart, and still loses no output and no work."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dali_vit import cli
from dali_vit.config import LocalUserError
from dali_vit.process import int_from_environment
from tests.conftest import TINY, environment, read_metrics

pytestmark = pytest.mark.timeout(60)


def end(program: str, stdout: int = subprocess.PIPE, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `dali-vit` after a program that changes `cli`, for instance what it does."""
    lines = ["import sys", "from dali_vit import cli", *program.splitlines(), "cli.run()"]
    command = [sys.executable, "-c", "\n".join(lines)]
    variables = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=variables, timeout=50, check=False
    )


@pytest.mark.parametrize("program", ["bench_throughput", "measure_step", "measure_ddp", "measure_input"])
def test_openmp_waits_in_the_benchmarks_as_it_does_in_training(program: str) -> None:
    """libgomp reads the variable as torch loads it, and says here what it has read."""
    tool = Path(__file__).parents[1] / "tools" / f"{program}.py"
    variables = {**environment(), "OMP_DISPLAY_ENV": "VERBOSE"}
    variables.pop("GOMP_SPINCOUNT", None)
    variables.pop("OMP_WAIT_POLICY", None)
    ended = subprocess.run(
        [sys.executable, str(tool), "--help"], capture_output=True, text=True, env=variables, timeout=50, check=True
    )
    assert "GOMP_SPINCOUNT = '10000'" in ended.stderr


def test_streams_have_queues_of_their_own_unless_the_user_says_otherwise() -> None:
    program = "import os, dali_vit.process; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    for given, expected in ((None, "32"), ("1", "1")):
        variables = environment()
        variables.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        if given:
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = given
        command = [sys.executable, "-c", program]
        assert subprocess.check_output(command, env=variables, text=True, timeout=50).strip() == expected


def test_what_a_machine_lacks_is_told_by_one_of_its_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("dali_vit.data")
    for variables, told in (
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_LOCALID": "1"}, False),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "1"}, True),
    ):
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        cli._set_up_logging(3)
        log.warning("of this process")
        log.warning("of the machine", extra={"of_machine": True})
        assert capsys.readouterr().out.splitlines() == ["of this process", *(["of the machine"] if told else [])]


def test_ctrl_c_is_no_defect() -> None:
    ended = end("def interrupted(): raise KeyboardInterrupt\ncli.main = interrupted")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_python_without_docstrings_is_told_of() -> None:
    command = [sys.executable, "-OO", "-m", "dali_vit", "doctor"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=50, check=False)
    told = "dali-vit: PYTHONOPTIMIZE=2 or -OO: DALI needs the docstrings that this leaves out; unset it\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told)


def test_a_launchers_number_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((None, 5), ("", 5), ("7", 7)):
        monkeypatch.delenv("RANK", raising=False)
        if given is not None:
            monkeypatch.setenv("RANK", given)
        assert int_from_environment("RANK", 5) == expected
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(
        LocalUserError, match=r"^RANK=one: not a whole number; set the one of this process or unset it$"
    ):
        int_from_environment("RANK", 5)


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        # The POSIX locale, where the bytes of a name that is not ASCII are printed as they were found.
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"caf\\xe9 \xc3\xa9 \\u540d\xff\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, b"caf\xc3\xa9 \xc3\xa9 \xe5\x90\x8d\xff\n"),
        ({"PYTHONIOENCODING": "ascii"}, b"caf\\xe9 \\udcc3\\udca9 \\u540d\\udcff\n"),
    ],
)
def test_what_the_terminal_cannot_show_is_escaped(variables: dict[str, str], printed: bytes) -> None:
    program = (
        "import sys; from dali_vit import cli\n"
        r"cli.main = lambda: (print('caf\xe9 \udcc3\udca9 \u540d\udcff'), sys.exit(0))"
        "\ncli.run()"
    )
    kept = {k: v for k, v in environment().items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={**kept, **variables}, timeout=50, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed, b"")


CTRL_C = """import os, signal
from dali_vit import process
def main():
    {before}
    try:
        os.kill(os.getpid(), signal.SIGINT)
        print("went on")
    except KeyboardInterrupt:  # as of an import that is optional to a library
        print("swallowed")
    sys.exit(0)
cli.main = main"""


@pytest.mark.usefixtures("ctrl_c_is_minded")
@pytest.mark.parametrize(
    ("before", "code", "printed"),
    [
        ("pass", 130, ""),
        ("process.tidy_up_at_ctrl_c()", 0, "swallowed\n"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); process.tidy_up_at_ctrl_c()", 0, "went on\n"),
    ],
)
def test_ctrl_c_ends_the_process_until_there_is_something_to_tidy_up(before: str, code: int, printed: str) -> None:
    process = end(CTRL_C.format(before=before))
    assert (process.returncode, process.stdout, process.stderr) == (code, printed, "")


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As of a command that a script starts in the background."""
    process = end("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + CTRL_C.format(before="pass"))
    assert (process.returncode, process.stdout, process.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize(("exits", "code"), [("0", 0), ("2", 2), ("75", 75), ("", 0), ("None", 0), ("'text'", 1)])
def test_the_code_is_that_of_main(exits: str, code: int) -> None:
    process = end(f"cli.main = lambda: sys.exit({exits})")
    assert (process.returncode, process.stdout, process.stderr) == (code, "", "")


def test_what_was_printed_arrives_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--print-config"])
    command = [sys.executable, "-m", "dali_vit", "train", "--print-config"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=50, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, capsys.readouterr().out, "")


def test_threads_and_exit_handlers_are_waited_for(tmp_path: Path) -> None:
    process = end(
        f"""import atexit, pathlib, threading, time
folder = pathlib.Path({str(tmp_path)!r})
def main():
    def write():
        time.sleep(0.5)
        (folder / "thread").write_text("done")
    threading.Thread(target=write).start()
    atexit.register(lambda: (folder / "handler").write_text((folder / "thread").read_text()))
    sys.exit(3)
cli.main = main"""
    )
    assert (process.returncode, process.stderr) == (3, "")
    assert (tmp_path / "thread").read_text() == "done"
    assert (tmp_path / "handler").read_text() == "done"  # it comes after the threads


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_gone_is_no_error(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    process = end("cli._dispatch = lambda argv: print('text') or 0", stdout=write, unbuffered=unbuffered)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_run_goes_on_in_silence_when_its_reader_has_gone(image_folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(image_folder), "--runs-dir", str(tmp_path), "--name", "r", "--gpus", "0", *TINY]
    command = [sys.executable, "-m", "dali_vit", "train", *arguments, "--steps", "12", "--log-every", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("run "):  # a slow machine also says what it has compiled
            assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(50) == 0
    assert [m["step"] for m in read_metrics(tmp_path / "r") if "train/loss" in m] == list(range(1, 13))


def test_a_closed_output_is_no_error() -> None:
    process = end("sys.stdout = None\ncli.main = lambda: (print('text'), sys.exit(0))")
    assert (process.returncode, process.stderr) == (0, "")


def test_streams_closed_from_the_start_are_opened_to_nowhere(tmp_path: Path) -> None:
    """Else the first file to be opened would be what libraries print to."""
    program = f"""
import os
from dali_vit import cli
def main():
    with open({str(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2
        file.write("content")
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/self/fd/{{number}}") == os.devnull
        assert os.get_inheritable(number)
    os.write(2, b"a library's message")
    print("said")
    raise SystemExit(7)
cli.main = main
cli.run()"""
    command = [sys.executable, "-c", program]
    closed = subprocess.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-", *command], env=environment(), timeout=50)
    assert closed.returncode == 7
    assert (tmp_path / "file").read_text() == "content"


def test_a_defect_keeps_its_traceback() -> None:
    process = end("def main(): raise KeyError('a defect')\ncli.main = main")
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")
    assert process.stderr.endswith("KeyError: 'a defect'\n")


def test_what_python_takes_apart_at_its_end_is_not_waited_for() -> None:
    """As a process group of NCCL, which waits for other ranks; a module's names go when Python ends."""
    program = """import time
class Group:
    def __del__(self): time.sleep(60)
cli.group = Group()
def main(): raise KeyError('a defect')
cli.main = main"""
    process = end(program)
    assert process.returncode == 1
    assert process.stderr.endswith("KeyError: 'a defect'\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_not_passed_over_in_silence(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        process = end("cli.main = lambda: (print('text'), sys.exit(0))", stdout=full.fileno(), unbuffered=unbuffered)
    assert process.returncode != 0
    assert "No space left" in process.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train", "--print-config"]])
def test_a_full_disk_under_what_a_command_says_is_told_in_one_line(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        process = end(f"sys.argv[1:] = {arguments}", stdout=full.fileno(), unbuffered=unbuffered)
    assert process.returncode == 2
    assert process.stderr == "dali-vit: stdout: No space left on device; make room\n"


def tool(name: str, *arguments: str | Path, stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, Path(__file__).parents[1] / "tools" / f"{name}.py", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment(), timeout=50, check=False
    )


def test_a_measurement_outlives_the_reader_of_what_it_prints(image_folder: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    out = tmp_path / "out.json"
    flags = ["--data", image_folder, "--batch-size", "8", "--threads", "1", "--seconds", "1", "--json", out]
    measured = tool("measure_input", *flags, stdout=writing)
    os.close(writing)
    assert (measured.returncode, measured.stderr) == (0, "")
    assert json.loads(out.read_text())["images_per_sec"] > 0


def test_a_full_disk_under_what_a_tool_prints_is_told_when_its_work_is_done(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        drawn = tool("make_jpegs", "--out", tmp_path / "jpegs", "--count", "2", "--classes", "1", stdout=full.fileno())
    assert drawn.returncode == 2
    assert drawn.stderr == "make_jpegs.py: stdout: No space left on device; what was printed is incomplete\n"
    assert len(list((tmp_path / "jpegs").glob("train/*/*.JPEG"))) == 2


@pytest.mark.parametrize(("what", "code"), [("sys.exit(1)", 1), ("1 / 0", 1), ("raise KeyboardInterrupt", 130)])
def test_a_full_disk_hides_nothing_that_a_tool_ends_with(what: str, code: int, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "tools")!r})
from benchmark import command
def main():
    print("text")
    {what}
command.run(main)"""
    arguments = [sys.executable, "-c", program]
    with open("/dev/full", "w") as full:
        for stderr in (subprocess.PIPE, full):  # both on the same disk, as in `> file 2>&1`
            ended = subprocess.run(
                arguments, stdout=full, stderr=stderr, text=True, env=environment(), timeout=50, check=False
            )
            assert ended.returncode == code
            assert ended.stderr is None or ("ZeroDivisionError" in ended.stderr) == ("1 / 0" in what)


def test_a_tool_goes_on_when_nobody_reads_its_errors_either(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "tools")!r})
from benchmark import command
def main():
    print("text")
    print("told", file=sys.stderr)
    open({str(tmp_path / "done")!r}, "w").close()
command.run(main)"""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=writing, env=environment(), timeout=50, check=False
    )
    os.close(writing)
    assert ended.returncode == 0
    assert (tmp_path / "done").exists()
