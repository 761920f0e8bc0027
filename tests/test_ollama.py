from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.errors import RunnerError
from runner.model.ollama import modelfile

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_A_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are useful.<|im_end|>\\n' }}{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content']|trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + GEMMA_3
)
QWEN_3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'].split('</think>')[-1].lstrip('\\n') %}{% else %}"
    "{% set said = m['content'] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + said + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief,\nand {{ kind }}."}
TURNS = [
    {"role": "user", "content": 'What is "Glück"?'},
    {"role": "assistant", "content": "Luck.\n\nOr happiness."},
    {"role": "user", "content": "Да?"},
    {"role": "assistant", "content": "Да."},
    {"role": "user", "content": "Ok"},
]


@pytest.mark.parametrize(
    "template",
    [CHATML, CHATML_WITH_A_DEFAULT, LLAMA_3, GEMMA_3, QWEN_3],
    ids=["chatml", "chatml-default", "llama-3", "gemma-3", "qwen-3"],
)
@pytest.mark.parametrize(
    "messages",
    [TURNS[:1], TURNS[:3], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS]],
    ids=["one", "three", "five", "system", "system-five"],
)
def test_ollama_writes_the_prompt_that_the_chat_template_writes(
    template: str, messages: list[dict[str, str]], tmp_path: Path
) -> None:
    tokenizer = _tokenizer(tmp_path, template)
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert _by_go(_template(tmp_path), messages) == str(wanted).removeprefix("<bos>")


def test_a_system_message_that_the_template_refuses_stands_before_the_first_user_message(
    tmp_path: Path,
) -> None:
    tokenizer = _tokenizer(tmp_path, GEMMA_2)
    folded = {"role": "user", "content": f"{SYSTEM['content']}\n\n{TURNS[0]['content']}"}
    wanted = tokenizer.apply_chat_template([folded], tokenize=False, add_generation_prompt=True)
    assert _by_go(_template(tmp_path), [SYSTEM, TURNS[0]]) == str(wanted).removeprefix("<bos>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "the tokenizer has no chat template"),
        ("{{ strftime_now('%d') }}" + CHATML, "the chat template writes today's date"),
        (
            "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
            "the chat template repeats or leaves out a message",
        ),
        (
            "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}A",
            "the chat template opens a new reply differently from an old one",
        ),
        (
            "{% for m in messages %}{{ '!' if loop.index > 3 }}{{ m['content'] }}{% endfor %}",
            "the chat template writes a message differently by its place",
        ),
        ('{{ \'"""\' }}' + CHATML, "the chat template writes what a Modelfile cannot hold"),
    ],
)
def test_a_template_without_a_counterpart_is_left_to_ollama(
    template: str, reason: str, tmp_path: Path
) -> None:
    _tokenizer(tmp_path, template)
    text = modelfile(tmp_path, "x.gguf", num_ctx=512, system=None)
    assert f"# No TEMPLATE: {reason}. " in text
    assert "\nTEMPLATE" not in text


def test_a_modelfile_names_the_file_the_stop_tokens_and_the_context(tmp_path: Path) -> None:
    _tokenizer(tmp_path, CHATML)
    ends = {"eos_token_id": [2, 3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    text = modelfile(tmp_path, "my-style-q4_k_m.gguf", num_ctx=8192, system="Be brief.")
    assert text == (
        "# ollama create NAME -f Modelfile\n"
        "FROM ./my-style-q4_k_m.gguf\n"
        'TEMPLATE """'
        "{{- if .System }}<|im_start|>system\n"
        "{{ .System }}<|im_end|>\n"
        "<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n"
        "{{ end }}\n"
        "{{- $first := true }}\n"
        "{{- range .Messages }}\n"
        '{{- if eq .Role "user" }}{{ if not $first }}<|im_end|>\n'
        "<|im_start|>user\n"
        "{{ end }}{{ .Content }}<|im_end|>\n"
        "<|im_start|>assistant\n"
        "{{ $first = false }}\n"
        '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
        "{{- end }}\n"
        '{{- end }}"""\n'
        'PARAMETER stop "<eos>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 8192\n"
        'SYSTEM """Be brief."""\n'
    )


def test_a_system_message_that_would_end_early_is_refused(tmp_path: Path) -> None:
    _tokenizer(tmp_path, CHATML)
    with pytest.raises(RunnerError, match="the system message holds"):
        modelfile(tmp_path, "x.gguf", num_ctx=512, system='Say """.')


def _tokenizer(folder: Path, template: str) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<bos>", "<eos>", "<|im_end|>", "<|im_start|>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(special)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)
    return tokenizer


def _template(folder: Path) -> str:
    found = re.search(
        r'^TEMPLATE """(.*?)"""$',
        modelfile(folder, "x.gguf", num_ctx=512, system=None),
        re.M | re.S,
    )
    assert found
    return found[1]


def _by_go(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Go's text/template, as far as a Modelfile of ours goes: if, else, range, eq, a variable.

    Ollama gives it `.System`, and every message in `.Messages`.
    """
    parts = re.split(r"(?:(?<=\})|(?<=^)|)(\s*\{\{-|\{\{)\s*(.*?)\s*\}\}", template, flags=re.S)
    tokens: list[tuple[str, str]] = [("text", parts[0])]
    for _, action, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        tokens += [("action", action), ("text", text)]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    variables = {"$first": False}
    at = 0

    def holds(condition: str, message: dict[str, str]) -> bool:
        if condition == ".System":
            return bool(system)
        if condition == "not $first":
            return not variables["$first"]
        return condition == f'eq .Role "{message["role"]}"'

    def run(message: dict[str, str], live: bool) -> tuple[str, str]:
        """What is written up to the `else` or `end` of this level, and that action."""
        nonlocal at
        out = ""
        while at < len(tokens):
            kind, what = tokens[at]
            at += 1
            if kind == "text":
                out += what if live else ""
            elif what.startswith(("else", "end")):
                return out, what
            elif what.startswith("if "):
                out += branches(what[3:], message, live)
            elif what == "range .Messages":
                start = at
                for each in messages:
                    at = start
                    out += run(each, live)[0]
            elif "=" in what:
                if live:
                    variables["$first"] = what.endswith("true")
            elif live:
                out += system if what == ".System" else message["content"]
        return out, ""

    def branches(condition: str, message: dict[str, str], live: bool) -> str:
        taken = holds(condition, message)
        out, stop = run(message, live and taken)
        while stop != "end":
            now = not taken and (stop == "else" or holds(stop.removeprefix("else if "), message))
            text, stop = run(message, live and now)
            out, taken = out + text, taken or now
        return out

    return run({"role": "", "content": ""}, True)[0]
