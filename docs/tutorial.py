# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A bot with a personality: how it works, step by step
#
# This tutorial is for readers who have never trained a dialogue model. It takes about half an hour. At its end you
# know what the model reads, what it learns, how it chooses its words, and what the usual figures say about it and do
# not say. And you have talked to it.
#
# You need some Python, no GPU, and no internet connection: the bot and the dialogs come with the project. Run `make
# tutorial` once, which also installs Jupyter. Then read `docs/tutorial.html`, or open the notebook with
# `.venv/bin/jupyter lab docs/tutorial.ipynb`, change what makes you curious, and run it again.
#
# Two promises. All computing is done by the functions with which the project itself trains, measures and talks. And
# no number in the text was typed by hand: a cell has computed it, and where the text claims something about the bot,
# an `assert` checks the claim. When the bot is trained anew, the numbers change, and the text stays true.

# %%
import json
import math
import os
import random
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "train.py").exists())
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import pictures
import torch
from pictures import say

from corpora import read_corpus
from decoding import Decoding, fitted_context, generate_replies, load_checkpoint, readable, top_filtering
from inputs import IGNORED, Specials, TurnDataset, build_context, build_input_from_segments, build_reply, collate
from layers import candidate_mask
from utils import get_dataset

# %% [markdown]
# ## What a persona dialogue is
#
# Early neural chatbots learnt from film subtitles, and they had a flaw that everybody noticed: they were nobody.
# Asked for their job twice, they named two different ones. The data set PERSONA-CHAT ([Zhang et al.
# 2018](https://arxiv.org/abs/1801.07243)) was made to mend this. Two people who had never met each got a few
# sentences about an invented person, the *persona*, and then chatted as if they were these persons.
#
# The model reads the same sentences. A good reply therefore fits two things: what was just said, and who the bot is.
#
# We load the default bot, which is called `persona`, with its tokenizer, and some of the dialogs that were written
# for this project. The bot was not trained on these.

# %%
model, tokenizer = load_checkpoint("persona")
special = Specials.of(tokenizer)

corpus = {split: list(entries) for split, entries in read_corpus("data/sample_personachat.json").items()}
scratch = TemporaryDirectory()
small = Path(scratch.name, "small.json")
small.write_text(json.dumps({"train": corpus["train"], "valid": corpus["valid"][12:20]}))
table = get_dataset(tokenizer, str(small), dataset_cache=f"{scratch.name}/cache")
valid = table["valid"]

# %%
dialog = next(number for number, entry in enumerate(corpus["valid"][12:20])
              if entry["utterances"][0]["history"] == ["what music do you like ?"])
first, after = np.searchsorted(valid.turn_dialog, [dialog, dialog + 1])
said = [*valid.texts("history", after - 1), valid.texts("candidates", after - 1)[-1]]
pictures.dialog({"the bot": valid.texts("persona", dialog)}, said,
                [("somebody", "the bot")[place % 2] for place in range(len(said))])

# %% [markdown]
# On the right is the bot's side with its persona. The sentences are not recited; they show where they fit.
#
# In the data, each of the bot's turns comes with several *candidates*. The last one is the reply that was really
# given, the *gold* reply. The others are replies from other dialogs, the *distractors*.

# %%
turn = int(first)
candidates = valid.texts("candidates", turn)
say(f"Here we use {len(valid)} of the sample's {len(corpus['valid'])} validation dialogs. They have "
    f"{valid.num_turns} turns with {len(candidates)} candidates each. Some of those for "
    f"“{valid.texts('history', turn)[-1]}”:")
say("\n".join(f"- {text}" for text in [*candidates[-3:-1], f"{candidates[-1]} **← gold**"]))

# %% [markdown]
# ## One turn as parallel sequences
#
# A network reads numbers. The tokenizer cuts text into *tokens*, which are words or pieces of words, and each token
# has a number. The function `build_input_from_segments` makes one line of the whole turn: the persona, what was said,
# and the reply. *Control tokens* divide it. `<bos>` begins the line, `<speaker1>` stands before everything that the
# bot says, `<speaker2>` before everything that the other person says, and `<eos>` ends the reply.
#
# Two more sequences run parallel to the tokens. The *token types*, also called segments, name the speaker to whom
# each token belongs; the persona belongs to the bot. The *positions* count the tokens, because a network that looks
# at all tokens at once has no other notion of order.

