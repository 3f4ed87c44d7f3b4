"""Export a run for other software: an ordinary transformers folder with a chat template, and GGUF files.

    python export.py runs/<your run> FOLDER [--gguf f16] [--push_to_hub NAME]

The template renders messages to exactly the tokens of training, so that other servers give the same replies. The system
message is the persona, one sentence per line.
"""

import json
import logging
from argparse import ArgumentParser
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file
from transformers import GenerationConfig

from cards import MARK, make_chat_template, model_card, model_name, modelfile
from cli import InputError, command, short
from decoding import Decoding, load_checkpoint
from files import write_tensors
from gguf_file import TYPES, write_gguf
from inputs import Specials
from tokenization import Tokenizer
from weights import HEADS, save_model

logger = logging.getLogger("export")


def export(run: str, folder: Path, licence: str = "") -> None:
    """Write the run's model, merged, its tokenizer, a generation config, a model card and a ``Modelfile``.

    ``licence``: the model's licence for its card, such as apache-2.0. Raises `InputError` if the run needs what
    servers lack (GPT-1's word splitting, token types, or a history at a fixed position), or if the folder contains
    other files.
    """
    model, tokenizer = load_checkpoint(run)
    if model.config.model_type == "openai-gpt":
        raise InputError(f"{run}: is a GPT-1, which needs spaCy to split words, and other software has none; train "
                         "another decoder, for example gpt2 or smollm2")
    if not model.no_token_types:
        raise InputError(f"{run}: was trained with token types, which other software lacks; train it with "
                         "--no_token_types")
    if model.history_start:
        raise InputError(f"{run}: was trained with --history_first, and other software lacks its positions; train it "
                         "without")
    _make_room(folder)
    save_model(model, folder)
    (folder / HEADS).unlink(missing_ok=True)  # other software has no place for the choice head
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if model.config.model_type == "gpt2":
        weights = load_file(folder / "model.safetensors")
        write_tensors({name: tensor for name, tensor in weights.items() if not name.startswith("multiple_choice_head")},
                      folder / "model.safetensors", {"format": "pt"})
        config["architectures"] = ["GPT2LMHeadModel"]
    special = Specials.of(tokenizer)
    config.pop("trained_on", None)  # it names a file on this machine
    config |= {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    between = " " if tokenizer.encode_persona(["a"]) != tokenizer(["a"])["input_ids"] else ""
    _write_tokenizer(tokenizer, make_chat_template(model, tokenizer, between), folder)
    options = Decoding()
    GenerationConfig(
        bos_token_id=special.bos, pad_token_id=special.pad, eos_token_id=[special.eos, special.speaker1,
                                                                          special.speaker2, special.bos, special.pad],
        min_new_tokens=1, max_new_tokens=options.max_length, do_sample=True, temperature=options.temperature,
        top_p=options.top_p, top_k=0,
    ).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(run, folder, licence, model), "utf-8")
    (folder / "Modelfile").write_text(modelfile(".", between), "utf-8")


def _make_room(folder: Path) -> None:
    """Create the folder, or reuse one that export.py has written, without its old GGUF files.

    Raises `InputError` if the folder contains anything else.
    """
    notes = folder / "Modelfile"
    if folder.is_dir() and any(folder.iterdir()):
        if not (notes.is_file() and notes.read_text("utf-8", "replace").startswith(MARK)):
            raise InputError(f"{folder}: is not empty, and export.py has not written it; name a new folder")
        for old in folder.glob("*.gguf"):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    notes.write_text(MARK + "\n")  # so that an interrupted export can be repeated


def _write_tokenizer(tokenizer: Tokenizer, chat_template: str, folder: Path) -> None:
    """Write the tokenizer for plain transformers, with the chat template; it reads control tokens in texts as such."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"split_special_tokens": False, "add_bos_token": False}
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder's files to the hub as the model ``name``, which is created if necessary; return its address.

    The token comes from ``HF_TOKEN`` or ``hf auth login``. Raises `InputError` if there is no token, if it does not
    allow writing there, or if the hub cannot be reached.
    """
    flag, hub = f"--push_to_hub {name}", constants.ENDPOINT
    kept = f"the files are in {folder}"
    if not get_token():
        raise InputError(f"{flag}: no token for {hub}; run `hf auth login` or set HF_TOKEN ({kept})")
    api = HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export from TransferTransfo",
                          ignore_patterns=["*.unfinished"])
    except HFValidationError as error:
        raise InputError(f"{flag}: is not a name for a model ({short(str(error))}); write USER/NAME") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{flag}: HF_HUB_OFFLINE forbids connecting to {hub}; unset it ({kept})") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(f"{flag}: the token may not write there ({error.response.status_code}); use one with the "
                             f"right to write, and your own user name ({kept})") from None
        raise InputError(f"{flag}: {hub} refused ({short(str(error))}); try again ({kept})") from None
    except (HTTPError, OSError) as error:
        raise InputError(f"{flag}: {hub} cannot be reached ({short(str(error))}); check the network ({kept})") from None
    except (ValueError, RuntimeError) as error:  # errors of the library's upload
        raise InputError(f"{flag}: {hub} did not take the files ({short(str(error))}); try again ({kept})") from None
    return str(address)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="a run folder, or another checkpoint that was trained here")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    parser.add_argument("--gguf", choices=TYPES, nargs="+", default=[],
                        help="also write GGUF files with matrices of these types; the Modelfile names the first one")
    parser.add_argument("--licence", default="", help="licence of the model, for its card, such as apache-2.0")
    parser.add_argument("--push_to_hub", default="", metavar="NAME",
                        help="upload the folder as the model NAME, with the token of HF_TOKEN or `hf auth login`")
    parser.add_argument("--private", action="store_true", help="make the model on the hub private")
    args = parser.parse_args()
    logging.getLogger("gguf").setLevel(logging.WARNING)
    try:
        export(args.run, args.folder, args.licence)
        options, notes = Decoding(), args.folder / "Modelfile"
        for kind in args.gguf:
            file = args.folder / f"{model_name(args.folder)}-{kind}.gguf"
            write_gguf(args.folder, file, kind, {"temp": options.temperature, "top_p": options.top_p, "top_k": 0})
            logger.info("Wrote %s", file)
            if kind == args.gguf[0]:
                notes.write_text(notes.read_text("utf-8").replace("FROM .\n", f"FROM ./{file.name}\n"), "utf-8")
    except OSError as error:
        raise InputError(f"{args.folder}: cannot be written ({error.strerror or error})") from None
    logger.info("Wrote %s", args.folder)
    if args.push_to_hub:
        logger.info("Uploaded to %s", push(args.folder, args.push_to_hub, args.private))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
