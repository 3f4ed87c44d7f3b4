"""Test that one client's faults, long requests, memory and number of requests do not harm other clients."""

import math
import random
import statistics

import pytest
import torch
from test_serving import LONG, SPECIAL, VOCABULARY, asked, small_model, until

from cli import InputError
from decoding import generate_replies
from inputs import build_context
from web.batching import CROWDED, LEAST_READ, LONGER, MOST_READ, NO_OPTIONS, Busy, Decoder, Pace, Reply, Stopping
from web.clients import Client
from web.keyvalues import BatchRow, KeyValues, Work, let_attend_by_row_

SHORT = build_context([], [[3, 4]], SPECIAL)


@pytest.fixture(params=[False, True], ids=["as on CPUs", "as on GPUs"])
def in_rooms(request, monkeypatch) -> bool:
    """Let the keys and values lie in rooms, as on GPUs, or not."""
    if request.param:
        monkeypatch.setattr("web.keyvalues.belongs_in_rooms", lambda model: True)
    return request.param


def ended(*replies) -> None:
    until(lambda: all(reply.finish for reply in replies), "the end")


def long_context(tokens: int):
    return build_context([[1] * 10], [[number % 50 for number in range(tokens)]], SPECIAL)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_of_nan_ends_alone(beams, in_rooms):
    """Make a token's embedding NaN: replies to contexts with this token end in an error, and no others change."""
    model, options = small_model("llama", 3), [asked(seed=seed, max_length=12, min_length=12) for seed in (1, 2)]
    expected = []
    for one in options:
        torch.manual_seed(one.seed)
        expected.append(generate_replies(model, [SHORT], SPECIAL, one)[0])
    poison = next(token for token in range(5, 50) if token not in sum(expected, []))
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    decoder = Decoder(model, SPECIAL, max_batch=8)
    for _ in range(2):  # the second time in the memory of the failed rows
        bad = [decoder.submit(build_context([], [[3, poison]], SPECIAL), asked(num_beams=beams)) for _ in range(3)]
        good = [decoder.submit(SHORT, one) for one in options]
        ended(*good, *bad)
        assert [reply.finish for reply in bad] == ["error"] * 3
        assert [reply.tokens for reply in good] == expected
    decoder.close()


