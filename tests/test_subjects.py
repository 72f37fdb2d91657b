"""Every subject: the same prompts for a seed, and a sentence for what is wrong with a file."""
import json
import random
import re

import pytest
from transformers import AutoTokenizer
from workbook import embedded, hub, params, subjects, tokens
from workbook.errors import BadInput

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.Tokenizer(embedded.prepare())


@pytest.fixture(scope="module")
def peer():
    return AutoTokenizer.from_pretrained(embedded.prepare())


def exam(**values):
    return params.check({"run": "x"} | values)


def test_tokens_and_templates_are_those_of_transformers(tokenizer, peer):
    texts = ["", "3 + 4 =", "Janet’s ducks 🦆 lay 16 eggs.\n\n\tTabs", "<|im_start|>user\nno", "日本語 ünï", " " * 40 + "x"]
    assert tokenizer.encode(texts) == peer(texts).input_ids
    assert tokenizer.encode(texts, special=False) == peer(texts, add_special_tokens=False).input_ids
    for text in texts:
        assert tokenizer.chat(text) == peer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    assert tokenizer.vocabulary == len(peer) and tokenizer.special_ids() == set(peer.all_special_ids) | {i for i, t in peer.added_tokens_decoder.items() if t.special}


def test_a_model_without_a_template(tmp_path):
    for path in embedded.prepare().iterdir():
        if path.name != "chat_template.jinja" and path.suffix == ".json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(BadInput, match="key 'chat_template' is true: .* has no chat template; expected false, or chat_template.jinja"):
        tokens.Tokenizer(tmp_path).chat("hello")


@pytest.mark.parametrize("template, text", [
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!", "hello!"),
    ("{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}", "01 January 2026: hello"),
    ("{% if strftime_now is defined %}today{% else %}26 Jul 2024{% endif %}", "26 Jul 2024"),
    ("{% unheard_of %}", "cannot be rendered (TemplateSyntaxError: Encountered unknown tag 'unheard_of'."),
    ("{{ raise_exception('system first') }}", "cannot be rendered (TemplateError: system first); expected one that transformers documents, or false")],
    ids=["marks for training", "a date", "a date if there is one", "not Jinja", "refuses"])
def test_templates_as_models_have_them(tmp_path, template, text):
    """With what transformers gives them; the date is the same every day, or the prompts would not be."""
    for path in embedded.prepare().iterdir():
        if path.name != "chat_template.jinja" and path.suffix == ".json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text(template)
    if "cannot" not in text:
        assert tokens.Tokenizer(tmp_path).chat("hello") == text
    else:
        with pytest.raises(BadInput) as refused:
            tokens.Tokenizer(tmp_path).chat("hello")
        assert text in str(refused.value)


@pytest.mark.parametrize("values", [
    {"subject": "chain_sum", "subject_args": ONE_DIGIT}, {"subject": "gsm_symbolic", "scorers": ["numeric"]},
    {"subject": "sharegpt", "chat_template": False, "max_tokens": 0},
    {"subject": "random", "chat_template": False, "input_len": 17, "output_len": 5, "max_tokens": 0}], ids=lambda v: v["subject"])
