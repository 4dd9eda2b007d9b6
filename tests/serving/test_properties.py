"""Schedules that nobody would think of: thousands of them, each looked at after every step.

SCHEDULES=10000 pytest tests/serving/test_properties.py tries so many, and a fifth of it with a real model.
"""

import os
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.block_pool import BlockPool, chain
from gpt4lib.serving.engine import Engine
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.serving.timeline import Timeline
from gpt4lib.specs import LatentAttention, ModelSpec

SCHEDULES = int(os.environ.get("SCHEDULES", 300))
SETTINGS = settings(deadline=None, derandomize=True, database=None, report_multiple_bugs=False, max_examples=SCHEDULES,
                    stateful_step_count=20, suppress_health_check=list(HealthCheck))

# so much of one trunk, then something of its own: prefixes are often equal, whole prompts too, and blocks often just full
PROMPTS = st.builds(lambda common, own: (*range(2, 2 + common), *own),
                    st.integers(1, 12), st.just([]) | st.lists(st.integers(0, 1), max_size=6))
PRIORITIES, MOSTLY = st.sampled_from([0, 0, 0, -1, 1]), st.sampled_from([True, True, True, False])


@cache
def key_of(tokens, size):
    key = b""
    for at in range(0, len(tokens), size):
        key = chain(key, tokens[at:at + size])
    return key


