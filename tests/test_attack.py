"""Run the attacks of `make attack` in their short form: fewer requests, and nothing judged by the clock."""

import asyncio

import attack
import pytest
from conftest import make_parrot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    make_parrot(folder / "model")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = attack.Server(folder, "--memory", 64)
    yield server
    server.end()


@pytest.mark.parametrize("name", ["files", "hosts", "faults", "contexts", "memory", "pages", "forgeries"])
def test_the_server_withstands(server, monkeypatch, name):
    monkeypatch.setattr(attack.Pace, "short", True)
    succeeded = [attempt for attempt in asyncio.run(attack.attack(server, name)) if not attempt.withstood]
    assert not succeeded


def test_stopping_finishes_the_replies_in_progress(folder):
    server = attack.Server(folder, "--drain", 120)
    try:
        succeeded = [attempt for attempt in asyncio.run(attack.attack(server, "stopping")) if not attempt.withstood]
        assert not succeeded
    finally:
        server.end()
