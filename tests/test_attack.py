"""Run the attacks of `make attack` in their short form: fewer requests, and nothing judged by the clock."""

import asyncio
import json

import attack
import httpx
import pytest
from attacked import WAIT, Events, conversation, until_done
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


@pytest.mark.parametrize("name", ["files", "hosts", "faults", "contexts", "memory", "pages", "flood", "forgeries"])
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


@pytest.mark.parametrize("collect", [False, True])
def test_only_collect_keeps_what_visitors_prefer(server, folder, collect):
    """Rate a reply and choose between two, as the page does; without --collect nothing is written or promised."""
    own = attack.Server(folder, "--collect", folder / "kept") if collect else server
    before = {path.name for path in folder.iterdir()}
    try:
        events = Events(own.address)
        ids = {tuple(kinds): number for number, kinds, _ in events.all
               if events.dependencies[number]["collects_event_data"]}
        rate, choose = ids["textbox", "state"], ids["state",]

        async def visit() -> tuple[dict, dict, dict]:
            async with httpx.AsyncClient(base_url=own.address, timeout=WAIT) as client:

                async def turn(compare: bool) -> dict:
                    body = events.turn()
                    body["data"] = [compare if isinstance(value, bool) else value for value in body["data"]]
                    await client.post("/gradio_api/queue/join", json=body)
                    done = json.loads((await until_done(client, "somebody"))[-1].removeprefix("data: "))
                    return json.loads(done["output"]["data"][-1])

                async def tell(number: int, *data: object, **about: object) -> dict:
                    answer = await client.post("/gradio_api/run/predict", json={
                        "data": data, "fn_index": number, "session_hash": "somebody", "event_data": about})
                    return json.loads(answer.json()["data"][0])

                said = (await turn(compare=False))["said"]
                rated = await tell(rate, conversation(persona=[], said=said), None, index=1, liked=True)
                compared = await turn(compare=True)
                return rated, compared, await tell(choose, None, index=0)

        rated, compared, chosen = asyncio.run(visit())
        assert (rated["place"], rated["liked"]) == (1, True) and compared["choosing"] and len(chosen["said"]) == 2
        promised = [bool(rated["note"]), bool(chosen["note"]), "kept for research" in httpx.get(own.address).text]
        assert promised == [collect] * 3
        written = {path.name for path in folder.iterdir()} - before
        kept = {path.name: len(path.read_text().splitlines()) for path in (folder / "kept").glob("*.jsonl")}
        assert kept == ({"pairs.jsonl": 1, "answers.jsonl": 1, "ratings.jsonl": 1} if collect else {})
        assert collect or not written
        if collect:  # what cannot be written costs the visitor nothing but the rating
            (folder / "kept" / "ratings.jsonl").unlink()
            (folder / "kept" / "ratings.jsonl").mkdir()
            rated, _, chosen = asyncio.run(visit())
            assert "could not be kept" in rated["note"] and rated["liked"] and "is kept" in chosen["note"]
    finally:
        if collect:
            own.end()
