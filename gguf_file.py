"""Convert an exported folder to a GGUF file for llama.cpp and Ollama; for Llama and GPT-2 models.

The input is an ordinary transformers folder without a choice head, as export.py writes it.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from cli import InputError
from files import replacing
from inputs import Specials
from tokenization import get_tokenizer

FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}  # the supported model families
TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
              "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
# Settings that all readers of the format assume; they ignore the model's configuration here.
FIXED: dict[str, dict[str, tuple]] = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,)},
    "llama": {"hidden_act": ("silu",)}}
# The readers' names for the rules that split a text into words before BPE merges.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
SPLITS = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
}


def write_gguf(folder: Path, path: Path, kind: str, sampling: dict[str, float]) -> None:
    """Write the exported ``folder`` as the GGUF file ``path``.

    ``kind``: the type of the matrices, one of `TYPES`; vectors stay float32. ``sampling``: options such as "temp" and
    "top_p", which become the readers' defaults. Raises `InputError` for models that the format cannot express: a family
    outside `FAMILIES`, a tokenizer outside `SPLITS`, or scaled rotations.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = config["model_type"]
    if family not in FAMILIES:
        raise InputError(f"--gguf: supports {' and '.join(FAMILIES)} models, and this is '{family}'; the folder "
                         "without --gguf holds the same model")
    for name, known in FIXED[family].items():
        if config.get(name, known[0]) not in known:
            raise InputError(f"--gguf: the format's readers compute {name} {known[0]}, and this model has "
                             f"{config[name]}; the folder without --gguf holds the same model")
    with replacing(path) as unfinished:
        file = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[FAMILIES[family]])
        layers = _write_shape(file, family, config)
        _write_vocabulary(file, folder, config["vocab_size"])
        file.add_file_type(FILE_TYPES[kind])
        for name, value in sampling.items():
            getattr(file, f"add_sampling_{name}")(value)
        names = gguf.get_tensor_name_map(FAMILIES[family], layers)
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


def _write_shape(file: gguf.GGUFWriter, family: str, config: dict) -> int:
    """Write the sizes of the network, and return the number of layers."""
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
    rotations = config.get("rope_parameters") or config
    scaling = (config.get("rope_scaling") or rotations).get("rope_type", "default")
    if scaling != "default":
        raise InputError(f"--gguf: does not support models with scaled rotations ({scaling}); the folder "
                         "without --gguf holds the same model")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    file.add_rope_dimension_count(size)
    file.add_key_length(size)
    file.add_value_length(size)
    file.add_rope_freq_base(rotations.get("rope_theta", 10000.0))
    file.add_vocab_size(config["vocab_size"])
    return add(config["max_position_embeddings"], config["hidden_size"], config["num_hidden_layers"],
               config["intermediate_size"], config["num_attention_heads"])


def _write_vocabulary(file: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Write tokens, merges, control tokens and the chat template.

    Readers end a reply at three tokens: the end of the sequence, the end of a turn and the end of a message. These are
    <eos> and the two speakers' tokens, with which our models end a reply.
    """
    tokenizer = get_tokenizer(str(folder))
    spelt, special = {number: token for token, number in tokenizer.get_vocab().items()}, Specials.of(tokenizer)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    model = settings["model"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(_split_name(settings))
    file.add_token_list([spelt.get(number, f"<unused{number}>") for number in range(size)])
    file.add_token_types([gguf.TokenType.UNUSED if number not in spelt else gguf.TokenType.CONTROL
                          if number in control else gguf.TokenType.NORMAL for number in range(size)])
    file.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    file.add_bos_token_id(special.bos)
    file.add_eos_token_id(special.eos)
    file.add_eot_token_id(special.speaker2)
    file.add_eom_token_id(special.speaker1)
    file.add_pad_token_id(special.pad)
    file.add_add_bos_token(False)  # the template writes it
    file.add_add_space_prefix(False)
    file.add_chat_template(tokenizer.chat_template)


def _split_name(settings: dict) -> str:
    """Return the readers' name for how a tokenizer, given as JSON, splits words. Raises `InputError` if none fits."""
    before = settings["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    for name, known in SPLITS.items():
        if len(parts) == len(known) and all(part | wanted == part for part, wanted in zip(parts, known, strict=True)):
            if settings["model"]["type"] == "BPE" and not settings["normalizer"]:
                return name
    raise InputError("--gguf: supports byte-level BPE that splits words as GPT-2, SmolLM or Llama 3 do, and this "
                     "tokenizer does not; the folder without --gguf holds the same model")


def _as_stored(name: str, values: np.ndarray, family: str, config: dict) -> np.ndarray:
    """Reorder a weight for GGUF: (out, in); the halves of each rotation of Llama's queries and keys interleave."""
    if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if family == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        heads = config["num_attention_heads"]
        heads = heads if "q_proj" in name else config.get("num_key_value_heads") or heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values
