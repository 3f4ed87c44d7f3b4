"""Write the texts of an exported model: chat template, Ollama's ``Modelfile`` and model card."""

import json
from pathlib import Path

from decoding import Decoding
from files import ARGUMENTS, METRICS
from model import DoubleHeadsModel
from pretrained import NAMED, adapter_base, resolve_checkpoint
from releases import ABOUT
from tokenization import SPECIAL_TOKENS, Tokenizer

# Renders messages to the same tokens as in training, see `inputs.build_context`: the persona's sentences, each after a
# space (for GPT-2 without one, as in 2019), then the last utterances, each after its speaker's token. Consecutive
# messages of one side are merged. A finished conversation ends with <eos>. Control tokens in a text get a space.
TEMPLATE = """
{{- '<bos>' }}
{%- set its = namespace(said=[], speaker='', role='', text='') %}
{%- for message in messages %}
    {%- set its.text = '' %}
    {%- if message['content'] is string %}
        {%- set its.text = message['content'] %}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{%- set its.text = its.text + part['text'] %}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- for token in CONTROL %}
        {%- set its.text = its.text | replace(token, token[:1] + ' ' + token[1:]) %}
    {%- endfor %}
    {%- if message['role'] in ['system', 'developer'] %}
        {%- for line in its.text.split('\\n') %}
            {%- if line | trim and PERSONA %}{{- 'BETWEEN' + (line | trim) }}{%- endif %}
        {%- endfor %}
    {%- else %}
        {%- set its.role = 'assistant' if message['role'] == 'assistant' else 'user' %}
        {%- if its.role == its.speaker %}
            {%- set its.said = its.said[:-1] + [(its.said[-1] + ' ' + its.text) | trim] %}
        {%- else %}
            {%- set its.said = its.said + [its.text | trim] %}
        {%- endif %}
        {%- set its.speaker = its.role %}
    {%- endif %}
{%- endfor %}
{%- set most = UTTERANCES if add_generation_prompt else UTTERANCES + 1 %}
{%- for text in its.said[-most:] %}
    {%- set bot = (loop.revindex % 2 == 1) == (its.speaker == 'assistant') %}
    {{- ('<speaker1>' if bot else '<speaker2>') + text }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<speaker1>' }}
{%- elif its.speaker == 'assistant' %}{{- '<eos>' }}
{%- endif %}
""".strip()

MARK = "# Written by TransferTransfo's export.py."  # a Modelfile that begins so marks a folder to overwrite


def model_name(folder: Path) -> str:
    """Return the name of the model's folder, which is the model's name."""
    return folder.resolve().name


def make_chat_template(model: DoubleHeadsModel, tokenizer: Tokenizer, between: str) -> str:
    """Fill in `TEMPLATE` for a model; ``between`` is the text between persona sentences."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    values = {"CONTROL": json.dumps(control, ensure_ascii=False), "UTTERANCES": str(2 * model.max_history + 1),
              "PERSONA": "false" if model.no_persona else "true", "BETWEEN": between}
    text = TEMPLATE
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def modelfile(source: str, between: str) -> str:
    """Return the text that ``ollama create`` reads: the weights' place, prompt, stop tokens and decoding options.

    Ollama's templates cannot split a text into lines, so the persona must be a single line.
    """
    options = Decoding()
    stops = "\n".join(f'PARAMETER stop "{token}"' for token in SPECIAL_TOKENS)
    return f'''{MARK} The system message is the persona, on a single line.
FROM {source}
TEMPLATE """<bos>{{{{- if .System }}}}{between}{{{{ .System }}}}{{{{- end }}}}
{{{{- range .Messages }}}}
{{{{- if eq .Role "user" }}}}<speaker2>{{{{ .Content }}}}
{{{{- else if eq .Role "assistant" }}}}<speaker1>{{{{ .Content }}}}
{{{{- end }}}}
{{{{- end }}}}<speaker1>"""
{stops}
PARAMETER temperature {options.temperature}
PARAMETER top_p {options.top_p}
PARAMETER top_k 0
PARAMETER repeat_penalty 1
PARAMETER num_predict {options.max_length}
'''


def model_card(run: str, folder: Path, licence: str, model: DoubleHeadsModel) -> str:
    """Return the model card: base model, data, licence and metrics from the run folder, and how to use the model."""
    place = Path(resolve_checkpoint(run))

    def read(name: str):
        try:
            return json.loads((place / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    args, figures = read(ARGUMENTS) or {}, read(METRICS) or []
    base = args.get("model_checkpoint") or adapter_base(str(place))
    facts = [f"Base: {Path(base).name}." if base else "", f"Data: {_data(args)}." if args else ""]
    facts += [f"Licence: {licence}." if licence else
              "Licence: not stated; the licences of the base model and of the data apply."]
    table = ["\n## Figures\n", "Measured on the validation split after each epoch of training.\n",
             f"| {' | '.join(figures[0])} |", "|---" * len(figures[0]) + "|"] if figures else []
    table += [f"| {' | '.join(f'{value:.4g}' if value is not None else '' for value in row.values())} |"
              for row in figures] + [""] * bool(figures)
    metadata = ["pipeline_tag: text-generation", "library_name: transformers", "tags: [persona-chat, dialogue]"]
    metadata += [f"license: {licence}"] if licence else []
    metadata += [f"base_model: {base}"] if base and base not in NAMED and base.count("/") == 1 else []
    return CARD.format(
        metadata="\n".join(metadata), name=model_name(folder), persona="i have two dogs .",
        facts="\n".join(filter(None, facts)), table="\n".join(table), utterances=2 * model.max_history + 1)


def _data(args: dict) -> str:
    """Describe the training data, with licences if known."""
    names = [name for name in (args.get("dataset") or "").split(",") if name in ABOUT]
    if not names and args.get("dataset_path"):
        return Path(args["dataset_path"]).name
    return "; ".join(f"{name}, {ABOUT[name].size} ({ABOUT[name].licence})" for name in names or ["personachat"])


CARD = """---
{metadata}
---
# {name}

A persona-grounded dialogue model, trained with TransferTransfo (after Wolf et al. 2019, https://arxiv.org/abs/1901.08149)
and exported as an ordinary model of its architecture.

{facts}
{table}
## Use

The system message is the persona, a sentence per line, in the spelling of the training data ("{persona}"). The chat
template renders the last {utterances} utterances as they were in training:
`<bos> persona <speaker2>user<speaker1>bot…<speaker1>`. Control tokens end a reply; if a text contains one, a space is
inserted.

    from transformers import pipeline
    bot = pipeline("text-generation", "FOLDER")
    print(bot([{{"role": "system", "content": "{persona}"}}, {{"role": "user", "content": "any pets ?"}}],
              return_full_text=False))

A GGUF file runs in llama.cpp (`llama-server -m FILE.gguf --jinja`) and, after `ollama create {name} -f Modelfile`, in
Ollama, where the persona must be on one line.

This is a small model for conversation: its statements about the world, or about itself, need not be true.
"""