# %%
persona, history = valid.token_ids("persona", dialog), valid.token_ids("history", turn)
gold = valid.token_ids("candidates", turn)[-1]
sequence = build_input_from_segments(persona, history, gold, tokenizer, lm_labels=True)
tokens = [tokenizer.decode([token]).strip() for token in sequence["input_ids"]]
types = ["bot" if kind == special.speaker1 else "other" for kind in sequence["token_type_ids"]]
learnt = ["–" if label == IGNORED else "learn" for label in sequence["lm_labels"]]
context = build_context(persona, history, special)
parts = [pictures.PERSONA if place <= sum(map(len, persona)) else
         pictures.USER if place < len(context.ids) else pictures.BOT for place in range(len(tokens))]
pictures.sequences(tokens, {"type": types, "position": range(len(tokens)), "label": learnt}, parts)

# %%
assert len(sequence["input_ids"]) == len(sequence["token_type_ids"]) == len(sequence["lm_labels"])
assert sum(map(len, persona)) + 1 + sum(len(utterance) + 1 for utterance in history) == len(context.ids)
assert learnt.count("learn") == len(gold) + 1 and learnt[-1] == "learn"
assert model.no_token_types
say(f"The persona is green, the question blue, the reply orange: {len(tokens)} tokens in all. The row of labels is "
    f"for training. The model learns to say only {learnt.count('learn')} of these tokens, the {len(gold)} of the "
    "reply and the `<eos>`, by which it learns to stop. It reads the others and is not asked to say them.")

# %% [markdown]
# One detail: the default bot was trained without token types (`train.py --no_token_types`), so that other programs
# can serve it. The control tokens alone tell this bot who speaks. A model that you train reads the token types, too,
# unless you give it the same flag.

# %% [markdown]
# ## All candidates in one row, and why that is exact
#
# The bot also learns to tell the gold reply from the distractors, so it has to read all candidates. The textbook way
# is one line per candidate, each with its own copy of the context, which is the persona and the history. This project
# writes the context once and all candidates behind it, one after the other. The *mask* keeps them from disturbing
# each other: it says which token may look at which.

# %%
data = TurnDataset.for_model(model, valid, tokenizer, num_candidates=4)
row = data[turn]
batch = collate([row], special.pad)
visible = candidate_mask(batch["segment_ids"])[0, 0].numpy()
pictures.mask(visible, row.segment_ids, ["context", "distractor A", "distractor B", "distractor C", "gold reply"])

# %% [markdown]
# Read the picture row by row. A token of the context looks at the context up to itself, and never ahead. This is what
# *causal* means, and every model of the GPT kind is causal. A token of a candidate looks at the context and at its
# own candidate up to itself. Everything else is empty: no candidate sees another one.
#
# So what the network computes for the context is the same whatever stands behind it, and once is enough. And nothing
# tells a candidate that it has company, not even its positions: they go on from the context's end, as if the
# candidate stood there alone. Packing is therefore exact, and no approximation. Let us check.

# %%
everything = TurnDataset.for_model(model, valid, tokenizer)
ids = valid.token_ids("candidates", turn)
with torch.inference_mode():
    packed = model(**collate([everything[turn]], special.pad)).mc_logits[0]
    alone = model(**collate([everything.pack(turn, [one]) for one in ids], special.pad)).mc_logits[:, 0]
difference = float((packed - alone).abs().max())
assert difference < 1e-3 < float(packed.std())
textbook = sum(len(context.ids) + len(one) + 2 for one in ids)
say(f"Between the two ways, the scores of the {len(ids)} candidates differ by at most {difference:.0e}. This is "
    f"rounding: the scores themselves have a standard deviation of {float(packed.std()):.1f}. The packed row has "
    f"{len(everything[turn].input_ids)} tokens, the textbook lines have {textbook} together.")

