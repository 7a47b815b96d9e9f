"""Train the tiny byte-level Qwen3-MoE checkpoint in models/tiny-qwen3-moe on the King James Bible.

The text is public domain and is not kept in this repository. On Debian or Ubuntu:

    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg -x "$package" kjv; done
    kjv/usr/bin/bible -f -p kjv/usr/lib gen1:1-rev22:21 > kjv.txt
    python scripts/train_tiny.py kjv.txt --prompts examples/prompts.txt

The script writes the checkpoint, its tokenizer, training.json and README.md (the model card). `bible -f` prints one
verse a line as "Ge1:1 In the beginning ..."; the reference is dropped, a chapter ends with <|endoftext|>, and every
20th chapter is held out.

Axis suffixes: N tokens of a batch, D hidden, E experts, K experts per token, B windows, S window length.
"""

import argparse
import copy
import datetime
import json
import math
import platform
import random
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END, PAD = 256, 257
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny-qwen3-moe

A real, tiny Mixture-of-Experts language model for the tests and the demo of moetrace: {parameters:,} parameters,
Qwen3-MoE architecture, bytes as tokens. It was trained, so its router has preferences and its choices depend on the
text. It is not for any other use.

{architecture}

## Data and licence

The King James Bible (1611), public domain, as packaged by Debian (`bible-kjv-text`); the text is not in this
repository. One verse a line without its reference, {train_bytes:,} bytes to train on; every 20th chapter,
{held_bytes:,} bytes, is held out. A chapter ends with `<|endoftext|>`. The weights, like the rest of this repository,
are under Apache-2.0.

## How it was made

    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg -x "$package" kjv; done
    kjv/usr/bin/bible -f -p kjv/usr/lib gen1:1-rev22:21 > kjv.txt
    {command}

{date}, {hardware}, {seconds} s of training;
{versions}.
Another machine or version gives a similar model, not equal weights.

## Results

**{saved_val_bits} bits per byte** on the held-out chapters, measured on the saved bfloat16 weights as
`from_pretrained` loads them on a CPU (windows of {context} bytes, nothing carried from one to the next).
The weights kept are those of the best validation.

{curve}

Routing on the held-out text. Entropy of the experts' load is relative to a uniform load; the last column is how many
bits the input byte alone tells about a chosen expert, of the {full_bits:.0f} that a uniform choice of one has.

{routing}

## Samples

Greedy, then sampled at temperature 0.7 with seed 0, 120 new tokens:

{samples}

## Limits

It knows one book, in English of 1611, and no facts; the text carries the views of its time. Sentences drift after a few
words. It was trained on windows of {context} bytes, so use beyond that is untested (the limit is 1,024). Parallel
passages of the Bible repeat almost word for word, so held-out chapters are not entirely unseen. Ids 258 and 259 are
unused padding of the vocabulary. There is no chat template.
"""
SAMPLE_PROMPTS = ("In the beginning God created", "And the LORD spake unto Moses, saying,", "Blessed are they that")


def read_chapters(path: Path) -> list[list[str]]:
    """Chapters of the `bible -f` output, each a list of verses without their references."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text("ascii").splitlines():
        reference, verse = line.split(" ", 1)
        chapters.setdefault(reference.split(":")[0], []).append(re.sub(r"\s+", " ", verse).strip())
    return list(chapters.values())


def to_ids(chapters: list[list[str]]) -> torch.Tensor:
    """One int16 stream: the bytes of every chapter, one verse a line, each chapter closed by END."""
    return torch.tensor([i for c in chapters for i in (*"".join(v + "\n" for v in c).encode(), END)], dtype=torch.int16)


