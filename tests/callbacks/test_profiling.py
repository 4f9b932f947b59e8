"""Traces of chosen steps, and the table of times."""

import gzip
import json
import re
from typing import Any

import pytest
from problems import Clock, batches, host, trainer

import ant_jax as ant


def fit(*callbacks: ant.Callback, epochs: int = 2, count: int = 6, **options: Any) -> Any:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(count), epochs, batches(1))


def test_a_trace_is_of_the_chosen_steps(tmp_path):
    inside: list[tuple[int, int]] = []
    open_traces: list[bool] = []

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        inside.append((state.epoch, batch_idx))
        open_traces.append(not _may_trace(tmp_path / "other"))
        return state, logs

    fit(ant.callbacks.profile(tmp_path / "traces", start=2, steps=3, epoch=1), host(on_batch_end=on_batch_end))
    # It is listed first, so at its last batch it has ended already.
    assert [place for place, traced in zip(inside, open_traces, strict=True) if traced] == [(1, 2), (1, 3)]
    (file,) = (tmp_path / "traces").rglob("*.trace.json.gz")
    assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def _may_trace(directory: Any) -> bool:
    import jax

    try:
        jax.profiler.start_trace(str(directory))
    except RuntimeError:
        return False
    jax.profiler.stop_trace()
    return True


def test_after_an_exception_nothing_is_traced_any_more(tmp_path):
    def failing(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(ant.callbacks.profile(tmp_path, start=0, steps=3), host(on_batch_end=failing))
    assert _may_trace(tmp_path)


def test_a_trace_whose_end_is_left_out_ends_with_the_run(tmp_path, caplog):
    trace = ant.callbacks.profile(tmp_path, start=0, steps=2)
    fit(ant.callbacks.when(lambda state, logs: "loss" not in logs, trace), epochs=1)
    assert list(tmp_path.rglob("*.trace.json.gz")) and not caplog.text
    assert _may_trace(tmp_path / "other")


@pytest.mark.parametrize("options", [{"start": 6}, {"epoch": 2, "start": 0}])
def test_says_that_nothing_was_traced(options, tmp_path, caplog):
    fit(ant.callbacks.profile(tmp_path, **options))
    start, epoch = options["start"], options.get("epoch", 0)
    assert f"nothing was traced: this run had no batch {start} in epoch {epoch}" in caplog.text
    assert not list(tmp_path.iterdir())


def test_two_traces_at_once_are_refused_by_name(tmp_path):
    callbacks = [ant.callbacks.profile(tmp_path, start=0, name=name) for name in ("one", "two")]
    with pytest.raises(RuntimeError) as caught:
        fit(*callbacks)
    assert "in on_batch_begin of callback 'two' (epoch 0, batch 0)" in caught.value.__notes__
    assert _may_trace(tmp_path)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("every", [None, 2])
def test_the_table_has_the_times(every):
    clock, printed = Clock(), []
    passing = clock.passing(on_epoch_begin=0.5, on_batch_end=0.25, on_evaluate_begin=1.0, on_epoch_end=1.0)
    fit(ant.callbacks.profile_steps(every=every, printer=printed.append, clock=clock), passing)
    # What passes in `on_epoch_end` after it has measured belongs to no epoch.
    assert printed[0] == "profile_steps: epoch 1/2 took 3.00 s: training 2.00 s, 333 ms a batch; evaluation 1.00 s"
    table = dict(re.findall(r"^ +(\w+(?: \w+)?)  +(.*)$", printed[-1], re.MULTILINE))
    assert table["in all"] == "8.00 s, 2 epochs"
    spans = "" if every is None else "; of 6 spans median 250 ms, longest 375 ms"
    assert table["training"] == f"4.00 s, 333 ms a batch{spans}"
    assert table["evaluation"] == "2.00 s"
    assert table["compiling"] == "0.00 s"
    assert table["passing"] == "0.00 s" and "profile_steps" not in table
    assert re.fullmatch(r"[\d.]+ GiB in use, [\d.]+ GiB at most", table["memory"])


def test_the_table_comes_after_an_exception_too():
    printed: list[str] = []

    def failing(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(ant.callbacks.profile_steps(printer=printed.append), host(on_batch_end=failing))
    assert printed[-1].startswith("profile_steps:\n  in all ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ant.callbacks.profile("x", start=-1), "profile: start must be a whole number of batches, at least 0"),
        (lambda: ant.callbacks.profile("x", steps=0), "profile: steps must be a whole number of batches, at least 1"),
        (lambda: ant.callbacks.profile("x", epoch=True), "profile: epoch must be a whole number, at least 0, got True"),
        (lambda: ant.callbacks.profile_steps(every=0), "profile_steps: every must be a whole number of batches"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("nothing_compiles")
def test_what_misses_the_beginning_of_the_run_has_the_epochs_that_it_sees_begin():
    clock, printed = Clock(), []
    table = ant.callbacks.profile_steps(every=2, printer=printed.append, clock=clock)
    late = ant.callbacks.when(lambda state, logs: state.epoch >= 1, table)
    fit(late, clock.passing(on_batch_end=0.5), epochs=3)
    assert [line.split(":")[1] for line in printed[:2]] == [" epoch 2/3 took 3.00 s", " epoch 3/3 took 3.00 s"]
    assert "6.00 s, 2 epochs" in printed[2] and len(printed) == 3
