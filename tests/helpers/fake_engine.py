"""An engine without a model: it answers by a rule, at a pace, and keeps count of its slots. For tests of what surrounds an engine."""

import collections
import dataclasses
import threading
import time

from jaxmodels.generation.stop_strings import GeneratedText
from jaxmodels.serving.requests import Busy, Finished, Score, Scored, Stats, Token


class FakeEngine:
    """The answer to a prompt is its tokens in turn, each plus 1 (modulo the vocabulary, without the end token), until `max_tokens`; `fail` raises in the place of a step.

    Attributes:
      step: seconds of a step, in which every running request gets a token.
      served: requests that have finished, by reason.
    """

    def __init__(self, run, *, slots=4, context=None, queue=64, step=0.0):
        self.tokenizer, self.vocab = run.tokenizer, run.info["vocab_size"]
        self.slots, self.limit, self.step, self.context = slots, queue, step, context or getattr(run.model, "context", None) or 256
        self.end = None if run.tokenizer is None else run.tokenizer.special("end")
        self.served = collections.Counter()
        self.fail = None
        self._waiting, self._running = collections.deque(), []
        self._condition = threading.Condition()
        self._open, self._closed, self._steps, self._made, self._prompts = True, False, 0, 0, 0
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request, deliver):
        with self._condition:
            if not self._open:
                raise Busy("the engine takes no more requests.", 1.0)
            if len(self._waiting) >= self.limit:
                raise Busy(f"{len(self._waiting)} requests are waiting.", 0.2)
            ticket = _Ticket(self, request, deliver)
            self._waiting.append(ticket)
            self._condition.notify_all()
            return ticket

    def stats(self):
        with self._condition:
            held = sum(len(t.request.tokens) + len(t.tokens) for t in self._running)
            counts = (self._made, self._prompts, 0, self._steps)
            return Stats(self.slots, len(self._running), len(self._waiting), self.limit, self.slots * self.context, held, *counts)

    def drain(self, seconds):
        end = time.monotonic() + seconds
        with self._condition:
            self._open = False
            while (self._waiting or self._running) and (left := end - time.monotonic()) > 0:
                self._condition.wait(min(left, 0.05))
            left = [*self._waiting, *self._running]
        for ticket in left:
            ticket.cancel()
        return len(left)

    def close(self):
        with self._condition:
            self._open, self._closed = False, True
            self._condition.notify_all()
        self._thread.join(5)

    def _loop(self):
        while True:
            with self._condition:
                while not (self._waiting or self._running or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
                while self._waiting and len(self._running) < self.slots:
                    self._running.append(self._waiting.popleft())
                    self._prompts += len(self._running[-1].request.tokens)
                running = list(self._running)
                self._steps += 1
            if self.step:
                time.sleep(self.step)
            for ticket in running:
                self._advance(ticket)
            with self._condition:
                self._running = [ticket for ticket in self._running if not ticket.ended]
                self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.ended)
                self._condition.notify_all()

    def _advance(self, ticket):
        request = ticket.request
        if ticket.cancelled:
            ticket.finish("cancelled")
        elif self.fail is not None and self.fail(request):
            ticket.finish("error", "the step failed")
        elif ticket.first():
            most = self.context - len(request.tokens) if request.max_tokens is None else request.max_tokens
            if len(ticket.tokens) >= most:
                ticket.finish("length")
                return
            token = self.next(request.tokens, len(ticket.tokens))
            self._made += 1
            ticket.add(token)
            if ticket.text.finish is not None:
                ticket.finish(ticket.text.finish)
            elif len(ticket.tokens) >= most:
                ticket.finish("length")

    def next(self, prompt, number):
        """The rule. The end token is left out."""
        token = (prompt[number % len(prompt)] + 1) % self.vocab
        return token + 1 if token == self.end else token

    def score(self, token, count):
        top = tuple(((token + i) % self.vocab, -0.5 - i) for i in range(count))
        return Score(token, -0.5, top)


class _Ticket:
    def __init__(self, engine, request, deliver):
        self.engine, self.request, self.deliver = engine, request, deliver
        self.tokens, self.ended, self.cancelled, self._scored = [], False, False, False
        self.text = GeneratedText(engine.tokenizer, (), (), request.stop)
        self.rest = ""

    def first(self):
        """Score the prompt, once."""
        if self.request.echo and self.request.logprobs is not None and not self._scored:
            self._scored = True
            scores = [self.engine.score(token, self.request.logprobs) for token in self.request.tokens]
            self.deliver(Scored((dataclasses.replace(scores[0], logprob=None, top=()), *scores[1:])))
        return True

    def add(self, token):
        self.tokens.append(token)
        piece = self.text.add(token)
        if self.text.finish is not None:
            self.rest, piece = piece, ""
        score = None if self.request.logprobs is None else self.engine.score(token, self.request.logprobs)
        self.deliver(Token(token, piece, score))

    def finish(self, reason, error=None):
        self.ended = True
        self.engine.served[reason] += 1
        rest = self.rest if self.text.finish is not None else self.text.end("length")
        self.deliver(Finished(reason, rest, len(self.request.tokens), len(self.tokens), error=error))

    def cancel(self):
        self.cancelled = True
