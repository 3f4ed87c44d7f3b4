"""Use a model's own chat template if the model has never been trained with this project's control tokens.

Examples are the instruct models of the hub. The model's own control tokens end a reply; the personality becomes the
system message.
"""

from collections.abc import Sequence

from jinja2 import TemplateError

from cli import InputError, short
from inputs import Segment, Specials
from tokenization import Tokenizer

MARK = "hello"  # a sample message; the token behind it in the template ends a message


class OwnTemplate(Specials):
    """The control tokens of a model with its own chat template, instead of this project's five; each ends a reply."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "OwnTemplate":
        """Find the control tokens in a tokenizer's template. Raises `InputError` if the template cannot be used."""
        behind = _render(tokenizer, [("user", MARK), ("assistant", MARK)], reply=False).rpartition(MARK)[2]
        named = [tokenizer.get_vocab().get(str(name)) for name in tokenizer.own_names.values()]
        ends = [token for token in _ids(tokenizer, behind) if token in tokenizer.control]
        others = [token for token in (*ends[:1], *named, *sorted(tokenizer.control)) if token in tokenizer.control]
        own = cls(*(list(dict.fromkeys(others)) * 5)[:5])
        own.tokenizer = tokenizer
        return own

    def context(self, persona: Sequence[Sequence[int]], history: Sequence[Sequence[int]], room: int) -> Segment:
        """Build the context of a reply in at most ``room`` tokens.

        If necessary, the oldest exchanges are left out, then the last sentences of the personality, then the first
        tokens.
        """
        sentences, said = ([self.tokenizer.decode(ids).strip() for ids in texts] for texts in (persona, history))
        while True:
            roles = (["assistant", "user"] * len(said))[-len(said):]
            messages = [*[("system", "\n".join(sentences))] * bool(sentences), *zip(roles, said, strict=True)]
            ids = _ids(self.tokenizer, _render(self.tokenizer, messages))
            if len(ids) <= room or not (said[1:] or sentences):
                ids = ids[-room:]
                return Segment(ids, [self.speaker1] * len(ids), opened=True)
            said, sentences = (said[2:] or said[-1:], sentences) if said[1:] else (said, sentences[:-1])


def tokens_for_chat(tokenizer: Tokenizer) -> Specials:
    """Return the control tokens that a model uses for replies: this project's, or its own."""
    return OwnTemplate.of(tokenizer) if tokenizer.own_names else Specials.of(tokenizer)


def _render(tokenizer: Tokenizer, messages: list[tuple[str, str]], reply: bool = True) -> str:
    """Render messages (role, text) with the tokenizer's template. Control tokens within a text get a space."""
    special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})
    chat = []
    for role, text in messages:
        for token in special:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        chat.append({"role": role, "content": text})
    how = {**tokenizer.own_names, "tokenize": False, "add_generation_prompt": reply}
    try:
        return tokenizer.apply_chat_template(chat, **how)
    except TemplateError as error:
        if chat[0]["role"] == "system" and len(chat) > 1:  # some templates do not support system messages
            first = {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
            return _render(tokenizer, [(one["role"], one["content"]) for one in [first, *chat[2:]]], reply)
        raise InputError(f"--model_checkpoint: the model's own chat template refuses the conversation "
                         f"({short(str(error))}); train the model first, train.py --model_checkpoint") from None


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a rendered template; control tokens in it are read as such."""
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, False
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = before