# %% [markdown]
# ## Two heads, two losses
#
# The network turns each token of the row into a *state*, a vector that holds what the model has read up to there. Two
# *heads* read the states, and they give the class its name, `DoubleHeadsModel` ([Wolf et al.
# 2019](https://arxiv.org/abs/1901.08149)).
#
# The **language-modelling head** says how likely each token of the vocabulary is to come next. Its loss is small
# where the gold tokens are likely: take the probability that the model gave to each gold token, then minus the
# logarithm of each, then the mean. Here is one reply, token by token.

# %%
with torch.inference_mode():
    out = model(**batch)
labels = [label for label in row.labels if label != IGNORED]
probabilities = out.logits.softmax(-1)[range(len(labels)), labels]
pictures.losses([tokenizer.decode([label]).strip() for label in labels], probabilities.tolist())

# %%
by_hand = -sum(math.log(probability) for probability in probabilities.tolist()) / len(labels)
assert math.isclose(by_hand, float(out.lm_loss), rel_tol=1e-3)
hardest = int(probabilities.argmin())
say(f"By hand: the mean of the {len(labels)} lower bars is **{by_hand:.4f}**. By the model: `out.lm_loss` is "
    f"**{float(out.lm_loss):.4f}**. The model was most surprised by "
    f"“{tokenizer.decode([labels[hardest]]).strip()}”, to which it gave a probability of "
    f"{float(probabilities[hardest]):.4f}.")

# %% [markdown]
# The **choice head** makes one number, a score, of the state at the last token of each candidate, which holds the
# whole candidate and the whole context. A *softmax* turns the scores into probabilities: take the exponential of each
# score, and divide by their sum. The loss is minus the logarithm of the gold reply's probability.
#
# The distractors of the data are mostly easy to tell. So we write our own. The first fits neither the question
# nor the persona, the second fits the question and ignores the persona, and the third contradicts the persona.

# %%
rivals = ["my dog does not like the rain .", "oh , a bit of everything , mostly blues . you ?",
          "everything , i work at a bakery . but mostly jazz . you ?", candidates[-1]]
with torch.inference_mode():
    choice = model(**collate([data.pack(turn, [tokenizer.encode(text) for text in rivals])], special.pad))
scores = choice.mc_logits[0].tolist()
exponentials = [math.exp(score) for score in scores]
chances = [one / sum(exponentials) for one in exponentials]
pictures.bars(rivals, chances, "probability of being the reply", [pictures.FAINT] * 3 + [pictures.BOT],
              [f"{chance:.2g}  (score {score:.1f})" for chance, score in zip(chances, scores, strict=True)])

# %%
assert math.isclose(-math.log(chances[-1]), float(choice.mc_loss), rel_tol=1e-3, abs_tol=1e-5)
say(f"By hand: minus the logarithm of the last bar is **{-math.log(chances[-1]):.2g}**. By the model: "
    f"`choice.mc_loss` is **{float(choice.mc_loss):.2g}**. Guessing among {len(scores)} candidates has a loss of "
    f"log {len(scores)}, which is {math.log(len(scores)):.4f}.")

# %% [markdown]
# Training makes the sum small, `lm_coef * lm_loss + mc_coef * mc_loss`. The first loss teaches the bot to talk, the
# second to notice what fits the persona and the dialog, and both shape the same network. With this pair of losses the
# authors won the automatic track of the competition ConvAI2.

# %% [markdown]
# ## Half a minute of training
#
# Now we go back to the bot's first day. `smollm2` is the model that the bot was made of. It was pretrained on general
# text, has never seen a persona or a control token, and its choice head is random. We show it a few batches of the
# sample and watch both losses. The code is that of `train.py` without its checkpoints and its validation.

# %%
import devices
import train
from schedule import AdamW
from tokenization import get_tokenizer
from weights import add_lora_, add_special_tokens_, load_model

