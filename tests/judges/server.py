"""A server of OpenAI's chat protocol on loopback, with a real model behind it; it can be told to fail.

Started in a thread of the test's process. `faults` is a list that each request takes one from: a status, one with its
Retry-After, or "junk".
"""

from __future__ import annotations

import socket
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from transformers import AutoModelForCausalLM, AutoTokenizer


class Server:
    def __init__(self, folder, logprobs: bool = True) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.logprobs, self.faults, self.bodies, self.tokens = logprobs, [], [], []
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        self.answers: list[str] = []
        """Told in place of what the model says, where there are any."""
        app = FastAPI()
        app.post("/v1/chat/completions")(self.complete)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.02)

    def complete(self, body: dict, request: Request) -> Response:  # a sync endpoint: FastAPI runs it in a thread
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            self.bodies.append(body)
            self.tokens.append(request.headers.get("authorization"))
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.pause)
            if fault == "junk":
                return Response("<html>", media_type="text/html")
            if fault:
                status, after = fault if isinstance(fault, tuple) else (fault, "0.01")
                return Response('{"error": "told to"}', status_code=status, headers={"Retry-After": after})
            with self.lock:
                return self._answer(body)
        finally:
            with self.lock:
                self.busy -= 1

    @torch.inference_mode()
    def _answer(self, body: dict) -> Response:
        import json

        text = "\n".join(m["content"] for m in body["messages"]) + "\n("
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][:, -400:]
        logprobs = self.model(ids).logits[0, -1].log_softmax(-1)
        letters = {x: self.tokenizer(x, add_special_tokens=False)["input_ids"][-1] for x in "AB"}
        top = [{"token": x, "logprob": float(logprobs[i])} for x, i in letters.items()]
        best = max(top, key=lambda t: t["logprob"])["token"]
        said = self.answers.pop(0) if self.answers else f"({best})"
        at = next(t for t in top if t["token"] == best)
        content = [{"token": "(", "logprob": 0.0, "top_logprobs": []}, {**at, "top_logprobs": top}]
        ended = "length" if said.endswith("...") else "stop"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": ended}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": 3, "total_tokens": ids.shape[1] + 3}
        return Response(json.dumps({"choices": [choice], "usage": usage}), media_type="application/json")

    def stop(self) -> None:
        self.server.should_exit = True
