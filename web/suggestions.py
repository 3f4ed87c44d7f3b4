"""What the user may say next: the model's replies as the user and questions of the data, ranked by the choice head."""

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import aclosing

from cli import InputError
from tables import TokenTable
from web.batching import Busy, Client
from web.bot import Bot
from web.insight import LONGEST, read
from words import text_key, words

GENERATED, ASKED, OFFERED = 8, 10, 3  # suggestions that are decoded, that are taken from the data, that are offered
LONGEST_QUESTION = 10  # words
LOOKED_AT = 3_000  # turns of a split, for questions
# A question with these is about its first speaker, or about what was said before it.
BOUND = re.compile(r"\b(i|me|my|mine|we|us|our|ours|he|him|his|she|her|hers|they|them|their|it|its|that|this|those|"
                   r"these|one|ones|there|then|no|yes|so|when|why|how can)\b", re.I)
CALMER = 0.7  # a suggestion's temperature, as a part of a reply's


class Suggestions:
    """Suggestions for one bot. ``somebody``: gives a conversation's user a personality, by the conversation's name."""

    def __init__(self, bot: Bot, table: TokenTable, somebody: Callable[[str], list[str]]):
        self.bot, self.somebody = bot, somebody
        openings, questions = {}, {}
        for split in table.values():
            for turn in random.sample(range(split.num_turns), min(LOOKED_AT, split.num_turns)):
                history = split.texts("history", turn)
                if history and _is_plain_question(history[-1]):
                    (openings if len(history) == 1 else questions)[text_key(history[-1])] = history[-1]
        self.openings, self.questions = list(openings.values()), list((openings | questions).values())

    async def offer(self, conversation: str, own: list[str], said: list[str], options, client: Client,
                    over: asyncio.Event) -> list[str]:
        """At most `OFFERED` texts; fewer where there is nothing good, none when ``over`` is set meanwhile.

        ``said``: the messages so far, the user's first; the model speaks as the user, as whom all others were said to.
        ``conversation``: its name, by which a persona is drawn for the user where ``own`` is empty.
        """
        if not said:
            return random.sample(self.openings, min(OFFERED, len(self.openings)))
        own = own or self.somebody(conversation)
        known = {text_key(text) for text in said}
        questions = [text for text in random.sample(self.questions, min(ASKED, len(self.questions)))
                     if text_key(text) not in known]
        options = options if options.no_sample else options.over(temperature=max(CALMER * options.temperature, 0.01))
        if said[-1].rstrip().endswith("?"):
            questions = []  # who was asked answers
        spoken = await asyncio.gather(*(self._speak(own, said, options.over(seed=seed), client, over)
                                        for seed in self._seeds(options)))
        if over.is_set():
            return []
        pool = {text_key(text): text for text in [*questions, *filter(None, spoken)] if text_key(text) not in known}
        return await asyncio.to_thread(self._best, own, said, list(pool.values()))

    def _seeds(self, options) -> list[int]:
        """A seed per decoded suggestion, 0 for none; where all would be the same, one is enough."""
        number = 1 if options.no_sample or options.num_beams > 1 else GENERATED
        return [options.seed + place if options.seed else 0 for place in range(number)]

    async def _speak(self, own, said, options, client, over) -> str:
        """What the model says as the user; empty when it was not a whole reply, which is not worth a complaint."""
        try:
            async with aclosing(self.bot.reply(own, said, options, client)) as replies:
                async for reply in replies:  # noqa: B007  the last one is the whole
                    if over.is_set():
                        return ""
        except (InputError, Busy, RuntimeError):
            return ""
        return self.bot.text(reply) if reply.finish == "stop" else ""

    def _best(self, own: list[str], said: list[str], texts: list[str]) -> list[str]:
        """The best of the texts: by the choice head, who is asked with and without the persona, and likelihood."""
        bot = self.bot
        ids = {tuple(bot.encode(text)): text for text in texts}
        scores = dict.fromkeys(ids, 0.0)
        try:
            for persona in (own, []):
                context = bot.context(persona, said, bot.options())
                if context.opened:  # a chat template of the model's own, which the choice head does not know
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
        if best and not answers and not any("?" in text for text in best[:OFFERED]):  # a question always goes on
            best[OFFERED - 1:] = [text for text in best[OFFERED - 1:] if "?" in text]
        return best[:OFFERED]


def _is_plain_question(text: str) -> bool:
    return text.rstrip().endswith("?") and len(words(text)) <= LONGEST_QUESTION and not BOUND.search(text)


def _alike(one: str, other: str) -> bool:
    """Whether most words of the shorter text are in the other one, too."""
    first, second = set(words(one)), set(words(other))
    return 3 * len(first & second) >= 2 * min(len(first), len(second))