def test_the_same_seed_gives_the_same_prompts(tokenizer, values):
    asked = exam(num_prompts=20, **values)
    first, again, other = (subjects.questions(e, tokenizer) for e in (asked, asked, asked.model_copy(update={"seed": 1})))
    assert first == again and [q.prompt_id for q in first] == list(range(20))
    hashes = [subjects.prompt_set_sha256(q) for q in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_chain_sum_is_right(tokenizer, peer):
    for q in subjects.questions(exam(num_prompts=20, subject_args=ONE_DIGIT), tokenizer):
        a, sign, b = re.search(r"(\d) ([+-]) (\d) =", q.text).groups()
        assert int(q.gold) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert q.text.endswith("<|im_start|>assistant\n") and peer.decode(q.token_ids) == q.text


def test_gsm_symbolic_asks_word_problems_with_a_number(tokenizer):
    found = subjects.questions(exam(subject="gsm_symbolic", num_prompts=10), tokenizer)
    assert all(re.fullmatch(r"-?[\d.,/]+", q.gold) for q in found) and len({q.text for q in found}) == 10


def test_random_prompts_are_made_to_length(tokenizer):
    found = subjects.questions(exam(subject="random", chat_template=False, input_len=17, output_len=5, max_tokens=0, num_prompts=50), tokenizer)
    assert {len(q.token_ids) for q in found} == {17} and {q.max_tokens for q in found} == {5} and {q.text for q in found} == {""}
    used = {i for q in found for i in q.token_ids}
    assert not used & tokenizer.special_ids() and max(used) < tokenizer.vocabulary and len(used) > 500


@pytest.mark.parametrize("subject", ["chain_sum", "gsm_symbolic"])
def test_wrong_options_of_a_generated_subject(tokenizer, subject):
    for wrong in ({"terms": 2}, {"min_terms": 5, "max_terms": 2}) if subject == "chain_sum" else ({"terms": 2},):
        with pytest.raises(BadInput, match=f"key 'subject_args' (is|has) .*; expected options of reasoning-gym's {subject}"):
            subjects.require(exam(subject=subject, subject_args=wrong))


def test_a_misspelt_option_is_refused_before_anything_starts():
    with pytest.raises(BadInput, match="^key 'subject_args' has 'min_term'; expected options of reasoning-gym's chain_sum: min_terms, .*; did you mean 'min_terms'.$"):
        subjects.require(exam(subject="chain_sum", subject_args={"min_term": 2}))
    with pytest.raises(BadInput, match="subject_args"):
        subjects.require(exam(subject="random", chat_template=False, input_len=17, output_len=5, max_tokens=0, subject_args={"min_terms": 2}))


# -- files --------------------------------------------------------------------------------------


def ask(tokenizer, path, lines, **values):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return subjects.questions(exam(subject_path=str(path), **({"subject": "jsonl", "num_prompts": 2} | values)), tokenizer, 200)


def test_a_users_own_prompts(tokenizer, tmp_path):
    found = ask(tokenizer, tmp_path / "p.jsonl", [{"prompt": "one?", "answer": 1, "id": "a"}, "\n", {"prompt": "two?", "answer": "2", "id": "b", "more": []}],
                scorers=["numeric"], chat_template=False, prompt_suffix=" Say it.")
    assert [(q.text, q.gold) for q in found] == [("one? Say it.", "1"), ("two? Say it.", "2")]
    found = ask(tokenizer, tmp_path / "q.jsonl", [{"question": "one?"}, {"question": "two?"}], subject_args={"prompt": "question"}, chat_template=False)
    assert [(q.text, q.gold) for q in found] == [("one?", None), ("two?", None)]


def test_gsm8k_from_a_file(tokenizer, tmp_path):
    rows = [{"question": "How many?", "answer": "Two and two.\n#### 4"}, {"question": "How much?", "answer": "A lot: 1,000.\n#### 1,000 "}]
    found = ask(tokenizer, tmp_path / "g.jsonl", rows, subject="gsm8k", scorers=["numeric"])
    assert [q.gold for q in found] == ["4", "1,000"] and "How many?" in found[0].text


def test_gsm8k_from_the_hub(tokenizer, tmp_path, monkeypatch):
    """A stand-in for the downloaded file, in the hub's own format."""
    import pandas as pd
    pd.DataFrame({"question": ["How many?"], "answer": ["#### 4"]}).to_parquet(tmp_path / "test.parquet")
    asked = []
    monkeypatch.setattr(hub, "dataset_file", lambda *words: asked.append(words) or tmp_path / "test.parquet")
    found = subjects.questions(exam(subject="gsm8k", num_prompts=1), tokenizer)
    assert found[0].gold == "4" and asked == [("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main/test-00000-of-00001.parquet")]


GOOD = {"prompt": "one?", "answer": "1"}
BAD_FILES = [
    ([GOOD, '{"prompt": "tw\n'], {}, "{path} line 2: not JSON (Invalid control character at: line 1 column 15 (char 14)); expected an object"),
    ([GOOD, "[1]\n"], {}, "{path} line 2: holds [1]; expected an object"),
    ([{"text": "one?"}], {}, "{path} line 1: key 'prompt' is None; expected a text; the line has text"),
    ([{"prompt": 5}], {}, "{path} line 1: key 'prompt' is 5; expected a text; the line has prompt"),
    ([GOOD | {"id": 7}, "\n", GOOD | {"id": "7"}], {}, "{path} line 3: key 'id' is '7', as on line 1; expected every id once"),
    ([GOOD, {"prompt": "two?"}], {"scorers": ["numeric"]},
     "{path} line 2: key 'answer' is missing and key 'scorers' is ['numeric']; expected a right answer on every line, or scorers: []"),
    ([GOOD | {"answer": "B"}], {"scorers": ["numeric"]},
     "{path} line 1: key 'answer' is 'B' and key 'scorers' is ['numeric'], which compare numbers; expected a number, or scorers: []"),
    ([], {}, "subject 'jsonl' ({path}) has no prompts; expected at least one"),
    ([GOOD], {}, "key 'num_prompts' is 2: subject 'jsonl' has 1; expected at most that, or repeat_prompts: true"),
    ([GOOD, GOOD], {"subject_args": {"promt": "x"}}, "key 'subject_args' has 'promt'; expected names of the fields prompt, answer and id (subject_args=null in SET takes away what the run's file has)"),
    ([{"prompt": "word " * 300}, GOOD], {"chat_template": False},
     "prompt 0 has 301 tokens and needs 1 more for its answer: the window is 200 (engine_args.max_model_len, or the model's own); expected at most 200 together; "
     "it begins 'word word word word word word word word '"),
    ([{"prompt": "word " * 150}, GOOD], {"chat_template": False, "ignore_eos": True},
     "prompt 0 has 151 tokens and needs 64 more for its answer: the window is 200 (engine_args.max_model_len, or the model's own); expected at most 200 together; "
     "it begins 'word word word word word word word word '"),
    ([{"question": "one?", "answer": "1"}], {"subject": "gsm8k"}, "{path} line 1: key 'answer' has no line '#### number'; expected a GSM8K answer"),
    ([GOOD], {"subject": "sharegpt", "max_tokens": 0, "chat_template": False},
     "{path}: not ShareGPT's JSON (AttributeError: 'str' object has no attribute 'get'); expected a list of records with 'conversations'"),
]


@pytest.mark.parametrize("lines, values, sentence", BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))])
def test_a_wrong_file_gets_a_sentence(tokenizer, tmp_path, lines, values, sentence):
    path = tmp_path / "p.jsonl"
    if values.get("subject") == "sharegpt":
        lines = ['["x"]']
    with pytest.raises(BadInput) as caught:
        ask(tokenizer, path, lines, **values)
    assert str(caught.value) == sentence.replace("{path}", str(path))