BATCHES = 24
args = train.parse_args(["--model_checkpoint", "smollm2", "--dataset_path", str(small), "--lora", "8", "--lr", "8e-4",
                         "--max_history", "1", "--num_candidates", "2", "--train_batch_size", "4",
                         "--gradient_accumulation_steps", "1", "--epoch_batches", str(BATCHES), "--device", "cpu"])
torch.manual_seed(args.seed)
beginner, its_tokenizer = load_model(args.model_checkpoint), get_tokenizer(args.model_checkpoint)
add_special_tokens_(beginner, its_tokenizer)
train.note_training(beginner, table, args)
add_lora_(beginner, its_tokenizer, args.lora, args.model_checkpoint)

with devices.processes(args):
    loader, _ = train.get_dataflow(args, its_tokenizer, beginner, table)
    optimizer = AdamW(beginner.parameters(), args.lr)
    scaler = devices.loss_scaler(args.device, args.fp16)
    trainer = train.create_trainer(devices.prepare(beginner, args.device, args.fp16), optimizer, scaler, args)
    steps = []
    trainer.add_event_handler(train.Events.ITERATION_COMPLETED, lambda engine: steps.append(engine.state.output))
    trainer.run(loader, max_epochs=1)

# %%
course = {name: [float(step[name]) for step in steps] for name in ("lm_loss", "mc_loss")}
pictures.curves(course, "batches", {"choosing between two by chance": math.log(2)})

# %%
quarter = BATCHES // 4
began, ended = (float(np.mean(course["lm_loss"][part])) for part in (slice(quarter), slice(-quarter, None)))
assert ended < began
trained = sum(weight.numel() for weight in beginner.parameters() if weight.requires_grad)
share = trained / sum(weight.numel() for weight in beginner.parameters())
say(f"There were {BATCHES} batches of {args.train_batch_size} turns. In the last {quarter} of them the "
    f"language-modelling loss was {ended:.2f}, where it had been {began:.2f} in the first {quarter}. Only "
    f"{share:.1%} of the weights were trained: `--lora` freezes the network and learns small additions to it, so "
    "that a small machine is enough.")
del beginner, optimizer, trainer, loader

# %% [markdown]
# The language-modelling head soon learns how people write here, in lower case and with a space before the full stop,
# and when a reply is over. The choice takes longer, because its head began as a coin flip. The default bot learnt in
# the same way, from more dialogs and for longer; [its card](../models/persona/README.md) has the recipe.

# %% [markdown]
# ## What the figures say, and what they do not
#
# Three figures are usual, and they measure three different things. The command `convai_evaluation.py` prints all of
# them; here we call its functions.
#
# **hits@1** is about the choice head: how often is the gold reply its first choice among the candidates of a turn?

# %%
from metrics import choice_metrics, count_words, f1_score, gold_rank_by_words, intervals, perplexities, reply_metrics
from outputs import choice_scores, gold_likelihoods, replies

choices = [record for _, record in sorted(choice_scores(model, everything))]
texts = [valid.texts("candidates", number) for number in range(valid.num_turns)]
found = [gold_rank_by_words(record["scores"], of_turn) for record, of_turn in zip(choices, texts, strict=True)]
hits = {number: float(np.mean([gold_rank_by_words(record["scores"][-number:], of_turn[-number:]) == 1
                               for record, of_turn in zip(choices, texts, strict=True)])) for number in (2, 5, 10, 20)}
pictures.ranks(found, len(texts[0]), hits)

# %%
assert list(hits.values()) == sorted(hits.values(), reverse=True)
assert hits[20] == choice_metrics(choices, valid)["Hits@1"] > 2 / len(texts[0])
low, high = intervals({"hits@1": choices}, valid)["Hits@1"]
say(f"The bot's hits@1 is {hits[20]:.2f} here, and guessing has {1 / len(texts[0]):.2f}. *It says* how well the bot "
    "knows a fitting reply when it reads one. *It does not say* that the bot could have written it. It also "
    f"depends on the distractors: with {min(hits)} candidates it is {hits[min(hits)]:.2f}. And these are only "
    f"{valid.num_turns} turns. The confidence interval, from {low:.2f} to {high:.2f}, says how far the figure could "
    "be off by chance; an honest figure has one beside it.")

