"""Write a run as other software opens it: an ordinary transformers folder with a chat template, or a GGUF file.

    python export.py runs/<your run> FOLDER [--gguf f16]

The template renders messages, the system message being the persona with a sentence per line, to the very tokens that
the run was trained on, so that a server that knows nothing of this project gives the same replies.
"""

import json
import logging
from argparse import ArgumentParser
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import GenerationConfig

from cli import InputError, command
from decoding import Decoding, load_checkpoint
from inputs import Specials
from model import HEADS, save_model
from tables import write_tensors
from utils import SPECIAL_TOKENS, get_tokenizer

# The sentences of a persona stand behind a space (of GPT-2, as in 2019, behind nothing), utterances directly behind the
# token of their speaker: see `inputs.build_context` and the tokenizer's `encode_persona`.
TEMPLATE = (
    "{{- '<bos>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- for line in message['content'].split('\\n') -%}"
    "{%- if line | trim -%}{{- 'SPACE' + (line | trim) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<speaker1>' + (message['content'] | trim) -}}"
    "{%- else -%}{{- '<speaker2>' + (message['content'] | trim) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<speaker1>' -}}{%- endif -%}"
)
FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}  # which GGUF files are written for
TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0}

logger = logging.getLogger("export")


def export(run: str, folder: Path) -> None:
    """Write the run's model, merged, its tokenizer, a generation config, a model card and a ``Modelfile``.

    Raises `InputError` for a run that was trained with what servers lack: GPT-1's way to split words, token types, or
    a history that begins at a fixed position.
    """
    model, tokenizer = load_checkpoint(run)
    if model.config.model_type == "openai-gpt":
        raise InputError(f"{run}: is a GPT-1, whose words are split by spaCy, which other software does not do; train "
                         "another decoder, gpt2 or smollm2 for example")
    if not model.no_token_types:
        raise InputError(f"{run}: was trained with token types, which other software lacks; train it with "
                         "--no_token_types")
    if model.history_start:
        raise InputError(f"{run}: was trained with --history_first, whose positions other software cannot give")
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    (folder / HEADS).unlink(missing_ok=True)  # other software has no place for the choice head
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if model.config.model_type == "gpt2":
        weights = load_file(folder / "model.safetensors")
        write_tensors({name: tensor for name, tensor in weights.items() if not name.startswith("multiple_choice_head")},
                      folder / "model.safetensors", {"format": "pt"})
        config["architectures"] = ["GPT2LMHeadModel"]
    special = Specials.of(tokenizer)
    config |= {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(tokenizer, folder)
    options = Decoding()
    GenerationConfig(
        bos_token_id=special.bos, pad_token_id=special.pad, eos_token_id=[special.eos, special.speaker1,
                                                                          special.speaker2, special.bos, special.pad],
        min_new_tokens=1, max_new_tokens=options.max_length, do_sample=True, temperature=options.temperature,
        top_p=options.top_p, top_k=0,
    ).save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(name=folder.name, persona="i have two dogs ."), "utf-8")
    (folder / "Modelfile").write_text(modelfile("."), "utf-8")


def _write_tokenizer(tokenizer, folder: Path) -> None:
    """The tokenizer as plain transformers loads it, with the chat template; here control tokens in a text are those."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    behind_a_space = tokenizer.encode_persona(["a"]) != tokenizer(["a"])["input_ids"]
    tokenizer.chat_template = TEMPLATE.replace("SPACE", " " if behind_a_space else "")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"split_special_tokens": False, "add_bos_token": False}
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def modelfile(source: str) -> str:
    """What ``ollama create`` reads: where the weights are, the prompt, the stops and the decoding options."""
    options = Decoding()
    stops = "\n".join(f'PARAMETER stop "{token}"' for token in SPECIAL_TOKENS)
    return f'''FROM {source}
TEMPLATE """<bos>{{{{- if .System }}}} {{{{ .System }}}}{{{{- end }}}}
{{{{- range .Messages }}}}
{{{{- if eq .Role "user" }}}}<speaker2>{{{{ .Content }}}}
{{{{- else if eq .Role "assistant" }}}}<speaker1>{{{{ .Content }}}}
{{{{- end }}}}
{{{{- end }}}}<speaker1>"""
{stops}
PARAMETER temperature {options.temperature}
PARAMETER top_p {options.top_p}
PARAMETER top_k 0
PARAMETER num_predict {options.max_length}
'''


def write_gguf(folder: Path, kind: str) -> Path:
    """The exported ``folder`` as one GGUF file, its matrices of type ``kind`` of `TYPES`; vectors stay float32.

    Raises `InputError` for families that `FAMILIES` lacks.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = config["model_type"]
    if family not in FAMILIES:
        raise InputError(f"--gguf: is written for {' and '.join(FAMILIES)} models, and this is '{family}'; the folder "
                         "without --gguf holds the same model")
    architecture, path = FAMILIES[family], folder / f"{folder.name}-{kind}.gguf"
    file = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    layers = _write_shape(file, family, config)
    _write_vocabulary(file, folder, config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise InputError(f"--gguf: the format has no place for {name}")
        values = _as_stored(name, tensor.float().numpy(), family, config)
        wanted = TYPES[kind] if values.ndim > 1 and values.shape[-1] % 32 == 0 else TYPES["f32"]
        file.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(values), wanted), raw_dtype=wanted)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    (folder / "Modelfile").write_text(modelfile(f"./{path.name}"), "utf-8")
    return path