def test_a_missing_file(tokenizer):
    for asked in (subjects.require, lambda exam: subjects.questions(exam, tokenizer)):
        with pytest.raises(BadInput, match="key 'subject_path' is '/no/where.jsonl': no such file; expected the prompts of subject 'jsonl'"):
            asked(exam(subject="jsonl", subject_path="/no/where.jsonl"))


def test_options_of_another_subject_are_refused_before_any_prompt_is_read(tmp_path):
    """As smoke's own, joined with those of SET."""
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(BadInput, match="key 'subject_args' has 'min_terms'; expected names of the fields prompt, answer and id .subject_args=null in SET takes away"):
        subjects.require(exam(subject="jsonl", subject_path=str(tmp_path / "p.jsonl"), subject_args={"prompt": "question", "min_terms": 2}))


def test_prompts_are_repeated_only_where_asked(tokenizer, tmp_path):
    found = ask(tokenizer, tmp_path / "p.jsonl", [GOOD, {"prompt": "two?"}], num_prompts=5, repeat_prompts=True)
    assert [q.prompt_id for q in found] == [0, 1, 2, 3, 4] and [q.text == found[0].text for q in found] == [True, False, True, False, True]


# -- ShareGPT -----------------------------------------------------------------------------------


def sharegpt(**values):
    return exam(**({"subject": "sharegpt", "num_prompts": 30, "max_tokens": 0, "chat_template": False} | values))


def test_sharegpt_lengths(tokenizer):
    found = subjects.questions(sharegpt(), tokenizer)
    assert all(4 <= len(q.token_ids) <= 1024 and q.max_tokens >= 4 and len(q.token_ids) + q.max_tokens <= 2048 for q in found)
    assert len({q.max_tokens for q in found}) > 10
    capped = subjects.questions(sharegpt(max_tokens=16), tokenizer)
    assert [q.max_tokens for q in capped] == [min(16, q.max_tokens) for q in found]


@pytest.mark.parametrize("seed", [0, 7])
def test_sharegpt_is_what_vllms_sampler_gives(tokenizer, peer, tmp_path, seed):
    """The first 1,000 (prompt, output length) pairs of `vllm.benchmarks`, same file, tokenizer and seed."""
    from vllm.benchmarks.datasets import ShareGPTDataset
    path = tmp_path / "sharegpt.json"
    pairs = list(subjects._conversations(sharegpt()))
    path.write_text(json.dumps([{"conversations": [{"value": prompt}, {"value": answer}]} for prompt, answer in pairs]))
    random.seed(seed)
    theirs = ShareGPTDataset(dataset_path=str(path), random_seed=seed).sample(peer, 1000)
    ours = subjects.questions(sharegpt(num_prompts=1000, seed=seed), tokenizer)
    assert [(q.text, q.max_tokens) for q in ours] == [(r.prompt, r.expected_output_len) for r in theirs]


def test_half_a_character_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d b"}\n')
    exam = params.check({"run": "x", "subject": "jsonl", "subject_path": str(tmp_path / "p.jsonl"), "num_prompts": 1, "max_tokens": 4, "chat_template": False})
    with pytest.raises(BadInput, match=r"key 'prompt' has '\\ud83d', half of a character, at 2; expected text that is UTF-8"):
        subjects.questions(exam, tokens.Tokenizer(embedded.prepare()))