# %% [markdown]
# **Perplexity** is about the language-modelling head: the exponential of its loss over all gold replies. If it is N,
# the model was on average as unsure of the next token as somebody who guesses among N equally likely ones.

# %%
gold_only = TurnDataset.for_model(model, valid, tokenizer, num_candidates=1)
counts = count_words(table)
likelihoods = [record for _, record in sorted(gold_likelihoods(model, gold_only, tokenizer, counts))]
perplexity = perplexities(likelihoods)
nll, count = (sum(record[name] for record in likelihoods) for name in ("nll", "tokens"))
other = get_tokenizer("models/tiny")
other_count = sum(len(other.encode(of_turn[-1])) + 1 for of_turn in texts)
assert other_count > count and perplexity["Word PPL"] > 1 and perplexity["Token PPL"] > 1
pictures.bars(["per token, as the bot's tokenizer cuts", "per token, as another tokenizer would cut",
               "per word, as ConvAI2 counted"],
              [perplexity["Token PPL"], math.exp(nll / other_count), perplexity["Word PPL"]],
              "perplexity of the same replies", [pictures.USER, pictures.FAINT, pictures.BOT])

# %%
say(f"The bot's tokenizer cuts the replies into {count} tokens. That of `models/tiny` has a smaller vocabulary and "
    f"cuts them into {other_count}. If another model gave the replies the same probability as our bot, but counted "
    f"these tokens, its perplexity would be {math.exp(nll / other_count):.1f} instead of "
    f"{perplexity['Token PPL']:.1f}, and it would be no better. *It says* how well a model foresees what people "
    "say. *It does not say* which of two models is better if their tokenizers differ. ConvAI2 therefore counted "
    f"per word, which is fair to all: {perplexity['Word PPL']:.1f} here.")

# %% [markdown]
# **F1** is about what the bot writes. It compares the words of the bot's reply with those of the gold reply, whatever
# their order: the harmonic mean of precision, the share of the bot's words that are in the gold reply, and recall,
# the share of the gold reply's words that the bot found.

# %%
greedy = [record for _, record in sorted(replies(model, gold_only, tokenizer, Decoding(no_sample=True), 32))]
golds = [of_turn[-1] for of_turn in texts]
usual_words = " ".join([word for word, _ in counts.most_common(40) if word.isalpha() and word not in ("a", "the")][:8])
f1 = {"the bot": np.mean([f1_score(record["reply"], gold) for record, gold in zip(greedy, golds, strict=True)]),
      f"always “{usual_words}”": np.mean([f1_score(usual_words, gold) for gold in golds]),
      "a person, in another dialog": np.mean([f1_score(of_turn[0], of_turn[-1]) for of_turn in texts])}
pictures.bars(list(f1), list(f1.values()), "F1", [pictures.BOT, pictures.FAINT, pictures.USER])

# %%
bot_f1, words_f1, person_f1 = f1.values()
question, answer, witty = "are you afraid of the dark ?", "not at all , nothing scares me .", "darkness is my job ."
assert words_f1 > person_f1 and f1_score(witty, answer) == 0
say(f"The bot has {bot_f1:.2f}. The most frequent words, which are no reply at all, have {words_f1:.2f}, and what a "
    f"person said in another dialog has {person_f1:.2f}. *It says* how many words the bot shares with one reply "
    f"that was given. *It does not say* whether its own reply is good. Say the question is “{question}”, and the "
    f"gold reply “{answer}”. Then the reply “{witty}” has an F1 of {f1_score(witty, answer):.0f}.")

# %% [markdown]
# ## How a reply is chosen, word by word
#
# The network only says how likely each next token is. Choosing one, token after token until `<eos>`, is called
# *decoding*, and it makes a great difference to the bot.
#
# - **Greedy**: always take the likeliest token.
# - **Beams**: follow several beginnings at a time, and in the end take the reply that is likeliest as a whole.
# - **Sampling**: draw the token by its probability. Replies become lively and sometimes absurd, because each unlikely
#   token is unlikely, but together they are not.
# - **Top-k**: sample among a fixed number of the likeliest tokens.
# - **Nucleus**, or top-p ([Holtzman et al. 2020](https://arxiv.org/abs/1904.09751)): sample among the fewest
#   likeliest tokens that reach a given share of the probability.
#
# Look at two places of the same reply, its beginning and its middle.

