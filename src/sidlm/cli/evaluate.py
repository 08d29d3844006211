"""``sid evaluate``: bits per byte on held-out text, likelihood of answers, the harness; quantised, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, add_device, load, model_folder, number, run_config, write_json
from sidlm.cli.evaluate_tables import show_domains, show_harness, show_quantized, show_rewards, show_tasks
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.config import DataConfig
    from sidlm.data.sources import Document
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.evaluate import DomainNLL
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.train.config import RunConfig


def documents(cfg: DataConfig) -> Iterator[Document]:
    """Documents of all of ``cfg.valid``. Raises SidError naming the source that cannot be read or holds no text."""
    from sidlm.data.sources import iter_documents

    for source in cfg.valid:
        found = iter_documents(source, cfg)
        first = next(found, None)
        if first is None:
            raise SidError(f"no text in {source}: every document is empty, or there is none")
        yield first
        yield from found


def held_out(run: RunConfig | None, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents that a run kept out of its training. Raises SidError if there is no run or it kept none."""
    from sidlm.data.loader import open_data
    from sidlm.data.sources import Document

    if run is None:
        raise SidError("nothing to evaluate: the model lies in no run folder, so give --data, --tasks or both")
    valid = open_data(run.data, tokenizer).valid
    if not len(valid):
        raise SidError(f"the run {run.train.out} held out no documents (data.valid_fraction): give --data")
    return (Document(text=document.text, domain=document.domain) for document in valid)


def harness(args: Any, model: SidForCausalLM) -> dict[str, Any]:
    """Runs and shows the harness's tasks; gives their results as JSON."""
    from transformers import AutoTokenizer

    from sidlm.evaluate.harness import evaluate_harness

    found = evaluate_harness(
        model,
        # a question that spells a control token is text, as in --data and --tasks
        AutoTokenizer.from_pretrained(model_folder(args.model), split_special_tokens=True),
        args.harness,
        batch_size=args.batch_size,
        shots=args.shots,
        limit=args.limit,
    )
    show_harness(found)
    return {name: dataclasses.asdict(part) for name, part in found.items()}


