"""Share what several tests need: material beside the repository, script runs, small checkpoints, a server."""

import contextlib
import functools
import json
import os
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# pytest-xdist runs tests in parallel, so each process computes on one thread: more threads would spin and slow down
# the other processes tenfold. torch reads this when it is imported, and processes that tests start inherit it.
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
pytest_plugins = ["feedback_world"]  # fixtures for feedback/
WAIT = 240  # seconds; only a broken server takes this long
LONG = 4096  # tokens; a reply of this length is still being decoded when a test looks at it
TINY_TOKENS = json.loads((TINY / "config.json").read_text())["vocab_size"]  # without the five control tokens
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}


# These test files train, start servers or browsers, or compare with whole libraries; together they take minutes.
SLOW = {f"test_{name}.py" for name in (
    "attack", "checkpoints", "commands", "decoders", "distributed", "export", "gguf", "hostile", "judge",
    "lora", "page", "parlai", "persona", "policy", "published", "ranking", "reward", "selfplay", "serving", "sharing",
    "terminal", "tutorial")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


def shared(path: str) -> Path:
    """Return a path within the shared material; skip the test on machines without it."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs ../shared/{path}, which is not on this machine")
    return SHARED / path


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def golden(family) -> dict:
    """Load what the software of 2019 recorded for one family."""
    return json.loads(shared(f"golden/{family}.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def run_2019(family) -> Path:
    """Return a run folder that the 2019 script wrote."""
    return shared(f"golden/run-2019-{family}")


@functools.cache
def templates() -> Path:
    """Write dialogs made from templates, once per process; they are so regular that a few training steps learn much."""
    templates.folder = tempfile.TemporaryDirectory()  # deleted when the process ends
    path = Path(templates.folder.name) / "corpus.json"
    script("models/tiny_corpus.py", "--out", path, cwd=path.parent)
    return path


def first_dialogs(source: Path, path: Path, train: int, valid: int = 1) -> Path:
    """Write the first training and validation dialogs of a data file to another file."""
    corpus = json.loads(source.read_text("utf-8"))
    path.write_text(json.dumps({"train": corpus["train"][:train], "valid": corpus["valid"][:valid]}))
    return path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """Write twelve training dialogs and four validation dialogs made from templates."""
    return first_dialogs(templates(), tmp_path_factory.mktemp("corpus") / "small.json", 12, 4)


@pytest.fixture(scope="session")
def tokenizer():
    """Load the tokenizer of models/tiny."""
    from tokenization import get_tokenizer

    return get_tokenizer(str(TINY))


def smollm2() -> str:
    """Return the path of the default bot's pretrained base; skip the test if it is not installed."""
    from cli import InputError
    from pretrained import find_smollm2

    try:
        return find_smollm2()
    except InputError as error:
        pytest.skip(str(error))


def make_checkpoint(folder: Path, **config) -> Path:
    """Copy models/tiny, which has no weights, and change its configuration."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    settings = json.loads((TINY / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def make_parrot(folder: Path) -> Path:
    """Make a model with random weights and long contexts that never ends a reply by itself."""
    import torch

    from model import PostNormConfig, PostNormDoubleHeadsModel
    from weights import save_model

    make_checkpoint(folder, n_positions=2 * LONG + 512, n_embd=32, n_head=2, vocab_size=TINY_TOKENS + 5,
                    initializer_range=0.3)
    torch.manual_seed(5)
    save_model(PostNormDoubleHeadsModel(PostNormConfig.from_pretrained(folder, num_labels=1)), folder)
    return folder


def the_run(work: Path) -> Path:
    """Return the only run folder under ``work``."""
    (run,) = (work / "runs").iterdir()
    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_corpus) -> Path:
    """Train two layers for two epochs on the small corpus, and return the run folder."""
    work = tmp_path_factory.mktemp("trained")
    checkpoint = make_checkpoint(work / "two-layers", n_layer=2, n_embd=64)
    script("train.py", "--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 2,
           "--lr", 1e-3, "--gradient_accumulation_steps", 1, cwd=work)
    return the_run(work)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start a web server.

    ``files`` maps paths to (body, headers), ``redirects`` maps paths to addresses, and ``asked`` lists the requests.
    """
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
    """Run the whole server in this process on a free port, and yield its address."""
    import demo  # imported here, because few tests need it

    listening = demo.listen("127.0.0.1", 0)
    app = demo.build_app(bot, table, demo.host_names("127.0.0.1", []), [])
    server = demo.serve(bot, app, drain=1, proxies=["127.9.9.9"])
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    bot.decoder.close()
    listening.close()


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    """Make a bot with random weights whose replies always have the requested length."""
    import demo
    from web.bot import Bot

    folder = make_parrot(tmp_path_factory.mktemp("web") / "parrot")
    return Bot(demo.parse_args(["--model_checkpoint", str(folder), "--device", "cpu", "--min_length", str(LONG),
                                "--max_batch", "4", "--max_waiting", "8"]))


@pytest.fixture(scope="module")
def address(bot, tmp_path_factory):
    """Run a server with this bot, and yield its address."""
    from utils import get_dataset

    table = get_dataset(bot.tokenizer, str(SAMPLE), str(tmp_path_factory.mktemp("table") / "cache"))
    with serving(bot, table) as address:
        yield address


@pytest.fixture
def client(address):
    """Connect OpenAI's own client to this server."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=WAIT) as client:
        yield client


def script(name: str, *args, cwd: Path, stdin: str | bytes = "", status: int = 0, env: dict | None = None) -> str:
    """Run one of our scripts offline, as a user would, and return its standard output; warm.py starts the process.

    Fails unless the script exits with ``status`` and without a traceback. ``script.stderr`` keeps the standard error.
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
    """Run a script that must refuse its arguments with exit status 2, and return its one-line error message."""
    script(name, *args, cwd=cwd, status=2, **kwargs)
    lines = [line for line in script.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, script.stderr
    return lines[0]


def run_main(monkeypatch, main, *args) -> None:
    """Run the command line of a script's ``main`` in this process."""
    monkeypatch.setattr("sys.argv", ["script", *map(str, args)])
    main()


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)