class Schedules(RuleBasedStateMachine):
    """A scheduler, and an executor whose memory holds, in every row of every block, what a key of a deep model depends on:
    the tokens up to there as they were read from the blocks. So a wrong block shows, whoever wrote it and whenever."""
    met = Counter()

    @initialize(n_blocks=st.integers(2, 12), size=st.integers(1, 4), seats=st.integers(1, 6), more=st.integers(0, 8),
                continuous=MOSTLY, prefix_cache=MOSTLY, dice=st.integers(0, 9999), ends=st.sampled_from([0, 0.1, 0.3]))
    def start(self, n_blocks, size, seats, more, continuous, prefix_cache, dice, ends):
        self.scheduler = Scheduler(BlockPool(n_blocks, size), seats, seats + more, continuous, prefix_cache)
        self.pool, self.size, self.dice, self.ends = self.scheduler.pool, size, random.Random(dice), ends
        self.all, self.memory, self.timeline, self.sound = [], {}, Timeline(self.scheduler), True

    def live(self):
        return [s for s in self.all if not s.finish_reason]

    def row(self, s, at):
        return s.blocks[at // self.size], at % self.size

    @rule(prompt=PROMPTS, n=st.integers(1, 9), priority=PRIORITIES, forks=st.sampled_from([0, 0, 1, 2, 5]))
    def add(self, prompt, n, priority, forks):
        room = self.pool.n_blocks * self.size
        members = 1 + min(forks, self.scheduler.max_running - 1) * self.scheduler.continuous      # static batches have none
        prompt = prompt[:room - 1]
        group = [Sequence(prompt, min(n, room - len(prompt)), priority) for _ in range(members)]
        group[0].forks = group[1:]
        self.scheduler.add(group[0])
        self.all += group

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        live, self.sound = self.live(), False
        self.scheduler.finish(live[which % len(live)], "cancelled")

    @precondition(lambda self: self.live())
    @rule(n=st.integers(1, 10))
    def steps(self, n):
        for _ in range(n):
            if self.live():
                self.step()

    def teardown(self):
        """Whatever came before, everybody finishes: the best in rank never loses a token, another all of them once at most."""
        if getattr(self, "sound", False):
            self.steps(2 * sum(len(s.prompt) + s.max_new_tokens for s in self.live()))
            assert not self.live() and not self.scheduler.waiting and not self.scheduler.running
            assert self.pool.n_free == self.pool.n_blocks
            assert all(len(s.generated) == s.max_new_tokens for s in self.all if s.finish_reason == "length")
            assert len({slot[:2] for slot in self.timeline.slots}) == len(self.timeline.slots), "two on one seat"
            self.met.update(machines=1, sequences=len(self.all), preempting=any(s.preemptions for s in self.all))

    def step(self):
        """One step: planned, looked at, computed, answered."""
        self.sound = False
        running = [s for s in self.scheduler.running if not s.finish_reason]
        decoding = [s for s in running if s.n_tokens - s.n_computed == 1]
        step = self.scheduler.schedule()
        self.look_at(step, running, decoding)
        self.timeline.record(step)
        self.compute(step)
        for group in self.scheduler.advance(step):
            for s in group:
                self.answer(s)
        self.everything_is_in_order()
        self.met.update(steps=1, preemptions=len(step.preempted), copies=len(step.copies),
                        cached=sum(0 < w.start == w.sequence.n_cached for w in step.work))

    def look_at(self, step, running, decoding):
        scheduler, size, work = self.scheduler, self.size, {w.sequence: w for w in step.work}
        kept, total = [s for s in scheduler.running if not s.finish_reason], sum(w.stop - w.start for w in step.work)
        assert kept and step.work, "nobody goes on"
        assert len(work) == len(step.work) and set(work) <= set(kept)
        assert total <= scheduler.max_batched_tokens or not scheduler.continuous
        for s, start, stop in step.work:
            assert s.n_computed == start < stop <= min(s.n_tokens, len(s.blocks) * size)
            assert all(self.pool.references(b) == 1 for b in s.blocks[start // size:-(-stop // size)]), "others read there"
        assert all(s in step.preempted or work[s][1:] == (s.n_computed, s.n_tokens) for s in decoding)
        assert all(s in work and work[s].stop == s.n_tokens for s in kept) or total == scheduler.max_batched_tokens, "idle"
        assert not any(s.rank > w.rank for s in {*kept} - {*running} for w in scheduler.waiting), "somebody overtook"
        tails = {s.blocks[start // size] for s, start, _ in step.work if start % size}
        assert {new for _, new in step.copies} <= tails, "a copy of what nobody goes on writing"
        if step.preempted:
            assert kept[-1].rank < min(s.rank for s in step.preempted)
        if step.preempted or running and not scheduler.continuous:
            assert set(kept) <= set(running)

    def compute(self, step):
        wrote = {}
        self.memory.update({(new, row): self.memory.get((old, row)) for old, new in step.copies for row in range(self.size)})
        for s, start, stop in step.work:
            past = self.memory[self.row(s, start - 1)] if start else ()
            for at in range(start, stop):
                wrote[self.row(s, at)] = past = (*past, *s.tokens(at, at + 1))
        self.memory.update(wrote)

    def answer(self, s):
        """A token, perhaps the last; or an error, after which the engine clears what this sequence alone has held."""
        number, blocks = self.dice.random(), s.blocks
        if number >= self.ends / 3:
            self.scheduler.append(s, self.dice.randrange(2), "stop" if number < self.ends else None)
            return
        self.scheduler.finish(s, "error")
        for b in blocks:
            self.pool.forget(b)
        self.memory = {row: held for row, held in self.memory.items() if row[0] not in blocks or self.pool.references(row[0])}

    @invariant()
    def everything_is_in_order(self):
        self.sound, scheduler, pool = False, self.scheduler, self.pool
        used = Counter(b for s in scheduler.running for b in s.blocks)
        assert pool.n_free + len(used) == pool.n_blocks and all(pool.references(b) == used[b] for b in range(pool.n_blocks))
        assert not any(s.blocks for s in self.all if s.finish_reason or s not in scheduler.running)
        for queue in (scheduler.waiting, scheduler.running):
            assert [s.rank for s in queue] == sorted({s.rank for s in queue})
        assert sum(1 + len(s.forks) for s in scheduler.running) <= scheduler.max_running
        over = [bool(s.finish_reason) for s in scheduler.running]
        assert not any(over) or not scheduler.continuous and not all(over), "only a static batch keeps its finished"
        placed = [*scheduler.waiting, *(s for s in scheduler.running if not s.finish_reason)]
        assert {*self.live()} == {s for first in placed for s in (first, *first.forks)}
        for s in self.live():
            for at in range(s.n_computed):
                assert self.memory[self.row(s, at)] == (*s.tokens(0, at + 1),), "what stands in its blocks is not its own"
        for key, block in pool._block.items():
            *_, tokens = rows = [self.memory.get((block, row)) or () for row in range(self.size)]
            assert rows == [tokens[:n] for n in range(len(tokens) - self.size + 1, len(tokens) + 1)] != [()]
            assert key == key_of(tokens, self.size)
        self.sound = True


def test_every_step_of_any_schedule_is_in_order():
    Schedules.met = met = Counter()
    run_state_machine_as_test(Schedules, settings=SETTINGS)
    print(dict(met))
    assert met["preempting"] > met["machines"] / 10
    assert min(met["preemptions"], met["copies"], met["cached"]) > met["machines"] / 4


TINY = ModelSpec("tiny", n_layers=1, d_model=16, n_heads=2, head_dim=8, d_ff=24, vocab_size=20, context=32, tied=False)
KINDS = {"multi-query": dict(n_kv_heads=1), "window": dict(n_layers=2, window=5),
         "latent": dict(latent=LatentAttention(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=8))}


@cache
def model(kind):
    """fp64, and weights so large that a token depends on all that its layers see: nothing wrong in the cache goes unnoticed."""
    net = Transformer(TINY.with_(**KINDS[kind]), seed=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(12 if p.dim() > 1 else 1)
    return net


@cache
def greedily(kind, prompt):
    return model(kind).generate(torch.tensor([prompt]), 10)[0, len(prompt):].tolist()


@cache
def alone(kind, prompt, params):
    """The answers to a request that has an engine of its own."""
    if params.temperature == 0:
        return [greedily(kind, prompt)[:params.max_tokens]] * params.n
    engine = Engine(model(kind), 40, 4)
    answers = engine.add(prompt, params)
    while engine.work:
        engine.step()
    return [a.generated for a in answers]


PARAMS = st.builds(SamplingParams, temperature=st.sampled_from([0.0, 0.0, 1.0]), max_tokens=st.integers(1, 10),
                   n=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 2))
REQUESTS = st.lists(st.tuples(PROMPTS, PARAMS, PRIORITIES, st.integers(0, 12), st.none() | st.integers(1, 25)),
                    min_size=5, max_size=10)               # .., .., arrives, and is cancelled so much later


def test_any_engine_answers_as_if_each_request_were_alone():
    """Greedy, token for token as one-by-one generation does; sampled, as with an engine of its own and the same seed."""
    met = Counter()

    @given(REQUESTS, st.sampled_from(list(KINDS)), st.integers(1, 4), st.integers(0, 3), st.integers(3, 6), st.integers(0, 8),
           MOSTLY, MOSTLY)
    @settings(SETTINGS, max_examples=max(SCHEDULES // 5, 1))
    def serve(requests, kind, size, more, seats, tokens, continuous, prefix_cache):
        requests = [(prompt, params if continuous else replace(params, n=1), *rest) for prompt, params, *rest in requests]
        n_blocks = max(-(-(len(prompt) + params.max_tokens) // size) for prompt, params, *_ in requests) + more
        engine = Engine(model(kind), n_blocks, size, seats, max_batched_tokens=seats + tokens, continuous=continuous,
                        prefix_cache=prefix_cache)
        copies, given = [], {}
        engine.on_step = lambda step: copies.extend(step.copies)
        for now in range(1000):
            for i, (prompt, params, priority, arrival, patience) in enumerate(requests):
                if arrival == now:
                    given[i] = engine.add(prompt, params, priority)
                if patience and arrival + patience == now:
                    engine.cancel(given[i])
            engine.step()
        assert not engine.work and engine.scheduler.pool.n_free == n_blocks
        for i, (prompt, params, _, _, patience) in enumerate(requests):
            for a, answer in zip(given[i], alone(kind, prompt, params), strict=True):
                assert a.generated == answer[:len(a.generated)]
                assert a.finish_reason == "length" and len(a.generated) == len(answer) or a.finish_reason == "cancelled" and patience
        every = [a for answers in given.values() for a in answers]
        met.update(schedules=1, answers=len(every), tokens=sum(len(a.generated) for a in every), steps=engine.steps,
                   preempting=any(a.preemptions for a in every), hitting=any(a.n_cached and not a.preemptions for a in every),
                   copying=bool(copies), cancelling=any(a.finish_reason == "cancelled" for a in every))

    serve()
    print(dict(met))
    assert min(met[x] for x in ("preempting", "copying", "hitting", "cancelling")) > met["schedules"] / 4
