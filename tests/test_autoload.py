"""Packed models in programs that do not import the package."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest

from optimum_eggs import autoload
from optimum_eggs.cli.startup import main
from optimum_eggs.errors import OutputError

LOAD = """
import json, sys
before = [name for name in ("optimum_eggs", "torch") if name in sys.modules]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps([before, type(model.model.layers[0].mlp.up_proj).__name__]))
"""


def started(*arguments, python=sys.executable, cwd=None, **environment):
    command, variables = [python, *map(str, arguments)], os.environ | environment
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python of an environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=os.name == "posix")
    return folder / ("bin" if os.name == "posix" else "Scripts") / "python"


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The line goes to a folder that no Python reads."""
    monkeypatch.setattr(autoload, "place", lambda: tmp_path / autoload.NAME)
    return tmp_path / autoload.NAME


def test_a_command_knows_packed_models_and_so_do_those_that_it_starts(packed_folder):
    assert "optimum_eggs" not in LOAD.partition("from transformers")[2]
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LOAD!r}, sys.argv[1]], check=True)"
    done = started("-m", "optimum_eggs", "run", sys.executable, "-c", nested, packed_folder)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], "NMLinear"], done.stderr


def test_the_line_of_an_environment_does_the_same(elsewhere, packed_folder, tmp_path):
    autoload.switch_on()
    code = f"import site; site.addsitedir({str(tmp_path)!r})\n{LOAD}"
    assert json.loads(started("-c", code, packed_folder).stdout.splitlines()[-1]) == [[], "NMLinear"]


def test_without_either_the_package_is_not_there(packed_folder):
    done = started("-c", LOAD, packed_folder)
    assert done.returncode != 0 or json.loads(done.stdout.splitlines()[-1])[1] != "NMLinear"


def test_it_is_switched_on_and_off_and_says_which(elsewhere, capsys):
    for state, said in (
        ("status", "off"),
        ("on", "on"),
        ("on", "on"),
        ("status", "on"),
        ("off", "off"),
        ("off", "off"),
    ):
        assert main(["autoload", state]) == 0
        assert capsys.readouterr().out.startswith(f"{said}: {elsewhere}")
        assert elsewhere.exists() == (said == "on")
    assert list(elsewhere.parent.iterdir()) == []


def test_a_line_of_another_place_is_told_apart(elsewhere, capsys):
    elsewhere.write_text(autoload.line(Path("gone") / "hook.py"))
    main(["autoload", "status"])
    assert capsys.readouterr().out.startswith("on, but of another")
    main(["autoload", "on"])
    assert elsewhere.read_text() == autoload.line()


def test_a_package_that_is_gone_leaves_python_as_it_was(elsewhere, tmp_path):
    elsewhere.write_text(autoload.line(tmp_path / "gone" / "hook.py"))
    done = started("-c", f"import site; site.addsitedir({str(tmp_path)!r}); print('fine')")
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_an_environment_without_the_package_is_left_alone(bare, tmp_path):
    (tmp_path / "transformers.py").write_text("print('transformers')")
    environment = autoload.with_hook({"PYTHONPATH": str(tmp_path)})
    done = started("-W", "error", "-c", "import transformers", python=bare, cwd=tmp_path, **environment)
    assert (done.stdout, done.stderr) == ("transformers\n", "")


def test_a_sitecustomize_that_was_there_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("here = __file__")
    environment = autoload.with_hook({"PYTHONPATH": str(tmp_path)})
    done = started("-c", "import sitecustomize; print(sitecustomize.here)", **environment)
    assert done.stdout.strip() == str(tmp_path / "sitecustomize.py")


def test_exit_codes_and_errors_are_the_commands(tmp_path):
    assert started("-m", "optimum_eggs", "run", "--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    wrong = [([], "no command is given"), (["no-such-program"], "'no-such-program' is not found")]
    for command, said in [*wrong, ([tmp_path / "text"], "cannot be run")]:
        done = started("-m", "optimum_eggs", "run", *command)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert started("-m", "optimum_eggs", "autoload", "maybe").returncode == 2


def test_what_cannot_be_written_is_said(elsewhere, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(autoload, "place", lambda: tmp_path / "missing" / autoload.NAME)
    with pytest.raises(OutputError, match="python -m optimum_eggs run COMMAND"):
        autoload.switch_on()
    assert main(["autoload", "on"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_both():
    assert "autoload" in started("-m", "optimum_eggs", "--help").stdout
    assert "COMMAND" in started("-m", "optimum_eggs", "run", "--help").stdout


def test_pythons_start_imports_nothing_for_it(bare):
    modules = "import sys; print(*sorted(sys.modules))"
    before, after = (
        set(started("-c", modules, python=bare, **environment).stdout.split())
        for environment in ({"PYTHONPATH": ""}, autoload.with_hook({}))
    )
    assert after - before <= {"sitecustomize"}


@pytest.mark.slow
def test_transformers_serves_a_packed_model_and_chats_with_it(packed_folder, tmp_path):
    pytest.importorskip("uvicorn")
    transformers = shutil.which("transformers", path=Path(sys.executable).parent)
    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each['content'] }}{% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "optimum_eggs", "run", transformers, "serve", str(folder), *where]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            answers(url, server)
            asked = {"model": str(folder), "prompt": "what follows", "max_tokens": 4, "temperature": 0}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
            chat = [transformers, "chat", str(folder), url, "max_new_tokens=4", "do_sample=False"]
            done = subprocess.run(chat, input="what follows\n!exit\n", capture_output=True, text=True, timeout=120)
            assert "tokens in" in done.stdout, done.stdout + done.stderr
        finally:
            server.terminate()
    assert "MISMATCH" not in log.read_text()


def answers(url, server):
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
