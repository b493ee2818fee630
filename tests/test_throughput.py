"""Nothing here asserts on speed: clocks of shared machines are not to be trusted."""

import gc
import os
import socket
import sys

import pytest
import torch

from ltrp_timm.measure import throughput
from ltrp_timm.measure.throughput import (
    Ratio,
    Timing,
    compare,
    environment,
    peak_memory,
    ratio,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_calls_are_interleaved_and_warmup_comes_first():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "ABC"}
    timings = compare(fns, repeats=3, warmup=2)
    assert "".join(calls) == "ABC" * 5
    assert list(timings) == ["A", "B", "C"]
    assert [timing.name for timing in timings.values()] == ["A", "B", "C"]


def test_warmup_rounds_are_not_counted(monkeypatch):
    # a clock that ticks only inside the callable, and much more in its first two calls
    now = [0.0]
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(durations)

    assert compare({"work": work}, repeats=3, warmup=2)["work"].seconds == (1.0, 2.0, 3.0)


def test_seconds_go_to_the_callable_that_spent_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    timings = compare({"a": lambda: spend(1.0), "b": lambda: spend(5.0)}, repeats=2, warmup=0)
    assert timings["a"].seconds == (1.0, 1.0)
    assert timings["b"].seconds == (5.0, 5.0)


def test_each_call_is_synchronised_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))
    compare(
        {"a": lambda: events.append("a"), "b": lambda: events.append("b")},
        repeats=2,
        warmup=0,
        device="cuda:1",
    )
    one_round = ["cuda:1", "a", "cuda:1", "cuda:1", "b", "cuda:1"]
    assert events == one_round * 2


def test_the_clock_stops_after_the_device_and_before_the_result_is_freed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: tick(1.0))

    def tick(seconds):
        now[0] += seconds

    class Result:
        def __del__(self):
            tick(1000.0)

    timing = compare({"one": Result}, repeats=2, warmup=0, device="cuda")["one"]
    assert (timing.seconds, timing.peak_memory) == ((1.0, 1.0), None)


def test_quartiles_of_a_timing():
    timing = Timing("t", (5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert timing.items_per_second(6) == 2.0


def test_one_round_is_its_own_quartiles():
    timing = Timing("t", (2.0,))
    assert (timing.low, timing.median, timing.high) == (2.0, 2.0, 2.0)


def test_ratio_is_taken_pair_by_pair():
    # ratios 1, 2, 10: their median is 2; the ratio of the medians would be 3 / 1 = 3
    slow, fast = Timing("slow", (1.0, 4.0, 3.0)), Timing("fast", (1.0, 2.0, 0.3))
    found = ratio(slow, fast)
    assert isinstance(found, Ratio)
    assert found.median == pytest.approx(2.0)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(6.0)


def test_ratio_of_a_timing_and_itself_is_one():
    timing = Timing("t", (1.0, 7.0, 3.0))
    assert ratio(timing, timing) == Ratio(1.0, 1.0, 1.0)


def test_ratio_refuses_timings_of_different_comparisons():
    with pytest.raises(ValueError, match=r"'slow' has 2 rounds, 'fast' has 1"):
        ratio(Timing("slow", (1.0, 2.0)), Timing("fast", (1.0,)))


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_collector_is_off_while_timing_and_back_afterwards(was_on, fails):
    before = gc.isenabled()
    seen = []

    def work():
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("work failed")

    (gc.enable if was_on else gc.disable)()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="work failed"):
                compare({"work": work}, repeats=1, warmup=0)
        else:
            compare({"work": work}, repeats=1, warmup=0)
        assert gc.isenabled() is was_on
        assert seen == [False]
    finally:
        (gc.enable if before else gc.disable)()


def test_gradient_mode_is_the_callers():
    seen = []
    compare({"grad": lambda: seen.append(torch.is_grad_enabled())}, repeats=1, warmup=0)
    with torch.no_grad():
        compare({"none": lambda: seen.append(torch.is_grad_enabled())}, repeats=1, warmup=0)
    assert seen == [True, False]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one callable, got an empty mapping"):
        compare({})
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        compare({"int": int}, repeats=0)
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        compare({"int": int}, warmup=-1)


@linux
def test_peak_memory_sees_a_large_allocation_that_is_gone_afterwards():
    size = 200_000_000

    def work():
        torch.ones(size // 4)
        return None

    timings = compare({"work": work, "none": int}, repeats=1, warmup=1, memory=True)
    # the kernel counts resident pages in batches: allow 1 %
    assert 0.99 * size <= timings["work"].peak_memory <= 1.5 * size
    assert timings["none"].peak_memory < 0.1 * size


@linux
def test_peak_memory_is_not_hidden_by_heap_kept_from_an_earlier_call():
    blocks, size = 20, 100_000  # small blocks, which glibc keeps when they are freed

    def work():
        return len([torch.ones(size // 4) for _ in range(blocks)])

    for _ in range(3):
        work()
    assert peak_memory(work) >= 0.5 * blocks * size


def test_peak_memory_is_none_where_it_cannot_be_read(monkeypatch):
    def refuse(self, text):
        raise PermissionError

    monkeypatch.setattr(throughput.Path, "write_text", refuse)
    assert peak_memory(int) is None
    assert compare({"int": int}, repeats=1, memory=True)["int"].peak_memory is None


def test_environment_says_everything_and_nothing_private():
    env = environment()
    expected = ["machine", "cores", "threads", "torch", "timm", "ltrp_timm", "python", "platform"]
    assert list(env) == expected
    for name, value in env.items():
        assert isinstance(value, str)
        assert value.strip(), name
        assert os.sep not in value
        assert value != socket.gethostname()
    assert env["torch"] == torch.__version__
    assert int(env["threads"]) == torch.get_num_threads()
    assert int(env["cores"]) >= 1


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_exact():
    def work():
        torch.empty(200 * 2**20, dtype=torch.uint8, device="cuda")
        return None

    timings = compare({"work": work}, repeats=1, device="cuda", memory=True)
    assert timings["work"].peak_memory == 200 * 2**20
    assert "NVIDIA" in environment("cuda")["machine"]
