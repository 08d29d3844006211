"""lm-evaluation-harness on made-up questions, against sidlm.evaluate.nll on the same tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch
import zstandard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sidlm.data.sources import Document
from sidlm.errors import SidError
from sidlm.evaluate import bits_per_byte, span_nll
from sidlm.evaluate.harness import _spec, evaluate_harness
from sidlm.evaluate.nll import Span

WORDS = ["quick fox", "lazy dog", "brown", "the number 7", "jumps over"]
GSM8K = [{"question": f"How many is {i}?", "answer": f"{WORDS[i]} is {i}.\n#### {i}"} for i in range(5)]
MMLU = [
    {"subject": "x", "question": f"Which is {i}?", "choices": WORDS[: 1 + i % 4], "answer": i % 2 if i % 4 else 0}
    for i in range(5)
]
MBPP = [
    {"text": f"Return {i}.", "code": f"def f():\r\n    return {i}", "test_list": [f"assert f() == {i}"]}
    for i in range(3)
]


def write(path, items):
    text = "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    named = {"gsm8k": GSM8K, "mmlu": MMLU, "mbpp": MBPP}
    return {name: write(folder / f"{name}.jsonl.zst", items) for name, items in named.items()}


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def nlls(model, tokenizer, pairs, max_len=1 << 30):
    """NLL of each answer given its prompt, by sidlm.evaluate.nll."""
    spans = []
    for prompt, answer in pairs:
        prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer)
        room = max_len - 1 - len(answer)
        context = [tokenizer.bos_id, *(prompt[len(prompt) - room :] if len(prompt) > room else prompt)]
        spans.append(Span([*context, *answer], len(context)))
    return span_nll(model, spans)


def mmlu_pairs(item):
    answers = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", item["choices"], strict=False)]
    prompt = f"Question: {item['question']}\n" + "".join(f"{answer}\n" for answer in answers) + "Answer:"
    return [(prompt, " " + answer) for answer in answers]


def test_likelihoods_are_our_own(model, tokenizer, hf_tokenizer, files):
    asked = [f"{name}={file}" for name, file in files.items()]
    found = evaluate_harness(model, hf_tokenizer, asked, shots=0, batch_size=3, max_len=1 << 12)
    assert list(found) == ["sid_gsm8k", "sid_mmlu", "sid_mbpp"]
    task = "You are an expert Python programmer, and here is your task: {} "
    task += "Your code should pass these tests:\n\n{}\n[BEGIN]"
    pairs = {
        "sid_gsm8k": [(f"Question: {item['question']}\nAnswer:", " " + item["answer"]) for item in GSM8K],
        "sid_mmlu": [mmlu_pairs(item)[item["answer"]] for item in MMLU],
        "sid_mbpp": [
            (task.format(item["text"], item["test_list"][0]), "\n" + item["code"].replace("\r\n", "\n"))
            for item in MBPP
        ],
    }
    for name, result in found.items():
        want = nlls(model, tokenizer, pairs[name])
        mean = sum(want) / len(want)
        assert result.questions == len(want) and result.shots == 0 and result.cut == 0
        assert result.nll == pytest.approx(mean, rel=1e-5), name
        size = sum(len(answer.encode()) for _, answer in pairs[name])
        assert result.nll_per_byte == pytest.approx(sum(want) / size, rel=1e-5)
        spread = math.sqrt(sum((nll - mean) ** 2 for nll in want) / (len(want) - 1))
        assert result.nll_ci95 == pytest.approx(1.96 * spread / math.sqrt(len(want)), rel=1e-3)


def test_accuracy_and_its_interval(model, tokenizer, hf_tokenizer, files):
    (result,) = evaluate_harness(model, hf_tokenizer, [f"mmlu={files['mmlu']}"]).values()
    hits = 0
    for item in MMLU:
        scores = nlls(model, tokenizer, mmlu_pairs(item))
        hits += scores.index(min(scores)) == item["answer"]
    share = hits / len(MMLU)
    assert result.metrics["acc"].value == pytest.approx(share)
    assert result.metrics["acc"].ci95 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / len(MMLU)))


def test_five_shots_from_another_file_and_prompts_cut_behind_bos(model, tokenizer, hf_tokenizer, files, tmp_path):
    shot = {"question": "One?", "answer": "dog"}
    shots = write(tmp_path / "shots.jsonl", [shot] * 6)
    task = f"gsm8k={files['gsm8k']},{shots}"
    example = "Question: One?\nAnswer: dog\n\n"
    pairs = [(example * 5 + f"Question: {item['question']}\nAnswer:", " " + item["answer"]) for item in GSM8K]
    (whole,) = evaluate_harness(model, hf_tokenizer, [task], max_len=1 << 12).values()
    want = nlls(model, tokenizer, pairs)
    assert whole.shots == 5 and whole.cut == 0 and whole.nll == pytest.approx(sum(want) / 5, rel=1e-5)
    (cut,) = evaluate_harness(model, hf_tokenizer, [task], max_len=60, limit=4).values()
    want = nlls(model, tokenizer, pairs[:4], max_len=60)
    assert cut.questions == cut.cut == 4 and cut.nll == pytest.approx(sum(want) / 4, rel=1e-5)
    assert abs(cut.nll - whole.nll) > 1e-3


def test_shots_from_the_questions_themselves_leave_out_the_one_asked(model, tokenizer, hf_tokenizer, tmp_path):
    two = write(tmp_path / "two.jsonl", GSM8K[:2])
    (result,) = evaluate_harness(model, hf_tokenizer, [f"gsm8k={two}"], shots=1, max_len=1 << 12).values()
    prompts = [f"Question: {item['question']}\nAnswer:" for item in GSM8K[:2]]
    answers = [" " + item["answer"] for item in GSM8K[:2]]
    pairs = [(f"{prompts[1 - i]}{answers[1 - i]}\n\n{prompts[i]}", answers[i]) for i in range(2)]
    assert result.shots == 1 and result.nll == pytest.approx(sum(nlls(model, tokenizer, pairs)) / 2, rel=1e-5)


def test_a_llama_and_low_precision(hf_tokenizer, files):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(hf_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    asked = [f"gsm8k={files['gsm8k']}"]
    exact = evaluate_harness(llama, hf_tokenizer, asked, shots=2)["sid_gsm8k"]
    low = evaluate_harness(llama.bfloat16(), hf_tokenizer, asked, shots=2)["sid_gsm8k"]
    # bfloat16 holds three digits; had the sum over 40 tokens been in it, two would be left
    assert low.nll == pytest.approx(exact.nll, rel=2e-2) and low.nll != exact.nll
    assert low.nll * 256 % 1 != 0


def test_a_yaml_file_of_ones_own_with_generated_answers(model, hf_tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", GSM8K)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        f"  cache_dir: {tmp_path / 'cache'}\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list:\n  - metric: exact_match\n"
    )
    (result,) = evaluate_harness(model, hf_tokenizer, [str(tmp_path / "mine.yaml")]).values()
    assert result.questions == 5 and result.nll is None and result.metrics["exact_match"].value == 0
    assert result.metrics["exact_match"].ci95 == 0


def test_a_group_is_its_tasks_together(model, hf_tokenizer, tmp_path):
    data = [write(tmp_path / f"{i}.jsonl", MMLU[: 2 + i]) for i in range(2)]
    common = "test_split: test, output_type: multiple_choice, doc_to_choice: choices, doc_to_target: answer"
    tasks = "".join(
        f"  - {{task: part{i}, dataset_path: json, {common}, doc_to_text: '{{{{question}}}}', "
        f"dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {tmp_path / 'cache'}}}}}\n"
        for i, path in enumerate(data)
    )
    weight = "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    weight += "  - {metric: acc_norm, weight_by_size: false}\n"
    (tmp_path / "both.yaml").write_text(f"group: both\ntask:\n{tasks}{weight}")
    found = evaluate_harness(model, hf_tokenizer, [str(tmp_path / "both.yaml")])
    (first, second), both = [found[f"both::part{i}"] for i in range(2)], found["both"]
    assert (first.questions, second.questions, both.questions) == (2, 3, 5)
    assert both.nll == pytest.approx((2 * first.nll + 3 * second.nll) / 5)
    share = (2 * first.metrics["acc"].value + 3 * second.metrics["acc"].value) / 5
    assert both.metrics["acc"].value == pytest.approx(share)
    assert both.metrics["acc"].ci95 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 5))
    other = (first.metrics["acc_norm"].value + second.metrics["acc_norm"].value) / 2
    assert both.metrics["acc_norm"].value == pytest.approx(other)
    pooled = (2 * first.metrics["acc_norm"].value + 3 * second.metrics["acc_norm"].value) / 5
    assert (both.metrics["acc_norm"].ci95 is None) == (abs(other - pooled) > 1e-9)


def test_likelihood_of_whole_texts(model, tokenizer, hf_tokenizer, texts, tmp_path):
    texts = [text for text in texts if text]
    data = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        f"  cache_dir: {tmp_path / 'cache'}\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    (result,) = evaluate_harness(model, hf_tokenizer, [str(tmp_path / "rolling.yaml")], max_len=1 << 12).values()
    documents = [Document(text=text, domain="all texts") for text in texts]
    want = bits_per_byte(model, tokenizer, documents, seq_len=1 << 12)["all"].bits_per_byte
    assert result.nll is None and result.metrics["bits_per_byte"].ci95 is None
    assert result.metrics["bits_per_byte"].value == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("gsm8k", {"question": "a"}, r"bad\.jsonl:2: task gsm8k needs the key 'answer'; the line has question"),
        ("gsm8k", "{", r"bad\.jsonl:2: Expecting"),
        ("gsm8k", [], r"bad\.jsonl:2: a line must be a JSON object, got list"),
        ("gsm8k", {"question": "a", "answer": ""}, "'answer' must be a text"),
        ("mmlu", {"question": "a", "choices": [], "answer": 0}, "list of 1 to 26"),
        ("mmlu_pro", {"question": "a", "choices": ["b", "c"], "answer": 2}, "answer index 2 is outside its 2 choices"),
        ("mbpp", {"text": "a", "code": "b", "test_list": "c"}, "'test_list' must be a list"),
    ],
)
def test_a_malformed_line_is_named(model, hf_tokenizer, tmp_path, task, line, message):
    good = {"gsm8k": GSM8K, "mmlu": MMLU, "mmlu_pro": MMLU, "mbpp": MBPP}[task][0]
    path = write(tmp_path / "bad.jsonl", [good, line])
    with pytest.raises(SidError, match=message):
        evaluate_harness(model, hf_tokenizer, [f"{task}={path}"])


def test_tasks_that_cannot_be_run(model, hf_tokenizer, files, tmp_path):
    for task, message in {
        "gsm8k": "task gsm8k needs a file: gsm8k=FILE",
        "absent.yaml": r"no such task file: absent\.yaml",
        f"arc={tmp_path}": "no task 'arc' takes a file; there are gsm8k, mmlu",
        f"gsm8k={tmp_path / 'absent'}": "no such task file",
        f"gsm8k={write(tmp_path / 'empty.jsonl', [])}": "no questions in it",
    }.items():
        with pytest.raises(SidError, match=message):
            evaluate_harness(model, hf_tokenizer, [task])
    with pytest.raises(SidError, match=r"gsm8k\.jsonl\.zst: 5 examples before each question need more than 4 others"):
        evaluate_harness(model, hf_tokenizer, [f"gsm8k={files['gsm8k']}"])
    with pytest.raises(SidError, match="the harness has no task 'arc_esay'; did you mean 'arc_easy'"):
        _spec("arc_esay", tmp_path, None, ["arc_easy", "boolq"])  # reading all of its names takes seconds
    absent = f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'no.jsonl'}}}\n"
    (tmp_path / "mine.yaml").write_text(absent + 'test_split: test\ndoc_to_text: ""\ndoc_to_target: ""\n')
    with pytest.raises(SidError, match=r"the data of .*mine\.yaml cannot be read: Unable to find .*no\.jsonl"):
        evaluate_harness(model, hf_tokenizer, [str(tmp_path / "mine.yaml")])
    with pytest.raises(SidError, match="sid_gsm8k is asked for twice"):
        evaluate_harness(model, hf_tokenizer, [f"gsm8k={files['gsm8k']}"] * 2, shots=0)
    (tmp_path / "other.yaml").write_text("dataset_path: json\n")
    with pytest.raises(SidError, match=r"other\.yaml: names no task"):
        evaluate_harness(model, hf_tokenizer, [str(tmp_path / "other.yaml")])
    with pytest.raises(SidError, match=r"an answer of \d+ tokens does not fit in 5"):
        evaluate_harness(model, hf_tokenizer, [f"gsm8k={files['gsm8k']}"], shots=0, max_len=5)
