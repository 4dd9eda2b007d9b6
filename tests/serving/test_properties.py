"""Schedules that nobody would think of: thousands of them, each looked at after every step.

SCHEDULES=10000 pytest tests/serving/test_properties.py tries so many, a fifth of it with a real model.
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
from gpt4lib.specs import LatentAttention, ModelSpec

SCHEDULES = int(os.environ.get("SCHEDULES", 300))
FIXED = dict(deadline=None, derandomize=True, database=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))

# so much of one trunk, then something of one's own: prefixes are often equal, whole prompts too, and blocks often just full
PROMPTS = st.builds(lambda common, own: [*range(2, 2 + common), *own],
                    st.integers(1, 12), st.lists(st.integers(0, 1), max_size=6) | st.just([]))


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
                continuous=st.sampled_from([True, True, False]), prefix_cache=st.sampled_from([True, True, False]),
                dice=st.integers(0, 9999), ends=st.sampled_from([0, 0.1, 0.3]))
    def start(self, n_blocks, size, seats, more, continuous, prefix_cache, dice, ends):
        self.scheduler = Scheduler(BlockPool(n_blocks, size), seats, seats + more, continuous, prefix_cache)
        self.pool, self.size, self.dice, self.ends = self.scheduler.pool, size, random.Random(dice), ends
        self.all, self.memory, self.sound = [], {}, True

    def live(self):
        return [s for s in self.all if not s.finish_reason]

    @rule(prompt=PROMPTS, n=st.integers(1, 9), priority=st.sampled_from([0, 0, 0, -1, 1]), forks=st.sampled_from([0, 0, 1, 2, 5]))
    def add(self, prompt, n, priority, forks):
        room = self.pool.n_blocks * self.size
        prompt = prompt[:room - 1]
        group = [Sequence(prompt, min(n, room - len(prompt)), priority) for _ in range(1 + (min(forks, self.scheduler.max_running - 1) if self.scheduler.continuous else 0))]
        first, *first.forks = group
        self.scheduler.add(first)
        self.all += group

    @precondition(lambda self: self.live())
    @rule(n=st.integers(1, 10))
    def steps(self, n):
        for _ in range(n):
            if self.live():
                self.step()

    @precondition(lambda self: self.live())
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        live, self.sound = self.live(), False
        self.scheduler.finish(live[which % len(live)], "cancelled")

    def teardown(self):
        """Whatever came before, everybody finishes: the best in rank never loses a token, the others at most once each."""
        if getattr(self, "sound", False):
            for _ in range(2 * sum(len(s.prompt) + s.max_new_tokens for s in self.live())):
                if self.live():
                    self.step()
            assert not self.live() and not self.scheduler.waiting and not self.scheduler.running
            assert self.pool.n_free == self.pool.n_blocks
            assert all(len(s.generated) == s.max_new_tokens for s in self.all if s.finish_reason == "length")
            self.met.update(machines=1, sequences=len(self.all), preempting=any(s.preemptions for s in self.all))

    def step(self):
        """One step, computed and answered."""
        self.sound = False
        scheduler, running = self.scheduler, [s for s in self.scheduler.running if not s.finish_reason]
        decoding = [s for s in running if s.n_tokens - s.n_computed == 1]
        step = scheduler.schedule()
        self.look_at(step, running, decoding)
        self.compute(step)
        for group in scheduler.advance(step):
            for s in group:
                self.answer(s)
        self.everything_is_in_order()
        self.met.update({"steps": 1, "preemptions": len(step.preempted), "copies": len(step.copies),
                         "cached": sum(w.start > 0 and w.start == w.sequence.n_cached for w in step.work)})

    def look_at(self, step, running, decoding):
        scheduler, work = self.scheduler, {w.sequence: w for w in step.work}
        total = sum(w.stop - w.start for w in step.work)
        assert len(work) == len(step.work) and (total <= scheduler.max_batched_tokens or not scheduler.continuous)
        for s, start, stop in step.work:
            assert s in scheduler.running and not s.finish_reason and s.n_computed == start < stop <= s.n_tokens
            assert all(self.pool.references(b) == 1 for b in s.blocks[start // self.size:-(-stop // self.size)])
            assert len(s.blocks) >= self.pool.blocks_for(stop)
        for s in decoding:
            assert s in step.preempted or work[s][1:] == (s.n_computed, s.n_tokens)
        kept = [s for s in scheduler.running if not s.finish_reason]
        assert kept and step.work, "nobody goes on"
        if any(s not in work or work[s].stop < s.n_tokens for s in kept):
            assert total == scheduler.max_batched_tokens                        # who waits for no reason, waits for ever
        if step.preempted:
            assert kept[-1].rank < min(s.rank for s in step.preempted) and set(kept) <= set(running)
        if running and not scheduler.continuous:
            assert set(kept) <= set(running)

    def compute(self, step):
        memory, wrote = self.memory, {}
        memory.update({(new, row): memory[old, row] for old, new in step.copies for row in range(self.size) if (old, row) in memory})
        for s, start, stop in step.work:
            past = memory[self.row(s, start - 1)] if start else ()
            for at in range(start, stop):
                wrote[self.row(s, at)] = past = (*past, *s.tokens(at, at + 1))
        assert len(wrote) == sum(w.stop - w.start for w in step.work)
        memory.update(wrote)

    def row(self, s, at):
        return s.blocks[at // self.size], at % self.size

    def answer(self, s):
        """A token, perhaps the last; or an error, after which the engine clears what the sequence alone has held."""
        number, blocks = self.dice.random(), s.blocks
        if number > self.ends / 3:
            self.scheduler.append(s, self.dice.randrange(2), "stop" if number < self.ends else None)
            return
        self.scheduler.finish(s, "error")
        for b in blocks:
            self.pool.forget(b)
        self.memory = {row: held for row, held in self.memory.items() if row[0] not in blocks or self.pool.references(row[0])}

    @invariant()
    def everything_is_in_order(self):
        self.sound = False
        scheduler, pool = self.scheduler, self.pool
        used = Counter(b for s in scheduler.running for b in s.blocks)
        assert pool.n_free + len(used) == pool.n_blocks and all(pool.references(b) == used[b] for b in range(pool.n_blocks))
        assert not any(s.blocks for s in self.all if s.finish_reason or s not in scheduler.running)
        for queue in (scheduler.waiting, scheduler.running):
            assert [s.rank for s in queue] == sorted({s.rank for s in queue})
        assert sum(1 + len(s.forks) for s in scheduler.running) <= scheduler.max_running
        assert not any(s.finish_reason for s in scheduler.waiting)
        over = [bool(s.finish_reason) for s in scheduler.running]
        assert not over or not (any(over) if scheduler.continuous else all(over))
        placed = [*scheduler.waiting, *scheduler.running]
        placed = {*placed, *(fork for s in placed for fork in s.forks)}
        assert set(self.live()) == {s for s in placed if not s.finish_reason}
        for s in scheduler.running:
            for at in range(0 if s.finish_reason else s.n_computed):
                assert self.memory[self.row(s, at)] == tuple(s.tokens(0, at + 1)), "what stands in its blocks is not its own"
        for key, block in pool._block.items():
            rows = [self.memory.get((block, row)) for row in range(self.size)]
            n = len(rows[-1])
            assert rows == [rows[-1][:i] for i in range(n - self.size + 1, n + 1)] and key == key_of(rows[-1], self.size)
        self.sound = True


def test_every_step_of_any_schedule_is_in_order():
    Schedules.met = met = Counter()
    run_state_machine_as_test(Schedules, settings=settings(max_examples=SCHEDULES, stateful_step_count=20, **FIXED))
    print(dict(met))
    assert met["preempting"] > met["machines"] / 8 and min(met[x] for x in ("preemptions", "copies", "cached")) > met["machines"] / 2


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


REQUESTS = st.lists(st.tuples(
    st.integers(0, 12), PROMPTS.map(tuple), st.sampled_from([0, 0, 0, -1, 1]), st.none() | st.integers(1, 25),     # arrives, .., .., cancelled
    st.builds(SamplingParams, temperature=st.sampled_from([0.0, 0.0, 1.0]), max_tokens=st.integers(1, 10), n=st.sampled_from([1, 1, 2, 3]),
              seed=st.integers(0, 2), repetition_penalty=st.just(1.0))), min_size=5, max_size=10)


def test_any_engine_answers_as_if_each_request_were_alone():
    met = Counter()

    @given(REQUESTS, st.sampled_from(list(KINDS)), st.integers(1, 4), st.integers(0, 3), st.integers(3, 6), st.integers(0, 8),
           st.sampled_from([True, True, True, False]), st.sampled_from([True, True, True, False]))
    @settings(max_examples=max(SCHEDULES // 5, 1), **FIXED)
    def serve(requests, kind, size, more, seats, tokens, continuous, prefix_cache):
        if not continuous:
            requests = [(*rest, replace(params, n=1)) for *rest, params in requests]
        n_blocks = max(-(-(len(prompt) + p.max_tokens) // size) for _, prompt, _, _, p in requests) + more
        engine = Engine(model(kind), n_blocks, size, seats, max_batched_tokens=seats + tokens, continuous=continuous, prefix_cache=prefix_cache)
        copies, given = [], {}
        engine.on_step = lambda step: copies.extend(step.copies)
        for now in range(1000):
            for i, (arrival, prompt, priority, end, params) in enumerate(requests):
                if arrival == now:
                    given[i] = engine.add(prompt, params, priority)
                if end is not None and arrival + end == now:
                    engine.cancel(given[i])
            engine.step()
        assert not engine.work and engine.scheduler.pool.n_free == n_blocks
        for i, (_, prompt, _, end, params) in enumerate(requests):
            for a, answer in zip(given[i], alone(kind, prompt, params)):
                assert a.generated == answer[:len(a.generated)], (a, answer)
                assert a.finish_reason == "length" and len(a.generated) == params.max_tokens or a.finish_reason == "cancelled" and end is not None
        every = [a for answers in given.values() for a in answers]
        met.update(schedules=1, answers=len(every), tokens=sum(len(a.generated) for a in every), steps=engine.steps,
                   preempting=any(a.preemptions for a in every), copying=bool(copies), cancelling=any(a.finish_reason == "cancelled" for a in every),
                   hitting=any(a.n_cached and not a.preemptions for a in every))

    serve()
    print(dict(met))
    assert min(met[x] for x in ("preempting", "copying", "hitting", "cancelling")) > met["schedules"] / 4
