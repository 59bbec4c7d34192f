"""What plain transformers makes of exported folders, in a process that never sees Trueup.

Reads a JSON object on stdin: `policy` and `judge`, folders; `chat`, the questions of a conversation; `prompts`,
conversations that await a reply; `conversations`, whole ones to score; `tokens`, how long replies may be. Writes one
on stdout.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline


def answer(prompt: list[dict], tokens: int) -> tuple[list[int], str]:
    """Greedy: the ids with their end token, and the text."""
    inputs = speaker.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    out = policy.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return out.tolist(), speaker.decode(out, skip_special_tokens=True)


def score(conversation: list[dict]) -> tuple[float, int]:
    """The normalized score, read at the end token, and the length in the judge's tokens."""

    def ids(messages: list[dict], prompt: bool) -> list[int]:
        text = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        text = text if prompt else text[: text.rindex(reader.eos_token) + len(reader.eos_token)]
        return reader(text, add_special_tokens=False)["input_ids"]

    whole = ids(conversation, False)
    with torch.no_grad():
        raw = judge(input_ids=torch.tensor([whole])).logits[0, 0].item()
    figures = judge.config.trueup
    return (raw - figures["score_mean"]) / figures["score_std"], len(whole)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    speaker, policy = (k.from_pretrained(asked["policy"]) for k in (AutoTokenizer, AutoModelForCausalLM))
    reader, judge = (k.from_pretrained(asked["judge"]) for k in (AutoTokenizer, AutoModelForSequenceClassification))
    talk = pipeline("text-generation", model=asked["policy"])
    said, history = [], []
    for question in asked["chat"]:
        history.append({"role": "user", "content": question})
        said.append(answer(history, asked["tokens"])[1])
        history.append({"role": "assistant", "content": said[-1]})
    piped = [
        talk(p, do_sample=False, max_new_tokens=asked["tokens"])[0]["generated_text"][-1]["content"]
        for p in asked["prompts"]
    ]
    answers = [answer(p, asked["tokens"]) for p in asked["prompts"]]
    out = {"chat": said, "ids": [a[0] for a in answers], "texts": [a[1] for a in answers], "piped": piped}
    out |= {"scores": [score(c) for c in asked["conversations"]]}
    out |= {"sides": [policy.config.model_type, judge.config.model_type], "trueup": "trueup" in sys.modules}
    json.dump(out, sys.stdout)
