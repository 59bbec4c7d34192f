"""Tokens per second of one SFT step of the learner against a plain padded transformers step, in turns.

One random Llama, one minibatch of prompts of 16 to 128 and answers of 64 to 128 tokens; the loss counts answer tokens
on both sides and must be the same number. The plain step pads to the longest row, scores every position through the
model's own head, and steps fused AdamW. CPU time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/learner.py --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trueup.engine.learner import Learner, Optim
from trueup.models.net import Batch, Net


def nll(outputs: dict[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    return {"loss": (-outputs["logprobs"], batch["mask"].float())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--answer", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    heads = max(1, args.width // 48)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=args.width * 8 // 3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    plain = LlamaForCausalLM(config)
    optim = Optim(lr=1e-4, micro_tokens=args.micro_tokens)
    learner = Learner(Net(copy.deepcopy(plain), "policy"), optim, steps=100, precision=args.precision)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    generator = torch.Generator().manual_seed(1)
    low, high = args.prompt
    prompt = torch.randint(low, high + 1, (args.batch,), generator=generator)
    low, high = args.answer
    lengths = prompt + torch.randint(low, high + 1, (args.batch,), generator=generator)
    width = int(lengths.max())
    column = torch.arange(width)[None]
    ids = torch.randint(3, args.vocab, (args.batch, width), generator=generator)
    real = column < lengths[:, None]
    mask = real & (column >= prompt[:, None])
    batch = {"ids": ids.where(real, 0), "lengths": lengths, "mask": mask}

    def ours() -> float:
        loss = learner.forward_backward(batch, nll)["loss"]
        learner.step()
        return loss

    def theirs() -> float:
        labels = batch["ids"].masked_fill(~mask, -100)
        loss = plain(input_ids=batch["ids"], attention_mask=real.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    print(f"loss: learner {ours():.6f}   plain {theirs():.6f}")
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))
        return
    tokens, ratios = int(lengths.sum()), []
    for _ in range(args.rounds):
        start = time.process_time()
        ours()
        middle = time.process_time()
        theirs()
        a, b = middle - start, time.process_time() - middle
        ratios.append(b / a)
        print(f"learner {tokens / a:7.0f} tok/s   plain {tokens / b:7.0f} tok/s   x {b / a:.2f}")
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