def test_a_row_that_cannot_be_computed_ends_alone(in_rooms):
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    good = decoder.submit(SHORT, asked(max_length=200, min_length=200))
    until(lambda: good.tokens, "its first token")
    bad = decoder.submit(build_context([], [[VOCABULARY + 1]], SPECIAL), asked())  # there is no such token
    # Words may not repeat, so in the end none is left:
    forbidden = decoder.submit(SHORT, asked(max_length=100, min_length=100, no_repeat_ngram_size=1))
    ended(good, bad, forbidden)
    assert (good.finish, bad.finish, forbidden.finish) == ("length", "error", "error")
    torch.manual_seed(1)
    assert good.tokens == generate_replies(decoder.model, [SHORT], SPECIAL, good.args)[0]
    assert len(forbidden.tokens) == VOCABULARY - 5
    decoder.close()


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "qwen2", "gemma2"])
def test_contexts_may_be_read_in_pieces(family, in_rooms):
    """Compare the logits after a long context, computed in pieces beside other rows, with one forward pass."""
    model = small_model(family, 3)
    let_attend_by_row_(model)
    cache = KeyValues.of(model)
    context = long_context(600)
    rows = []
    for length, segment in ((700, context), (100, SHORT)):
        place, = cache.allocate(length, 1)
        rows.append(BatchRow(place, segment.start, 0, list(segment.ids), list(segment.types)))
    pieces = [1, 7, 100, 13, 256, 1000]
    with torch.inference_mode():
        cache.compute(model, [Work(rows[1], len(rows[1].ids))])
        for piece in pieces:
            rows[1].ids, rows[1].types = [5], [SPECIAL.speaker1]
            ready, logits = cache.compute(model, [Work(rows[0], min(piece, len(rows[0].ids))), Work(rows[1], 1)])
        whole = model(input_ids=torch.tensor([context.ids]), token_type_ids=torch.tensor([context.types]),
                      position_ids=context.start + torch.arange(len(context.ids))[None], logits_to_keep=1).logits[0, -1]
    assert rows[0] in ready
    torch.testing.assert_close(logits[ready.index(rows[0])], whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_any_rows_may_be_computed_together(family, in_rooms):
    """Compute random rows of two shelves, single tokens and pieces of contexts; compare each with a pass of its own.

    One row in between is NaN throughout.
    """
    model, draw = small_model(family, 3), random.Random(5)
    let_attend_by_row_(model)
    cache = KeyValues.of(model)
    contexts = [long_context(draw.randint(20, 60)) for _ in range(12)]
    rows = [BatchRow(place, context.start, 0, list(context.ids), list(context.types))
            for place, context in zip(cache.allocate(120, 12), contexts, strict=True)]
    for states in rows[4].place.shelf.states.values():
        states[rows[4].place.slot] = math.nan
    del rows[4], contexts[4]
    gaps, last = 0, {}
    with torch.inference_mode():
        while left := [row for row in rows if row.ids]:
            chosen = draw.sample(left, draw.randint(1, len(left)))
            work = [Work(row, draw.choice([1, 1, 1, min(7, len(row.ids))])) for row in chosen]
            ready, logits = cache.compute(model, work)
            last |= dict(zip(map(id, ready), logits, strict=True))
            gaps += any(block.own is not None for block in cache.blocks)
        for row, context in zip(rows, contexts, strict=True):
            whole = model(input_ids=torch.tensor([context.ids]), token_type_ids=torch.tensor([context.types]),
                          position_ids=context.start + torch.arange(len(context.ids))[None], logits_to_keep=1)
            torch.testing.assert_close(last[id(row)], whole.logits[0, -1], rtol=2e-4, atol=2e-4)
    assert gaps > 10 or in_rooms


def test_long_contexts_are_read_between_steps():
    """Read 6,000 tokens: a neighbour's reply continues meanwhile, and a short new request does not wait for the end."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    neighbour = decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG), Client("a"))
    until(lambda: len(neighbour.tokens) > 20, "some tokens")
    reader = decoder.submit(long_context(6000), asked(max_length=2, num_beams=4), Client("b"))
    until(lambda: reader.rows and reader.rows[0].length, "its first piece")
    before, newcomer = len(neighbour.tokens), decoder.submit(SHORT, asked(max_length=2), Client("c"))
    ended(newcomer)
    assert not reader.finish and reader.reading
    ended(reader)
    assert len(neighbour.tokens) - before >= (6000 - 2 * 256) / 256
    torch.manual_seed(1)
    assert reader.tokens == generate_replies(decoder.model, [reader.context], SPECIAL, reader.args)[0]
    decoder.close()


def test_the_piece_adapts_to_step_times():
    """Report step times: longer steps than allowed halve the piece, and shorter steps let it grow."""
    pace = Pace()
    pace.took(0.1, 0, 3)
    pace.took(0.5, 32, 3)
    assert pace.most(LONGER) == 16
    assert pace.most(CROWDED) == 64
    pace.took(0.29, 64, 3, CROWDED)
    assert pace.most(LONGER) == 19
    pace.took(0.31, 76, 3, CROWDED)
    assert pace.most(LONGER) == 9
    for _ in range(20):
        pace.took(0.5, pace.most(LONGER), 3)
    assert pace.most(LONGER) == LEAST_READ
    for _ in range(40):
        pace.took(0.12, pace.most(LONGER), 3)
    assert pace.most(LONGER) == MOST_READ
    pace.took(9.0, 256, 0)  # a step may take long if no reply waits for a token
    assert pace.most(LONGER) == MOST_READ


def test_a_crowd_is_many_clients_with_short_contexts():
    """Count who waits per client with a reply: several keys at one address, or several addresses; no long contexts."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    decoder.close()

    def reply(client: Client, context: int, known: bool = False) -> Reply:
        one = Reply(long_context(context), asked(), SPECIAL, torch.device("cpu"), client, lambda: None, NO_OPTIONS)
        one.begin(decoder.cache.allocate(one.longest, 1), {}, len(one.prompt.ids) - 1 if known else 0)
        return one

    talking = [reply(Client("a", key), 50, known=True) for key in "xy"]
    short, long = ([reply(Client("a", str(number)), size) for number in range(6)] for size in (60, 3000))
    elsewhere = reply(Client("b"), 60)
    for readers, longer in ((short[:2], LONGER), (short, 2.5), (short * 2, 2.5), (long, LONGER),
                            ([*short, elsewhere], 2), ([*long, elsewhere], LONGER), (long + short, 2.5)):
        decoder.decoding = talking + readers
        assert decoder._allowed(readers) == longer
    decoder.decoding = talking[:1] + short
    assert decoder._allowed(short) == CROWDED
    own = [reply(Client("a", "x"), 60)]  # a further request of a client that is alone
    decoder.decoding = talking[:1] + own
    assert decoder._allowed(own) == CROWDED
    decoder.decoding = talking + own
    assert decoder._allowed(own) == LONGER
    decoder.steps, decoder.pace.usual = 1, 0.1
    for readers, pieces in ((long, [8, 24]), (short, [24, 72]), (long + short, [8, 73, 15]),
                            (long + short[:1], [8, 24])):
        decoder.decoding = talking + readers
        assert [tokens for _, tokens in decoder._contexts_to_read()] == pieces


def test_memory_grows_and_shrinks_with_the_replies():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=20)
    cache, token = decoder.cache, decoder.cache.token_bytes
    assert cache.bytes == 0
    small = [decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG)) for _ in range(1)]
    many = [decoder.submit(SHORT, asked(max_length=400, min_length=400)) for _ in range(9)]
    large = decoder.submit(long_context(3000), asked(max_length=LONG, min_length=LONG))
    until(lambda: large.tokens and all(reply.rows for reply in many), "all of them")
    assert cache.bytes <= (LONG + 300 + 3000 + LONG + 300 + 16 * 512) * token
    large.cancelled = True
    ended(large, *many)
    until(lambda: cache.bytes <= (LONG + 300) * token, "the return of what they had")
    small[0].cancelled = True
    ended(*small)
    last = decoder.submit(SHORT, asked(max_length=1))
    ended(last)
    until(lambda: cache.bytes <= 8 * 64 * token, "the return of the rest")
    decoder.close()


