"""What several tests need: the material beside the repository, runs of our scripts, small checkpoints."""

import contextlib
import functools
import json
import os
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Tests run beside each other (pytest-xdist), each on one thread: threads that wait for each other by spinning would
# slow the neighbours tenfold. Before torch is imported, and for every process that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import warm

hypothesis.settings.register_profile("project", deadline=None, derandomize=True,  # no timed assertions
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
FAMILIES = ["openai-gpt", "gpt2"]
SAMPLE = ROOT / "data" / "sample_personachat.json"
TINY = ROOT / "models" / "tiny"
pytest_plugins = ["feedback_world"]  # fixtures of several files
WAIT = 240  # s; only a broken server ever takes as long
LONG = 4096  # tokens: far more than are decoded while a test looks
TINY_TOKENS = json.loads((TINY / "config.json").read_text())["vocab_size"]  # without the five control tokens


# Files whose tests train, start servers or browsers, or compare with whole libraries: minutes together.
SLOW = {f"test_{name}.py" for name in (
    "attack", "checkpoints", "commands", "decoders", "demo", "distributed", "export", "hostile", "judge", "lora",
    "page", "parlai", "persona", "policy", "published", "reward", "serving", "sharing", "tutorial")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and begin with the demo: it takes minutes, and the other process would wait for it."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name != "test_demo.py")


def shared(path: str) -> Path:
    """A path of the shared material; the test is skipped on machines without it."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of ../shared, which is not on this machine")
    return SHARED / path


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def golden(family) -> dict:
    """What the 2019 stack recorded for one family."""
    return json.loads(shared(f"golden/{family}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def run_2019(family) -> Path:
    """A run folder as the 2019 script left it."""
    return shared(f"golden/run-2019-{family}")


@functools.cache
def templates() -> Path:
    """Dialogs made of templates, of one process: short, and so regular that a few steps of training show."""
    templates.folder = tempfile.TemporaryDirectory()  # goes when the process ends
    path = Path(templates.folder.name) / "corpus.json"
    script("models/tiny_corpus.py", "--out", path, cwd=path.parent)
    return path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """Twelve training and four validation dialogs of these."""
    path = tmp_path_factory.mktemp("corpus") / "small.json"
    corpus = json.loads(templates().read_text("utf-8"))
    path.write_text(json.dumps({"train": corpus["train"][:12], "valid": corpus["valid"][:4]}))
    return path


def make_checkpoint(folder: Path, **config) -> Path:
    """models/tiny with a changed configuration, still without weights."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    settings = json.loads((TINY / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_corpus) -> Path:
    """A run folder of train.py: two layers, two epochs over the small corpus."""
    work = tmp_path_factory.mktemp("trained")
    checkpoint = make_checkpoint(work / "two-layers", n_layer=2, n_embd=64)
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 2,
           "--lr", 1e-3, "--gradient_accumulation_steps", 1, cwd=work)
    return next((work / "runs").iterdir())


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server; ``files`` maps paths to (body, headers), ``redirects`` to addresses; ``asked`` lists requests."""
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "downloads"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(f"{self.command} {self.path}")
            if self.path in server.redirects:
                self.send_response_only(302)
                self.send_header("Location", server.redirects[self.path])
                return self.end_headers()
            body, headers = server.files.get(self.path, (None, {}))
            if body is None:
                return self.send_error(404)
            self.send_response_only(200)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.redirects, server.asked = {}, {}, []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@contextlib.contextmanager
def serving(bot, table):
    """The whole server on a port of its own, in this process; yields its address."""
    import demo  # which not all tests need

    listening = demo.listen("127.0.0.1", 0)
    app = demo.build_app(bot, table, demo.host_names("127.0.0.1", []), [])
    server = demo.serve(bot, app, drain=1)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    bot.decoder.close()
    listening.close()


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    """A model of random weights, whose replies are exactly as long as asked for."""
    import torch

    import demo
    from model import PostNormConfig, PostNormDoubleHeadsModel
    from web.bot import Bot
    from weights import save_model

    folder = make_checkpoint(tmp_path_factory.mktemp("web") / "parrot", n_positions=2 * LONG + 512, n_embd=32, n_head=2,
                             vocab_size=TINY_TOKENS + 5, initializer_range=0.3)
    torch.manual_seed(5)
    save_model(PostNormDoubleHeadsModel(PostNormConfig.from_pretrained(folder, num_labels=1)), folder)
    return Bot(demo.parse_args(["--model_checkpoint", str(folder), "--device", "cpu", "--min_length", str(LONG),
                                "--max_batch", "4", "--max_waiting", "8"]))


@pytest.fixture(scope="module")
def address(bot, tmp_path_factory):
    """Of a server of that model."""
    from utils import get_dataset

    table = get_dataset(bot.tokenizer, str(SAMPLE), str(tmp_path_factory.mktemp("table") / "cache"))
    with serving(bot, table) as address:
        yield address


@pytest.fixture
def client(address):
    """OpenAI's own, at that server."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=WAIT) as client:
        yield client


def script(name: str, *args, cwd: Path, stdin: str | bytes = "", status: int = 0, env: dict | None = None) -> str:
    """Run one of our scripts as a user would, offline, and return standard output; in a warm process, see warm.py.

    Fails unless it exits with ``status`` and without a traceback; ``script.stderr`` keeps standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream, content in zip(streams, (stdin if isinstance(stdin, bytes) else stdin.encode(), b"", b""),
                                   strict=True):
            stream.write_bytes(content)
        exit_status = warm.run(ROOT / name, list(map(str, args)), cwd, {**os.environ, **(env or {})}, streams, 600)
        output, script.stderr = (stream.read_bytes().decode() for stream in streams[1:])
    assert exit_status == status, script.stderr
    assert "Traceback" not in script.stderr, script.stderr
    return output


def error_line(name: str, *args, cwd: Path, **kwargs) -> str:
    """Run one of our scripts that must refuse with exit status 2, and return its one line of complaint."""
    script(name, *args, cwd=cwd, status=2, **kwargs)
    lines = [line for line in script.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, script.stderr
    return lines[0]
