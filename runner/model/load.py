"""Opens base models and tokenizers: folders in Hugging Face layout, and GGUF files made into one.

Nothing here runs code from a model repository, and no pickle is ever opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils import logging as transformers_logging

from runner import disk
from runner.errors import PreconditionError, RunnerError
from runner.model import families, gguf_header
from runner.model.source import named_in

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cuda", "mps", "cpu"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOWER_PACKAGES = {"PIL": "pillow", "timm": "timm", "torchvision": "torchvision"}
_OTHER_SIZES = ("ignore_mismatched_sizes", "size mismatch", "overflow", "negative dimension")
"""In what transformers and torch say of sizes that cannot be."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def base_folder(source: Path, cache: Path) -> Path:
    """The folder that holds the base model: `source` itself, or what its GGUF was converted to."""
    if source.is_dir():
        _check_folder(source)
        return source
    if source.is_file() and source.suffix.lower() == ".gguf":
        return _converted(source, cache)
    raise PreconditionError(
        f"the base model {source} is neither a folder nor a .gguf file",
        hint="give a folder with config.json, tokenizer files and *.safetensors, or a .gguf file",
    )


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, as its files say."""
    with _quiet(), _whole_files(folder):
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        )


def context_of(folder: Path) -> int:
    """How many tokens the model was made for, as its config says; 4096 where it does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    length = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 4096


def causal_lm(
    folder: Path,
    *,
    dtype: Dtype,
    four_bit: bool = False,
    device: str,
    float32_modules: tuple[str, ...] | Literal["auto"] = "auto",
) -> PreTrainedModel:
    """The model of a folder; `four_bit` holds its linear weights in NF4, and computes in `dtype`.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314), section 3: NF4 with double quantisation.

    In 4 bits or float16 what has one of `float32_modules` in its name stays in float32, computes
    in it, and is not quantised; "auto" takes what the architecture needs (`families`).
    """
    compute_dtype: torch.dtype = getattr(torch, dtype)
    kept: tuple[str, ...] = ()
    if four_bit or dtype == "float16":
        family = families.of_base(folder)
        wanted = family.float32_modules if family else ()
        kept = wanted if float32_modules == "auto" else float32_modules
    quantisation = None
    if four_bit:
        if device.startswith("mps"):
            raise PreconditionError(
                "4-bit weights need CUDA or a CPU; this run would be on mps",
                hint="use `method: lora`, or run on the CPU",
            )
        quantisation = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            # Where it is given, transformers no longer leaves the head alone by itself.
            llm_int8_skip_modules=[rf".*{name}[^.]*" for name in (*kept, "lm_head")]
            if kept
            else None,
        )
    with _quiet(), _whole_files(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute_dtype,
            quantization_config=quantisation,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if kept:
        _hold_in_float32(model, kept, compute_dtype)
    return model


def device() -> Device:
    """The best device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _hold_in_float32(model: PreTrainedModel, names: tuple[str, ...], around: torch.dtype) -> None:
    """Turns the modules of these names to float32 and has them compute in it, amid `around`."""
    for path, module in model.named_modules():
        if not any(name in path for name in names):
            continue
        module.float()
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_take_own_dtype)
        elif hasattr(module, "predict") and hasattr(module, "correct"):
            # AltUp is entered by these two; a product of its float32 coefficients with `around`
            # is an error in transformers 5.23.
            module.predict = partial(_in_float32, module.predict)
            module.correct = partial(_in_float32, module.correct)
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.dtype != around:  # tied to a head that is in float32 now
        embeddings.register_forward_hook(lambda module, args, output: output.to(around))


def _take_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    linear = cast(nn.Linear, module)
    return args[0].to(linear.weight.dtype), *args[1:]


def _in_float32(compute: Any, *inputs: Tensor) -> Tensor:
    found: Tensor = compute(*(each.float() for each in inputs))
    return found.to(inputs[0].dtype)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise PreconditionError(
            f"the base model {folder} has no config.json",
            hint="give the folder that holds config.json, tokenizer files and *.safetensors",
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
        found = f"only {pickles[0]}, a pickle" if pickles else "no weights"
        raise PreconditionError(
            f"the base model {folder} has no *.safetensors, {found}",
            hint="a pickle can run any code, so it is never opened; take a safetensors variant of "
            "the model",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = named_in(index)
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise PreconditionError(
                f"the base model {folder} lacks {missing[0]} ({len(missing)} of {len(named)} "
                "weight files)",
                hint="finish the download of the model",
            )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise PreconditionError(
            f"the base model {folder} has no tokenizer files",
            hint=f"one of {', '.join(_TOKENIZER_FILES)} has to be beside config.json",
        )


def _converted(source: Path, cache: Path) -> Path:
    """The folder made of a GGUF file, from the cache where it was made before."""
    gguf_header.read(source)  # a damaged or foreign file is refused before any library opens it
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / f"{digest[:16]}-bf16"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    staged = cache / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        _convert(source, staged)
        disk.publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    # The reader of GGUF draws a bar that transformers' own switch does not reach.
    with _quiet(), redirect_stderr(io.StringIO()):
        read = _gguf_tokenizer(source)
        quantised = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16, local_files_only=True
        )
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # Built without memory: each weight is then taken over from the one that was read.
        with torch.device("meta"):
            plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(folder)
        positions = getattr(config, "max_position_embeddings", None)
        if positions:
            read.model_max_length = positions
        read.save_pretrained(folder)


# What `tokenizer.ggml.pre` stands for in llama.cpp, src/llama-vocab.cpp, where transformers 5.23
# leaves it out: each digit by itself, then GPT-2's pattern; or GPT-2's pattern alone.
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
_AS_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion"})


def _gguf_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a GGUF file, split as the model was trained."""
    metadata, _ = read_gguf_metadata(str(source))
    read = cast(
        PreTrainedTokenizerBase,
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True),
    )
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return read
    split = metadata.get("tokenizer.ggml.pre")
    if split in _DIGITS_APART:
        read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif split not in _AS_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise PreconditionError(
            f"{source.name} splits text in a way that is not known here: tokenizer.ggml.pre is "
            f"{split!r}",
            hint="use the model's folder with safetensors; a wrong split would train on tokens "
            "that the model has never seen",
        )
    return read


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no advice from libraries; their errors still come through."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # On a CPU it recommends a package that would download a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _whole_files(folder: Path) -> Iterator[None]:
    """Names the model whose files the libraries stumble over, in whatever way they do."""
    try:
        yield
    except (MemoryError, RunnerError):
        raise
    except RuntimeError as error:
        # Memory that runs out and what a GPU says are RuntimeErrors too, and no fault of the files.
        if not any(words in str(error) for words in _OTHER_SIZES):
            raise
        raise PreconditionError(
            f"the model {folder} cannot be read: its config and its weights differ in size",
            hint="its files are damaged, or from different models; get the model again",
        ) from error
    except ImportError as error:
        packages = " ".join(p for name, p in _TOWER_PACKAGES.items() if not find_spec(name))
        if "timm" not in str(error).lower() or not packages:
            raise
        raise PreconditionError(
            f"the model {folder} sees pictures with the help of {packages}, not installed here",
            hint=f"pip install {packages}; the part that sees is loaded and left as it is",
        ) from error
    except Exception as error:
        said = str(error).strip().split("\n")[0][:200]
        raise PreconditionError(
            f"the model {folder} cannot be read: {type(error).__name__}: {said}",
            hint="its files are damaged, or of a kind that this version of transformers does not "
            "know; get the model again",
        ) from error