def test_rows_move_to_fewer_shelves():
    """Fill three shelves with 24 sequences, of which three continue: one shelf remains, and no reply changes."""
    model = small_model("gpt2", 1)
    decoder = Decoder(model, SPECIAL, max_batch=24)
    stay = [decoder.submit(SHORT, asked(seed=seed, max_length=450, min_length=450)) if seed % 8 == 3 else
            decoder.submit(SHORT, asked(max_length=300, min_length=300)) for seed in range(1, 25)]
    until(lambda: all(reply.rows for reply in stay), "all of them")
    assert len(decoder.cache.shelves) == 3
    ended(*(reply for reply in stay if reply.args.max_length == 300))
    until(lambda: len(decoder.cache.shelves) <= 1, "the move")
    kept = [reply for reply in stay if reply.args.max_length == 450]
    ended(*kept)
    for reply in kept:
        torch.manual_seed(reply.args.seed)
        assert reply.tokens == generate_replies(model, [SHORT], SPECIAL, reply.args)[0]
    decoder.close()


def test_rooms_are_used_again_until_their_memory_is_needed(monkeypatch):
    """Fill a shelf of two rows, leave it, come back to it, and need all memory for something else."""
    monkeypatch.setattr("web.keyvalues.belongs_in_rooms", lambda model: True)
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, memory=1)  # MiB, for 2,048 tokens; 256 in a shelf
    cache, rooms = decoder.cache, []
    for seed in (1, 2):
        replies = [decoder.submit(SHORT, asked(seed=seed, max_length=5 + more)) for more in range(3)]
        ended(*replies)
        until(lambda: not decoder.decoding, "their departure")
        assert cache.bytes == 0 and [len(shelf.places) for shelf in cache.shelves] == [2, 2]
        rooms.append([shelf.room for shelf in cache.shelves])
        for reply in replies:
            torch.manual_seed(seed)
            assert reply.tokens == generate_replies(decoder.model, [SHORT], SPECIAL, reply.args)[0]
    assert rooms[0] == rooms[1]
    large = [decoder.submit(long_context(900), asked(max_length=50, min_length=50), Client(address))
             for address in "ab"]
    ended(*large)
    until(lambda: not decoder.decoding, "their departure")
    assert [shelf.columns for shelf in cache.shelves] == [1024, 1024]
    decoder.close()


