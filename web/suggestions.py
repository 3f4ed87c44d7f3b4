"""Suggest messages to the user: replies decoded as the user, and questions of the data, ranked by the choice head."""

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import aclosing

from cli import InputError
from tables import TokenTable
from web.batching import Busy, apart
from web.bot import Bot
from web.clients import Client
from web.insight import LONGEST, read
from words import text_key, words

DECODED, FROM_DATA, OFFERED = 8, 10, 3  # suggestions decoded by the model, taken from the data, shown to the user
LONGEST_QUESTION = 10  # words
LOOKED_AT = 3_000  # turns per split searched for questions
# A question with one of these words is about the person who asked it, or about an earlier message.
DEPENDENT = re.compile(r"\b(i|me|my|mine|we|us|our|ours|he|him|his|she|her|hers|they|them|their|it|its|that|this|those|"
                       r"these|one|ones|there|then|no|yes|so|when|why|how can)\b", re.I)
CALMER = 0.7  # factor on a reply's temperature


class Suggestions:
    """Suggestions for the users of one bot. ``persona_of`` returns a personality for a user, by conversation name."""

    def __init__(self, bot: Bot, table: TokenTable, persona_of: Callable[[str], list[str]]):
        self.bot, self.persona_of = bot, persona_of
        openings, questions = {}, {}
        for split in table.values():
            for turn in random.sample(range(split.num_turns), min(LOOKED_AT, split.num_turns)):
                history = split.texts("history", turn)
                if history and _is_plain_question(history[-1]):
                    (openings if len(history) == 1 else questions)[text_key(history[-1])] = history[-1]
        self.openings, self.questions = list(openings.values()), list((openings | questions).values())

    async def offer(self, conversation: str, own: list[str], said: list[str], options, client: Client,
                    turn_over: asyncio.Event) -> list[str]:
        """Return at most `OFFERED` texts; fewer if too few are good, none if ``turn_over`` is set meanwhile.

        ``conversation``: a name, by which a personality is drawn for the user if ``own`` is empty. ``own``: the user's
        personality. ``said``: the messages so far, the user's first; the model answers the last one as the user.
        """
        if not said:
            return random.sample(self.openings, min(OFFERED, len(self.openings)))
        own = own or self.persona_of(conversation)
        known = {text_key(text) for text in said}
        questions = [text for text in random.sample(self.questions, min(FROM_DATA, len(self.questions)))
                     if text_key(text) not in known]
        options = options if options.no_sample else options.over(temperature=max(CALMER * options.temperature, 0.01))
        if said[-1].rstrip().endswith("?"):
            questions = []  # a question deserves an answer, not another question
        decoded = await asyncio.gather(*(self._decode(own, said, options.over(seed=seed), client, turn_over)
                                         for seed in self._seeds(options)))
        pool = {text_key(text): text for text in [*questions, *filter(None, decoded)] if text_key(text) not in known}
        if turn_over.is_set() or not pool:
            return []
        return await apart(self._best, own, said, list(pool.values()))

    def _seeds(self, options) -> list[int]:
        """Return one seed per suggestion to decode, 0 for no seed. Without sampling, one suggestion is enough."""
        number = 1 if options.no_sample or options.num_beams > 1 else DECODED
        return [options.seed + place if options.seed else 0 for place in range(number)]

    async def _decode(self, own, said, options, client, turn_over) -> str:
        """Return the model's reply as the user, or an empty text if no complete reply could be decoded."""
        try:
            async with aclosing(self.bot.reply(own, said, options, client)) as replies:
                async for reply in replies:  # noqa: B007  the last item is the whole reply
                    if turn_over.is_set():
                        return ""
        except (InputError, Busy, RuntimeError):
            return ""
        return self.bot.text(reply) if reply.finish == "stop" else ""

    def _best(self, own: list[str], said: list[str], texts: list[str]) -> list[str]:
        """Return the best texts by likelihood and by the choice head, with and without the personality."""
        bot = self.bot
        ids = {tuple(bot.encode(text)): text for text in texts}
        scores = dict.fromkeys(ids, 0.0)
        try:
            for persona in (own, []):
                context = bot.context(persona, said, bot.options())
                if context.opened:  # the choice head was not trained with the model's own chat template
                    return texts[-OFFERED:]
                if len(context.ids) + sum(len(one) + 2 for one in ids) > min(LONGEST, 4 * bot.model.max_positions):
                    return texts[:OFFERED]
                for one, reading in zip(ids, read(bot.model, bot.special, context, list(ids))[0], strict=True):
                    scores[one] += reading.choice + 2 * reading.likelihood
        except InputError:
            return []
        best: list[str] = []
        for one in sorted(ids, key=scores.__getitem__, reverse=True):
            if not any(_alike(ids[one], other) for other in [*best, *said]):
                best.append(ids[one])
        answers = said[-1].rstrip().endswith("?")
        if best and not answers and not any("?" in text for text in best[:OFFERED]):  # a question keeps the talk going
            best[OFFERED - 1:] = [text for text in best[OFFERED - 1:] if "?" in text]
        return best[:OFFERED]


def _is_plain_question(text: str) -> bool:
    return text.rstrip().endswith("?") and len(words(text)) <= LONGEST_QUESTION and not DEPENDENT.search(text)


def _alike(one: str, other: str) -> bool:
    """Tell whether at least two thirds of the shorter text's words are also in the other text."""
    first, second = set(words(one)), set(words(other))
    return 3 * len(first & second) >= 2 * min(len(first), len(second))
