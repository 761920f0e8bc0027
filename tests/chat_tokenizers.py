"""Tiny byte-level tokenizers with the chat templates of known families: cut to what matters, or as
their models ship them."""

from __future__ import annotations

import re
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_GEMMA_TURNS = (
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ (lead if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}"
    "{%- set lead = messages[0].content + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set lead = '' -%}{%- set turns = messages -%}{%- endif -%}" + _GEMMA_TURNS
)
GEMMA2 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set lead = '' -%}{%- set turns = messages -%}" + _GEMMA_TURNS
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = m.content -%}{%- set thought = '' -%}"
    "{%- if m.role == 'assistant' and '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') -}}"
    "{%- else -%}{{- content -}}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
MARKERS = (
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
THOUGHTS = ("<think>", "</think>")
TEXT = ("\n\n\n", "<table>", "ня")

# By Mistral, as in the tokenizer files of Mistral-7B-Instruct-v0.2; its words take a space.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
SHIPPED = (
    "cohere",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "gemma4",
    "lfm2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "mistral",
    "nemotron_3_nano",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_instruct_2507",
)
"""Chat templates as models ship them: TRL keeps copies, by these names."""
_ANY_MARKER = re.compile(r"<[|｜/]?[\w▁|]+[|｜]?>|\[/?[A-Z_]+\]")
_PHI_MARKERS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")


def shipped(name: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and every marker of the template as a control token."""
    if name == "mistral":
        chat_template = MISTRAL
    else:
        files = resources.files("trl") / "chat_templates"
        chat_template = (files / f"{name}.jinja").read_text(encoding="utf-8")
    backend = _bytes()
    markers = ["<bos_>", "<eos_>", *_PHI_MARKERS, *sorted(_ANY_MARKER.findall(chat_template))]
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text in dict.fromkeys(markers)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos_>",
        eos_token="<eos_>",
        chat_template=chat_template,
    )


def tiny(chat_template: str, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, control tokens that are special, `<think>` that is not, and three that are
    text: a run of line breaks, an HTML tag and an added word."""
    backend = _bytes()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in MARKERS])
    backend.add_tokens([AddedToken(text, normalized=False) for text in THOUGHTS + TEXT])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )


def _bytes() -> Tokenizer:
    letters = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn, behind a system message where one is given."""
    turns = [
        {"role": "assistant" if place % 2 else "user", "content": content}
        for place, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns
