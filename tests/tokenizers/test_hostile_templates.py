"""Chat templates that loop, recurse or allocate without limit: a problem of that conversation, in bounded time and memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizer_folders
from conftest import ROOT
from processes import is_alive

from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers import chat_template, render_chat
from jaxmodels.tokenizers.chat_template import ChatTemplate, TemplateProblem

pytestmark = pytest.mark.faults

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

HOSTILE = {
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
    "nested loops": (NESTED, "takes more than 0.3 s of processor time"),
    "recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "a tree of recursion": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", "takes more than 0.3 s"),
    "a division by zero": ("{{ (messages|length - 2) and 1 }}{{ 1 / (messages|length - 2) }}", "ZeroDivisionError: division by zero"),
    "a long text": ("{{ messages[0].content * 10**10 }}", "out of memory"),
    "a long list": ("{% set x = messages * 10**9 %}", "out of memory"),
    "a large number": ("{{ messages|length ** (10 ** 10) }}", "takes more than 0.3 s|out of memory"),
    "doubling": ("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "out of memory"),
    "wide padding": ("{{ messages[0].content|center(10**10) }}", "out of memory"),
    "a wide format": ("{{ '{:9999999999}'.format(messages|length) }}", "out of memory"),
    "a wide indent": ("{{ messages|tojson(indent=10**10) }}", "out of memory"),
    "long output": ("{{ messages[0].content * 10**6 }}", "writes 2,000,000 characters; at most 1,000,000"),
}
UNREADABLE = {
    "a constant that is computed early": ("{{ 10 ** (10 ** 10) }}", "takes more than 0.3 s|out of memory"),
    "deep nesting": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError"),
    "too many blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "IndentationError"),
}


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SECONDS", 0.3), ("MEMORY", 200 << 20), ("CHARACTERS", 1_000_000)):
            patch.setattr(chat_template, name, value)
        chat_template._RENDERER.kill()
        yield
    chat_template._RENDERER.kill()


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_are_a_problem_of_their_conversation(kind):
    text, problem = HOSTILE[kind]
    template, good = ChatTemplate(text, {}, []), ChatTemplate(tokenizer_folders.CHATML, {}, ["<|im_end|>"])
    with pytest.raises(TemplateProblem, match=problem) as error:
        template.answers(TALK)
    assert "\n" not in str(error.value)
    assert "Hello" in good.render(TALK), "the next conversation is rendered"


@pytest.mark.parametrize("kind", UNREADABLE)
def test_templates_that_cannot_be_compiled(kind):
    text, problem = UNREADABLE[kind]
    with pytest.raises(ConfigError, match=f"config.data.template: the chat template cannot be read: .*({problem})"):
        ChatTemplate(text, {}, [])


def test_the_limit_of_time_is_for_each_conversation():
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}", {}, [])
    process, used = chat_template._RENDERER._process, 0.0
    while used < 1.5 * chat_template.SECONDS:
        assert template.render(TALK) == "Hi"
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        used = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    assert chat_template._RENDERER._process is process


def test_a_process_that_was_killed_is_started_again():
    template = ChatTemplate("{{ messages[0].content }}", {}, [])
    os.kill(chat_template._RENDERER._process.pid, signal.SIGKILL)
    chat_template._RENDERER._process.wait()
    assert template.render(TALK) == "Hi"


def test_the_marks_are_the_same_in_both_programs():
    assert (render_chat.OPEN, render_chat.CLOSE) == (chat_template.OPEN, chat_template.CLOSE)


def test_a_signal_to_all_processes_of_a_job_does_not_end_it():
    template = ChatTemplate("{{ messages[0].content }}", {}, [])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(chat_template._RENDERER._process.pid, number)
        assert template.render(TALK) == "Hi"


def test_it_ends_with_the_process_that_asks():
    program = "from jaxmodels.tokenizers import chat_template as c; c.ChatTemplate('x', {}, []); print(c._RENDERER._process.pid, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < end, "it is left behind"
        time.sleep(0.02)
