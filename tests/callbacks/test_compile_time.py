"""The time of compilations is that of their union."""

import jax
import jax.numpy as jnp
import pytest

from ant_jax.callbacks._compile_time import CompileTime


PREFIX = "/jax/core/compile/"


@pytest.fixture
def now(monkeypatch):
    times = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: times[0])
    return times


def test_spans_inside_others_count_once(now):
    compiling = CompileTime()
    for end, duration in ((2.0, 1.0), (4.0, 1.0), (5.0, 5.0), (8.0, 2.0)):
        now[0] = end
        jax.monitoring.record_event_duration_secs(f"{PREFIX}jaxpr_trace_duration", duration)
    assert compiling.seconds == 7.0
    jax.monitoring.record_event_duration_secs("/jax/something/else", 100.0)
    assert compiling.seconds == 7.0
    compiling.stop()
    jax.monitoring.record_event_duration_secs(f"{PREFIX}jaxpr_trace_duration", 100.0)
    assert compiling.seconds == 7.0


def test_jax_reports_what_it_compiles():
    compiling = CompileTime()
    function = jax.jit(lambda x: jnp.sin(x) + 1)
    function(jnp.ones(3))
    first = compiling.seconds
    function(jnp.ones(3))
    compiling.stop()
    assert compiling.seconds == first > 0
