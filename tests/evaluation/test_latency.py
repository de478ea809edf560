"""What is timed and what is counted; how long it takes, no test can know."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.evaluation import latency
from lorax_gen.evaluation.latency import measure_latency, peak_memory
from lorax_gen.method import take_example
from lorax_gen.models.decoding import generate_tokens
from tests.tiny import adapter_of


@pytest.fixture(scope="module")
def edge(tiny_world_system):
    return tiny_world_system.edge


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the clock and for decoding: what was called, in order."""
    log, clock = [], iter(np.cumsum(np.arange(1000)) / 1000)

    def tick():
        log.append("tick")
        return next(clock)

    def answer(params, config, tokens, lengths, **options):
        log.append((tokens.shape, lengths.tolist(), options))
        return np.zeros((1, options["max_new_tokens"]))

    monkeypatch.setattr(latency.time, "perf_counter", tick)
    monkeypatch.setattr(latency, "generate_tokens", answer)
    return log


def test_every_program_has_run_before_any_question_is_timed(edge, calls):
    measure_latency(edge, [[4] * n for n in (3, 8, 9, 200, 5)], new_tokens=2)
    warm, timed = calls[:3], calls[3:]
    assert {shape for shape, *_ in warm} == {(1, 8), (1, 16), (1, 256)}
    assert timed[::3] == timed[2::3] == ["tick"] * 5
    assert [(shape[1], *length) for shape, length, _ in timed[1::3]] == [
        (8, 3), (8, 8), (16, 9), (256, 200), (8, 5)
    ]  # fmt: skip
    assert all(call[2]["max_new_tokens"] == 2 for call in [*warm, *timed[1::3]])


def test_median_and_p90_are_those_of_the_questions_alone(edge, calls):
    result = measure_latency(edge, [[4]] * 11)
    assert result == latency.Latency(
        pytest.approx(np.median(np.arange(1, 23, 2))), pytest.approx(19.0), 11
    )


def test_a_question_is_answered_as_decoding_answers_it(tiny_world_system, edge):
    ids, stops = [5, 9, 7], {"stop_ids": edge.stop_ids}
    pool = tiny_world_system.params["pool"]
    for lora in (None, take_example(pool, 0)):
        tokens, lengths = latency.padded(edge, ids, 3)
        found = latency.answerer(edge, 3, adapter_of(lora))(tokens, lengths)
        expected = generate_tokens(
            edge.decoding_params, edge.config, np.array([ids]), np.array([3]),
            max_new_tokens=3, adapter=adapter_of(lora), **stops,
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def test_memory_is_what_the_program_needs_where_the_device_does_not_tell(edge):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(edge.params))
    small, large = peak_memory(edge, 8), peak_memory(edge, 256)
    assert not small.measured
    assert weights < small.peak_bytes < large.peak_bytes
    cache = 2 * 2 * 256 * 2 * 8 * 4  # keys and values of 2 layers, 256 slots, 2 heads of 8 floats
    assert large.peak_bytes > weights + cache


def test_memory_is_what_the_device_has_held_where_it_tells(edge, calls, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 10**9 + len(calls)})
    monkeypatch.setattr(latency.jax, "local_devices", lambda: [device])
    assert peak_memory(edge, 100) == latency.Memory(10**9 + 1, measured=True)
    assert calls[0][0] == (1, 128)


def test_what_cannot_be_asked_is_refused(edge):
    limit = edge.config.max_position_embeddings
    assert latency.padded(edge, [4] * (limit - 1), 1)[0].shape == (1, limit - 1)
    for questions in ([], [[]], [[4] * limit]):
        with pytest.raises(UserError):
            measure_latency(edge, questions)