def verse_beginnings(chapters: list[list[str]], count: int) -> list[str]:
    """`count` different beginnings of verses, 20 to 120 bytes, cut between words, spread over the chapters."""
    rng = random.Random(0)
    prompts: dict[str, None] = {}
    for verse in (verse for chapter in chapters for verse in chapter):
        words = verse[: rng.randint(30, 110)].rsplit(" ", 1)[0]
        if 20 <= len(words) <= 120 and len(words) <= 0.8 * len(verse):
            prompts[words] = None
    return [list(prompts)[i * len(prompts) // count] for i in range(count)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b is id b, exactly: a byte-level BPE over the 256 byte characters and no merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that ByteLevel writes as themselves
    others = [b for b in range(256) if b not in plain]
    vocab = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=96,
        intermediate_size=320,
        moe_intermediate_size=40,
        num_hidden_layers=5,
        mlp_only_layers=[0],
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        router_aux_loss_coef=0.005,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Qwen3MoeForCausalLM(config)


def every_expert(experts, hidden_ND, index_NK, weight_NK):
    """All experts on all tokens, unchosen ones weighted zero: at this size faster on a GPU than grouping tokens."""
    weight_NE = torch.zeros(len(hidden_ND), experts.num_experts, device=hidden_ND.device, dtype=weight_NK.dtype)
    weight_EN = weight_NE.scatter(1, index_NK, weight_NK).T
    gate, up = torch.matmul(hidden_ND, experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    return torch.einsum("enf,edf->nd", experts.act_fn(gate) * up * weight_EN.unsqueeze(-1), experts.down_proj)


ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)


def balance_loss(router_logits, num_experts: int, top_k: int) -> torch.Tensor:
    """Switch Transformer's load balancing loss (arXiv 2101.03961, eq. 4-6), a mean over layers; 1 when balanced."""
    losses = []
    for logits_NE in router_logits:
        probs_NE = logits_NE.float().softmax(-1)
        chosen_NE = torch.zeros_like(probs_NE).scatter(1, probs_NE.topk(top_k).indices, 1.0 / top_k)
        losses.append(num_experts * (chosen_NE.mean(0) * probs_NE.mean(0)).sum())
    return torch.stack(losses).mean()


def entropy(probabilities: torch.Tensor) -> float:
    """Shannon entropy in bits."""
    return torch.special.entr(probabilities).sum().item() / math.log(2)


@torch.no_grad()
def evaluate(model, ids: torch.Tensor, context: int) -> tuple[float, list[dict]]:
    """Bits per byte over consecutive windows of `context`, and routing statistics for each MoE layer."""
    config, bits, routed = model.config, 0.0, {}
    windows_BS = ids[: (len(ids) - 1) // context * context].view(-1, context).long()
    targets_BS = ids[1 : windows_BS.numel() + 1].view(-1, context).long()
    for inputs, targets in zip(windows_BS.split(32), targets_BS.split(32)):
        out = model(input_ids=inputs, output_router_logits=True, use_cache=False)
        bits += F.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        for layer, logits_NE in enumerate(out.router_logits):
            # One count for each (input byte, expert) pair.
            pairs = inputs.reshape(-1, 1) * config.num_experts + logits_NE.topk(config.num_experts_per_tok).indices
            counts = torch.bincount(pairs.flatten(), minlength=config.vocab_size * config.num_experts)
            routed[layer] = routed.get(layer, 0) + counts.view(config.vocab_size, -1).double().cpu()
    moe_layers = [n for n in range(config.num_hidden_layers) if n not in config.mlp_only_layers]
    statistics = []
    for layer, counts_VE in zip(moe_layers, routed.values()):
        joint_VE = counts_VE / counts_VE.sum()
        load_E = joint_VE.sum(0)
        load_bits, byte_bits, joint_bits = entropy(load_E), entropy(joint_VE.sum(1)), entropy(joint_VE)
        statistics.append(
            {
                "layer": layer,
                "normalised_load_entropy": round(load_bits / math.log2(config.num_experts), 4),
                "max_load_share": round(load_E.max().item(), 4),
                "min_load_share": round(load_E.min().item(), 5),
                "bits_about_expert_from_input_byte": round(load_bits + byte_bits - joint_bits, 3),
            }
        )
    return bits / math.log(2) / (targets_BS != END).sum().item(), statistics


def train(model, train_ids: torch.Tensor, held_ids: torch.Tensor, args) -> list[list[float]]:
    """Train in place, leave the weights of the best validation in the model, return [step, train bits, val bits]."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    config, warmup = model.config, min(200, args.steps // 10)

    def rate(step: int) -> float:
        rest = (step - warmup) / max(1, args.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    offsets = torch.arange(args.context + 1, device=args.device)
    curve, best, losses, start = [], (math.inf, None), [], time.monotonic()
    for step in range(1, args.steps + 1):
        first = torch.randint(len(train_ids) - args.context - 1, (args.batch, 1), device=args.device)
        window = train_ids[first + offsets].long()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            out = model(input_ids=window[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), window[:, 1:].flatten())
        balance = balance_loss(out.router_logits, config.num_experts, config.num_experts_per_tok)
        (loss + config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if step % args.every == 0 or step == args.steps:
            model.eval()
            val_bits, statistics = evaluate(model, held_ids, args.context)
            model.train()
            curve.append([step, round(torch.stack(losses).mean().item() / math.log(2), 4), round(val_bits, 4)])
            entropies = [s["normalised_load_entropy"] for s in statistics]
            print(
                *curve[-1], f"balance {balance.item():.2f}", entropies, f"{time.monotonic() - start:.0f} s", flush=True
            )
            losses = []
            if val_bits < best[0]:
                best = (val_bits, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return curve


@torch.no_grad()
def continuations(model, tokenizer) -> list[dict]:
    samples = []
    for prompt in SAMPLE_PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        greedy = model.generate(**encoded, max_new_tokens=120, do_sample=False)
        torch.manual_seed(0)
        sampled = model.generate(**encoded, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=0)
        text = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (greedy, sampled)]
        samples.append({"prompt": prompt, "greedy": text[0], "sampled": text[1]})
    return samples


def describe_cpu() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    return f"{torch.get_num_threads()} CPU thread(s) of {names[0]}"


def to_json(record: dict) -> str:
    """One line for each row of the curve, so that the file can be read and compared."""
    rows = ",\n    ".join(json.dumps(row) for row in record["curve"])
    return json.dumps({**record, "curve": "@"}, indent=2).replace('"@"', f"[\n    {rows}\n  ]") + "\n"


def table(header: str, rows) -> str:
    return "\n".join(
        [f"| {header} |", "|" + "---:|" * (header.count("|") + 1), *(f"| {' | '.join(row)} |" for row in rows)]
    )


def wrap(text: str, indent: str, end: str = "") -> str:
    lines = textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)
    return f"{end}\n{indent}".join(lines)


def to_card(record: dict, config, context: int) -> str:
    curve = record["curve"]
    shown = sorted({round(i * (len(curve) - 1) / 9) for i in range(10)})
    low, high = min(row[2] for row in curve), max(row[2] for row in curve)
    spark = "".join("▁▂▃▄▅▆▇█"[round(7 * (row[2] - low) / (high - low or 1))] for row in curve)
    rows = table("step | training bits | validation bits", (map(str, curve[i]) for i in shown))
    names = "layer | entropy of load | largest share | smallest share | bits from the input byte"
    samples = (wrap(f"- {s[kind]!r}", "  ") for s in record["samples"] for kind in ("greedy", "sampled"))
    return CARD.format(
        **{k: record[k] for k in ("date", "hardware", "seconds", "parameters", "train_bytes", "saved_val_bits")},
        command=wrap(record["command"], "        ", " \\"),
        held_bytes=record["held_out_bytes"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        context=context,
        full_bits=math.log2(config.num_experts),
        architecture=(
            f"{config.num_hidden_layers} decoder layers, of which layers {config.mlp_only_layers} dense, hidden size "
            f"{config.hidden_size}, {config.num_experts} experts of\nwidth {config.moe_intermediate_size}, "
            f"{config.num_experts_per_tok} for each token, no shared expert. Byte b is token id b; 256 is "
            "`<|endoftext|>`, 257 `<|pad|>`."
        ),
        curve=f"{rows}\n\nValidation bits over training: `{spark}`",
        routing=table(names, (map(str, row.values()) for row in record["routing"])),
        samples="\n".join(samples),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="output of `bible -f`")
    parser.add_argument("--out", type=Path, default=Path("models/tiny-qwen3-moe"))
    parser.add_argument("--prompts", type=Path, help="also write 128 beginnings of held-out verses to this file")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--experts", default=None, help="experts implementation (default: every_expert on cuda)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    chapters = read_chapters(args.text)
    held = chapters[19::20]
    train_ids = to_ids([c for n, c in enumerate(chapters) if n % 20 != 19]).to(args.device)
    held_ids = to_ids(held).to(args.device)
    model = build_model().to(args.device)
    model.set_experts_implementation(args.experts or ("every_expert" if args.device == "cuda" else "grouped_mm"))
    start = time.monotonic()
    curve = train(model, train_ids, held_ids, args)
    seconds = round(time.monotonic() - start)

    model.generation_config = GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)
    if args.prompts:
        args.prompts.parent.mkdir(parents=True, exist_ok=True)
        args.prompts.write_text("".join(prompt + "\n" for prompt in verse_beginnings(held, 128)))

    # What is reported is measured on what was written, loaded the way a user loads it, on the CPU.
    saved = AutoModelForCausalLM.from_pretrained(args.out).eval()
    saved_val_bits, routing = evaluate(saved, held_ids.cpu(), args.context)
    samples = continuations(saved, AutoTokenizer.from_pretrained(args.out))
    record = {
        "command": shlex.join(["python", "scripts/train_tiny.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"one {torch.cuda.get_device_name()}" if args.device == "cuda" else describe_cpu(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "seconds": seconds,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "train_bytes": (train_ids != END).sum().item(),
        "held_out_bytes": (held_ids != END).sum().item(),
        "saved_val_bits": round(saved_val_bits, 4),
        "curve": curve,
        "routing": routing,
        "samples": samples,
    }
    (args.out / "training.json").write_text(to_json(record))
    (args.out / "README.md").write_text(to_card(record, saved.config, args.context))
    print(json.dumps({k: record[k] for k in ("saved_val_bits", "seconds", "routing", "samples")}, indent=1))


if __name__ == "__main__":
    main()
