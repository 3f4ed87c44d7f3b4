"""What visitors prefer, for `feedback`: pairs and answers of the page's comparisons, and ratings of single replies.

Only what this server said itself is written, only in the folder that ``--collect`` names. Knows no page.
"""

import hashlib
import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cli import InputError
from decoding import Decoding
from feedback.pairs import append_json_lines, pair_name
from web.bot import Bot

REMEMBERED = 200  # replies of a visit that may be rated


class Compared(NamedTuple):
    """Two replies to one context, in the order in which they were shown: text, token ids, whether it has its end."""

    conversation: str
    personality: list[str]
    said: list[str]
    replies: list[tuple[str, list[int], bool]]
    options: Decoding


class Heard:
    """What one visit was told, as hashes, so that nobody can have a reply rated that the model did not give."""

    def __init__(self):
        self.replies: deque[str] = deque(maxlen=REMEMBERED)

    def add(self, personality: list[str], said: list[str]) -> None:
        """``said``: the messages, the reply last."""
        self.replies.append(_hash(personality, said))

    def __contains__(self, told: tuple[list[str], list[str]]) -> bool:
        return _hash(*told) in self.replies


class Collector:
    """Writes into a folder: ``pairs.jsonl``, ``answers.jsonl``, ``ratings.jsonl``.

    Raises `InputError` when the folder cannot be written, or another server writes there.
    """

    def __init__(self, folder: str | Path, bot: Bot):
        self.folder, self.bot = Path(folder), bot
        self.pairs, self.answers, self.ratings = (self.folder / f"{name}.jsonl"
                                                  for name in ("pairs", "answers", "ratings"))
        append_json_lines(self.answers, [])
        self.lock = FileLock(f"{self.answers}.lock")  # that of feedback.annotate
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"--collect {folder}: another server, or feedback.annotate, writes there; name another "
                             "folder") from None

    def compare(self, compared: Compared, choice: int | str, visitor: str) -> None:
        """Write a pair and the answer to it, which is on the disk when this returns.

        ``choice``: 0, 1, "tie" or "bad". A pair's dialog has a number of its own, the hash of the conversation's name:
        all pairs of one conversation are held out together.
        """
        bot, history = self.bot, compared.said[-(2 * self.bot.model.max_history + 1):]
        record = {
            "checkpoint": bot.args.model_checkpoint, "model": bot.weights, "data": "page", "split": "chat",
            "max_history": bot.model.max_history, "fp16": bot.args.fp16,
            "decoders": [{name: value for name, value in asdict(compared.options).items() if name != "seed"}],
            "dialog": int(hashlib.sha256(compared.conversation.encode()).hexdigest()[:12], 16),
            "turn": len(compared.said) // 2, "persona": compared.personality, "history": history,
            "replies": [{"text": text, "ids": ids, "ended": ended, "decoder": 0}
                        for text, ids, ended in compared.replies]}
        name = pair_name(record)
        append_json_lines(self.pairs, [{"pair": name} | record])
        append_json_lines(self.answers, [{"pair": name, "annotator": visitor, "choice": choice, "shown": [0, 1]}])

    def rate(self, personality: list[str], said: list[str], good: bool, visitor: str) -> None:
        """Write a rating of the last of ``said``: 1 or 0."""
        append_json_lines(self.ratings, [{"persona": personality, "history": said[:-1], "reply": said[-1],
                                     "rating": int(good), "rater": visitor}])


def _hash(personality: list[str], said: list[str]) -> str:
    return hashlib.sha256(json.dumps([personality, said]).encode()).hexdigest()[:24]