def haystacks(lengths: list[int], model: SidForCausalLM, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Looks for needles at each length and shows how many were found; {length: {"recall": ..., by depth}}."""
    from sidlm.evaluate.needle import needle_recall, needles, reader_of

    report = {}
    for length in lengths:
        report[str(length)] = found = needle_recall(reader_of(model), needles(tokenizer, length))
        print(
            f"needle in {length:,} tokens: " + ", ".join(f"{name} {100 * share:.0f}%" for name, share in found.items())
        )
    return report


def quantize(args: Any, model: SidForCausalLM) -> dict[str, Any]:
    """Quantises the model in place and, if asked, compares the rewards of its answers; gives a JSON report."""
    from sidlm.nn.quantize import quantize_feed_forward

    rewards = answers(args, model) if args.reward else None
    before = rewards() if rewards else []
    try:
        done = quantize_feed_forward(model.model.layers, args.quantize)
    except ImportError as error:
        raise SidError(f"--quantize {args.quantize} needs torchao ({error}): pip install 'sidlm[quantize]'") from error
    except ValueError as error:
        raise SidError(f"--quantize {args.quantize}: {error}") from error
    print(
        f"{done.implementation} in {len(done.layers)} linear layers, blocks {', '.join(map(str, done.kept))} kept: "
        f"{done.bytes_before:,} -> {done.bytes_after:,} bytes of weights"
    )
    report = dataclasses.asdict(done)
    if rewards:
        from sidlm.evaluate.rewards import compare_rewards

        found = compare_rewards(before, rewards())
        show_rewards(found)
        report["rewards"] = dataclasses.asdict(found)
    return report


def answers(args: Any, model: SidForCausalLM) -> Callable[[], list[float]]:
    """What scores the model's answers to --prompts, as it is when called."""
    from transformers import AutoTokenizer

    from sidlm.evaluate.rewards import answer_rewards, read_prompts
    from sidlm.models import SidForSequenceClassification

    prompts = read_prompts(args.prompts, args.limit)
    folder = model_folder(args.reward)
    loaded: Any = SidForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    judge, info = loaded
    if info["missing_keys"]:
        raise SidError(f"{folder}: not a reward model: {min(info['missing_keys'])} is missing in the checkpoint")
    judge = judge.to(model.device).eval()
    tokenizer, judges = AutoTokenizer.from_pretrained(model_folder(args.model)), AutoTokenizer.from_pretrained(folder)

    def score() -> list[float]:
        return answer_rewards(
            model, tokenizer, judge, judges, prompts,
            max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed,
        )  # fmt: skip

    return score


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        "evaluate",
        "Bits per byte of held-out text, per domain, likelihood of the right answer on question files, and tasks of "
        "lm-evaluation-harness.",
        "  sid evaluate runs/demo\n"
        "  sid evaluate runs/demo --data notes.txt --json result.json\n"
        "  sid evaluate runs/demo --tasks arc.jsonl gsm8k.jsonl.zst\n"
        "  sid evaluate runs/demo --harness gsm8k=test.jsonl,train.jsonl mmlu=mmlu.jsonl hellaswag\n"
        "  sid evaluate runs/demo --data notes.txt --quantize int8\n\n"
        "A line of a task file is {question, choices, answer}, with the answer's index, letter or text, or\n"
        "{prompt, completion}.",
    )
    parser.add_argument("model", help="model folder, Sid's or Llama's, or the run folder of a training")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text file, folder, .jsonl[.zst|.gz], .parquet or glob; default, if no tasks are given either: what the "
        "training of this model held out",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="FILE", help=".jsonl or .jsonl.zst files of questions"
    )
    parser.add_argument(
        "--needle", nargs="+", type=number(int, 1), default=[], metavar="LENGTH",
        help="needles in haystacks of so many tokens: the share that the model reads",
    )  # fmt: skip
    parser.add_argument("--json", metavar="OUT", help="also write the result to this file")
    parser.add_argument(
        "--seq-len",
        type=number(int, 1),
        metavar="N",
        help="tokens of context; compare models at the same one; default: the row length of the training, if known",
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=8, metavar="N", help="rows at once; default: 8")
    parser.add_argument("--text-key", default="text", help="field of a document's text in .jsonl and .parquet")
    parser.add_argument("--domain-key", default="domain", help="field of its domain, if there is one")
    harness = parser.add_argument_group("lm-evaluation-harness (pip install 'sidlm[eval]')")
    harness.add_argument(
        "--harness",
        nargs="+",
        default=[],
        metavar="TASK",
        help="gsm8k=FILE, mmlu=FILE, mmlu_pro=FILE or mbpp=FILE (.jsonl[.zst]; FILE,SHOTS takes few-shot examples from "
        "a second file), a task's .yaml file, or a task that the harness knows",
    )
    harness.add_argument("--shots", type=number(int, 0), metavar="N", help="examples before each question")
    harness.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N questions or prompts")
    quantized = parser.add_argument_group("quantised feed-forward layers (pip install 'sidlm[quantize]')")
    quantized.add_argument(
        "--quantize",
        choices=("int8", "float8"),
        help="evaluate the model with inner feed-forward layers in int8 or float8, beside itself on --data",
    )
    quantized.add_argument("--reward", metavar="FOLDER", help="a reward model; compare its scores of both's answers")
    quantized.add_argument("--prompts", metavar="FILE", help="what to answer: .jsonl[.zst] with a key prompt")
    quantized.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="longest answer")
    quantized.add_argument("--seed", type=number(int, 0), default=0, help="of the answers")
    add_device(parser)
    args = parser.parse_args(argv)
    if bool(args.reward) != bool(args.prompts) or (args.reward and not args.quantize):
        parser.error("--reward FOLDER and --prompts FILE go together, with --quantize")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    from sidlm.data.config import DataConfig
    from sidlm.evaluate import bits_per_byte, read_task, score_task

    cfg = DataConfig(valid=tuple(args.data), text_key=args.text_key, domain_key=args.domain_key)
    tasks = {file: read_task(file) for file in args.tasks}
    run = run_config(args.model)
    model, tokenizer = load(args.model, args.device)
    limit = model.config.max_position_embeddings
    seq_len = args.seq_len or (run.data.seq_len if run else limit)
    if seq_len > limit:
        raise SidError(f"--seq-len {seq_len} exceeds the model's {limit} positions")
    if max(args.needle, default=0) > limit:
        raise SidError(f"--needle {max(args.needle)} exceeds the model's {limit} positions")
    report: dict[str, Any] = {"model": args.model, "seq_len": seq_len}

    def likelihood() -> dict[str, DomainNLL]:
        text = documents(cfg) if args.data else held_out(run, tokenizer)
        return bits_per_byte(model, tokenizer, text, seq_len=seq_len, batch_size=args.batch_size)

    reads = args.data or not (tasks or args.harness or args.reward or args.needle)
    former = likelihood() if args.quantize and reads else None
    if args.quantize:
        report["quantized"] = quantize(args, model)
    if reads:
        found = likelihood()
        report["data"] = {domain: part.as_dict() for domain, part in found.items()}
        show_domains(found)
        if former is not None:
            report["quantized"]["data_before"] = {domain: part.as_dict() for domain, part in former.items()}
            show_quantized(former, found)
    if tasks:
        scores = {
            file: score_task(model, tokenizer, questions, batch_size=args.batch_size)
            for file, questions in tasks.items()
        }
        report["tasks"] = {file: dataclasses.asdict(part) for file, part in scores.items()}
        show_tasks(scores)
    if args.needle:
        report["needle"] = haystacks(args.needle, model, tokenizer)
    if args.harness:
        report["harness"] = harness(args, model)
    if args.json:
        write_json(args.json, report)
    return 0