# %%
places = {"at the beginning": [], "after “i work at a record”": tokenizer.encode("i work at a record")}
panels = {}
for name, beginning in places.items():
    start = build_reply(beginning, special, with_eos=False)
    line = {"input_ids": context.ids + start.ids, "token_type_ids": context.types + start.types}
    with torch.inference_mode():
        logits = model(**{key: torch.tensor([values]) for key, values in line.items()}, logits_to_keep=1).logits[0, -1]
    likely = logits.softmax(-1).topk(14)
    sizes = [int(top_filtering(logits, **way).isfinite().sum()) for way in ({"top_k": 5, "top_p": 0.0}, {"top_p": 0.9})]
    words = [tokenizer.decode([token]).strip() or "␣" for token in likely.indices]
    panels[name] = (words, likely.values.tolist(), *sizes)
pictures.next_tokens(panels)

# %%
(_, _, top_k, wide), (_, _, _, narrow) = panels.values()
assert narrow < wide
say(f"At the beginning, where many words would do, the nucleus has {wide} tokens. In the middle, where the persona "
    f"says what has to come, it has {narrow}. Top-k takes {top_k} in both places. That the number follows how sure "
    "the model is, this is the idea of the nucleus.")

# %% [markdown]
# Why not search for the likeliest reply, as beams do? Because people do not talk like that. Holtzman et al. showed it
# with a picture, and this is the same one for our own validation dialogs: how likely the model finds each token of
# what people said, and each token of what a beam search says.

# %%
torch.manual_seed(42)
turns = range(valid.num_turns)
contexts = [fitted_context(model, *gold_only.context(number), special, 20) for number in turns]
ways = {"greedy": Decoding(no_sample=True), "beams": Decoding(num_beams=5),
        "top-k": Decoding(temperature=1.0, top_k=20, top_p=0), "nucleus": Decoding(temperature=1.0, top_p=0.9),
        "no filter": Decoding(temperature=1.0, top_p=0)}
written = {name: generate_replies(model, contexts, special, way) for name, way in ways.items()}


@torch.inference_mode()
def token_probabilities(replies_: list[list[int]]) -> list[list[float]]:
    """Return the probability of each token of a reply, for each of the turns."""
    probabilities = []
    for start in range(0, len(replies_), 8):
        rows = [gold_only.pack(number, [reply]) for number, reply in enumerate(replies_[start:start + 8], start)]
        labels = [[label for label in row.labels if label != IGNORED] for row in rows]
        out = model(**collate(rows, special.pad))
        flat = out.logits.softmax(-1)[range(len(out.logits)), sum(labels, [])]
        probabilities += [part.tolist()[:-1] for part in flat.split([len(of_row) for of_row in labels])]
    return probabilities


human = token_probabilities([valid.token_ids("candidates", number)[-1][:20] for number in turns])
beams = token_probabilities(written["beams"])
pictures.positions({"what people said": human, "what the beams say": beams})

# %%
mean_human, mean_beams = (float(np.mean(sum(kind, []))) for kind in (human, beams))
assert mean_beams > mean_human
say("The lines are means, the shades the middle half of the replies. The tokens of the beams have a probability of "
    f"{mean_beams:.2f} on average, those of people {mean_human:.2f}. People do not say the likeliest thing; if they "
    "did, they would tell each other nothing new. A search finds text that is *more* probable than what people "
    "say, and duller.")

# %%
looks = {name: reply_metrics([{"reply": readable(tokenizer, reply)} for reply in of_way], valid, model.max_history)
         for name, of_way in written.items()}
looks["people"] = reply_metrics([{"reply": gold} for gold in golds], valid, model.max_history)
kinds = {"Words per reply": "words per reply", "Distinct-2": "different pairs of words", "Copied": "copied replies"}
pictures.compare({name: {title: of[kind] for kind, title in kinds.items()} for name, of in looks.items()}, "people")