def test_requests_wait_for_memory_or_are_refused():
    model = small_model("gpt2", 1)
    token = 2 * 2 * 32 * 4  # layers × (keys and values) × numbers × bytes
    decoder = Decoder(model, SPECIAL, memory=6)  # MiB, for 12,288 tokens; half of them for one request
    assert decoder.cache.token_bytes == token
    with pytest.raises(InputError, match=r"needs 4 MiB of memory, and one reply may take half of --memory, 3; ask for"):
        decoder.submit(long_context(4200), asked(max_length=LONG))
    first = decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG))
    until(lambda: first.tokens, "its start")
    second = decoder.submit(long_context(3000), asked(max_length=1))
    third = decoder.submit(SHORT, asked(max_length=5), Client("b"))  # this request fits
    ended(third)
    assert second in decoder.waiting and not second.finish
    assert decoder.cache.bytes <= 6 << 20
    first.cancelled = True
    ended(second)
    assert second.finish in ("length", "stop")
    decoder.close()


def test_a_crowding_client_leaves_others_their_share():
    """Fill batch and queue with forty streams from one address.

    A request from another address starts at once and gets its share of the steps; the crowding client loses its latest
    requests.
    """
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=8, max_waiting=32)
    crowd = []
    for number in range(40):
        crowd.append(decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG), Client("a", f"key {number}")))
        if number < 8:
            until(lambda: not decoder.waiting, "its place in the batch")
    with pytest.raises(Busy):
        decoder.submit(SHORT, asked(), Client("a", "another key"))
    assert decoder.refuses(Client("a")) and not decoder.refuses(Client("b"))
    for _ in range(3):
        honest = decoder.submit(SHORT, asked(max_length=100, min_length=100), Client("b"))
        start = [len(reply.tokens) for reply in crowd]
        ended(honest)
        assert honest.finish == "length"
        gained = sum(len(reply.tokens) for reply in crowd) - sum(start)
        # The crowd gets a quarter of 8 rows in each of the 100 steps, and all 8 in the steps before this thread looks
        # again. Without shares it would get all 8 in every step, 800 in total.
        assert gained <= 100 * 2 + 40 * 8
    lost = [reply for reply in crowd if reply.finish]
    assert lost and all(reply.finish == "busy" and not reply.tokens for reply in lost) and crowd[-1] in lost
    decoder.close()


def test_keys_share_the_part_of_their_address():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=4, max_waiting=8)
    crowd = []
    for number in range(12):
        crowd.append(decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG), Client("a", "one")))
        if number < 4:
            until(lambda: not decoder.waiting, "its place in the batch")
    other = decoder.submit(SHORT, asked(max_length=3), Client("a", "two"))
    crowd[0].cancelled = True  # one place is free, and eight earlier requests wait
    ended(other)
    assert sum(reply.finish == "busy" for reply in crowd) == 1
    decoder.close()


def test_a_second_key_enters_a_full_batch():
    """Use many keys at one address, as behind a proxy. The address is bounded too, so that others get in."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=8, max_waiting=32)
    endless = asked(max_length=LONG, min_length=LONG)
    crowd = [decoder.submit(SHORT, endless, Client("a", "one")) for _ in range(12)]
    until(lambda: len(decoder.decoding) == 8, "a full batch")
    for key in ("two", "three"):
        honest = decoder.submit(SHORT, asked(max_length=3), Client("a", key))
        ended(honest)
        assert honest.finish in ("length", "stop")
    crowd += [decoder.submit(SHORT, endless, Client("a", f"made up {number}")) for number in range(12)]
    until(lambda: len(decoder.decoding) == 12, "one and a half batches")
    honest = decoder.submit(SHORT, asked(max_length=3), Client("b"))
    ended(honest)
    assert honest.finish in ("length", "stop") and not any(reply.finish for reply in crowd)
    assert len(decoder.decoding) <= 12
    decoder.close()


def test_no_client_takes_all_memory():
    """Request long replies with one key and with made-up keys: other clients still get memory."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, memory=16)  # MiB, for 32,768 tokens
    endless = asked(max_length=LONG, min_length=LONG)
    crowd = [decoder.submit(SHORT, endless, Client("a", "one")) for _ in range(12)]
    for address, key in [("a", "two"), ("b", "")]:
        honest = decoder.submit(long_context(2000), asked(max_length=3), Client(address, key))
        ended(honest)
        assert honest.finish in ("length", "stop")
    crowd += [decoder.submit(long_context(size), endless, Client("a", f"made up {size}"))
              for size in (4000, 2000, 1000, 500, 200, 100)]
    honest = decoder.submit(long_context(4000), asked(max_length=3), Client("b"))
    ended(honest)
    assert honest.finish in ("length", "stop") and not any(reply.finish for reply in crowd)
    decoder.close()


