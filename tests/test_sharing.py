"""What one request may do to others: its faults, its length, its memory and its number stay its own."""

import statistics

import pytest
import torch
from test_serving import LONG, SPECIAL, VOCABULARY, asked, small_model, until

from cli import InputError
from decoding import generate_replies
from inputs import build_context
from web.batching import Busy, Client, Decoder, Stopping
from web.keyvalues import BatchRow, KeyValues, Work, let_attend_by_row_

SHORT = build_context([], [[3, 4]], SPECIAL)


def ended(*replies) -> None:
    until(lambda: all(reply.finish for reply in replies), "the end")


def long_context(tokens: int):
    return build_context([[1] * 10], [[number % 50 for number in range(tokens)]], SPECIAL)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_without_numbers_ends_alone(beams):
    """A token whose embedding is no number spoils whoever reads it, then and later, and nobody else."""
    model, options = small_model("llama", 3), [asked(seed=seed, max_length=12, min_length=12) for seed in (1, 2)]
    expected = []
    for one in options:
        torch.manual_seed(one.seed)
        expected.append(generate_replies(model, [SHORT], SPECIAL, one)[0])
    poison = next(token for token in range(5, 50) if token not in sum(expected, []))
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    decoder = Decoder(model, SPECIAL, max_batch=8)
    for _ in range(2):  # the second time where the spoilt rows lay
        bad = [decoder.submit(build_context([], [[3, poison]], SPECIAL), asked(num_beams=beams)) for _ in range(3)]
        good = [decoder.submit(SHORT, one) for one in options]
        ended(*good, *bad)
        assert [reply.finish for reply in bad] == ["error"] * 3
        assert [reply.tokens for reply in good] == expected
    decoder.close()


def test_a_row_that_cannot_be_computed_ends_alone():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL)
    good = decoder.submit(SHORT, asked(max_length=200, min_length=200))
    until(lambda: good.tokens, "its first token")
    bad = decoder.submit(build_context([], [[VOCABULARY + 1]], SPECIAL), asked())  # there is no such token
    forbidden = decoder.submit(SHORT, asked(max_length=100, min_length=100, no_repeat_ngram_size=1))  # all, in the end
    ended(good, bad, forbidden)
    assert (good.finish, bad.finish, forbidden.finish) == ("length", "error", "error")
    torch.manual_seed(1)
    assert good.tokens == generate_replies(decoder.model, [SHORT], SPECIAL, good.args)[0]
    assert len(forbidden.tokens) == VOCABULARY - 5
    decoder.close()


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "qwen2", "gemma2"])
def test_a_context_read_in_pieces_is_the_whole(family):
    """The logits after a long context, computed in pieces beside other rows, are those of one forward pass."""
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


def test_a_long_context_is_read_between_the_steps_of_others():
    """While 6,000 tokens are read, a neighbour goes on; a short newcomer does not wait for the end of it either."""
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


def test_the_piece_follows_the_time_that_steps_take():
    """Twice a usual step at most: longer ones halve the piece, shorter ones let it grow."""
    from web.batching import LEAST_READ, MOST_READ, Pace

    pace = Pace()
    pace.took(0.1, 0, 3)
    pace.took(0.5, 32, 3)
    assert pace.tokens == 16
    for _ in range(20):
        pace.took(0.5, int(pace.tokens), 3)
    assert pace.tokens == LEAST_READ
    for _ in range(40):
        pace.took(0.15, int(pace.tokens), 3)
    assert pace.tokens == MOST_READ
    pace.took(9.0, 256, 0)  # where nobody waits for a token, it may take long
    assert pace.tokens == MOST_READ


def test_memory_follows_what_is_decoding():
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


def test_rows_are_moved_so_that_few_shelves_are_left():
    """Of three shelves with 24 sequences, of which three stay, one shelf stays, and replies do not notice."""
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


def test_who_needs_more_memory_than_is_left_waits_and_who_needs_more_than_there_is_is_told():
    model = small_model("gpt2", 1)
    token = 2 * 2 * 32 * 4  # layers, keys and values, numbers, bytes
    decoder = Decoder(model, SPECIAL, memory=3)  # MiB: 6,144 tokens
    assert decoder.cache.token_bytes == token
    with pytest.raises(InputError, match=r"needs 4 MiB of memory, and --memory allows 3; ask for fewer tokens"):
        decoder.submit(long_context(4200), asked(max_length=LONG))
    first = decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG))
    until(lambda: first.tokens, "its start")
    second = decoder.submit(long_context(3000), asked(max_length=1))
    third = decoder.submit(SHORT, asked(max_length=5), Client("b"))  # for which there is room
    ended(third)
    assert second in decoder.waiting and not second.finish
    assert decoder.cache.bytes <= 3 << 20
    first.cancelled = True
    ended(second)
    assert second.finish in ("length", "stop")
    decoder.close()


def test_one_clients_crowd_leaves_others_their_share():
    """Forty streams of one address fill batch and queue; another address comes in at once, and is not slowed by more
    than a share of them; of its own crowd a client loses the last."""
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
        honest = decoder.submit(SHORT, asked(max_length=20, min_length=20), Client("b"))
        start = [len(reply.tokens) for reply in crowd]
        ended(honest)
        assert honest.finish == "length"
        gained = sum(len(reply.tokens) for reply in crowd) - sum(start)
        # A quarter of 8 rows in each of its 20 steps, and all 8 in the few before this thread looks again; of a batch
        # without shares it would be all 8 in every step, 160.
        assert gained <= 20 * 2 + 8 * 8
    lost = [reply for reply in crowd if reply.finish]
    assert lost and all(reply.finish == "busy" and not reply.tokens for reply in lost) and crowd[-1] in lost
    decoder.close()


def test_keys_at_one_address_share_what_it_gets():
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, max_batch=4, max_waiting=8)
    crowd = []
    for number in range(12):
        crowd.append(decoder.submit(SHORT, asked(max_length=LONG, min_length=LONG), Client("a", "one")))
        if number < 4:
            until(lambda: not decoder.waiting, "its place in the batch")
    other = decoder.submit(SHORT, asked(max_length=3), Client("a", "two"))
    crowd[0].cancelled = True  # a place is free, and there are eight who came before
    ended(other)
    assert sum(reply.finish == "busy" for reply in crowd) == 1
    decoder.close()


def test_a_key_comes_into_a_batch_that_another_at_its_address_has_filled():
    """As behind a proxy, whose address all have; what one address can take is bounded, so that others come in, too."""
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
    """Long replies of one client, and of made-up ones at its address, leave room for another's."""
    decoder = Decoder(small_model("gpt2", 1), SPECIAL, memory=16)  # MiB: 32,768 tokens
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


def test_a_server_that_stops_goes_on_with_what_it_has_begun():
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


def test_gaps_of_a_neighbour_are_steps():
    """The time between a neighbour's tokens while contexts of all sizes come: no gap is that of a whole context.

    No clock decides: what is compared is how many tokens were read between two of its tokens."""
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