# %%
likeliest, nucleus, boldest, people = (looks[name] for name in ("beams", "nucleus", "no filter", "people"))
assert boldest["Distinct-2"] > likeliest["Distinct-2"]
say(f"Beams write {likeliest['Words per reply']:.1f} words per reply, and people {people['Words per reply']:.1f}. Of "
    f"all pairs of neighbouring words, {likeliest['Distinct-2']:.0%} are different ones in the replies of the "
    f"beams, {boldest['Distinct-2']:.0%} in those of sampling without a filter, and {people['Distinct-2']:.0%} in "
    f"those of people: beams repeat themselves from reply to reply. {likeliest['Copied']:.0%} of their replies "
    f"stand word for word in the persona or the history. And F1 is {likeliest['F1']:.2f} for beams, "
    f"{nucleus['F1']:.2f} for the nucleus, {boldest['F1']:.2f} without a filter.")

# %% [markdown]
# A nucleus with a moderate temperature lies between dull and absurd. That is why it is this project's default. No
# decoder is the best for everything: a competition that counts F1 asks for another one than a chat does.

# %% [markdown]
# ## The bot in your shoes
#
# Here is all that it takes to reply, from texts to a text. The chat program does no more.

# %%
def answer_as(persona: list[str], said: list[str], decoding: Decoding) -> str:
    """Reply to what was said as a person with this persona."""
    history = [tokenizer.encode(text) for text in said]
    context = fitted_context(model, tokenizer.encode_persona(persona), history, special, decoding.max_length)
    return readable(tokenizer, generate_replies(model, [context], special, decoding)[0])


torch.manual_seed(7)
bot = ["i am a baker .", "i have two dogs .", "i love rainy days ."]
you = ["i study music .", "i am afraid of dogs .", "i live in a small town ."]
chat = ["hello ! do you have any pets ?"]
for number in range(5):
    chat.append(answer_as(you if number % 2 else bot, chat, Decoding()))
pictures.dialog({"you": you, "the bot": bot}, chat, [("you", "the bot")[place % 2] for place in range(len(chat))])

# %% [markdown]
# A person wrote the first line, and the model all others, on both sides. It can do so because roles are counted back
# from the reply: whoever has to speak next is `<speaker1>`, and the persona in front is theirs. Give the model *your*
# persona, and it says what you might say next. The web page (`make web`) suggests your next line in this way.
#
# Change `bot`, `you` and the first line, and run the cell again: now you have talked to it. With less code it is
# `python interact.py --model_checkpoint persona`.

# %% [markdown]
# ## What people prefer
#
# All training so far imitates. With the same loss the choice head can learn something else: not which reply was
# given, but which of two replies people *prefer*. The folder `feedback` does this properly; here is the idea on a
# small scale.
#
# We let the bot reply twice to the same contexts. Then somebody has to choose. Nobody is at hand, so we take the
# simulated annotator of `feedback`, who prefers long replies, and questions even more.

# %%
from feedback.annotate import by_rule
from feedback.reward import pack_texts, raw_scores

torch.manual_seed(3)
pairs = []
asked = random.Random(3).sample(list(turns), 16)
twice = generate_replies(model, [contexts[number] for number in asked], special, Decoding(temperature=1.0), samples=2)
for place, number in enumerate(asked):
    both = [readable(tokenizer, reply) for reply in twice[2 * place:2 * place + 2]]
    choice = by_rule({"replies": [{"text": text} for text in both]}, random.Random(0), noise=0)
    if choice != "tie":
        pairs.append((valid.texts("persona", valid.turn_dialog[number]), valid.texts("history", number)[-1:],
                      [both[1 - choice], both[choice]]))  # the better one last, where a gold reply stands
say("\n".join(f"- “{pair[1][-1]}” ✗ {pair[2][0]} **✓ {pair[2][1]}**" for pair in pairs[:3]))