def test_an_ipv6_network_is_one_client():
    assert Client.at("2001:db8::1") == Client.at("2001:db8::ffff:2") != Client.at("2001:db8:0:1::1")
    assert Client.at("127.0.0.1", "k") == Client("127.0.0.1", "k") != Client.at("127.0.0.1")


def test_a_stopping_server_finishes_its_replies():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=1)
    begun = decoder.submit(SHORT, asked(max_length=60, min_length=60))
    until(lambda: begun.tokens, "its first token")
    waiting = decoder.submit(SHORT, asked())
    decoder.drain()
    assert waiting.finish == "stopping"
    with pytest.raises(Stopping, match="is stopping"):
        decoder.submit(SHORT, asked())
    ended(begun)
    assert begun.finish == "length" and len(begun.tokens) == 60
    decoder.close()


def test_reading_contexts_delays_neighbours_little():
    """Count the tokens that are read between two tokens of a neighbour, instead of measuring time."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    read, seen = [], [0]

    def note() -> None:
        total = sum(reply.rows[0].length for reply in readers if reply.rows)
        read.append(total - seen[0])
        seen[0] = total

    readers: list = []
    neighbour = decoder.submit(SHORT, asked(max_length=800, min_length=800), Client("a"), note)
    readers += [decoder.submit(long_context(size), asked(max_length=LONG - 64, min_length=LONG - 64), Client("b"))
                for size in (3000, 3500, 2500)]
    ended(neighbour)
    assert max(read) <= 2 * 256 and statistics.median(read) < 256
    decoder.close()


def test_a_conversation_is_kept_for_its_client_only():
    """Send the turns of a conversation: all get the right replies, but only its own client computes less."""
    model, counted = small_model("llama", 2), []
    decoder = Decoder(model, SPECIAL)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: counted.append(inputs[0].numel()))
    client, others = Client("a", "key"), [Client("a", "another key"), Client("b", "key"), Client("a")]
    persona, history = [list(range(20))], []

    def answer(context, args, client) -> tuple[list[int], int]:
        """Return a reply and the number of tokens that the network read for it."""
        counted.clear()
        reply = decoder.submit(context, args, client)
        ended(reply)
        until(lambda: not decoder.decoding, "its departure")
        return reply.tokens, sum(counted)

    for turn in range(4):
        history.append([turn, 7, 9])
        context = build_context(persona, history, SPECIAL)
        args = asked(seed=turn + 1, max_length=8, min_length=8, num_beams=2 if turn == 2 else 1)
        torch.manual_seed(turn + 1)
        right = generate_replies(model, [context], SPECIAL, args)[0]
        read = {}
        for one in [*others, client]:
            tokens, read[one] = answer(context, args, one)
            assert tokens == right
            decoder.cache.kept = [kept for kept in decoder.cache.kept if kept.owner not in others]
        assert len({read[one] for one in others}) == 1
        computed = len(context.ids) - (5 + (8 if turn == 3 else 1)) if turn else 0
        assert read[client] <= read[others[0]] - computed
        history.append(right)
    decoder.close()


def test_requests_take_the_memory_of_kept_conversations(monkeypatch):
    monkeypatch.setattr("web.batching.KEPT_FOR", 1.0)
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, memory=6)  # MiB, for 12,288 tokens
    cache, client = decoder.cache, Client("a", "key")
    for length in (1000, 900):
        ended(decoder.submit(long_context(length), asked(max_length=2, min_length=2), client))
    until(lambda: cache.kept_bytes, "keeping")
    assert cache.kept_bytes <= (6 << 20) // 4
    large = [decoder.submit(long_context(3000), asked(max_length=2600, min_length=2600), Client(address, "key"))
             for address in "bc"]
    until(lambda: all(one.tokens for one in large), "their start")
    assert cache.bytes + cache.kept_bytes <= 6 << 20 and cache.bytes > 5 << 20
    for one in large:
        one.cancelled = True
    ended(*large)
    ended(decoder.submit(SHORT, asked(max_length=20, min_length=20), client))
    until(lambda: not decoder.decoding and not cache.kept, "the end of keeping")
    decoder.close()
