"""Tokens per second of the sampler against transformers' `generate`, in turns, on one random Llama.

Prompts of 16 to 128 tokens; an end-token bias gives answers of geometric length (mean about 70), cut at 128. Both
draw from the same distribution; useful tokens are counted (up to and with the end token). CPU time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/sampler.py --rounds 3
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trueup.engine.sampler import Sampler, Sampling

END, PAD = 2, 0


def build(width: int, layers: int, vocab: int, dtype: torch.dtype, mean: float) -> PreTrainedModel:
    """A random Llama of 48-wide heads whose end token has a probability of about 1 / mean at every position."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 48 or 1,
        num_key_value_heads=width // 48 or 1,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    bias = torch.zeros(vocab)
    bias[END] = math.log(vocab / mean)
    bias[PAD] = -1e9
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.to(dtype).eval()


def generate(model: PreTrainedModel, prompts: list[list[int]], batch: int, limit: int) -> int:
    """Useful tokens that `generate` draws, in static batches of left-padded prompts."""
    settings = GenerationConfig(do_sample=True, max_new_tokens=limit, eos_token_id=END, pad_token_id=PAD, top_k=0)
    useful = 0
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in part])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(ids, attention_mask=real, generation_config=settings)[:, width:]
        useful += int((out != PAD).sum())
    return useful


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--mean", type=float, default=96)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    model = build(args.width, args.layers, args.vocab, getattr(torch, args.dtype), args.mean)
    plain = build(args.width, args.layers, args.vocab, getattr(torch, args.dtype), args.mean)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(args.shortest, args.longest + 1, (args.prompts,), generator=generator).tolist()
    prompts = [torch.randint(3, args.vocab, (n,), generator=generator).tolist() for n in lengths]
    sampler = Sampler(model, end_id=END, pad_id=PAD, decode=lambda ids: "", slots=args.batch)
    settings = Sampling(max_tokens=args.limit)
    sampler.sample(prompts[:8], Sampling(max_tokens=4), seed=0)
    generate(plain, prompts[:8], args.batch, 4)
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sampler.sample(prompts, settings, seed=0)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return
    ours, theirs = [], []
    for i in range(args.rounds):
        start = time.process_time()
        done = sampler.sample(prompts, settings, seed=i)
        ours.append(sum(len(c.ids) for c in done) / (time.process_time() - start))
        start = time.process_time()
        with torch.no_grad():
            theirs.append(generate(plain, prompts, args.batch, args.limit) / (time.process_time() - start))
        print(f"sampler {ours[-1]:7.0f} tok/s   generate {theirs[-1]:7.0f} tok/s   x {ours[-1] / theirs[-1]:.2f}")
    middle = sorted(a / b for a, b in zip(ours, theirs, strict=True))[len(ours) // 2]
    print(f"median ratio {middle:.2f}")


if __name__ == "__main__":
    main()