# %% [markdown]
# The score that the head gives a reply is now called its *reward*. In the model of Bradley and Terry, the probability
# that one reply is preferred to another is the softmax over both rewards. This is the choice loss between two
# candidates, so the trainer of `train.py` trains it as it is.

# %%
def chances_of_the_better(turns_: list[tuple]) -> list[float]:
    """Return the probability of each choice by the model of Bradley and Terry."""
    return [1 / (1 + math.exp(worse - better)) for worse, better in raw_scores(model, tokenizer, turns_)]


before = chances_of_the_better(pairs)
with torch.inference_mode():
    loss = float(model(**collate([pack_texts(*pairs[0], tokenizer, model)], special.pad)).mc_loss)
assert math.isclose(-math.log(before[0]), loss, rel_tol=1e-2, abs_tol=1e-4)

args = train.parse_args(["--lora", "8", "--lm_coef", "0", "--lr", "5e-4", "--gradient_accumulation_steps", "1",
                         "--device", "cpu"])
add_lora_(model, tokenizer, args.lora, "persona")
torch.manual_seed(args.seed)
rows = [pack_texts(*pair, tokenizer, model) for pair in pairs]
with devices.processes(args):
    optimizer = AdamW(model.parameters(), args.lr)
    scaler = devices.loss_scaler(args.device, args.fp16)
    trainer = train.create_trainer(devices.prepare(model, args.device, args.fp16), optimizer, scaler, args)
    trainer.run(torch.utils.data.DataLoader(rows, 4, collate_fn=partial(collate, pad=special.pad)), max_epochs=3)
model.eval()
after_training = chances_of_the_better(pairs)
pictures.preferences(before, after_training)

# %%
loss_before, loss_after = (-float(np.mean(np.log(chances_))) for chances_ in (before, after_training))
assert loss_after < loss_before
say(f"Before the training the reward agreed with {sum(chance > 0.5 for chance in before)} of the {len(pairs)} "
    f"choices, after it with {sum(chance > 0.5 for chance in after_training)}, and the loss fell from "
    f"{loss_before:.2f} to {loss_after:.2f}. These are the pairs that it has learnt from. Whether it agrees with "
    "the annotator on others is the question that counts; to answer it, `feedback.reward` keeps some dialogs apart.")

# %% [markdown]
# The next step is to train the bot itself so that it earns a higher reward, with PPO or RLOO, or to learn from the
# choices without a reward model, with DPO. [feedback/README.md](../feedback/README.md) explains how.

# %% [markdown]
# ## Where to go on
#
# - **Talk to it**: `make web` opens the web page, `python interact.py --model_checkpoint persona` a chat in the
#   terminal.
# - **Bring your own dialogs**: [the README](../README.md) has the commands that convert, check, train and talk.
# - **Read the code**: begin with `train.py`, which is a page, and go on with `inputs.py`, where turns become rows.
#   [architecture.md](architecture.md) draws how the parts hang together.
# - **See what was measured** in [results.md](results.md), and what failed in [lab-log.md](lab-log.md).
#
# ## Exercises
#
# Each answer fits on half a screen. Ours are in [solutions.py](solutions.py), and the test suite runs them. Try
# first.
#
# - **Another decoder.** *Min-p* samples among the tokens that are at least a given share as likely as the likeliest
#   one. Write a function that decodes a reply in this way. You need `sequences_for`, which gives the logits step by
#   step, `allowed_scores` and `choose_tokens`.
# - **Your own persona file.** Write a file with one sentence per line, and a function that puts a question to the
#   person whom it describes. `read_persona` reads such a file, and `answer_as` above shows the rest. In the
#   terminal it is `interact.py --personality FILE`.
# - **A metric of your own.** How often does a reply use a word of the persona that nobody has said before? Write it
#   as `metrics.py` writes its own: records with a `reply` each and the split go in, a number comes out.
# - **One more corpus reader.** A chat program saves lines like `[21:04] <anna> hi !`, with an empty line between
#   dialogs. Write a reader that yields a `Dialog` for each, enter it in `FORMATS`, and let `get_dataset` read such a
#   file.
