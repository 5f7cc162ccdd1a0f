"""The conversation in the terminal."""

import signal
import threading

import pytest
import served_runs

from jaxmodels.errors import ConfigError
from jaxmodels.serving.terminal import talk


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return served_runs.write_runs(tmp_path_factory.mktemp("runs"), "chat", "gpt", "digits")


def say(run, *lines, **options):
    """Talk with these lines; an exception among them is raised at the prompt."""
    lines = iter(lines)

    def ask(prompt):
        line = next(lines, None)
        if isinstance(line, BaseException):
            raise line
        if line is None:
            raise EOFError
        return line

    talk(run, served_runs.HOW, make=served_runs.fake_engine(), ask=ask, **options)


def test_answers_are_printed_and_remembered(runs, capsys):
    say(runs["chat"], "the cat", "/reset", "the cat", "/what", KeyboardInterrupt(), "the dog", "/exit", "never", max_tokens=6)
    out, err = capsys.readouterr()
    answers = out.strip("\n").split("\n")
    assert out.count("\n") >= 3 and answers[0] in out[len(answers[0]) :]
    assert "there is no /what" in err and "/exit ends" in err


def test_a_refused_conversation_is_said_and_forgotten(runs, capsys):
    say(runs["chat"], "raise", "the cat " * 100, "the cat", max_tokens=2)
    err = capsys.readouterr().err
    assert "no such talk" in err and "the context of the model 'chat' is 128" in err


def test_runs_that_cannot_talk_are_refused(runs):
    for name, message in (("gpt", "has no chat template"), ("digits", "answers no conversations")):
        with pytest.raises(ConfigError, match=message):
            say(runs[name])


def test_an_interrupt_ends_the_answer_and_not_the_conversation(runs, capsys):
    lines = iter(["the cat", "/exit"])

    def ask(prompt):
        line = next(lines)
        if line == "the cat":
            threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        return line

    talk(runs["chat"], served_runs.HOW, make=served_runs.fake_engine(step=0.05), ask=ask)
    assert len(capsys.readouterr().out) < 60  # of the 95 tokens that the context leaves
