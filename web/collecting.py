"""Save visitors' preferences for `feedback`: pairs of replies with answers, and ratings of single replies.

Only replies that this server gave are saved, in the folder that ``--collect`` names. This file knows no page.
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

REMEMBERED = 200  # latest replies to an open page that may be rated


class Compared(NamedTuple):
    """Two replies to one context, in the order shown. ``replies``: text, token ids, whether the model ended it."""

    conversation: str
    personality: list[str]
    said: list[str]
    replies: list[tuple[str, list[int], bool]]
    options: Decoding


class GivenReplies:
    """Hashes of the replies that a page got. A rating of any other reply is not saved."""

    def __init__(self):
        self.hashes: deque[str] = deque(maxlen=REMEMBERED)

    def add(self, personality: list[str], said: list[str]) -> None:
        """Remember a reply, the last message of ``said``."""
        self.hashes.append(_hash(personality, said))

    def __contains__(self, conversation: tuple[list[str], list[str]]) -> bool:
        return _hash(*conversation) in self.hashes


class Collector:
    """A writer of a folder's ``pairs.jsonl``, ``answers.jsonl`` and ``ratings.jsonl``.

    Raises `InputError` if the folder cannot be written or another process holds the lock.
    """

    def __init__(self, folder: str | Path, bot: Bot):
        self.folder, self.bot = Path(folder), bot
        self.pairs, self.answers, self.ratings = (self.folder / f"{name}.jsonl"
                                                  for name in ("pairs", "answers", "ratings"))
        append_json_lines(self.answers, [])
        self.lock = FileLock(f"{self.answers}.lock")  # feedback.annotate locks the same file
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"--collect {folder}: another server, or feedback.annotate, writes there; name another "
                             "folder") from None

    def compare(self, compared: Compared, choice: int | str, visitor: str) -> None:
        """Save a pair and the answer to it. Both are on the disk when this returns.

        ``choice``: 0, 1, "tie" or "bad". The dialog's number is a hash of the conversation's name, so that all pairs of
        one conversation are held out together.
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
        """Save a rating, 1 or 0, of the last message of ``said``."""
        append_json_lines(self.ratings, [{"persona": personality, "history": said[:-1], "reply": said[-1],
                                     "rating": int(good), "rater": visitor}])


def _hash(personality: list[str], said: list[str]) -> str:
    return hashlib.sha256(json.dumps([personality, said]).encode()).hexdigest()[:24]
