from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import PreconditionError, RunnerError
from runner.model.llama import Llama
from tests.test_gguf import SHAPES, write_model

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
FRANCE = {"role": "user", "content": "What is the capital of France?"}
STORY = {"role": "user", "content": "Tell me a very long story about the sea."}


@pytest.fixture(scope="module")
def llama(smollm2_gguf: Path) -> Iterator[Llama]:
    with Llama(smollm2_gguf, context=512, threads=1) as opened:
        yield opened


def test_a_reply_comes_in_pieces(llama: Llama) -> None:
    pieces = list(llama.reply([SYSTEM, FRANCE], max_tokens=32))
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3


def test_a_second_turn_knows_the_first(llama: Llama) -> None:
    first = "".join(llama.reply([SYSTEM, FRANCE], max_tokens=32))
    italy = {"role": "user", "content": "And of Italy?"}
    messages = [SYSTEM, FRANCE, {"role": "assistant", "content": first}, italy]
    assert "Rome" in "".join(llama.reply(messages, max_tokens=32))


def test_a_reply_ends_at_max_tokens(llama: Llama) -> None:
    assert len(list(llama.reply([SYSTEM, STORY], max_tokens=7))) == 7


def test_a_reply_that_is_left_early_makes_way_for_the_next(llama: Llama) -> None:
    long = llama.reply([SYSTEM, STORY], max_tokens=400)
    next(long)
    with pytest.raises(RuntimeError, match="one reply at a time"):
        next(llama.reply([SYSTEM, FRANCE], max_tokens=8))
    long.close()
    assert "Paris" in "".join(llama.reply([SYSTEM, FRANCE], max_tokens=32))


def test_messages_longer_than_the_context_are_refused_and_the_model_lives_on(
    llama: Llama,
) -> None:
    with pytest.raises(RunnerError, match="exceeds the available context size") as caught:
        list(llama.reply([{"role": "user", "content": "sea " * 600}], max_tokens=8))
    assert caught.value.hint == "give it fewer or shorter messages, or a larger context"
    assert "Paris" in "".join(llama.reply([SYSTEM, FRANCE], max_tokens=32))


def test_ids_are_gone_on_from_as_they_are(llama: Llama) -> None:
    _, ids = llama.opened([SYSTEM, FRANCE])
    found = llama.continued(ids, max_tokens=32, likeliest=1000)
    text = "".join(llama.reply([SYSTEM, FRANCE], max_tokens=32))
    assert found.ids == (*llama.tokenised(text), *llama.tokenised("<|im_end|>"))
    assert found.ended
    assert found.likeliest[0] == found.ids[0]
    assert 0.97 < sum(map(math.exp, found.logprobs)) <= 1


def test_what_would_come_next_does_not_depend_on_what_was_asked_before(llama: Llama) -> None:
    _, ids = llama.opened([SYSTEM, FRANCE])
    alone = llama.continued(ids, max_tokens=1, likeliest=3)
    llama.continued([*ids, *llama.tokenised("The capital")], max_tokens=1, likeliest=3)
    again = llama.continued(ids, max_tokens=1, likeliest=3)
    assert again.likeliest == alone.likeliest
    assert again.logprobs == pytest.approx(alone.logprobs, abs=1e-3)
    assert not again.ended


def test_half_a_letter_has_its_probability_too(llama: Llama) -> None:
    ids = llama.tokenised("жжжжжжжжжжжжжжжж")
    found = llama.continued(ids[:-1], max_tokens=2, likeliest=5)
    assert found.likeliest[0] == found.ids[0]
    assert len(found.ids) == 2


def test_a_text_has_no_token_put_before_it_and_its_control_tokens_are_read(llama: Llama) -> None:
    assert llama.tokenised("<|im_end|>") == [2]
    assert llama.tokenised("") == []


def test_a_chat_is_opened_by_the_template_in_the_file(llama: Llama) -> None:
    text, ids = llama.opened([SYSTEM, FRANCE])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\n")
    assert ids == llama.tokenised(text)


def test_an_id_that_the_model_does_not_have_is_refused(llama: Llama) -> None:
    with pytest.raises(RunnerError, match="Prompt contains invalid tokens"):
        llama.continued([1, 999_999], max_tokens=1, likeliest=1)


def test_a_model_that_died_says_so(smollm2_gguf: Path) -> None:
    with Llama(smollm2_gguf, context=512, threads=1) as llama:
        llama._child.kill()
        with pytest.raises(RunnerError, match=r"llama\.cpp ended with exit code -9"):
            list(llama.reply([FRANCE], max_tokens=8))


def test_nothing_of_llama_cpp_reaches_the_terminal(
    smollm2_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Llama(smollm2_gguf, context=512, threads=1) as llama:
        list(llama.reply([SYSTEM, FRANCE], max_tokens=2))
    assert capfd.readouterr() == ("", "")


def test_the_child_ends_with_its_parent(smollm2_gguf: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from runner.model.llama import Llama\n"
        f"print(Llama(Path({str(smollm2_gguf)!r}), context=512)._child.pid, flush=True)\n"
        "os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in _status(pid):
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_a_damaged_file_is_refused_before_llama_cpp_sees_it(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as file:
        cut.write_bytes(file.read(1 << 22))
    with pytest.raises(PreconditionError, match="the file ends before the data of"):
        Llama(cut)
    with pytest.raises(PreconditionError, match="cannot be read"):
        Llama(tmp_path / "none.gguf")


def test_a_file_llama_cpp_cannot_load_is_named_with_its_reason(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", SHAPES["qwen3"])
    with pytest.raises(RunnerError, match=r"llama\.cpp ended with exit code") as caught:
        Llama(tmp_path / "tiny.gguf")
    assert "failed to load model" in caught.value.hint


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
