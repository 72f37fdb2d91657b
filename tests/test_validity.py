"""Each way in which answers can be missing or worthless has its sentence."""
import pandas as pd
import pytest
from workbook import params, validity

EXAM = params.check({"run": "x", "num_prompts": 2, "repetitions": 2, "warmup": 1, "max_tokens": 8})


def rows(**columns):
    base = [{"session": 1, "repetition": r, "point": 0, "replica": 0, "prompt_id": p, "sample": 0, "finish_reason": "stop", "output_tokens": 8, "max_tokens": 8,
             "first_token_s": 0.1, "last_token_s": 0.2} for r in (1, 2) for p in (0, 1)]
    return pd.DataFrame(base).assign(**columns)


def check(requests, exam=EXAM, answers=("7", " "), **options):
    return validity.check(exam, requests, pd.DataFrame({"answer": answers}), **{"weights": "a" * 64, "cached": 0} | options)


def test_a_complete_session_has_no_problem():
    found = check(rows())
    assert (found.expected, found.arrived, found.empty, found.cut_off, found.problems) == (4, 4, 0.5, 0.0, [])


@pytest.mark.parametrize("requests, options, problem", [
    (rows().head(3), {}, "1 of 4 answers are missing or failed (no row)"),
    (rows(finish_reason=["stop", "stop", "stop", "abort"]), {}, "1 of 4 answers are missing or failed (1 × abort)"),
    (rows(output_tokens=[8, 8, 8, 0]), {}, "1 of 4 answers are missing or failed (1 × stop)"),
    (pd.concat([rows(), rows().head(1)]), {}, "1 answers more than the 4 that were asked for"),
    (rows(), {"answers": ("7",)}, "generations.parquet has 1 rows; expected 2"),
    (rows(first_token_s=[0.1, float("nan"), 0.1, 0.1]), {}, "the engine gave no times for some requests"),
    (rows(), {"behind": ["the load fell behind", "the load fell behind"]}, "the load fell behind"),
    (rows(), {"disturbed": ["GPU 0 was slowed down while measuring: hardware slowdown in 12 % of the samples"]},
     "GPU 0 was slowed down while measuring: hardware slowdown in 12 % of the samples"),
    (rows(), {"cached": 640.0}, "640 prompt tokens came from the prefix cache or a KV connector, so a pass was fed by the one before; expected enable_prefix_caching: false"),
    (rows(finish_reason="length", output_tokens=[8, 8, 8, 3]), {}, "1 answers were cut off before the limit that was asked for (is the engine's window smaller than the exam's?)"),
    (rows(), {"worthless": ["the weights look random"]}, "the weights look random"),
    (rows(), {"logprobs": [[-0.1, None]]}, "the model gives 1 log-probabilities that are not finite numbers"),
    (rows(finish_reason="length", output_tokens=[8, 8, 8, 5]), {"exam": EXAM.model_copy(update={"ignore_eos": True})},
     "1 answers are shorter than asked for although end-of-sequence is ignored (is max_model_len too small?)"),
    (pd.concat([rows(), rows(prompt_id=[2, 3, 2, 3])]), {"exam": EXAM.model_copy(update={"num_prompts": 4, "engine": "async", "engine_args": {"data_parallel_size": 2}}), "answers": ("7",) * 4},
     "replica 1 of 2 answered nothing: it is dead, or no request reaches it"),
    (rows(), {"exam": EXAM.model_copy(update={"weights_sha256": "b" * 64})},
     "the weights loaded have SHA-256 aaaaaaaaaaaa...; key 'weights_sha256' asserts bbbbbbbbbbbb..."),
])
def test_problems(requests, options, problem):
    assert check(requests, **options).problems == [problem]


@pytest.mark.parametrize("values, said", [
    ({"engine": "async", "engine_args": {"data_parallel_size": 4}}, False), ({"engine": "async", "engine_args": {"data_parallel_size": 4}, "num_prompts": 8}, True),
    ({"engine": "async", "engine_args": {"data_parallel_size": 4}, "num_prompts": 8, "load": "poisson", "request_rate": 1.0}, False),
    ({"engine": "async", "engine_args": {"data_parallel_size": 4}, "num_prompts": 8, "load": "closed", "concurrency": [2]}, False), ({"engine": "server", "replicas": 4}, True)])
def test_a_load_that_need_not_reach_every_replica(values, said):
    """vLLM's balancer gives the first of idle engines the next request, so fewer under way than engines leave the last ones idle."""
    exam = params.check({"run": "x", "num_prompts": 2, "repetitions": 8, "warmup": 1, "max_tokens": 8} | values)
    assert any("answered nothing" in problem for problem in check(rows(), exam).problems) is said


def test_the_points_of_a_sweep_must_not_feed_each_other():
    once = EXAM.model_copy(update={"repetitions": 1, "warmup": 0})
    assert check(rows().head(2), once, cached=640.0).problems == [], "a pass that finds its own prompts again is measured as it is"
    sweep = pd.concat([rows(point=2).head(2), rows(point=1).head(1)])
    assert check(sweep, once.model_copy(update={"concurrency": [1, 2]}), cached=640.0).problems == [
        "640 prompt tokens came from the prefix cache or a KV connector, so a pass was fed by the one before; expected enable_prefix_caching: false"]


def test_every_point_of_a_sweep_is_expected():
    exam = EXAM.model_copy(update={"concurrency": [1, 2]})
    sweep = pd.concat([rows(point=2), rows(point=1)[rows().prompt_id == 0]])
    assert check(sweep, exam).expected == check(sweep, exam).arrived == 6 and check(sweep, exam).problems == []
    assert check(sweep.iloc[1:], exam).problems == ["1 of 6 answers are missing or failed (no row)"]
