"""A reward model as a Scorer: any family, with its own tokenizer and chat template, normalized as its config says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trueup.data.batches import rectangle
from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.rows import forward
from trueup.models.net import Net
from trueup.models.roles import Models, Whole, load_reward
from trueup.records import Completion, Prompt, Scores, UserError, start_of


class RewardModel:
    """Scores by text: the reply is tokenized by the reward model's own tokenizer, its end token after it unless
    the completion was cut by length. With `models`, weights that are theirs are not loaded again."""

    def __init__(self, folder: str, mesh: Mesh, models: Models | None = None) -> None:
        self.name, self.mesh = str(folder), mesh
        self.chat = Chat.load(folder)
        self.net: Net = load_reward(folder, models or Whole(folder, mesh.device))

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        asked = {id(p): p for p in prompts}  # one with many answers is written out once
        opening = {key: self.chat.prompt_ids(p.messages) for key, p in asked.items()}
        rows = [
            opening[id(p)] + self.chat.reply_ids(c.text, c.ended) for p, c in zip(prompts, completions, strict=True)
        ]
        ids, lengths = rectangle(rows, self.chat.pad_id)
        scores = forward(self.net, {"ids": ids, "lengths": lengths}, self.mesh)["scores"]
        value = np.asarray(scores.double().cpu())
        for i in np.flatnonzero(~np.isfinite(value))[:1]:
            told = f"its score is {value[i]} for an answer to {start_of(prompts[i].text)}"
            raise UserError(f"{self.name}: {told}; a reward model gives finite numbers (are its weights damaged?)")
        return Scores(value)