def _write_shape(file: gguf.GGUFWriter, family: str, config: dict) -> int:
    """The sizes of the network; returns the number of layers."""
    def add(context: int, width: int, layers: int, inner: int, heads: int) -> int:
        file.add_context_length(context)
        file.add_embedding_length(width)
        file.add_block_count(layers)
        file.add_feed_forward_length(inner)
        file.add_head_count(heads)
        return layers

    if family == "gpt2":
        file.add_layer_norm_eps(config["layer_norm_epsilon"])
        return add(config["n_positions"], config["n_embd"], config["n_layer"],
                   config.get("n_inner") or 4 * config["n_embd"], config["n_head"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_rope_dimension_count(size)
    file.add_key_length(size)
    file.add_value_length(size)
    file.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    file.add_vocab_size(config["vocab_size"])
    return add(config["max_position_embeddings"], config["hidden_size"], config["num_hidden_layers"],
               config["intermediate_size"], config["num_attention_heads"])


def _write_vocabulary(file: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Tokens, merges, control tokens and the chat template."""
    tokenizer = get_tokenizer(str(folder))
    spelt, special = {number: token for token, number in tokenizer.get_vocab().items()}, Specials.of(tokenizer)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise InputError(f"--gguf: is written for byte-level BPE, and this tokenizer is {model['type']}")
    control = set(tokenizer.all_special_ids)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    file.add_tokenizer_model("gpt2")
    # Both split words alike but for digits; SmolLM's merges have no pair of digits.
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([spelt.get(number, f"<unused{number}>") for number in range(size)])
    file.add_token_types([gguf.TokenType.UNUSED if number not in spelt else gguf.TokenType.CONTROL
                          if number in control else gguf.TokenType.NORMAL for number in range(size)])
    file.add_token_merges(merges)
    file.add_bos_token_id(special.bos)
    file.add_eos_token_id(special.eos)
    file.add_pad_token_id(special.pad)
    file.add_add_bos_token(False)  # the template has it
    file.add_chat_template(tokenizer.chat_template)


def _as_stored(name: str, values: np.ndarray, family: str, config: dict) -> np.ndarray:
    """A weight in GGUF's order: (out, in), and of Llama's queries and keys the halves of each rotation interleaved."""
    if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return values


CARD = """---
pipeline_tag: text-generation
tags: [persona-chat, dialogue]
---
# {name}

A persona-grounded dialogue model, trained with TransferTransfo (after Wolf et al. 2019, https://arxiv.org/abs/1901.08149)
and exported as an ordinary model of its architecture. Data, figures and licence are those of the run that it came from.

The system message is the persona, a sentence per line, in the spelling of the training data ("{persona}"). The chat
template renders a conversation as it was in training: `<bos> persona <speaker2>user<speaker1>bot…<speaker1>`. Any
control token ends a reply. Text of users that spells a control token is read as one, so do not let it through.

    from transformers import pipeline
    bot = pipeline("text-generation", "FOLDER")
    print(bot([{{"role": "system", "content": "{persona}"}}, {{"role": "user", "content": "any pets ?"}}],
              return_full_text=False))

Ollama: `ollama create {name} -f Modelfile`.
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="a run folder, or another checkpoint that was trained here")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    parser.add_argument("--gguf", choices=TYPES, help="write a GGUF file beside it, with matrices of this type")
    args = parser.parse_args()
    try:
        export(args.run, args.folder)
        if args.gguf:
            logger.info("Wrote %s", write_gguf(args.folder, args.gguf))
    except OSError as error:
        raise InputError(f"{args.folder}: cannot be written ({error.strerror or error})") from None
    logger.info("Wrote %s", args.folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
